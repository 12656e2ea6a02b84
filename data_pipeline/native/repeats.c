/* What a text repeats: lines, paragraphs, and n-grams of numbered words. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "characters.h"
#include "numbering.h"
#include "widest.h"

#define FACTOR 0x9E3779B97F4A7C15ull /* odd, its bits look random: 2^64 divided by the golden ratio */

static int64_t characters_of(const uint8_t *at, const uint8_t *end) {
    int64_t count = 0;
    for (; at < end; at++) count += (*at & 0xC0) != 0x80;
    return count;
}

/* The end of the part that begins at `at`: where at least `breaks` line feeds follow, or the text ends; next gets where
 * the line feeds end. */
static const uint8_t *part_end(const uint8_t *at, const uint8_t *end, int64_t breaks, const uint8_t **next) {
    while (at < end) {
        const uint8_t *stop = memchr(at, '\n', (size_t)(end - at));
        if (!stop) break;
        for (at = stop; at < end && *at == '\n';) at++;
        if (at - stop >= breaks) {
            *next = at;
            return stop;
        }
    }
    return *next = end;
}

/* Of the parts of a UTF-8 text between at least `breaks` line feeds, empty ones left out: how many there are, how many
 * repeat an earlier one, and the characters of those, in counts [3]. Returns 0, or -1 without memory. */
static int count_parts(const uint8_t *text, const uint8_t *end, int64_t breaks, uint64_t key, int64_t *counts) {
    const uint8_t *next;
    Numbering numbering;
    uint32_t number = 0;
    if (!numbering_start(&numbering, text, end, key)) return -1;
    for (const uint8_t *at = text; at < end && number != NO_MEMORY; at = next) {
        const uint8_t *stop = part_end(at, end, breaks, &next);
        if (stop == at) continue;
        uint32_t before = numbering.count;
        number = number_of(&numbering, at, stop);
        counts[0]++;
        if (number >= before) continue;
        counts[1]++;
        counts[2] += characters_of(at, stop);
    }
    numbering_end(&numbering);
    return number == NO_MEMORY ? -1 : 0;
}

/* Of paragraphs (of the text without white space around it), then of lines: how many there are, how many repeat an
 * earlier one, and the characters of those, in counts [6]. Returns 0, or -1 without memory. */
int64_t joy_repeated_parts(const uint8_t *text, int64_t bytes, const uint8_t *classes, uint64_t key, int64_t *counts) {
    const uint8_t *start = text, *end = text + bytes, *stop = end, *next = text;
    memset(counts, 0, sizeof *counts * 6);
    while (start < end && class_at(start, &next, classes) & SPACE) start = next;
    for (const uint8_t *at = end; at > start; stop = at) {
        while (--at > start && (*at & 0xC0) == 0x80) continue; /* to where a character begins */
        if (!(class_at(at, &next, classes) & SPACE)) break;
    }
    return count_parts(start, stop, 2, key, counts) || count_parts(text, end, 1, key, counts + 3) ? -1 : 0;
}

/* The n-grams of words by the places where they begin. A hash of 64 bits stands for an n-gram. */
typedef struct {
    uint64_t *hashes; /* [count] */
    uint32_t *slots;  /* place + 1 of the first n-gram of a kind; 0: free */
    uint64_t key;     /* odd; moves slots only, so that no text can be made whose n-grams all fall into one */
    int64_t count;
    int bits;
} Grams;

static void grams_end(Grams *grams) {
    free(grams->hashes);
    free(grams->slots);
}

/* Returns 0 without memory, or for words whose places don't fit into 32 bits. */
static int grams_start(Grams *grams, const uint32_t *numbers, int64_t words, int n, uint64_t key) {
    if (words >= UINT32_MAX) return 0;
    *grams = (Grams){.key = key, .count = words < n ? 0 : words - n + 1, .bits = 4};
    while ((int64_t)1 << grams->bits < 2 * grams->count) grams->bits++;
    grams->hashes = malloc(sizeof *grams->hashes * (size_t)(grams->count + 1));
    grams->slots = calloc((size_t)1 << grams->bits, sizeof *grams->slots);
    if (!grams->hashes || !grams->slots) {
        grams_end(grams);
        return 0;
    }
    for (int64_t place = 0; place < grams->count; place++) {
        uint64_t hash = 0;
        for (int step = 0; step < n; step++)
            hash = (hash ^ hash >> 29) * FACTOR + (numbers[place + step] + 1ull) * FACTOR;
        grams->hashes[place] = hash;
    }
    return 1;
}

/* Where an n-gram like the one at `place` was met first; `place` itself, which is noted, if nowhere. */
static inline int64_t first_place(Grams *grams, int64_t place) {
    uint64_t hash = grams->hashes[place];
    size_t mask = ((size_t)1 << grams->bits) - 1, slot = hash * grams->key >> (64 - grams->bits);
    for (; grams->slots[slot]; slot = (slot + 1) & mask)
        if (grams->hashes[grams->slots[slot] - 1] == hash) return grams->slots[slot] - 1;
    grams->slots[slot] = (uint32_t)place + 1;
    return place;
}

/* How often the most frequent n-gram occurs and the place of the first one (of several such, the first of all), in
 * found [2]. Returns 0, or -1 without memory. */
int64_t joy_top_gram(const uint32_t *numbers, int64_t words, int n, uint64_t key, int64_t *found) {
    Grams grams;
    found[0] = found[1] = 0;
    if (!grams_start(&grams, numbers, words, n, key)) return -1;
    uint32_t *times = calloc((size_t)(grams.count + 1), sizeof *times);
    for (int64_t place = 0; times && place < grams.count; place++) times[first_place(&grams, place)]++;
    for (int64_t place = 0; times && place < grams.count; place++) {
        if (times[place] <= found[0]) continue;
        found[0] = times[place];
        found[1] = place;
    }
    grams_end(&grams);
    free(times);
    return times ? 0 : -1;
}

/* Characters of the longest n-gram, without blanks. */
WIDEST
int64_t joy_longest_gram(const uint32_t *ends, int64_t words, int n) {
    uint32_t longest = 0;
    for (int64_t place = 0; place + n <= words; place++) {
        uint32_t size = ends[place + n] - ends[place];
        longest = size > longest ? size : longest;
    }
    return longest;
}

/* Characters of the words inside n-grams that occurred before; -1 without memory. */
int64_t joy_covered_characters(const uint32_t *numbers, const uint32_t *ends, int64_t words, int n, uint64_t key) {
    Grams grams;
    int64_t total = 0, until = 0;
    if (!grams_start(&grams, numbers, words, n, key)) return -1;
    for (int64_t place = 0; place < grams.count; place++) {
        if (first_place(&grams, place) == place) continue;
        total += ends[place + n] - ends[until > place ? until : place];
        until = place + n;
    }
    grams_end(&grams);
    return total;
}

/* Characters of n-grams that occurred before; from a repeat the count goes on behind it. -1 without memory. */
int64_t joy_repeated_characters(const uint32_t *numbers, const uint32_t *ends, int64_t words, int n, uint64_t key) {
    Grams grams;
    int64_t total = 0, place = 0;
    if (!grams_start(&grams, numbers, words, n, key)) return -1;
    while (place < grams.count) {
        if (first_place(&grams, place) == place) {
            place++;
        } else {
            total += ends[place + n] - ends[place];
            place += n;
        }
    }
    grams_end(&grams);
    return total;
}
