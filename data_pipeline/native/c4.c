/* Lines that C4's rules have to read: those that end in a terminal mark, or in what may be a citation behind one, and
 * long ones for a long word. Lines and blanks are those of Python's str.splitlines and str.strip.
 */
#include <stdint.h>

enum { BREAK = 1, BLANK = 2, LAST = 4 };

static const uint8_t CLASS[256] = {
    ['\n'] = BREAK | BLANK, ['\v'] = BREAK | BLANK, ['\f'] = BREAK | BLANK, ['\r'] = BREAK | BLANK,
    [0x1c] = BREAK | BLANK, [0x1d] = BREAK | BLANK, [0x1e] = BREAK | BLANK,
    [0x1f] = BLANK, ['\t'] = BLANK, [' '] = BLANK,
    ['.'] = LAST, ['?'] = LAST, ['!'] = LAST, ['"'] = LAST, ['\''] = LAST, [']'] = LAST,
    [0xc2] = BREAK, [0xe2] = BREAK, /* what U+0085, U+2028 and U+2029 begin with */
};

/* Bytes of the line end at text, 0 if none stands there. */
static int line_end(const uint8_t *text, int64_t left) {
    if (*text == '\r') return 1 + (left > 1 && text[1] == '\n');
    if (*text == 0xc2) return left > 1 && text[1] == 0x85 ? 2 : 0;
    if (*text == 0xe2) return left > 2 && text[1] == 0x80 && (text[2] == 0xa8 || text[2] == 0xa9) ? 3 : 0;
    return 1;
}

/* Bytes of the blank that ends before text, 0 if none does; behind: how many bytes may be looked at. */
static int blank_before(const uint8_t *text, int64_t behind) {
    uint8_t last = behind > 0 ? text[-1] : 0;
    if (last < 0x80) return (CLASS[last] & BLANK) != 0;
    if (behind > 1 && text[-2] == 0xc2) return last == 0x85 || last == 0xa0 ? 2 : 0;
    if (behind < 3) return 0;
    int wide = text[-3] << 16 | text[-2] << 8 | last;
    if (wide >= 0xe28080 && wide <= 0xe2808a) return 3; /* U+2000 to U+200A */
    return wide == 0xe19a80 || wide == 0xe280af || wide == 0xe2819f || wide == 0xe38080 ? 3 : 0;
}

/* Begin and end of the lines to read of text [size], in UTF-8, in lines [at most size, 2]: of every one if `all`, and of
 * each above `longest` bytes. Returns how many; *total: lines of the text. */
int64_t joy_c4_lines(const uint8_t *text, int64_t size, int all, int64_t longest, uint64_t *lines, int64_t *total) {
    int64_t count = 0, next;
    *total = 0;
    for (int64_t begin = 0; begin < size; begin = next) {
        int64_t end = begin, last;
        int broken = 0, blank;
        while (end < size && !(CLASS[text[end]] & BREAK && (broken = line_end(text + end, size - end)))) end++;
        next = end + broken;
        for (last = end; (blank = blank_before(text + last, last - begin)); last -= blank) {}
        if (all || end - begin > longest || (last > begin && CLASS[text[last - 1]] & LAST)) {
            lines[2 * count] = (uint64_t)begin;
            lines[2 * count++ + 1] = (uint64_t)end;
        }
        ++*total;
    }
    return count;
}
