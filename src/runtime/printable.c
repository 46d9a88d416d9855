#include "clmoe/clmoe.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static bool is_harmless(uint32_t code) {
    const bool control = code < 0x20 || (code >= 0x7f && code < 0xa0);
    const bool turns = code == 0x61c || code == 0x200e || code == 0x200f ||
                       (code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
    const bool breaks = code == 0x2028 || code == 0x2029;
    return !control && !turns && !breaks;
}

/* Bytes of the harmless character at `text`, or 0. */
static size_t character(const char *text) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char first = (unsigned char)text[0];
    const size_t length = first < 0x80    ? 1
                          : first < 0xc0  ? 0
                          : first < 0xe0  ? 2
                          : first < 0xf0  ? 3
                          : first <= 0xf4 ? 4
                                          : 0;
    uint32_t code = length < 2 ? first : first & (0x7fU >> length);
    for (size_t i = 1; i < length; i++) {
        if (((unsigned char)text[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | ((unsigned char)text[i] & 0x3f);
    }
    const bool valid =
        length > 0 && code >= least[length] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
    return valid && is_harmless(code) ? length : 0;
}

void clmoe_printable(const char *text, char *out, size_t size) {
    enum { ESCAPE = 4 };
    size_t used = 0;
    if (size == 0)
        return;
    while (*text != '\0') {
        const size_t length = character(text), bytes = length > 0 ? length : ESCAPE;
        if (used + bytes >= size)
            break;
        if (length > 0)
            memcpy(out + used, text, length);
        else
            snprintf(out + used, size - used, "\\x%02x", (unsigned)(unsigned char)*text);
        text += length > 0 ? length : 1;
        used += bytes;
    }
    out[used] = '\0';
}
