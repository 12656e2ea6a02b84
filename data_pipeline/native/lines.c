/* Lines of a text in normal form, as numbers: what repeated lines are found by (dedup/lines.py).
 *
 * A line's normal form is its words with one blank between them; case is folded before. Words end at what Python's
 * str.split takes for white space. The slow reference is in tests/data_pipeline/dedup/test_lines.py.
 */
#include <stddef.h>
#include <stdint.h>

#include "folding.h"

/* The bytes of the white space at `at`, 0 where there is none; a line feed is one. */
static inline int space(const uint8_t *at, const uint8_t *end) {
    uint8_t byte = *at;
    if (byte < 0x80) return byte == ' ' || (byte >= '\t' && byte <= '\r') || (byte >= 0x1C && byte <= 0x1F);
    if (byte == 0xC2) return end - at > 1 && (at[1] == 0x85 || at[1] == 0xA0) ? 2 : 0;
    if (byte < 0xE1 || byte > 0xE3 || end - at < 3) return 0;
    uint32_t point = (uint32_t)(byte & 0x0F) << 12 | (uint32_t)(at[1] & 0x3F) << 6 | (at[2] & 0x3F);
    int blank = point == 0x1680 || (point >= 0x2000 && point <= 0x200A) || point == 0x2028 || point == 0x2029 ||
                point == 0x202F || point == 0x205F || point == 0x3000;
    return blank ? 3 : 0;
}

/* The lines of text [bytes] that have a word: a hash of the normal form, its bytes, and the line's number, each [lines]
 * with room for as many as the text has. Returns how many they are.
 */
int64_t joy_line_hashes(const uint8_t *text, int64_t bytes, uint64_t *hashes, int64_t *sizes, int64_t *numbers) {
    const uint8_t *at = text, *end = text + bytes;
    int64_t found = 0;
    for (int64_t number = 0; at <= end; number++) {
        uint64_t hash = FNV_OFFSET;
        int64_t size = 0;
        int gap = 0;
        while (at < end && *at != '\n') {
            int skipped = space(at, end);
            if (skipped) {
                gap = size > 0;
                at += skipped;
                continue;
            }
            if (gap) {
                hash = (hash ^ ' ') * FNV_PRIME;
                size++;
                gap = 0;
            }
            hash = (hash ^ *at++) * FNV_PRIME;
            size++;
        }
        at++;
        if (!size) continue;
        hashes[found] = hash;
        sizes[found] = size;
        numbers[found++] = number;
    }
    return found;
}

/* Rows (hash, position) of spans of `length` lines that have `least` bytes with a line feed between two lines; a span's
 * position is `first` and the number of its line in hashes [lines]. rows has room for lines - length + 1. Returns how many.
 */
int64_t joy_spans(const uint64_t *hashes, const int64_t *sizes, int64_t lines, int64_t length, int64_t least,
                  uint64_t first, uint64_t *rows) {
    int64_t found = 0;
    for (int64_t start = 0; start + length <= lines; start++) {
        uint64_t hash = 0;
        int64_t size = length - 1;
        for (int64_t step = 0; step < length; step++) {
            hash = mix(hash ^ hashes[start + step]);
            size += sizes[start + step];
        }
        if (size < least) continue;
        rows[2 * found] = hash;
        rows[2 * found++ + 1] = first + (uint64_t)start;
    }
    return found;
}
