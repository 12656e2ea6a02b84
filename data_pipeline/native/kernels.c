/* Kernels of the data pipeline: MinHash signatures, shingle sets and their overlap, radix sort, union-find.
 *
 * Plain C11 on plain arrays, no allocation that outlives a call, no global state. The slow reference that each of them
 * equals is in tests/data_pipeline/dedup/.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "folding.h"
#include "widest.h"

enum { MAX_GRAM = 64 };

/* Words become shingles of `gram` words, in their place; returns how many. A shingle's hash is mix(sum of word[i] *
 * ROLL^(gram - 1 - i)). A text of fewer words than a shingle has is one shingle of all its words. */
static int64_t roll(uint64_t *words, int64_t count, int gram) {
    uint64_t ring[MAX_GRAM] = {0}, sum = 0, top = 1; /* top = ROLL^gram, what a word's factor is when it leaves */
    int64_t out = 0;
    for (int i = 0; i < gram; i++) top *= ROLL;
    for (int64_t i = 0, slot = 0; i < count; i++) {
        uint64_t word = words[i];
        sum = sum * ROLL + word - ring[slot] * top;
        ring[slot] = word;
        if (++slot == gram) slot = 0;
        if (i + 1 >= gram) words[out++] = mix(sum);
    }
    if (count && count < gram) words[out++] = mix(sum);
    return out;
}

/* The shingles of a text, in order; returns how many. */
static int64_t shingles(const uint8_t *text, const uint8_t *end, const uint32_t *table, uint32_t points,
                        const uint32_t *pool, int gram, uint64_t *out) {
    Words words;
    words_start(&words, out);
    words_some(&words, text, end, INT64_MAX, table, points, pool);
    words_end(&words);
    return roll(out, words.count, gram);
}

/* Signature [permutations] of shingles [count]: the least a[k] * high half + b[k], modulo 2^32, for each k. */
WIDEST
static void lower(uint32_t *restrict minima, const uint64_t *restrict shingles, int64_t count,
                  const uint32_t *restrict a, const uint32_t *restrict b, int permutations) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t x = (uint32_t)(shingles[i] >> 32);
        for (int k = 0; k < permutations; k++) {
            uint32_t value = a[k] * x + b[k];
            minima[k] = value < minima[k] ? value : minima[k];
        }
    }
}

/* Sort values by the byte at `shift` and those below it. Hashes spread evenly, so a pass or two leaves little to do; equal
 * values take a pass for each byte and no more. */
static void sort_hashes(uint64_t *values, uint64_t *scratch, int64_t count, int shift) {
    enum { FEW = 32 };
    if (count <= FEW) {
        for (int64_t i = 1; i < count; i++) {
            uint64_t value = values[i];
            int64_t place = i;
            for (; place && values[place - 1] > value; place--) values[place] = values[place - 1];
            values[place] = value;
        }
        return;
    }
    int64_t places[257] = {0}; /* where each digit begins, then where it ends */
    for (int64_t i = 0; i < count; i++) places[((values[i] >> shift) & 0xFF) + 1]++;
    for (int digit = 0; digit < 256; digit++) places[digit + 1] += places[digit];
    for (int64_t i = 0; i < count; i++) scratch[places[(values[i] >> shift) & 0xFF]++] = values[i];
    memcpy(values, scratch, sizeof *values * (size_t)count);
    int64_t begin = 0;
    for (int digit = 0; shift && digit < 256; begin = places[digit++]) {
        sort_hashes(values + begin, scratch, places[digit] - begin, shift - 8);
    }
}

/* Keep one of equal neighbours; returns how many are left. */
static int64_t distinct(uint64_t *values, int64_t count) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!kept || values[kept - 1] != values[i]) values[kept++] = values[i];
    }
    return kept;
}

/* Signatures [texts, permutations] of texts that lie one after another in `text`, text i at starts[i] .. starts[i + 1],
 * and the sets that they are of: the hashes of each text's shingles, ascending, the set of text i before ends[i].
 * sets holds WORDS_A_BYTE for each byte of text and one more for each text, scratch as many as the longest text needs.
 */
