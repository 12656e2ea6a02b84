/* Code points of UTF-8. */
#ifndef JOY_UTF8_H
#define JOY_UTF8_H

#include <stdint.h>

/* One code point of valid UTF-8 that is not ASCII. */
static inline uint32_t decode(const uint8_t **at) {
    const uint8_t *p = *at;
    if (p[0] < 0xE0) {
        *at = p + 2;
        return (uint32_t)(p[0] & 0x1F) << 6 | (p[1] & 0x3F);
    }
    if (p[0] < 0xF0) {
        *at = p + 3;
        return (uint32_t)(p[0] & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    }
    *at = p + 4;
    return (uint32_t)(p[0] & 0x07) << 18 | (uint32_t)(p[1] & 0x3F) << 12 | (uint32_t)(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
}

#endif
