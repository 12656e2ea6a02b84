/* Words of a text: counted for the rules, and numbered for the n-grams of repeats.c.
 *
 * A word is a run of word characters with single joiners inside, or a run of marks (clean/words.py: WORDS). Text is
 * valid UTF-8.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "characters.h"
#include "numbering.h"

enum { SHORT = 4 }; /* bytes of the longest stop word */

typedef struct {
    const uint8_t *start, *end;
    uint32_t characters, first, classes; /* the first character's class, and those of all together */
} Word;

/* The word that begins at `at`, where no white space is. */
static inline Word take_word(const uint8_t *at, const uint8_t *end, const uint8_t *classes) {
    const uint8_t *next, *behind;
    Word word = {.start = at, .characters = 1};
    uint32_t kind = word.first = word.classes = class_at(at, &at, classes);
    if (!(kind & WORD)) {
        for (; at < end && !(class_at(at, &next, classes) & (WORD | SPACE)); at = next) word.characters++;
        word.end = at;
        return word;
    }
    for (;;) {
        const uint8_t *run = at; /* of ASCII, the common case in a loop of its own */
        for (; at < end && *at < 0x80 && (kind = classes[*at]) & WORD; at++) word.classes |= kind;
        word.characters += (uint32_t)(at - run);
        if (at >= end) break;
        kind = class_at(at, &next, classes);
        if (kind & WORD) {
            word.characters++;
            word.classes |= kind;
            at = next;
            continue;
        }
        if (!(kind & JOINER) || next >= end) break;
        kind = class_at(next, &behind, classes);
        if (!(kind & WORD)) break;
        word.characters += 2;
        word.classes |= kind;
        at = behind;
    }
    word.end = at;
    return word;
}

/* A short word as one number, the first byte lowest; 0 for a longer one. */
static inline uint32_t packed(const uint8_t *start, const uint8_t *stop, const uint8_t *end) {
    return stop - start > SHORT ? 0 : (uint32_t)head_of(start, (size_t)(stop - start), end);
}

static inline int ends_with_ellipsis(const uint8_t *start, const uint8_t *end) {
    return end - start >= 3 && (!memcmp(end - 3, "...", 3) || !memcmp(end - 3, "\xE2\x80\xA6", 3));
}

/* Of words (all; real: not of marks; their characters; words with a letter; how many of the `stops` packed short words
 * occur) and of lines (all; that begin with a bullet; that end with an ellipsis), in this order in counts [8].
 */
void joy_count_words(const uint8_t *text, int64_t bytes, const uint8_t *classes, const uint32_t *stop_words, int stops,
                     int64_t *counts) {
    const uint8_t *at = text, *end = text + bytes, *next;
    const uint8_t *line = at, *solid = at; /* where the line begins, and where its last word so far ends */
    int64_t words = 0, real = 0, characters = 0, lettered = 0, lines = 0, bullets = 0, ellipses = 0, found = 0;
    uint64_t met = 0;
    while (at < end) {
        uint32_t kind = class_at(at, &next, classes);
        if (kind & SPACE) {
            if (kind & BREAK) {
                if (*at == '\r' && next < end && *next == '\n') next++;
                lines++;
                ellipses += ends_with_ellipsis(line, solid);
                line = solid = next;
            }
            at = next;
            continue;
        }
        Word word = take_word(at, end, classes);
        if (solid == line && word.first & BULLET) bullets++;
        words++;
        if (word.first & WORD) {
            real++;
            characters += word.characters;
            lettered += (word.classes & LETTER) != 0;
            uint32_t value = packed(at, word.end, end);
            for (int i = 0; value && i < stops; i++) met |= (uint64_t)(value == stop_words[i]) << i;
        }
        at = solid = word.end;
    }
    if (line < end) {
        lines++;
        ellipses += ends_with_ellipsis(line, solid);
    }
    for (; met; met &= met - 1) found++;
    int64_t all[] = {words, real, characters, lettered, found, lines, bullets, ellipses};
    memcpy(counts, all, sizeof all);
}

/* The words' numbers in the order in which they first come, and the characters up to each word's end (ends[0] is 0);
 * numbers holds `bytes` entries, ends one more. Returns how many words there are, -1 without memory.
 */
int64_t joy_number_words(const uint8_t *text, int64_t bytes, const uint8_t *classes, uint64_t key, uint32_t *numbers,
                         uint32_t *ends) {
    const uint8_t *at = text, *end = text + bytes, *next;
    Numbering numbering;
    int64_t words = 0;
    ends[0] = 0;
    if (!numbering_start(&numbering, text, end, key)) return -1;
    while (at < end) {
        if (class_at(at, &next, classes) & SPACE) {
            at = next;
            continue;
        }
        Word word = take_word(at, end, classes);
        at = word.end;
        numbers[words] = number_of(&numbering, word.start, word.end);
        ends[words + 1] = ends[words] + word.characters;
        if (numbers[words++] == NO_MEMORY) {
            words = -1;
            break;
        }
    }
    numbering_end(&numbering);
    return words;
}

/* Of runs of word characters (how many; their characters; how many are, but for case, one of the packed short words),
 * and of characters (letters; Han), in this order in counts [5].
 */
void joy_count_runs(const uint8_t *text, int64_t bytes, const uint8_t *classes, const uint32_t *stop_words, int stops,
                    int64_t *counts) {
    const uint8_t *at = text, *end = text + bytes, *start = NULL, *next, *behind; /* start: of the run that `at` is in */
    int64_t runs = 0, characters = 0, letters = 0, han = 0, found = 0;
    for (; at < end; at = next) {
        uint32_t kind = class_at(at, &next, classes);
        letters += (kind & LETTER) != 0;
        han += (kind & HAN) != 0;
        if (!(kind & WORD)) continue;
        characters++;
        if (!start) start = at;
        if (next < end && class_at(next, &behind, classes) & WORD) continue;
        runs++;
        uint32_t value = packed(start, next, end);
        if (value) value |= 0x20202020u >> 8 * (SHORT - (next - start)); /* makes a letter of no other byte of words */
        for (int i = 0; value && i < stops; i++) found += value == stop_words[i];
        start = NULL;
    }
    int64_t all[] = {runs, characters, found, letters, han};
    memcpy(counts, all, sizeof all);
}