void joy_sign(const uint8_t *text, const int64_t *starts, int64_t texts, const uint32_t *table, uint32_t points,
              const uint32_t *pool, const uint32_t *a, const uint32_t *b, int permutations, int gram,
              uint32_t *signatures, uint64_t *sets, int64_t *ends, uint64_t *scratch) {
    int64_t end = 0;
    for (int64_t i = 0; i < texts; i++) {
        uint64_t *set = sets + end;
        int64_t count = shingles(text + starts[i], text + starts[i + 1], table, points, pool, gram, set);
        sort_hashes(set, scratch, count, 56);
        count = distinct(set, count);
        uint32_t *minima = signatures + i * permutations;
        memset(minima, 0xFF, sizeof *minima * (size_t)permutations);
        lower(minima, set, count, a, b, permutations);
        ends[i] = end += count;
    }
}

/* All shingles of one text, in order, repeated ones too; out holds WORDS_A_BYTE * bytes + 1. Returns how many. */
int64_t joy_shingles(const uint8_t *text, int64_t bytes, const uint32_t *table, uint32_t points, const uint32_t *pool,
                     int gram, uint64_t *out) {
    return shingles(text, text + bytes, table, points, pool, gram, out);
}

/* How many values two ascending arrays without repetitions share, for each pair of rows of one store. */
void joy_shared(const uint64_t *store, const int64_t *starts, const int64_t *left, const int64_t *right, int64_t pairs,
                int64_t *shared) {
    for (int64_t p = 0; p < pairs; p++) {
        const uint64_t *a = store + starts[left[p]], *a_end = store + starts[left[p] + 1];
        const uint64_t *b = store + starts[right[p]], *b_end = store + starts[right[p] + 1];
        int64_t count = 0;
        while (a < a_end && b < b_end) {
            uint64_t x = *a, y = *b;
            count += x == y;
            a += x <= y;
            b += y <= x;
        }
        shared[p] = count;
    }
}

/* Sort rows (key, value) by key, equal keys as they were; scratch is as long as rows. */
void joy_sort_rows(uint64_t *rows, uint64_t *scratch, int64_t count) {
    uint64_t *from = rows, *to = scratch;
    for (int shift = 0; shift < 64; shift += 8) {
        int64_t places[257] = {0};
        for (int64_t i = 0; i < count; i++) places[((from[2 * i] >> shift) & 0xFF) + 1]++;
        int single = 0;
        for (int digit = 0; digit < 256; digit++) {
            single |= places[digit + 1] == count;
            places[digit + 1] += places[digit];
        }
        if (single) continue; /* all rows have the same digit here */
        for (int64_t i = 0; i < count; i++) {
            int64_t place = places[(from[2 * i] >> shift) & 0xFF]++;
            to[2 * place] = from[2 * i];
            to[2 * place + 1] = from[2 * i + 1];
        }
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != rows) memcpy(rows, from, sizeof(uint64_t) * 2 * (size_t)count);
}

static inline int64_t root(int64_t *parent, int64_t node) {
    while (parent[node] != node) {
        parent[node] = parent[parent[node]];
        node = parent[node];
    }
    return node;
}

/* Join pairs of nodes in parent [nodes], in which each node began as its own parent; the smaller root stays root. */
void joy_union(int64_t *parent, const int64_t *left, const int64_t *right, int64_t pairs) {
    for (int64_t p = 0; p < pairs; p++) {
        int64_t a = root(parent, left[p]), b = root(parent, right[p]);
        if (a < b) parent[b] = a;
        else parent[a] = b;
    }
}

/* Let every node point at its root. */
void joy_flatten(int64_t *parent, int64_t nodes) {
    for (int64_t node = 0; node < nodes; node++) parent[node] = root(parent, node);
}

/* Count ids in counts [vocabulary]; returns how many ids are outside and were not counted. */
int64_t joy_count(const uint32_t *ids, int64_t total, int64_t *counts, int64_t vocabulary) {
    int64_t outside = 0;
    for (int64_t i = 0; i < total; i++) {
        if (ids[i] < vocabulary) counts[ids[i]]++;
        else outside++;
    }
    return outside;
}
