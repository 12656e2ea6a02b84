/* The words of a text as data_pipeline/dedup/words.py says, by its table and pool, and their hashes. */
#ifndef JOY_FOLDING_H
#define JOY_FOLDING_H

#include <stdint.h>

#include "utf8.h"

enum { SEPARATOR = 0, IN_WORD = 1, ALONE = 2, IGNORED = 3, SEQUENCE = 4 };
/* What a text folds to at most: U+3316 is six words in three bytes; no code point has more than 18 parts (U+FDFA). */
enum { WORDS_A_BYTE = 2, MOST_PARTS = 18 };

#define FNV_OFFSET 0xCBF29CE484222325ull
#define FNV_PRIME 0x100000001B3ull
#define ROLL 0x9E3779B97F4A7C15ull /* odd, its bits look random: 2^64 divided by the golden ratio */

/* The finaliser of MurmurHash3: each bit of the result depends on each bit of x. */
static inline uint64_t mix(uint64_t x) {
    x ^= x >> 33;
    x *= 0xFF51AFD7ED558CCDull;
    x ^= x >> 33;
    x *= 0xC4CEB9FE1A85EC53ull;
    x ^= x >> 33;
    return x;
}

/* Hashes of words on their way out. */
typedef struct {
    uint64_t word; /* the hash of the present word, if it is open */
    int open;
    uint64_t *out;
    int64_t count;
} Words;

static inline void words_start(Words *w, uint64_t *out) {
    w->word = FNV_OFFSET;
    w->open = 0;
    w->out = out;
    w->count = 0;
}

static inline void words_end(Words *w) {
    if (!w->open) return;
    w->out[w->count++] = mix(w->word);
    w->word = FNV_OFFSET;
    w->open = 0;
}

static inline void add_symbol(Words *w, uint32_t entry) {
    uint32_t kind = entry >> 28, point = entry & 0xFFFFFFFu;
    if (kind == IGNORED) return;
    if (kind != IN_WORD) words_end(w);
    if (kind == SEPARATOR) return;
    w->word = (w->word ^ point) * FNV_PRIME;
    w->open = 1;
    if (kind == ALONE) words_end(w);
}

static inline void add_point(Words *w, uint32_t point, const uint32_t *table, uint32_t points, const uint32_t *pool) {
    if (point >= points) {
        /* Planes above the table: 3 holds rare ideographs, 14 tags and variation selectors, the rest no text. */
        uint32_t above = point < 0x40000 ? ALONE : point - 0xE0000u < 0x1000u ? IGNORED : SEPARATOR;
        add_symbol(w, above << 28 | point);
        return;
    }
    uint32_t entry = table[point];
    if (entry >> 28 != SEQUENCE) {
        add_symbol(w, entry);
        return;
    }
    const uint32_t *part = pool + (entry & 0xFFFFFFFu);
    for (uint32_t left = *part++; left; left--) add_symbol(w, *part++);
}

/* Words of text until its end or until at least `room` are out, which may be MOST_PARTS more; returns where it stopped.
 * Behind the text's end words_end puts out the last one. */
static inline const uint8_t *words_some(Words *w, const uint8_t *at, const uint8_t *end, int64_t room,
                                        const uint32_t *table, uint32_t points, const uint32_t *pool) {
    while (at < end && w->count < room) {
        if (*at >= 0x80) {
            add_point(w, decode(&at), table, points, pool);
            continue;
        }
        uint32_t entry = table[*at];
        if (entry >> 28 != IN_WORD) {
            at++;
            add_symbol(w, entry);
            continue;
        }
        uint64_t word = w->word; /* the common case in a loop of its own: letters and digits of ASCII */
        do {
            word = (word ^ (entry & 0xFFFFFFFu)) * FNV_PRIME;
            at++;
        } while (at < end && *at < 0x80 && (entry = table[*at]) >> 28 == IN_WORD);
        w->word = word;
        w->open = 1;
    }
    return at;
}

#endif
