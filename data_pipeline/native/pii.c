/* Where personal data may begin: data_pipeline/pii/scan.py asks its regular expressions there and nowhere else.
 *
 * A text comes as one byte for each character, those outside ASCII as '?', so that places are the same in both. Each test
 * holds wherever its expression matches and takes a bounded look, so the time is linear; it may also hold elsewhere.
 */
#include <stdint.h>
#include <string.h>

enum { EMAIL = 1, NUMBER = 2, IPV4 = 4, IPV6 = 8, IBAN = 16, EUROPEAN = 32, TOKEN = 64, VALUE = 128 };
enum { DIGIT = 1, UPPER = 2, LOWER = 4, HEX = 8, BLANK = 16, MARK = 32, FIRST = 64, ALNUM = DIGIT | UPPER | LOWER };
enum { NUMERAL = DIGIT | HEX | FIRST, CAPITAL = UPPER | FIRST, SMALL = LOWER | FIRST };
enum { LONGEST_LOCAL = 64, LONGEST_LABEL = 63, LEAST_VALUE = 12, LONGEST_VALUE = 200, LEAST_DIGITS = 7 };
enum { BLOCK = 1024 };

/* Classes of ASCII. FIRST: a letter or digit that something begins with, MARK: what else something begins with. */
static const uint8_t CLASS[256] = {
    ['0'] = NUMERAL, ['1'] = NUMERAL, ['2'] = NUMERAL, ['3'] = NUMERAL, ['4'] = NUMERAL,
    ['5'] = NUMERAL, ['6'] = NUMERAL, ['7'] = NUMERAL, ['8'] = NUMERAL, ['9'] = NUMERAL,
    ['A'] = CAPITAL | HEX, ['B'] = CAPITAL | HEX, ['C'] = CAPITAL | HEX, ['D'] = CAPITAL | HEX,
    ['E'] = CAPITAL | HEX, ['F'] = CAPITAL | HEX,
    ['G'] = CAPITAL, ['H'] = CAPITAL, ['I'] = CAPITAL, ['J'] = CAPITAL, ['K'] = CAPITAL, ['L'] = CAPITAL,
    ['M'] = CAPITAL, ['N'] = CAPITAL, ['O'] = CAPITAL, ['P'] = CAPITAL, ['Q'] = CAPITAL, ['R'] = CAPITAL,
    ['S'] = CAPITAL, ['T'] = CAPITAL, ['U'] = CAPITAL, ['V'] = CAPITAL, ['W'] = CAPITAL, ['X'] = CAPITAL,
    ['Y'] = CAPITAL, ['Z'] = CAPITAL,
    ['a'] = SMALL | HEX, ['b'] = SMALL | HEX, ['c'] = SMALL | HEX, ['d'] = SMALL | HEX, ['e'] = SMALL | HEX,
    ['f'] = SMALL | HEX,
    ['g'] = SMALL, ['h'] = SMALL, ['n'] = SMALL, ['p'] = SMALL, ['r'] = SMALL, ['s'] = SMALL, ['x'] = SMALL,
    ['i'] = LOWER, ['j'] = LOWER, ['k'] = LOWER, ['l'] = LOWER, ['m'] = LOWER, ['o'] = LOWER, ['q'] = LOWER,
    ['t'] = LOWER, ['u'] = LOWER, ['v'] = LOWER, ['w'] = LOWER, ['y'] = LOWER, ['z'] = LOWER,
    ['\t'] = BLANK, ['\n'] = BLANK, ['\v'] = BLANK, ['\f'] = BLANK, ['\r'] = BLANK, [' '] = BLANK,
    [0x1c] = BLANK, [0x1d] = BLANK, [0x1e] = BLANK, [0x1f] = BLANK,
    ['@'] = MARK, ['+'] = MARK, ['('] = MARK, [':'] = MARK, ['='] = MARK, ['>'] = MARK,
};

/* What may not begin behind a mark: the expressions' lookbehinds. Behind a letter or digit only VALUE may. */
static const uint8_t CLOSED[256] = {
    ['_'] = NUMBER | IPV4 | IPV6 | TOKEN, ['-'] = NUMBER | IPV4 | TOKEN, ['.'] = NUMBER | IPV4 | IPV6,
    ['+'] = NUMBER | IPV4, ['/'] = NUMBER | IPV4, ['='] = NUMBER | IPV4, ['#'] = NUMBER, [':'] = IPV6,
};

/* Behind the end stands 0, which is of no class and in no set. */
typedef struct {
    const uint8_t *text;
    int64_t size;
} Text;

static inline uint8_t at(const Text *t, int64_t i) { return i < t->size ? t->text[i] : 0; }
static inline int is(const Text *t, int64_t i, int classes) { return CLASS[at(t, i)] & classes; }
static inline int is_quote(uint8_t mark) { return mark == '"' || mark == '\'' || mark == '`'; }

