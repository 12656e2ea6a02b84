/* Kernels of the data pipeline: MinHash signatures, shingle sets and their overlap, radix sort, union-find.
 *
 * Plain C11 on plain arrays, no allocation that outlives a call, no global state. The slow reference that each of them
 * equals is in tests/data_pipeline/dedup/.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "utf8.h"
#include "widest.h"

enum { SEPARATOR = 0, WORD = 1, ALONE = 2, IGNORED = 3, SEQUENCE = 4 };
enum { MAX_GRAM = 64 };

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

/* Words on their way to shingles. A shingle's hash is mix(sum of word[i] * ROLL^(gram - 1 - i)). */
typedef struct {
    uint64_t ring[MAX_GRAM];
    uint64_t sum, top; /* top = ROLL^gram, what a word's factor is when it leaves */
    uint64_t word;     /* the hash of the present word */
    int64_t words;
    int gram, slot, open;
    uint64_t *out;
    int64_t count;
} Shingler;

static void shingler_start(Shingler *s, int gram, uint64_t *out) {
    memset(s, 0, sizeof *s);
    s->gram = gram;
    s->out = out;
    s->top = 1;
    for (int i = 0; i < gram; i++) s->top *= ROLL;
    s->word = FNV_OFFSET;
}

static inline void end_word(Shingler *s) {
    if (!s->open) return;
    uint64_t word = mix(s->word);
    s->sum = s->sum * ROLL + word - s->ring[s->slot] * s->top;
    s->ring[s->slot] = word;
    if (++s->slot == s->gram) s->slot = 0;
    s->words++;
    s->word = FNV_OFFSET;
    s->open = 0;
    if (s->words >= s->gram) s->out[s->count++] = mix(s->sum);
}

static inline void add_symbol(Shingler *s, uint32_t entry) {
    uint32_t kind = entry >> 28, point = entry & 0xFFFFFFFu;
    if (kind == IGNORED) return;
    if (kind != WORD) end_word(s);
    if (kind == SEPARATOR) return;
    s->word = (s->word ^ point) * FNV_PRIME;
    s->open = 1;
    if (kind == ALONE) end_word(s);
}

static inline void add_point(Shingler *s, uint32_t point, const uint32_t *table, uint32_t points, const uint32_t *pool) {
    if (point >= points) {
        /* Planes above the table: 3 holds rare ideographs, 14 tags and variation selectors, the rest no text. */
        uint32_t above = point < 0x40000 ? ALONE : point - 0xE0000u < 0x1000u ? IGNORED : SEPARATOR;
        add_symbol(s, above << 28 | point);
        return;
    }
    uint32_t entry = table[point];
    if (entry >> 28 != SEQUENCE) {
        add_symbol(s, entry);
        return;
    }
    const uint32_t *part = pool + (entry & 0xFFFFFFFu);
    for (uint32_t left = *part++; left; left--) add_symbol(s, *part++);
}

/* Words of text until its end or until at least `room` shingles are out; returns where it stopped. */
static const uint8_t *shingle_some(Shingler *s, const uint8_t *at, const uint8_t *end, int64_t room,
                                   const uint32_t *table, uint32_t points, const uint32_t *pool) {
    while (at < end && s->count < room) {
        if (*at >= 0x80) {
            add_point(s, decode(&at), table, points, pool);
            continue;
        }
        uint32_t entry = table[*at];
        if (entry >> 28 != WORD) {
            at++;
            add_symbol(s, entry);
            continue;
        }
        uint64_t word = s->word; /* the common case in a loop of its own: letters and digits of ASCII */
        do {
            word = (word ^ (entry & 0xFFFFFFFu)) * FNV_PRIME;
            at++;
        } while (at < end && *at < 0x80 && (entry = table[*at]) >> 28 == WORD);
        s->word = word;
        s->open = 1;
    }
    return at;
}

/* A text of fewer words than a shingle has is one shingle of all its words; one without words has none. */
static void shingler_end(Shingler *s) {
    end_word(s);
    if (s->words && s->words < s->gram) s->out[s->count++] = mix(s->sum);
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
 * sets holds as many as text has bytes and one more for each text, scratch as many as the longest text needs.
 */
void joy_sign(const uint8_t *text, const int64_t *starts, int64_t texts, const uint32_t *table, uint32_t points,
              const uint32_t *pool, const uint32_t *a, const uint32_t *b, int permutations, int gram,
              uint32_t *signatures, uint64_t *sets, int64_t *ends, uint64_t *scratch) {
    int64_t end = 0;
    for (int64_t i = 0; i < texts; i++) {
        uint64_t *set = sets + end;
        Shingler s;
        shingler_start(&s, gram, set);
        shingle_some(&s, text + starts[i], text + starts[i + 1], INT64_MAX, table, points, pool);
        shingler_end(&s);
        sort_hashes(set, scratch, s.count, 56);
        int64_t count = distinct(set, s.count);
        uint32_t *minima = signatures + i * permutations;
        memset(minima, 0xFF, sizeof *minima * (size_t)permutations);
        lower(minima, set, count, a, b, permutations);
        ends[i] = end += count;
    }
}

/* All shingles of one text, in order, repeated ones too; out holds at least bytes + 1. Returns how many. */
int64_t joy_shingles(const uint8_t *text, int64_t bytes, const uint32_t *table, uint32_t points, const uint32_t *pool,
                     int gram, uint64_t *out) {
    Shingler s;
    shingler_start(&s, gram, out);
    shingle_some(&s, text, text + bytes, INT64_MAX, table, points, pool);
    shingler_end(&s);
    return s.count;
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
