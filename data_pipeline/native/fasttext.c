/* The language of a text by fastText's lid.176 (Joulin et al. 2016): the mean of the vectors of its words and of their
 * 2- to 4-grams, then the likeliest leaf of a tree of 176 labels.
 *
 * Sums run in fastText's order and its widths of numbers, so that the score is the same to the last bit where the C
 * library is. Written from the format and the definition; data_pipeline/clean/language_model.py makes the arrays.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "widest.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* GCC has it off by -std=c11 and does not know the line */
#endif

enum { DIMENSIONS = 16, LONGEST_GRAM = 4, MAX_LABELS = 256 };
enum { ROOM = 512, OPEN = 6 }; /* places that wait; the last ones, of n-grams that a next character may end */

#define FNV_OFFSET 2166136261u
#define FNV_PRIME 16777619u

typedef struct {
    const uint8_t *spelling; /* of all words, one after another */
    const uint32_t *starts;  /* [words + 1] of each in spelling; word 0 ends a line */
    const uint32_t *slots;   /* [mask + 1], open addressing by hash: 1 + word, 0 for none */
    uint32_t mask;
    uint32_t buckets, inverse; /* inverse: 2^32 / buckets, rounded down */
    const uint32_t *kept; /* which places have a vector: 16 a number in its lower half, how many before them above */
    const float *vectors; /* [kept places, DIMENSIONS]; an n-gram's place is its bucket, word w's is buckets + w */
    float sum[DIMENSIONS];
    int64_t found;
    uint32_t pending, places[ROOM + 3]; /* looked up and added together, in their order */
} Reader;

static inline uint32_t step(uint32_t hash, uint8_t byte) {
    return (hash ^ (uint32_t)(int32_t)(int8_t)byte) * FNV_PRIME; /* the models were trained with signed characters */
}

/* Rows of vectors for places [count], and in has whether there is one. */
WIDEST
static void look_up(const uint32_t *restrict kept, const uint32_t *restrict places, uint32_t count,
                    uint32_t *restrict rows, uint32_t *restrict has) {
    for (uint32_t i = 0; i < count; i++) {
        uint32_t entry = kept[places[i] >> 4], bit = places[i] & 15;
        uint32_t before = entry & ((1u << bit) - 1); /* at most 15 bits to count */
        before -= before >> 1 & 0x5555u;
        before = (before & 0x3333u) + (before >> 2 & 0x3333u);
        before = (before + (before >> 4)) & 0x0F0Fu;
        rows[i] = (entry >> 16) + ((before + (before >> 8)) & 0x1Fu);
        has[i] = entry >> bit & 1;
    }
}

WIDEST
static void add_rows(float *restrict sum, const float *restrict vectors, const uint32_t *restrict rows,
                     uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        for (int d = 0; d < DIMENSIONS; d++) sum[d] += vectors[(size_t)rows[i] * DIMENSIONS + d];
}

/* The first `count` of the pending places. */
static void add_places(Reader *r, uint32_t count) {
    uint32_t rows[ROOM], has[ROOM], found = 0;
    look_up(r->kept, r->places, count, rows, has);
    for (uint32_t i = 0; i < count; i++) { /* without a branch, which would be guessed wrong half the time */
        rows[found] = rows[i];
        found += has[i];
    }
    add_rows(r->sum, r->vectors, rows, found);
    r->found += found;
}

/* Where the next place goes; the last OPEN before it may still change. */
static inline uint32_t *next_place(Reader *r) {
    if (r->pending >= ROOM) {
        add_places(r, r->pending - OPEN);
        memcpy(r->places, r->places + r->pending - OPEN, OPEN * sizeof *r->places);
        r->pending = OPEN;
    }
    return r->places + r->pending;
}

static inline uint32_t bucket_of(const Reader *r, uint32_t hash) {
    uint32_t quotient = (uint32_t)((uint64_t)hash * r->inverse >> 32); /* right or one too small; dividing is slow */
    uint32_t bucket = hash - quotient * r->buckets;
    return bucket >= r->buckets ? bucket - r->buckets : bucket;
}

/* The 2- to 4-grams of `<word>`. They are added in the order of where they begin and found in the order of where they
 * end: each beginning has three places in a row, but for the last two, which have two and one. */
static void add_grams(Reader *r, const uint8_t *p, const uint8_t *end) {
    uint32_t one = step(FNV_OFFSET, '<'), two = 0, three = 0, four; /* hashes of the last characters */
    for (int characters = 2;; characters += characters < LONGEST_GRAM) {
        const uint8_t *byte = p < end ? p : (const uint8_t *)">";
        int last = p == end;
        four = three;
        three = two;
        two = one;
        one = FNV_OFFSET;
        do {
            four = step(four, *byte);
            three = step(three, *byte);
            two = step(two, *byte);
            one = step(one, *byte++);
        } while (!last && byte < end && (*byte & 0xC0) == 0x80);
        uint32_t *out = next_place(r);
        out[0] = bucket_of(r, two);
        if (characters > 2) out[-2] = bucket_of(r, three);
        if (characters > 3) out[-4] = bucket_of(r, four);
        if (last) {
            out[-1] = out[0];
            return;
        }
        r->pending += 3;
        p = byte;
    }
}

