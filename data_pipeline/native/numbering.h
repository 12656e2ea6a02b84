/* Numbers for the different byte strings of a text, in the order in which they first come.
 *
 * The caller's key, an odd number that texts cannot know, decides where entries stand and nothing else: nobody can write
 * a text whose strings all fall into one place. Equal strings are compared byte by byte.
 */
#ifndef JOY_NUMBERING_H
#define JOY_NUMBERING_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NO_MEMORY UINT32_MAX

typedef struct {
    uint64_t head; /* the first eight bytes: all of it, as most words are short */
    uint32_t start, length;
} Entry;

typedef struct {
    const uint8_t *text, *end;
    uint64_t key;
    Entry *entries;  /* room for half as many as there are slots */
    uint32_t *slots; /* number + 1; 0: free */
    uint32_t count;
    int bits; /* of the number of slots */
} Numbering;

static inline uint64_t load(const uint8_t *at, size_t bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

/* The first bytes of start .. start + length, eight at most, zeros above them; the text goes on until `end`. */
static inline uint64_t head_of(const uint8_t *start, size_t length, const uint8_t *end) {
    if (length >= 8) return load(start, 8);
    if (end - start < 8) return load(start, length);
    return load(start, 8) & (((uint64_t)1 << 8 * length) - 1); /* without a branch for each length */
}

/* Both halves of the product: a difference in x goes where the key says. */
static inline uint64_t fold(uint64_t x, uint64_t key) {
    unsigned __int128 product = (unsigned __int128)x * key;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t hash_bytes(const uint8_t *start, size_t length, uint64_t head, uint64_t key) {
    uint64_t hash = fold(key ^ (uint64_t)length << 32 ^ head, key);
    if (length > 8) {
        const uint8_t *last = start + length - 8;
        for (start += 8; start < last; start += 8) hash = fold(hash ^ load(start, 8), key);
        hash = fold(hash ^ load(last, 8), key);
    }
    return fold(hash, key);
}

/* Returns 0 without memory, or for a text whose places don't fit into 32 bits. */
static int numbering_start(Numbering *n, const uint8_t *text, const uint8_t *end, uint64_t key) {
    if (end - text >= UINT32_MAX) return 0;
    *n = (Numbering){.text = text, .end = end, .key = key, .bits = 10};
    n->slots = calloc((size_t)1 << n->bits, sizeof *n->slots);
    n->entries = malloc(sizeof *n->entries << (n->bits - 1));
    if (n->slots && n->entries) return 1;
    free(n->slots);
    free(n->entries);
    return 0;
}

static void numbering_end(Numbering *n) {
    free(n->slots);
    free(n->entries);
}

static int numbering_grow(Numbering *n) {
    uint32_t *slots = calloc((size_t)2 << n->bits, sizeof *slots);
    Entry *entries = realloc(n->entries, sizeof *entries << n->bits);
    if (entries) n->entries = entries;
    if (!slots || !entries) {
        free(slots);
        return 0;
    }
    free(n->slots);
    n->slots = slots;
    n->bits++;
    size_t mask = ((size_t)1 << n->bits) - 1;
    for (uint32_t number = 0; number < n->count; number++) {
        Entry entry = n->entries[number];
        size_t slot = hash_bytes(n->text + entry.start, entry.length, entry.head, n->key) >> (64 - n->bits);
        while (slots[slot]) slot = (slot + 1) & mask;
        slots[slot] = number + 1;
    }
    return 1;
}

/* The number of the string start .. end of the text, a new one where it was not met before; NO_MEMORY. */
static inline uint32_t number_of(Numbering *n, const uint8_t *start, const uint8_t *end) {
    size_t length = (size_t)(end - start), mask = ((size_t)1 << n->bits) - 1;
    uint64_t head = head_of(start, length, n->end), hash = hash_bytes(start, length, head, n->key);
    size_t slot = hash >> (64 - n->bits);
    for (; n->slots[slot]; slot = (slot + 1) & mask) {
        const Entry *entry = n->entries + n->slots[slot] - 1;
        if (entry->head == head && entry->length == length &&
            (length <= 8 || !memcmp(n->text + entry->start + 8, start + 8, length - 8)))
            return n->slots[slot] - 1;
    }
    if (n->count == (uint32_t)1 << (n->bits - 1)) {
        if (!numbering_grow(n)) return NO_MEMORY;
        mask = ((size_t)1 << n->bits) - 1;
        for (slot = hash >> (64 - n->bits); n->slots[slot];) slot = (slot + 1) & mask;
    }
    n->entries[n->count] = (Entry){head, (uint32_t)(start - n->text), (uint32_t)length};
    n->slots[slot] = n->count + 1;
    return n->count++;
}

#endif
