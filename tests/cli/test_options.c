/* Command lines by a table: every pair of options, and every mistake by name. */
#include "support.h"

#include "../../src/cli/options.h"

#include <getopt.h>
#include <stdio.h>
#include <string.h>

enum { A, B, C, D, E, F, OPTIONS };

static const cli_option table[OPTIONS] = {
    [A] = {.name = "alpha", .has_value = true},
    [B] = {.name = "bravo", .excludes = "delta alpha"},
    [C] = {.name = "charlie", .has_value = true, .repeats = true},
    [D] = {.name = "delta"},
    [E] = {.name = "echo", .needs = "alpha charlie"},
    [F] = {.name = "del"}, /* which another name begins with */
};

/* What the table above says, once more. */
static bool goes(int a, int b) {
    const bool excluded = (a == B && (b == D || b == A)) || (b == B && (a == D || a == A));
    const bool lonely = (a == E && b != A && b != C) || (b == E && a != A && a != C);
    return !excluded && !lonely;
}

/* Parses the words behind the command's name; what cli_next() gives at last. */
static int parse(const char *const *words, cli_parser *parser, problem *why) {
    char *argv[16] = {(char *)"command"};
    int argc = 1, option;
    while (words[argc - 1] != NULL) {
        argv[argc] = (char *)words[argc - 1];
        argc++;
    }
    *parser = (cli_parser){.options = table, .count = OPTIONS};
    why->text[0] = '\0';
    optind = 0; /* anew */
    while ((option = cli_next(parser, argc, argv, why)) >= 0)
        assert_true((parser->value != NULL) == table[option].has_value);
    return option;
}

static size_t add(const char **words, size_t count, int option) {
    static char dashed[OPTIONS][16];
    snprintf(dashed[option], sizeof dashed[option], "--%s", table[option].name);
    words[count++] = dashed[option];
    if (table[option].has_value)
        words[count++] = "value";
    return count;
}

static void all_pairs(void **state) {
    (void)state;
    for (int a = 0; a < OPTIONS; a++)
        for (int b = 0; b < OPTIONS; b++) {
            const char *words[8] = {NULL};
            cli_parser parser;
            problem why;
            add(words, add(words, 0, a), b);
            const bool right = a == b ? table[a].repeats : goes(a, b);
            const int end = parse(words, &parser, &why);
            if (end != (right ? CLI_END : CLI_BAD))
                fail_msg("--%s --%s: %d, %s", table[a].name, table[b].name, end, why.text);
            if (!right) /* one of the two is named */
                assert_true(strstr(why.text, table[a].name) || strstr(why.text, table[b].name));
            else
                assert_true(parser.given[a] && parser.given[b]);
        }
}

static void refused(const char *word, const char *value, const char *sentence) {
    const char *words[] = {word, value, NULL};
    cli_parser parser;
    problem why;
    assert_int_equal(parse(words, &parser, &why), CLI_BAD);
    assert_string_equal(why.text, sentence);
}

static void mistakes(void **state) {
    (void)state;
    refused("--alhpa", NULL, "unknown option '--alhpa'; did you mean --alpha?");
    refused("--detla=1", NULL, "unknown option '--detla=1'; did you mean --delta?");
    refused("--zulu", NULL, "unknown option '--zulu'; see --help");
    refused("--xe", NULL, "unknown option '--xe'; see --help"); /* no letter less from --del */
    refused("-x", NULL, "unknown option '-x'; see --help");
    refused("--alpha", NULL, "option '--alpha' needs a value");
    refused("--delta=1", NULL, "option '--delta=1' takes no value");
    refused("--delta", "--delta", "--delta is given twice");
    refused("--echo", NULL, "--echo needs --alpha or --charlie");
    refused("--delta", "--bravo", "--bravo does not go with --delta");
}