static int find_word(const Reader *r, const uint8_t *word, size_t length, uint32_t hash, uint32_t *found) {
    for (uint32_t at = hash & r->mask; r->slots[at]; at = (at + 1) & r->mask) {
        uint32_t one = r->slots[at] - 1, start = r->starts[one];
        if (r->starts[one + 1] - start == length && !memcmp(r->spelling + start, word, length)) {
            *found = one;
            return 1;
        }
    }
    return 0;
}

static void add_word(Reader *r, const uint8_t *word, const uint8_t *end, uint32_t hash) {
    static const char label[] = "__label__"; /* what begins so is no word in fastText's files */
    uint32_t found;
    size_t length = (size_t)(end - word);
    if (length >= sizeof label - 1 && !memcmp(word, label, sizeof label - 1)) return;
    if (find_word(r, word, length, hash, &found)) {
        *next_place(r) = r->buckets + found;
        r->pending++;
    }
    add_grams(r, word, end);
}

/* How many bytes at p are a blank: Unicode's, as Python's str.split has them, and NUL, which fastText splits at. */
static inline int blank(const uint8_t *p, const uint8_t *end) {
    if (*p < 0x80) return *p <= ' ' && (1ull << *p & 0x1F0003E01ull);
    if (*p == 0xC2) return end - p > 1 && (p[1] == 0x85 || p[1] == 0xA0) ? 2 : 0;
    if (*p < 0xE1 || *p > 0xE3 || end - p < 3) return 0;
    uint32_t point = (uint32_t)(*p & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    int one = point == 0x1680 || (point >= 0x2000 && point <= 0x200A) || point == 0x2028 || point == 0x2029 ||
              point == 0x202F || point == 0x205F || point == 0x3000;
    return one ? 3 : 0;
}

static void read_words(Reader *r, const uint8_t *text, const uint8_t *end) {
    for (const uint8_t *word = text; word < end;) {
        int width = blank(word, end);
        if (width) {
            word += width;
            continue;
        }
        const uint8_t *stop = word;
        uint32_t hash = FNV_OFFSET;
        do hash = step(hash, *stop++);
        while (stop < end && !blank(stop, end));
        if (stop - word == 4 && !memcmp(word, "</s>", 4)) return; /* a line ends here for fastText */
        add_word(r, word, stop, hash);
        word = stop;
    }
}

static float log_of(double x) { return (float)log((float)x + 1e-5); }

/* The likeliest of the leaves 0 .. labels - 1 and its probability. Node n above them parts into children[n - labels], to
 * the second of them with the logistic function of hidden times planes[n - labels]. */
static int likeliest(const float *hidden, const int32_t *children, const float *planes, int labels, float *score) {
    struct { int32_t node; float score; } open[MAX_LABELS], one; /* one waits on each level of the tree at most */
    int32_t depth = 0, best = -1;
    float most = 0;
    open[depth].node = 2 * labels - 2;
    open[depth++].score = 0;
    while (depth) {
        one = open[--depth];
        if (best >= 0 && one.score < most) continue;
        if (one.node < labels) {
            best = one.node;
            most = one.score;
            continue;
        }
        const float *plane = planes + (size_t)(one.node - labels) * DIMENSIONS;
        const int32_t *pair = children + (size_t)(one.node - labels) * 2;
        float dot = 0;
        for (int d = 0; d < DIMENSIONS; d++) dot += plane[d] * hidden[d];
        float right = (float)(1.0 / (1.0f + expf(-dot)));
        open[depth].node = pair[1];
        open[depth++].score = one.score + log_of(right);
        open[depth].node = pair[0];
        open[depth++].score = one.score + log_of(1.0 - right);
    }
    *score = expf(most);
    return best;
}

/* The label of UTF-8 text and in score [1] its probability. For the arrays see Reader and likeliest; the caller vouches
 * for them, not for the text. */
int joy_language(const uint8_t *text, int64_t length, const uint8_t *spelling, const uint32_t *starts,
                 const uint32_t *slots, uint32_t mask, uint32_t buckets, const uint32_t *kept, const float *vectors,
                 const int32_t *children, const float *planes, int labels, float *score) {
    Reader r = {.spelling = spelling, .starts = starts, .slots = slots, .mask = mask, .kept = kept, .vectors = vectors};
    r.buckets = buckets;
    r.inverse = (uint32_t)((1ull << 32) / buckets);
    read_words(&r, text, text + length);
    *next_place(&r) = buckets; /* the end of the line, which is word 0 */
    add_places(&r, r.pending + 1);
    float share = (float)(1.0 / (double)r.found);
    for (int d = 0; d < DIMENSIONS; d++) r.sum[d] *= share;
    return likeliest(r.sum, children, planes, labels, score);
}

/* Whether more than four fifths of the letters A to Z in text, of either case, are capitals. */
int joy_capitals(const uint8_t *text, int64_t length) {
    int64_t capitals = 0, letters = 0;
    for (int64_t i = 0; i < length; i++) {
        capitals += (uint8_t)(text[i] - 'A') < 26;
        letters += (uint8_t)((text[i] | 0x20) - 'a') < 26;
    }
    return (double)capitals > 0.8 * (double)letters;
}
