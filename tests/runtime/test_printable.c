/* printable: what of a text reaches a terminal as it is, for all of Unicode and for what is none.
 */
#include "clmoe/clmoe.h"
#include "support.h"

#include <stdio.h>
#include <string.h>

/* What moves the cursor, turns the direction of text, ends lines, or is no character. */
static const uint32_t escaped[][2] = {
    {0x01, 0x1f},     {0x7f, 0x9f},     {0x61c, 0x61c},   {0x200e, 0x200f},
    {0x2028, 0x202e}, {0x2066, 0x2069}, {0xd800, 0xdfff},
};

static bool is_escaped(uint32_t code) {
    for (size_t i = 0; i < COUNT_OF(escaped); i++)
        if (code >= escaped[i][0] && code <= escaped[i][1])
            return true;
    return false;
}

/* UTF-8, as RFC 3629 has it, in `bytes` of them. */
static void encode(uint32_t code, int bytes, char *text) {
    static const unsigned lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (int i = bytes - 1; i > 0; i--, code >>= 6)
        text[i] = (char)(0x80 | (code & 0x3f));
    text[0] = (char)(lead[bytes] | code);
    text[bytes] = '\0';
}

static void escape(const char *text, char *out) {
    *out = '\0';
    for (; *text; text++, out += 4)
        snprintf(out, 5, "\\x%02x", (unsigned)(unsigned char)*text);
}

static void check(const char *text, const char *want) {
    char out[64];
    clmoe_printable(text, out, sizeof out);
    CHECK(strcmp(out, want) == 0, "'%s', not '%s'\n", out, want);
}

/* In its own number of bytes; in more of them it is not UTF-8. */
static void every_character(void **state) {
    (void)state;
    static const uint32_t ends[] = {0, 0x80, 0x800, 0x10000, 0x110000};
    for (int bytes = 1; bytes <= 4; bytes++)
        for (uint32_t code = 1; code < ends[bytes]; code++) {
            char text[8], want[32];
            encode(code, bytes, text);
            escape(text, want);
            check(text, code < ends[bytes - 1] || is_escaped(code) ? want : text);
        }
}

static void no_characters(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"a\x80z", "a\\x80z"},
        {"\xbf\xc3\xa8", "\\xbf\xc3\xa8"},
        {"\xc3", "\\xc3"},
        {"\xc3z", "\\xc3z"},
        {"\xe2\x82z", "\\xe2\\x82z"},
        {"\xf0\x9f\x98", "\\xf0\\x9f\\x98"},
        {"\xf0\x9f\xc3\xa8", "\\xf0\\x9f\xc3\xa8"},
        {"\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"},
        {"\xf5\x80\x80\x80", "\\xf5\\x80\\x80\\x80"},
        {"\xf8\x88\x80\x80\x80", "\\xf8\\x88\\x80\\x80\\x80"},
        {"\xff\xfe", "\\xff\\xfe"},
        {"\x1b[2J\r\n", "\\x1b[2J\\x0d\\x0a"},
        {"", ""},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++)
        check(cases[i][0], cases[i][1]);
}

/* As much as fits: whole characters and escapes, and nothing behind the end. */
static void short_of_room(void **state) {
    (void)state;
    static const char *const parts[] = {"a", "\xe2\x82\xac", "\\x1b", "\xf0\x9f\x98\x80", "b"};
    for (size_t size = 0; size < 20; size++) {
        char out[24], want[24] = "";
        bool fits = size > 0;
        for (size_t i = 0; i < COUNT_OF(parts) && fits; i++) {
            fits = strlen(want) + strlen(parts[i]) < size;
            if (fits)
                strcat(want, parts[i]);
        }
        memset(out, '#', sizeof out);
        clmoe_printable("a\xe2\x82\xac\x1b\xf0\x9f\x98\x80"
                        "b",
                        out, size);
        CHECK(size == 0 || strcmp(out, want) == 0, "'%s', not '%s', in %zu bytes\n", out, want,
              size);
        CHECK(out[size] == '#', "a byte behind %zu\n", size);
    }
}

/* What is in a sentence of the library. */
static void in_sentences(void **state) {
    (void)state;
    clmoe_checkpoint *checkpoint = NULL;
    assert_int_equal(clmoe_checkpoint_open("/nonexistent/\x1b[2J\xe2\x80\xae\n", NULL, &checkpoint),
                     CLMOE_IO);
    CHECK(strstr(clmoe_last_error(), "\\x1b[2J\\xe2\\x80\\xae\\x0a") != NULL, "it says: %s\n",
          clmoe_last_error());
    for (const char *c = clmoe_last_error(); *c; c++)
        CHECK((unsigned char)*c >= 0x20 && (unsigned char)*c < 0x7f, "byte %d\n", *c);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_character), TEST(no_characters),
                                       TEST(short_of_room), TEST(in_sentences)};
    return RUN(tests);
}
