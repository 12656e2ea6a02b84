/* What linear models see of texts (score/linear.py) and of the lines of a document (clean/noise.py): hashed words and
 * pairs of words, each a place in a table of weights. Training asks for the places, use for the sum of their weights.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "characters.h"
#include "folding.h"

enum { CHUNK = 256 };    /* words that are hashed at a time */
enum { LONGEST = 400 };  /* characters of a line that are looked at */
enum { SHAPE = 8 };      /* words for a line's shape, in front of its own */
enum { BLANK = 1, CAPITAL = 2, DIGIT = 4, MARK = 8, END_SHIFT = 4 }; /* as in clean/noise.py */

/* Where the folding of characters, and a model's weights [2^bits], lie. */
typedef struct {
    const uint32_t *table, *pool;
    uint32_t points;
    int bits;
    const float *weights;
} Model;

/* The places of one text, each once, in the order in which they first occur. */
typedef struct {
    uint64_t *seen;   /* a bit for each place of the table */
    uint32_t *places; /* room for one more than there can be */
    int64_t count;
    uint64_t before; /* the last word */
    int64_t words;
} Places;

/* How many places a text of so many bytes can have, with a line's shape. */
static int64_t most_places(int64_t bytes, int bits) {
    int64_t all = (int64_t)1 << bits, own = 2 * (WORDS_A_BYTE * bytes + 1 + SHAPE);
    return own < all ? own : all;
}

static int places_start(Places *p, int64_t bytes, int bits) {
    memset(p, 0, sizeof *p);
    p->seen = calloc(((size_t)1 << bits) / 64 + 1, sizeof *p->seen);
    p->places = malloc(sizeof *p->places * (size_t)(most_places(bytes, bits) + 1));
    return p->seen && p->places;
}

static void places_end(Places *p) {
    free(p->seen);
    free(p->places);
}

/* Make ready for another text. */
static void places_clear(Places *p) {
    for (int64_t i = 0; i < p->count; i++) p->seen[p->places[i] >> 6] = 0;
    p->count = p->words = 0;
}

static inline void add_place(Places *p, uint64_t hash, int bits) {
    uint32_t place = bits ? (uint32_t)(hash >> (64 - bits)) : 0;
    uint64_t *seen = p->seen + (place >> 6), bit = (uint64_t)1 << (place & 63);
    p->places[p->count] = place; /* stays when it is new: no branch that would be guessed wrong */
    p->count += !(*seen & bit);
    *seen |= bit;
}

static inline void add_word(Places *p, uint64_t word, int bits) {
    add_place(p, mix(word), bits);
    if (p->words++) add_place(p, mix(p->before * ROLL + word), bits);
    p->before = word;
}

static void add_text(Places *p, const uint8_t *at, const uint8_t *end, const Model *m) {
    uint64_t hashes[CHUNK + MOST_PARTS + 1];
    Words words;
    words_start(&words, hashes);
    do {
        at = words_some(&words, at, end, CHUNK, m->table, m->points, m->pool);
        if (at == end) words_end(&words);
        for (int64_t i = 0; i < words.count; i++) add_word(p, hashes[i], m->bits);
        words.count = 0;
    } while (at < end);
}

/* The sum of the weights over the root of how many they are; doubles, so that their order makes no difference. */
static double weigh(const Places *p, const float *weights) {
    double sum = 0;
    for (int64_t i = 0; i < p->count; i++) sum += weights[p->places[i]];
    return sum / sqrt(p->count ? (double)p->count : 1.0);
}

/* The places of UTF-8 text [size] in places [most_places]; returns how many, -1 without memory. */
int64_t joy_places(const uint8_t *text, int64_t size, const uint32_t *table, uint32_t points, const uint32_t *pool,
                   int bits, uint32_t *places) {
    Model model = {table, pool, points, bits, NULL};
    Places p;
    int64_t count = -1;
    if (places_start(&p, size, bits)) {
        add_text(&p, text, text + size, &model);
        count = p.count;
        memcpy(places, p.places, sizeof *places * (size_t)count);
    }
    places_end(&p);
    return count;
}

/* The model's sum for UTF-8 text [size], without the bias. Returns 0, -1 without memory. */
int64_t joy_linear(const uint8_t *text, int64_t size, const uint32_t *table, uint32_t points, const uint32_t *pool,
                   int bits, const float *weights, double *sum) {
    Model model = {table, pool, points, bits, weights};
    Places p;
    int made = places_start(&p, size, bits);
    if (made) {
        add_text(&p, text, text + size, &model);
        *sum = weigh(&p, weights);
    }
    places_end(&p);
    return made ? 0 : -1;
}

/* A line without the blanks around it. */
typedef struct {
    const uint8_t *begin, *cut; /* cut: where what is looked at ends */
    int64_t number, length, words, capitals, digits;
    int marks, ends; /* ends: which of NAMES_OF_ENDS */
} Line;

static const char *const NAMES_OF_ENDS[] = {"zendnone", "zendstop", "zendcall", "zendask",
                                            "zendcolon", "zendcomma", "zenddots"};

/* The lines of a document that are still to come; they end at line feeds only. */
typedef struct {
    const uint8_t *at, *end, *classes;
    int64_t number; /* of the line at `at` */
} Lines;

/* Go to the first character that is no blank; 0 if there is none. */
static int skip_blanks(Lines *lines) {
    for (const uint8_t *next; lines->at < lines->end; lines->at = next) {
        if (!(class_at(lines->at, &next, lines->classes) & BLANK)) return 1;
        lines->number += *lines->at == '\n';
    }
    return 0;
}

static const uint8_t *line_end(const Lines *lines) {
    const uint8_t *stop = memchr(lines->at, '\n', (size_t)(lines->end - lines->at));
    return stop ? stop : lines->end;
}