static int run_of(const Text *t, int64_t i, int classes, int length) {
    for (int k = 0; k < length; k++)
        if (!is(t, i + k, classes)) return 0;
    return 1;
}

static int starts(const Text *t, int64_t i, const char *with) {
    size_t length = strlen(with);
    return t->size - i >= (int64_t)length && memcmp(t->text + i, with, length) == 0;
}

/* '?' may be one of Unicode's hyphens. */
static inline int is_separator(uint8_t mark) {
    return mark == ' ' || (mark >= '(' && mark <= ')') || (mark >= '-' && mark <= '/') || mark == '?';
}

/* Seven digits with up to two separators between two of them. */
static int number_at(const Text *t, int64_t i) {
    for (int digits = 0; is(t, i, DIGIT); i++) {
        if (++digits == LEAST_DIGITS) return 1;
        for (int skipped = 0; skipped < 2 && is_separator(at(t, i + 1)); skipped++) i++;
    }
    return 0;
}

static int ipv4_at(const Text *t, int64_t i) {
    for (int part = 0; part < 3; part++) {
        int64_t begin = i;
        while (i - begin < 3 && is(t, i, DIGIT)) i++;
        if (i == begin || at(t, i++) != '.') return 0;
    }
    return is(t, i, DIGIT);
}

/* Two to seven groups, each with a colon behind it, and one more that ends there. */
static int ipv6_at(const Text *t, int64_t i) {
    int colons = 0, digits;
    for (;;) {
        for (digits = 0; digits < 4 && is(t, i, HEX); digits++) i++;
        if (colons == 7 || at(t, i) != ':') break;
        colons++;
        i++;
    }
    return colons >= 2 && digits && !is(t, i, ALNUM) && at(t, i) != '_' && at(t, i) != ':';
}

static int iban_at(const Text *t, int64_t i) {
    if (!run_of(t, i, UPPER, 2) || !run_of(t, i + 2, DIGIT, 2)) return 0;
    i += 4;
    for (int group = 0; group < 2; group++, i += 4) {
        i += at(t, i) == ' ' || at(t, i) == '-';
        if (!run_of(t, i, UPPER | DIGIT, 4)) return 0;
    }
    return 1;
}

static int spanish_at(const Text *t, int64_t i) {
    if (at(t, i) >= 'X' && at(t, i) <= 'Z') {
        i += 1 + (at(t, i + 1) == '-');
        if (!run_of(t, i, DIGIT, 7)) return 0;
        i += 7;
    } else if (run_of(t, i, DIGIT, 8)) {
        i += 8;
    } else {
        if (!run_of(t, i, DIGIT, 2) || at(t, i + 2) != '.' || !run_of(t, i + 3, DIGIT, 3) || at(t, i + 6) != '.' ||
            !run_of(t, i + 7, DIGIT, 3))
            return 0;
        i += 10;
    }
    i += at(t, i) == ' ' || at(t, i) == '-';
    return is(t, i, UPPER);
}

static int french_at(const Text *t, int64_t i) {
    static const int groups[] = {2, 2, 2, 3, 3, 2};
    if (!is(t, i, DIGIT) || strchr("0569", at(t, i++))) return 0;
    for (int group = 0; group < 6; group++) {
        i += at(t, i) == ' ';
        /* Corsica's department has a letter. */
        int corsica = group == 2 && at(t, i) == '2' && (at(t, i + 1) == 'A' || at(t, i + 1) == 'B');
        if (!corsica && !run_of(t, i, DIGIT, groups[group])) return 0;
        i += groups[group];
    }
    return 1;
}

static int european_at(const Text *t, int64_t i) {
    if (is(t, i, DIGIT)) return spanish_at(t, i) || french_at(t, i);
    return spanish_at(t, i) || (run_of(t, i, UPPER, 6) && run_of(t, i + 6, DIGIT, 2));
}

static int token_at(const Text *t, int64_t i) {
    uint8_t second = at(t, i + 1);
    switch (at(t, i)) {
    case 'A':
        return starts(t, i, "AKIA") || starts(t, i, "ASIA") || starts(t, i, "AGPA") || starts(t, i, "AROA") ||
               starts(t, i, "AIDA") || starts(t, i, "AIza");
    case 'S': return starts(t, i, "SG.");
    case 'e': return starts(t, i, "eyJ");
    case 'g':
        return (second == 'h' && is(t, i + 2, LOWER) && at(t, i + 3) == '_') || starts(t, i, "github_pat_") ||
               starts(t, i, "glpat-");
    case 'h': return starts(t, i, "hf_");
    case 'n': return starts(t, i, "npm_");
    case 'p': return starts(t, i, "pypi-");
    case 'r':
    case 's': return second == 'k' && (at(t, i + 2) == '_' || at(t, i + 2) == '-');
    case 'x': return starts(t, i, "xox");
    default: return 0;
    }
}

