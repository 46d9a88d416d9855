#include "classes.h"

#include <stdbool.h>

static bool is_in(unsigned char byte, unsigned char first, unsigned char last) {
    return byte >= first && byte <= last;
}

byte_class class_of(unsigned char byte) {
    if (is_in(byte, 'a', 'z'))
        return CLASS_LOWER;
    if (is_in(byte, 'A', 'Z'))
        return CLASS_UPPER;
    if (is_in(byte, '0', '9'))
        return CLASS_DIGIT;
    if (byte == '\n')
        return CLASS_NEWLINE;
    if (byte == ' ' || is_in(byte, '\t', '\r'))
        return CLASS_SPACE;
    return is_in(byte, '!', '~') ? CLASS_PUNCTUATION : CLASS_OTHER;
}

const char *class_name(byte_class class) {
    static const char *const names[BYTE_CLASSES] = {
        [CLASS_LOWER] = "lower", [CLASS_UPPER] = "upper",
        [CLASS_DIGIT] = "digit", [CLASS_PUNCTUATION] = "punctuation",
        [CLASS_SPACE] = "space", [CLASS_NEWLINE] = "newline",
        [CLASS_OTHER] = "other",
    };
    return names[class];
}
