/*
 * The edit of PTX for sm_90a, on texts of the test's own: what is changed, what is left, what is
 * refused. Memory may fail: the linker sends the library's malloc() here.
 */
#include "experts/gemm/nv_ptx.h" /* before support.h: cmocka has a macro fail() */

#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool starved;

void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);

void *__wrap_malloc(size_t bytes) {
    return starved ? NULL : __real_malloc(bytes);
}

/* Of a copy with no byte to spare, for AddressSanitizer; NULL: refused. To be freed. */
static char *edit(const char *text) {
    const size_t bytes = strlen(text) + 1;
    char *copy = malloc(bytes), *edited = copy;
    assert_non_null(copy);
    memcpy(copy, text, bytes);
    OK(nv_ptx_edit(copy, &edited));
    assert_memory_equal(copy, text, bytes);
    free(copy);
    return edited;
}

static void becomes(const char *text, const char *want) {
    test_case("%.60s", text);
    char *edited = edit(text);
    CHECK(edited != NULL, "it is refused\n");
    CHECK(strcmp(edited, want) == 0, "it became\n%s", edited);
    free(edited);
}

static void is_refused(const char *text) {
    test_case("%.60s", text);
    char *edited = edit(text);
    CHECK(edited == NULL, "it became\n%s", edited);
}

#define TARGET "\n.target sm_90\n"
#define EDITED "\n.target sm_90a\n"
#define MARKED "//@SM90A wgmma.fence;\n"
#define LINE   "wgmma.fence;\n"

static void comments_become_lines(void **state) {
    (void)state;
    becomes(TARGET MARKED, EDITED LINE);
    becomes(TARGET "\t" MARKED "add.s32 a, b, c;\n  " MARKED,
            EDITED "\t" LINE "add.s32 a, b, c;\n  " LINE);
    becomes(TARGET "//@SM90A ", EDITED);
    becomes(TARGET "//@SM90A last", EDITED "last");
    becomes(TARGET "{ //@SM90A a; }\n", EDITED "{ a; }\n");
    becomes(TARGET "// begin inline asm\n" MARKED "// end\n",
            EDITED "// begin inline asm\n" LINE "// end\n");
    /* Not the whole word. */
    becomes(TARGET MARKED "//@SM90A\n// @SM90A x\n//@SM90 x\n",
            EDITED LINE "//@SM90A\n// @SM90A x\n//@SM90 x\n");
}

static void targets_are_of_90_alone(void **state) {
    (void)state;
    becomes(".target sm_90, texmode_independent\n" MARKED,
            ".target sm_90a, texmode_independent\n" LINE);
    becomes(".target sm_90 , debug\n" MARKED, ".target sm_90a , debug\n" LINE);
    becomes(".target sm_90   \n" MARKED, ".target sm_90a   \n" LINE);
    becomes(".target\tsm_90\n" MARKED, ".target\tsm_90a\n" LINE);
    becomes(".version 8.7\n.target sm_90\n.address_size 64\n" MARKED,
            ".version 8.7\n.target sm_90a\n.address_size 64\n" LINE);
    is_refused(".target sm_90a\n" MARKED);
    is_refused(".target sm_90f\n" MARKED);
    is_refused(".target sm_900\n" MARKED);
    is_refused(".target sm_100\n" MARKED);
    is_refused(".target sm_80, texmode_independent\n" MARKED);
    is_refused("// .target sm_90\n" MARKED);
    is_refused(".target sm_80\nsm_90\n" MARKED);
    /* One that is left beside one that is changed. */
    becomes(".target sm_90a\n.target sm_90\n" MARKED, ".target sm_90a\n.target sm_90a\n" LINE);
}

static void text_of_something_else(void **state) {
    (void)state;
    is_refused("");
    is_refused("\n");
    is_refused("no word of it\n");
    is_refused(TARGET "add.s32 a, b, c;\n");
    is_refused(MARKED);
    is_refused("\x7F"
               "ELF");
    is_refused(".entry k()\n.reqntid 384, 1, 1\n{\n}\n");
}

static void every_entry_has_a_group(void **state) {
    (void)state;
    static const char group[] = ".reqntid 384, 1, 1\n", more[] = ".minnctapersm 1\n";
    char text[4096] = TARGET MARKED, want[4096] = EDITED LINE;
    for (int entries = 1; entries <= 20; entries++) {
        strcat(text, ".entry k(\n)\n");
        strcat(text, group);
        strcat(text, "{\nret;\n}\n");
        strcat(want, ".entry k(\n)\n");
        strcat(want, group);
        strcat(want, more);
        strcat(want, "{\nret;\n}\n");
        becomes(text, want);
    }
    /* On one line with others, and at the very end, where no line follows. */
    becomes(TARGET MARKED ".entry k() .reqntid 32\n{",
            EDITED LINE ".entry k() .reqntid 32\n.minnctapersm 1\n{");
    becomes(TARGET MARKED ".reqntid 32", EDITED LINE ".reqntid 32");
}

static void lines_may_end_otherwise(void **state) {
    (void)state;
    becomes(".version 8.7\r\n.target sm_90\r\n.entry k()\r\n.reqntid 128, 1, 1\r\n{\r\n"
            "//@SM90A a;\r\n}\r\n",
            ".version 8.7\r\n.target sm_90a\r\n.entry k()\r\n.reqntid 128, 1, 1\r\n"
            ".minnctapersm 1\n{\r\na;\r\n}\r\n");
}

/* What is made of a long text is as long as it should be, in a time that grows like it. */
static void long_texts(void **state) {
    (void)state;
    enum { LINES = 400000 };
    static const char line[] = "mov.u32 %r1, %r2; // nothing\n";
    test_case("%d lines", LINES);
    char *text = HOST(char, LINES *(sizeof line - 1) + sizeof TARGET MARKED), *to = text;
    to += sprintf(to, "%s%s", TARGET, MARKED);
    for (int i = 0; i < LINES; i++) {
        memcpy(to, line, sizeof line - 1);
        to += sizeof line - 1;
    }
    char *edited = edit(text);
    CHECK(edited != NULL, "it is refused\n");
    assert_int_equal(strlen(edited), strlen(text) + 1 - strlen("//@SM90A "));
    assert_string_equal(edited + strlen(EDITED LINE), text + strlen(TARGET MARKED));
    free(edited);
}

static void without_memory(void **state) {
    (void)state;
    char *edited = "something";
    test_case("no memory");
    starved = true;
    clmoe_status status = nv_ptx_edit(TARGET MARKED, &edited);
    starved = false;
    check_error(status, CLMOE_OUT_OF_MEMORY, "out of memory", "program");
    assert_null(edited);
}

/* The program that the engine compiles says so in the cache's key. */
static void edits_have_versions(void **state) {
    (void)state;
    assert_ptr_equal(nv_ptx_sm90a.apply, nv_ptx_edit);
    assert_non_null(strstr(nv_ptx_sm90a.version, "sm_90a"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(comments_become_lines),   TEST(targets_are_of_90_alone), TEST(text_of_something_else),
        TEST(every_entry_has_a_group), TEST(lines_may_end_otherwise), TEST(long_texts),
        TEST(without_memory),          TEST(edits_have_versions),
    };
    return RUN(tests);
}