/* A quoted value behind a mark and up to three blanks; '?' may be a blank, or not. */
static int value_at(const Text *t, int64_t i) {
    i++;
    for (int blanks = 0; blanks < 3 && (is(t, i, BLANK) || at(t, i) == '?'); blanks++) i++;
    if (!is_quote(at(t, i++))) return 0;
    int64_t begin = i;
    while (i < t->size && i - begin <= LONGEST_VALUE && !is(t, i, BLANK) && !is_quote(t->text[i])) i++;
    return i < t->size && !is(t, i, BLANK) && i - begin >= LEAST_VALUE && i - begin <= LONGEST_VALUE;
}

static inline int in_local(uint8_t mark) {
    return (CLASS[mark] & ALNUM) || mark == '.' || mark == '_' || mark == '%' || mark == '+' || mark == '-';
}

/* Where the address with its @ at i begins, -1 if none does: nothing of a name may stand in front of it. */
static int64_t email_start(const Text *t, int64_t i) {
    int64_t begin = i, end = i + 1;
    while (begin > 0 && i - begin <= LONGEST_LOCAL && in_local(t->text[begin - 1])) begin--;
    if (begin == i || i - begin > LONGEST_LOCAL || t->text[begin] == '.' || t->text[begin] == '-') return -1;
    if (begin > 0 && (t->text[begin - 1] == '/' || t->text[begin - 1] == '=')) return -1;
    while (end - i <= LONGEST_LABEL && (is(t, end, ALNUM) || at(t, end) == '-')) end++;
    return end > i + 1 && at(t, end) == '.' && is(t, end + 1, ALNUM) ? begin : -1;
}

/* What may begin with the letter or digit at i, no letter or digit in front of it. */
static int kinds_of_word(const Text *t, int64_t i, int closed) {
    int class = CLASS[t->text[i]], kinds = 0;
    if (class & DIGIT) {
        if (!(closed & NUMBER) && number_at(t, i)) kinds |= NUMBER;
        if (!(closed & IPV4) && ipv4_at(t, i)) kinds |= IPV4;
    } else if (!(closed & TOKEN) && token_at(t, i)) {
        kinds |= TOKEN;
    }
    if (class & UPPER && iban_at(t, i)) kinds |= IBAN;
    if (class & (UPPER | DIGIT) && european_at(t, i)) kinds |= EUROPEAN;
    if (class & HEX && !(closed & IPV6) && ipv6_at(t, i)) kinds |= IPV6;
    return kinds;
}

/* What may begin with the mark at i. */
static int kinds_of_mark(const Text *t, int64_t i, int closed) {
    uint8_t mark = t->text[i];
    if (mark == '+' || mark == '(') return !(closed & NUMBER) && number_at(t, i + 1) ? NUMBER : 0;
    int kinds = value_at(t, i) ? VALUE : 0;
    if (mark == ':' && !(closed & IPV6) && ipv6_at(t, i)) kinds |= IPV6;
    return kinds;
}

/* Places in [from, to) where anything at all may begin, without a branch: most words begin nothing. */
static int64_t beginnings(const uint8_t *text, int64_t from, int64_t to, int64_t *found) {
    int64_t count = 0;
    int in_word = from > 0 && CLASS[text[from - 1]] & ALNUM;
    for (int64_t i = from; i < to; i++) {
        int class = CLASS[text[i]];
        found[count] = i;
        count += ((class & FIRST) != 0 && !in_word) | ((class & MARK) != 0);
        in_word = (class & ALNUM) != 0;
    }
    return count;
}

/* Places [at most size] in text [size]: place * 256 + kinds that may begin there; returns how many. An address's is
 * listed where its @ stands; for each kind places ascend. */
int64_t joy_pii_places(const uint8_t *text, int64_t size, uint64_t *places) {
    const Text t = {text, size};
    int64_t found[BLOCK], count = 0;
    for (int64_t from = 0; from < size; from += BLOCK) {
        int64_t many = beginnings(text, from, from + BLOCK < size ? from + BLOCK : size, found);
        for (int64_t k = 0; k < many; k++) {
            int64_t i = found[k], place = i;
            int before = i ? text[i - 1] : 0, kinds;
            if (text[i] == '@') {
                place = email_start(&t, i);
                kinds = place >= 0 ? EMAIL : 0;
            } else if (CLASS[text[i]] & ALNUM) {
                kinds = kinds_of_word(&t, i, CLOSED[before]);
            } else {
                kinds = kinds_of_mark(&t, i, CLASS[before] & ALNUM ? ~VALUE : CLOSED[before]);
            }
            if (kinds) places[count++] = (uint64_t)place << 8 | (uint64_t)kinds;
        }
    }
    return count;
}