/* The next line that is not blank; 0 if there is none. No branches but one: blanks come when nobody expects them. */
static int next_line(Lines *lines, Line *line) {
    if (!skip_blanks(lines)) return 0;
    const uint8_t *begin = lines->at, *at = begin, *stop = line_end(lines), *cut = at, *next;
    int64_t passed = 0, length = 0, words = 0, capitals = 0, digits = 0, marks = 0;
    uint32_t last = 0, behind_blank = 1;
    for (; at < stop; at = next) {
        uint32_t class = class_at(at, &next, lines->classes), blank = class & BLANK, begins = behind_blank & ~blank;
        passed++;
        words += begins;
        capitals += begins & (class & CAPITAL) / CAPITAL;
        digits += (class & DIGIT) / DIGIT;
        marks += (class & MARK) / MARK;
        cut = passed <= LONGEST ? next : cut;
        length = blank ? length : passed;
        last = blank ? last : class;
        behind_blank = blank;
    }
    *line = (Line){begin, cut, lines->number, length, words, capitals, digits, marks < 5 ? (int)marks : 5,
                   (int)(last >> END_SHIFT)};
    lines->at = stop;
    return 1;
}

static int64_t count_lines(Lines lines) {
    int64_t count = 0;
    for (; skip_blanks(&lines); count++) lines.at = line_end(&lines);
    return count;
}

/* Which of a few lengths this is: 1 to 9. */
static int length_class(const Line *line) {
    static const int64_t BOUNDS[] = {0, 5, 12, 25, 40, 60, 90, 140, 220};
    int class = 0;
    for (int i = 0; i < 9; i++) class += line->length > BOUNDS[i];
    return class;
}

static inline void add_shape(Places *p, const char *name, int value, int bits) {
    uint64_t word = FNV_OFFSET;
    for (; *name; name++) word = (word ^ (uint8_t)*name) * FNV_PRIME;
    if (value > 9) word = (word ^ (uint64_t)('0' + value / 10)) * FNV_PRIME;
    if (value >= 0) word = (word ^ (uint64_t)('0' + value % 10)) * FNV_PRIME;
    add_word(p, mix(word), bits);
}

/* What the model sees of a line: words for its length, its neighbours', its place and its shape, then its own. */
static void add_line(Places *p, const Line *line, int before, int after, int64_t place, const Model *m) {
    add_shape(p, "zlength", length_class(line), m->bits);
    add_shape(p, "zbefore", before, m->bits);
    add_shape(p, "zafter", after, m->bits);
    add_shape(p, "zplace", (int)place, m->bits);
    add_shape(p, NAMES_OF_ENDS[line->ends], -1, m->bits);
    add_shape(p, "zcapital", (int)(4 * line->capitals / line->words), m->bits);
    add_shape(p, "zmarks", line->marks, m->bits);
    add_shape(p, "zdigits", (int)(4 * line->digits / line->length), m->bits);
    add_text(p, line->begin, line->cut, m);
}

/* A document's lines one after another, each with the lengths of its neighbours. */
typedef struct {
    Lines lines;
    Line line, next;
    int more; /* next is one */
    int64_t done, solid;
} Document;

static void document_start(Document *d, const uint8_t *text, int64_t size, const uint8_t *classes) {
    memset(d, 0, sizeof *d);
    d->lines = (Lines){text, text + size, classes, 0};
    d->solid = count_lines(d->lines);
    d->more = next_line(&d->lines, &d->next);
}

/* The places of the next line that is not blank; 0 if there is none. */
static int next_places(Document *d, Places *p, const Model *m) {
    if (!d->more) return 0;
    int before = d->done ? length_class(&d->line) + 1 : 0;
    d->line = d->next;
    d->more = next_line(&d->lines, &d->next);
    places_clear(p);
    add_line(p, &d->line, before, d->more ? length_class(&d->next) + 1 : 0, 10 * d->done / d->solid, m);
    d->done++;
    return 1;
}

/* The model's sum, without the bias, for each line of UTF-8 text [size] as line feeds end them, in sums [lines]; NaN for
 * blank ones. Returns how many are not blank, -1 without memory. */
int64_t joy_line_sums(const uint8_t *text, int64_t size, const uint32_t *table, uint32_t points, const uint32_t *pool,
                      const uint8_t *classes, int bits, const float *weights, int64_t lines, double *sums) {
    Model model = {table, pool, points, bits, weights};
    Places p;
    Document d = {.solid = -1};
    if (places_start(&p, size, bits)) {
        document_start(&d, text, size, classes);
        for (int64_t i = 0; i < lines; i++) sums[i] = NAN;
        while (next_places(&d, &p, &model)) {
            if (d.line.number < lines) sums[d.line.number] = weigh(&p, weights);
        }
    }
    places_end(&p);
    return d.solid;
}

/* The places of each line of UTF-8 text [size] that is not blank, one line after another in places [most_places of each
 * line]; ends [lines that are not blank] gets where each ends. Returns how many lines, -1 without memory. */
int64_t joy_line_places(const uint8_t *text, int64_t size, const uint32_t *table, uint32_t points, const uint32_t *pool,
                        const uint8_t *classes, int bits, uint32_t *places, int64_t *ends) {
    Model model = {table, pool, points, bits, NULL};
    Places p;
    Document d = {.solid = -1};
    int64_t end = 0;
    if (places_start(&p, size, bits)) {
        document_start(&d, text, size, classes);
        while (next_places(&d, &p, &model)) {
            memcpy(places + end, p.places, sizeof *places * (size_t)p.count);
            ends[d.done - 1] = end += p.count;
        }
    }
    places_end(&p);
    return d.solid;
}
