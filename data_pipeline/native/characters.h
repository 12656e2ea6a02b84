/* What a character is to the rules: bits in a table of all code points that Python makes (clean/characters.py). */
#ifndef JOY_CHARACTERS_H
#define JOY_CHARACTERS_H

#include <stdint.h>

#include "utf8.h"

enum { WORD = 1, LETTER = 2, SPACE = 4, JOINER = 8, BREAK = 16, BULLET = 32, HAN = 64 };
enum { POINTS = 0x110000 };

/* The class of the character at `at` of valid UTF-8; next gets where it ends. */
static inline uint32_t class_at(const uint8_t *at, const uint8_t **next, const uint8_t *classes) {
    if (*at < 0x80) {
        *next = at + 1;
        return classes[*at];
    }
    uint32_t point = decode(&at);
    *next = at;
    return point < POINTS ? classes[point] : 0;
}

#endif