static void words_and_help(void **state) {
    (void)state;
    cli_parser parser;
    problem why;
    char *argv[] = {(char *)"command", (char *)"one", (char *)"two", NULL};
    assert_int_equal(parse((const char *[]){"--help", NULL}, &parser, &why), CLI_HELP);
    assert_int_equal(parse((const char *[]){"-h", NULL}, &parser, &why), CLI_HELP);
    assert_int_equal(parse((const char *[]){"--version", NULL}, &parser, &why), CLI_VERSION);
    parser = (cli_parser){.options = table, .count = OPTIONS};
    optind = 0;
    assert_int_equal(cli_next(&parser, 3, argv, &why), CLI_END);
    assert_string_equal(cli_word(3, argv), "one");
    assert_true(cli_at_most(2, 3, argv, &why));
    assert_false(cli_at_most(1, 3, argv, &why));
    assert_string_equal(why.text, "unexpected argument 'two'; see --help");
}

/* The values that cli_parse() has given, and what refuses. */
typedef struct values {
    const char *of[OPTIONS];
    int refused;
} values;

static bool set_value(void *to, int option, const char *value, problem *why) {
    values *v = to;
    v->of[option] = value;
    return option != v->refused || problem_set(why, "no %s", value);
}

static void whole_lines(void **state) {
    (void)state;
    for (int words = 0; words < 3; words++) {
        char *argv[] = {(char *)"command",
                        (char *)"word",
                        (char *)"--alpha",
                        (char *)"some",
                        (char *)"--delta",
                        (char *)"more",
                        NULL};
        cli_parser parser = {
            .options = table, .count = OPTIONS, .set_value = set_value, .words = words};
        values v = {.refused = -1};
        problem why;
        optind = 0;
        assert_int_equal(cli_parse(&parser, 6, argv, &v, &why), words < 2 ? CLI_BAD : CLI_END);
        assert_string_equal(v.of[A], "some");
        assert_null(v.of[D]);
        assert_int_equal(parser.given[D], 1);
        if (words < 2)
            assert_non_null(strstr(why.text, words < 1 ? "'word'" : "'more'"));
    }
    char *argv[] = {(char *)"command", (char *)"--alpha", (char *)"some", (char *)"--delta", NULL};
    cli_parser parser = {.options = table, .count = OPTIONS, .set_value = set_value};
    values v = {.refused = A};
    problem why;
    optind = 0;
    assert_int_equal(cli_parse(&parser, 4, argv, &v, &why), CLI_BAD);
    assert_string_equal(why.text, "no some");
    assert_int_equal(parser.given[D], 0);
}

static void numbers(void **state) {
    (void)state;
    const char *const bad[] = {"",   "-1",  "+1", "1x",          "x",       " 1", "1 ",
                               "1.", "1e3", "0x", "99999999999", "1000001", "0"};
    const char *const bad_reals[] = {"",       "-1",    "-0",    "nan",    "inf", "1e",  "1e999",
                                     "3.5e38", "1e-50", "1e-40", "1e-400", "0x1", "1,5", " 1"};
    uint32_t u32 = 0;
    double real = 0;
    problem why;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_false(cli_u32("--n", bad[i], 1, 1000000, &u32, &why));
        assert_non_null(strstr(why.text, "--n is '"));
    }
    for (size_t i = 0; i < sizeof bad_reals / sizeof bad_reals[0]; i++) {
        assert_false(cli_real("--r", bad_reals[i], &real, &why));
        assert_non_null(strstr(why.text, "--r is '"));
    }
    assert_true(cli_u32("--n", "4294967295", 0, UINT32_MAX, &u32, &why) && u32 == UINT32_MAX);
    assert_false(cli_u32("--n", "4294967296", 0, UINT32_MAX, &u32, &why));
    assert_true(cli_real("--r", "1e-3", &real, &why) && real == 1e-3);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_pairs), cmocka_unit_test(mistakes),
                                       cmocka_unit_test(words_and_help),
                                       cmocka_unit_test(whole_lines), cmocka_unit_test(numbers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
