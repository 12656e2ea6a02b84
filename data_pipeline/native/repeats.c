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
    uint64_t *hashes; /* of the places looked up so far */
    uint32_t *slots;  /* place + 1 of the first n-gram of a kind; 0: free */
    uint64_t key;     /* odd; moves slots only, so that no text can be made whose n-grams all fall into one */
    int bits;
} Grams;

static void grams_end(Grams *grams) {
    free(grams->hashes);
    free(grams->slots);
}

static inline int64_t gram_count(int64_t words, int n) {
    return words < n ? 0 : words - n + 1;
}

/* For places 0 .. count - 1, of which `kept` are looked up. Returns 0 without memory, or for places that don't fit into
 * 32 bits. */
static int grams_start(Grams *grams, int64_t count, int64_t kept, uint64_t key) {
    if (count >= UINT32_MAX) return 0;
    *grams = (Grams){.key = key, .bits = 4};
    while ((int64_t)1 << grams->bits < 2 * kept) grams->bits++;
    grams->hashes = malloc(sizeof *grams->hashes * (size_t)(count + 1));
    grams->slots = calloc((size_t)1 << grams->bits, sizeof *grams->slots);
    if (grams->hashes && grams->slots) return 1;
    grams_end(grams);
    return 0;
}

/* Where the n-gram at `place` was met first; `place` itself, which is noted, if nowhere. */
static inline int64_t first_place(Grams *grams, const uint32_t *numbers, int64_t place, int n) {
    uint64_t hash = 0;
    for (int step = 0; step < n; step++) hash = (hash ^ hash >> 29) * FACTOR + (numbers[place + step] + 1ull) * FACTOR;
    grams->hashes[place] = hash;
    size_t mask = ((size_t)1 << grams->bits) - 1, slot = hash * grams->key >> (64 - grams->bits);
    for (; grams->slots[slot]; slot = (slot + 1) & mask)
        if (grams->hashes[grams->slots[slot] - 1] == hash) return grams->slots[slot] - 1;
    grams->slots[slot] = (uint32_t)place + 1;
    return place;
}

/* What pairs of words tell of longer n-grams: an n-gram occurs no more often than the rarest pair inside it. For n of 2
 * to 4, most [3] gets the greatest product of those occurrences and the n-gram's characters, blanks between words too;
 * recurring [words] gets how many pairs in a row from a place on occur elsewhere too. Returns 0, or -1 without memory. */
int64_t joy_count_pairs(const uint32_t *numbers, const uint32_t *ends, int64_t words, uint64_t key, uint32_t *recurring,
                        int64_t *most) {
    Grams grams;
    int64_t count = gram_count(words, 2);
    most[0] = most[1] = most[2] = 0;
    if (!grams_start(&grams, count, count, key)) return -1;
    uint32_t *times = calloc((size_t)(count + 1), sizeof *times);
    for (int64_t place = 0; times && place < count; place++) {
        recurring[place] = (uint32_t)first_place(&grams, numbers, place, 2); /* for now */
        times[recurring[place]]++;
    }
    uint32_t run = 0, least[3] = {0}; /* occurrences of the rarest of one, two, three pairs from the place on */
    for (int64_t place = count - 1; times && place >= 0; place--) {
        uint32_t own = times[recurring[place]];
        least[2] = least[1] < own ? least[1] : own;
        least[1] = least[0] < own ? least[0] : own;
        least[0] = own;
        for (int n = 2; n <= 4 && place + n <= words; n++) {
            int64_t product = (int64_t)least[n - 2] * (ends[place + n] - ends[place] + (uint32_t)n - 1);
            most[n - 2] = product > most[n - 2] ? product : most[n - 2];
        }
        recurring[place] = run = own > 1 ? run + 1 : 0;
    }
    if (words) recurring[words - 1] = 0;
    grams_end(&grams);
    free(times);
    return times ? 0 : -1;
}

/* How many n-grams have pairs inside that all occur elsewhere too: no others can. */
WIDEST
static int64_t count_recurring(const uint32_t *recurring, int64_t count, uint32_t pairs) {
    int64_t kept = 0;
    for (int64_t place = 0; place < count; place++) kept += recurring[place] >= pairs;
    return kept;
}

/* How often the most frequent n-gram occurs and the place of the first one (of several such, the first of all), in
 * found [2]. Returns 0, or -1 without memory. */
int64_t joy_top_gram(const uint32_t *numbers, int64_t words, int n, uint64_t key, int64_t *found) {
    Grams grams;
    int64_t count = gram_count(words, n);
    found[0] = found[1] = 0;
    if (!grams_start(&grams, count, count, key)) return -1;
    uint32_t *times = calloc((size_t)(count + 1), sizeof *times);
    for (int64_t place = 0; times && place < count; place++) times[first_place(&grams, numbers, place, n)]++;
    for (int64_t place = 0; times && place < count; place++) {
        if (times[place] <= found[0]) continue;
        found[0] = times[place];
        found[1] = place;
    }
    grams_end(&grams);
    free(times);
    return times ? 0 : -1;
}

/* Characters of the words inside n-grams that occurred before; -1 without memory. recurring: of joy_count_pairs. */
int64_t joy_covered_characters(const uint32_t *numbers, const uint32_t *ends, const uint32_t *recurring, int64_t words,
                               int n, uint64_t key) {
    Grams grams;
    uint32_t pairs = (uint32_t)n - 1;
    int64_t total = 0, until = 0, count = gram_count(words, n);
    if (!grams_start(&grams, count, count_recurring(recurring, count, pairs), key)) return -1;
    for (int64_t place = 0; place < count; place++) {
        if (recurring[place] < pairs || first_place(&grams, numbers, place, n) == place) continue;
        total += ends[place + n] - ends[until > place ? until : place];
        until = place + n;
    }
    grams_end(&grams);
    return total;
}

/* Characters of n-grams that occurred before; from a repeat the count goes on behind it. -1 without memory. recurring: of
 * joy_count_pairs. */
int64_t joy_repeated_characters(const uint32_t *numbers, const uint32_t *ends, const uint32_t *recurring, int64_t words,
                                int n, uint64_t key) {
    Grams grams;
    uint32_t pairs = (uint32_t)n - 1;
    int64_t total = 0, place = 0, count = gram_count(words, n);
    if (!grams_start(&grams, count, count_recurring(recurring, count, pairs), key)) return -1;
    while (place < count) {
        if (recurring[place] < pairs || first_place(&grams, numbers, place, n) == place) {
            place++;
        } else {
            total += ends[place + n] - ends[place];
            place += n;
        }
    }
    grams_end(&grams);
    return total;
}
