/* What a text has for the passes of data_pipeline/extract/normalise.py to change: one look at each character. */
#include <stdint.h>

#include "utf8.h"

/* As in extract/survey.py, which makes the table and gives more bits to single characters. */
enum { BLANK = 1, TRAILING = 2, BLANK_LINES = 4, UNCOMPOSED = 8, SUSPICIOUS = 16, ODD = 32, CAPITAL = 64, SMALL = 128 };
enum { TABLE = 0x10000, MOST_LINE_FEEDS = 3 };

/* The classes of all characters of text [size], valid UTF-8, together. TRAILING: a blank ends a line or the text;
 * BLANK_LINES: more than three line feeds stand together; SUSPICIOUS: two characters of mojibake do, and not as letters
 * do in words. classes [TABLE]. */
int joy_survey(const uint8_t *text, int64_t size, const uint16_t *classes) {
    const uint8_t *at = text, *end = text + size;
    int seen = 0, class = 0, feeds = 0;
    while (at < end) {
        if (*at == '\n') {
            if (class & BLANK) seen |= TRAILING;
            if (++feeds > MOST_LINE_FEEDS) seen |= BLANK_LINES;
            class = 0;
            at++;
            continue;
        }
        feeds = 0;
        if (*at < 0x80) {
            class = classes[*at++];
        } else {
            uint32_t point = decode(&at);
            int before = class;
            class = point < TABLE ? classes[point] : UNCOMPOSED;
            if (class & (ODD | CAPITAL) ? before & (ODD | CAPITAL | SMALL) : class & SMALL && before & ODD)
                seen |= SUSPICIOUS;
        }
        seen |= class;
    }
    return seen | (class & BLANK ? TRAILING : 0);
}
