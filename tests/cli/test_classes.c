/* The classes of bytes against <ctype.h>, whose locale is "C" here, and against their numbers. */
#include "../../src/cli/train/classes.h"

#include "support.h"

#include <ctype.h>
#include <string.h>

static byte_class expected(int byte) {
    if (byte > 127 || iscntrl(byte))
        return byte == '\n'                  ? CLASS_NEWLINE
               : byte < 128 && isspace(byte) ? CLASS_SPACE
                                             : CLASS_OTHER;
    return islower(byte)   ? CLASS_LOWER
           : isupper(byte) ? CLASS_UPPER
           : isdigit(byte) ? CLASS_DIGIT
           : isspace(byte) ? CLASS_SPACE
                           : CLASS_PUNCTUATION;
}

static void every_byte(void **state) {
    (void)state;
    uint32_t counts[BYTE_CLASSES] = {0};
    for (int byte = 0; byte < 256; byte++) {
        const byte_class class = class_of((unsigned char)byte);
        CHECK(class == expected(byte), "byte %d is %s\n", byte, class_name(class));
        counts[class]++;
    }
    const uint32_t want[BYTE_CLASSES] = {26, 26, 10, 32, 5, 1, 156};
    assert_memory_equal(counts, want, sizeof want);
}

static void names_differ(void **state) {
    (void)state;
    for (int a = 0; a < BYTE_CLASSES; a++)
        for (int b = 0; b < a; b++)
            assert_string_not_equal(class_name((byte_class)a), class_name((byte_class)b));
    assert_string_equal(class_name(class_of('q')), "lower");
    assert_string_equal(class_name(class_of('Q')), "upper");
    assert_string_equal(class_name(class_of('7')), "digit");
    assert_string_equal(class_name(class_of('{')), "punctuation");
    assert_string_equal(class_name(class_of('\t')), "space");
    assert_string_equal(class_name(class_of('\n')), "newline");
    assert_string_equal(class_name(class_of(0xc3)), "other");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_byte),
        cmocka_unit_test(names_differ),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
