/* JSON Lines: the strings of a few fields of each line, unescaped; what is unusual is left to a whole parser.
 *
 * A line is taken only where a whole parser would surely give the same: an object in valid UTF-8 whose wanted fields are
 * there once, numbers of common size, nesting of common depth. data_pipeline/readers/lines.py parses the others with
 * orjson, which also says what is wrong with them. The reference is orjson itself (tests/data_pipeline/native/).
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { DEEPEST = 16, MOST_DIGITS = 15 };
enum { ROW_BEGIN = 0, ROW_END = 1, ROW_TAKEN = 2, ROW_FIELDS = 3 };

/* Bytes side by side, in the compiler's own form of vectors: it knows what each machine has. */
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint64_t Halves __attribute__((vector_size(16)));

typedef struct {
    const uint8_t *at;
    uint8_t *out; /* a vector of bytes behind what is written may be overwritten */
} Cursor;

static inline int hex(uint8_t digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    digit |= 0x20;
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

/* Four hexadecimal digits; -1: not that. Stops at the line's end, which is no digit. */
static inline int32_t unit(const uint8_t *at) {
    int32_t value = 0;
    for (int i = 0; i < 4; i++) {
        int digit = hex(at[i]);
        if (digit < 0) return -1;
        value = value << 4 | digit;
    }
    return value;
}

static inline void put_point(Cursor *c, uint32_t point) {
    if (point < 0x80) {
        *c->out++ = (uint8_t)point;
    } else if (point < 0x800) {
        *c->out++ = (uint8_t)(0xC0 | point >> 6);
        *c->out++ = (uint8_t)(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
        *c->out++ = (uint8_t)(0xE0 | point >> 12);
        *c->out++ = (uint8_t)(0x80 | (point >> 6 & 0x3F));
        *c->out++ = (uint8_t)(0x80 | (point & 0x3F));
    } else {
        *c->out++ = (uint8_t)(0xF0 | point >> 18);
        *c->out++ = (uint8_t)(0x80 | (point >> 12 & 0x3F));
        *c->out++ = (uint8_t)(0x80 | (point >> 6 & 0x3F));
        *c->out++ = (uint8_t)(0x80 | (point & 0x3F));
    }
}

/* What follows a backslash. NULs are unusual in text, and half of a surrogate pair is no text. */
static inline int take_escape(Cursor *c) {
    static const uint8_t values[256] = {['"'] = '"',  ['\\'] = '\\', ['/'] = '/',  ['b'] = '\b',
                                        ['f'] = '\f', ['n'] = '\n',  ['r'] = '\r', ['t'] = '\t'};
    uint8_t value = values[c->at[1]];
    if (value) {
        *c->out++ = value;
        c->at += 2;
        return 1;
    }
    if (c->at[1] != 'u') return 0;
    int32_t point = unit(c->at + 2);
    if (point <= 0) return 0;
    c->at += 6;
    if (point >= 0xD800 && point < 0xE000) {
        if (point >= 0xDC00 || c->at[0] != '\\' || c->at[1] != 'u') return 0;
        int32_t low = unit(c->at + 2);
        if (low < 0xDC00 || low >= 0xE000) return 0;
        c->at += 6;
        point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    }
    put_point(c, (uint32_t)point);
    return 1;
}

static inline int follows(uint8_t byte) { return (byte & 0xC0) == 0x80; }

/* Characters outside ASCII, as many as follow one another (RFC 3629, table of section 4). */
static inline int take_wide(Cursor *c) {
    const uint8_t *p = c->at;
    uint8_t *out = c->out;
    do {
        uint8_t lead = p[0];
        if (lead < 0xC2 || !follows(p[1])) return 0;
        *out++ = lead;
        *out++ = p[1];
        if (lead < 0xE0) {
            p += 2;
            continue;
        }
        if (!follows(p[2])) return 0;
        *out++ = p[2];
        if (lead < 0xF0) {
            if ((lead == 0xE0 && p[1] < 0xA0) || (lead == 0xED && p[1] >= 0xA0)) return 0;
            p += 3;
            continue;
        }
        if (lead > 0xF4 || !follows(p[3]) || (lead == 0xF0 && p[1] < 0x90) || (lead == 0xF4 && p[1] >= 0x90)) return 0;
        *out++ = p[3];
        p += 4;
    } while (*p >= 0x80);
    c->at = p;
    c->out = out;
    return 1;
}

/* A string behind its opening quote, unescaped to `out`. 0: unusual. It reads no further than a vector behind the line. */
static int take_string(Cursor *c) {
    for (;;) {
        Bytes bytes;
        memcpy(&bytes, c->at, sizeof bytes);
        memcpy(c->out, &bytes, sizeof bytes);
        Bytes special = (Bytes)((bytes == '"') | (bytes == '\\') | (bytes < 0x20) | (bytes >= 0x80));
        Halves halves = (Halves)special;
        int plain = sizeof bytes; /* bytes before the first special one; the first is the lowest, as in the files */
        if (halves[0]) plain = __builtin_ctzll(halves[0]) / 8;
        else if (halves[1]) plain = 8 + __builtin_ctzll(halves[1]) / 8;
        c->at += plain;
        c->out += plain;
        if (plain == sizeof bytes) continue;
        uint8_t byte = *c->at;
        if (byte == '"') {
            c->at++;
            return 1;
        }
        if (byte < 0x20) return 0;
        if (!(byte == '\\' ? take_escape(c) : take_wide(c))) return 0;
    }
}

static inline const uint8_t *blanks(const uint8_t *at) {
    while (*at == ' ' || *at == '\t' || *at == '\r') at++;
    return at;
}

static const uint8_t *digits(const uint8_t *at, int *count) {
    for (; *at >= '0' && *at <= '9'; at++) ++*count;
    return at;
}

/* A number's end, NULL where it is none or larger than a parser might like. */
static const uint8_t *skip_number(const uint8_t *at) {
    int whole = 0, fraction = 0;
    if (*at == '-') at++;
    const uint8_t *first = at;
    at = digits(at, &whole);
    if (!whole || (*first == '0' && whole > 1)) return NULL;
    if (*at == '.') {
        at = digits(at + 1, &fraction);
        if (!fraction) return NULL;
    }
    return whole + fraction > MOST_DIGITS || (*at | 0x20) == 'e' ? NULL : at;
}

static int skip_value(Cursor *c, int depth);

/* The rest of an array or object behind its bracket. */
static int skip_members(Cursor *c, int depth, uint8_t end) {
    c->at = blanks(c->at);
    if (*c->at == end) {
        c->at++;
        return 1;
    }
    for (;;) {
        if (end == '}') {
            c->at = blanks(c->at);
            if (*c->at++ != '"' || !take_string(c)) return 0;
            c->at = blanks(c->at);
            if (*c->at++ != ':') return 0;
        }
        if (!skip_value(c, depth)) return 0;
        c->at = blanks(c->at);
        uint8_t mark = *c->at++;
        if (mark == end) return 1;
        if (mark != ',') return 0;
    }
}

/* Any value that is not wanted; what strings leave in `out` is dropped by the caller. */
static int skip_value(Cursor *c, int depth) {
    static const struct {
        const char *name;
        size_t size;
    } words[] = {{"true", 4}, {"false", 5}, {"null", 4}};
    if (depth == DEEPEST) return 0;
    c->at = blanks(c->at);
    if (*c->at == '"') {
        c->at++;
        return take_string(c);
    }
    if (*c->at == '{' || *c->at == '[') {
        uint8_t end = *c->at++ == '{' ? '}' : ']';
        return skip_members(c, depth + 1, end);
    }
    for (int i = 0; i < 3; i++) {
        if (strncmp((const char *)c->at, words[i].name, words[i].size) == 0) {
            c->at += words[i].size;
            return 1;
        }
    }
    const uint8_t *end = skip_number(c->at);
    if (end) c->at = end;
    return end != NULL;
}

/* Whether a text surely has something to see: Python's own rule is for whoever parses the line wholly. Outside ASCII
 * white space begins with C2, E1 9A, E2 80, E2 81 or E3 80.
 */
static int visible(const uint8_t *at, const uint8_t *end) {
    while (at < end && (*at == ' ' || (*at >= '\t' && *at <= '\r'))) at++;
    if (at == end || *at <= ' ' || *at == 0x7F || *at == 0xC2) return 0;
    if (*at < 0xE1 || *at > 0xE3) return 1;
    return *at == 0xE1 ? at[1] != 0x9A : *at == 0xE2 ? at[1] != 0x80 && at[1] != 0x81 : at[1] != 0x80;
}

typedef struct {
    const uint8_t *names;
    const int64_t *ends; /* of each name in `names` */
    int count;           /* the first one is the text */
} Fields;

static int field_of(const Fields *fields, const uint8_t *key, int64_t size) {
    int64_t begin = 0;
    for (int i = 0; i < fields->count; begin = fields->ends[i++]) {
        if (fields->ends[i] - begin == size && memcmp(fields->names + begin, key, (size_t)size) == 0) return i;
    }
    return -1;
}

/* One member of the line's object; places [2 * count]: beginning and end of each wanted string in `base`. */
static int take_member(Cursor *c, const Fields *fields, const uint8_t *base, int64_t *places, int *seen) {
    c->at = blanks(c->at);
    uint8_t *key = c->out;
    if (*c->at++ != '"' || !take_string(c)) return 0;
    int field = field_of(fields, key, c->out - key);
    c->out = key;
    c->at = blanks(c->at);
    if (*c->at++ != ':') return 0;
    c->at = blanks(c->at);
    if (field >= 0) {
        if (*seen & 1 << field) return 0; /* of two the last one counts */
        *seen |= 1 << field;
    }
    if (field < 0 || *c->at != '"') {
        uint8_t *kept = c->out;
        int good = skip_value(c, 0);
        c->out = kept;
        return good;
    }
    c->at++;
    places[2 * field] = c->out - base;
    if (!take_string(c)) return 0;
    places[2 * field + 1] = c->out - base;
    return 1;
}

/* One line, which ends with a line feed. 0: unusual. */
static int take_line(Cursor *c, const Fields *fields, const uint8_t *base, int64_t *places) {
    int seen = 0;
    c->at = blanks(c->at);
    if (*c->at++ != '{') return 0;
    for (;;) {
        if (!take_member(c, fields, base, places, &seen)) return 0;
        c->at = blanks(c->at);
        uint8_t mark = *c->at++;
        if (mark == '}') break;
        if (mark != ',') return 0;
    }
    return *blanks(c->at) == '\n' && places[0] >= 0 && visible(base + places[0], base + places[1]);
}

/* Whole lines of block [size], at most `most`; returns how many.
 *
 * Each gets a row [3 + 2 * fields]: where it begins and ends in the block, its line feed included; whether it was taken;
 * beginning and end of each wanted string in `out`, -1 where it has none. block and out [size] have 32 bytes more (SLACK
 * in readers/lines.py).
 */
int64_t joy_json_lines(const uint8_t *block, int64_t size, const uint8_t *names, const int64_t *ends, int count,
                       uint8_t *out, int64_t *rows, int64_t most) {
    Fields fields = {names, ends, count};
    Cursor cursor = {block, out};
    int64_t place = 0, found = 0;
    while (found < most && place < size) {
        const uint8_t *end = memchr(block + place, '\n', (size_t)(size - place));
        if (!end) break;
        int64_t *row = rows + found++ * (ROW_FIELDS + 2 * count);
        uint8_t *kept = cursor.out;
        for (int i = 0; i < 2 * count; i++) row[ROW_FIELDS + i] = -1;
        cursor.at = block + place;
        row[ROW_TAKEN] = count && take_line(&cursor, &fields, out, row + ROW_FIELDS);
        if (!row[ROW_TAKEN]) cursor.out = kept;
        row[ROW_BEGIN] = place;
        row[ROW_END] = place = end - block + 1;
    }
    return found;
}
