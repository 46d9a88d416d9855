#include "options.h"

#include <errno.h>
#include <float.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Names ----------------------------------------------------------------------------------- */

enum { MOST_LETTERS = 40, NEAR = 2 };

/* getopt_long()'s codes, above all characters: of an option, this and its index. */
enum { CODE_VERSION = 256, CODE_OPTION };

/* Letters to add, drop or change between two words; too many for long ones. */
static size_t distance(const char *a, size_t length, const char *b) {
    size_t row[MOST_LETTERS + 1], other = strlen(b);
    if (length > MOST_LETTERS || other > MOST_LETTERS)
        return MOST_LETTERS;
    for (size_t j = 0; j <= other; j++)
        row[j] = j;
    for (size_t i = 1; i <= length; i++) {
        size_t before = row[0];
        row[0] = i;
        for (size_t j = 1; j <= other; j++) {
            const size_t changed = before + (a[i - 1] != b[j - 1]);
            const size_t added = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            before = row[j];
            row[j] = changed < added ? changed : added;
        }
    }
    return row[other];
}

const char *cli_nearest(const char *word, const char *const *names, size_t stride, size_t count) {
    const char *best = NULL;
    const size_t length = strcspn(word, "=");
    size_t least = NEAR + 1;
    for (size_t i = 0; i < count; i++) {
        const char *const *name = (const void *)((const char *)names + i * stride);
        const size_t apart = distance(word, length, *name);
        if (apart < least && apart < length) {
            least = apart;
            best = *name;
        }
    }
    return best;
}

static bool unknown_option(const cli_parser *p, const char *word, problem *why) {
    const char *near =
        cli_nearest(word + strspn(word, "-"), &p->options[0].name, sizeof p->options[0], p->count);
    if (near != NULL)
        return problem_set(why, "unknown option '%s'; did you mean --%s?", word, near);
    return problem_set(why, "unknown option '%s'; see --help", word);
}

/* What getopt_long() refused. */
static int refuse(const cli_parser *p, char **argv, int code, problem *why) {
    const char *word = argv[optind - 1];
    if (code == ':')
        problem_set(why, "option '%s' needs a value", word);
    else if (optopt >= CODE_VERSION)
        problem_set(why, "option '%s' takes no value", word);
    else if (optopt != 0)
        problem_set(why, "unknown option '-%c'; see --help", optopt);
    else
        unknown_option(p, word, why);
    return CLI_BAD;
}

/* ---- What goes together ---------------------------------------------------------------------- */

/* Whether `name` is one of a list of words with spaces between. */
static bool has_word(const char *list, const char *name) {
    const size_t length = strlen(name);
    while (list != NULL && *list != '\0') {
        const size_t word = strcspn(list, " ");
        if (word == length && memcmp(list, name, length) == 0)
            return true;
        list += word + (list[word] == ' ');
    }
    return false;
}

static bool check_excluded(const cli_parser *p, size_t row, problem *why) {
    for (size_t i = 0; i < p->count; i++)
        if (p->given[i] && has_word(p->options[row].excludes, p->options[i].name))
            return problem_set(why, "--%s does not go with --%s", p->options[row].name,
                               p->options[i].name);
    return true;
}

static bool check_needed(const cli_parser *p, size_t row, problem *why) {
    const char *needs = p->options[row].needs, *rest = needs;
    char names[256] = "";
    for (size_t i = 0; i < p->count; i++)
        if (p->given[i] && has_word(needs, p->options[i].name))
            return true;
    while (rest != NULL && *rest != '\0') {
        const size_t word = strcspn(rest, " "), used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s--%.*s", used > 0 ? " or " : "", (int)word,
                 rest);
        rest += word + (rest[word] == ' ');
    }
    return needs == NULL || problem_set(why, "--%s needs %s", p->options[row].name, names);
}

static bool check_together(const cli_parser *p, problem *why) {
    for (size_t i = 0; i < p->count; i++)
        if (p->given[i] > 1 && !p->options[i].repeats)
            return problem_set(why, "--%s is given twice", p->options[i].name);
    for (size_t i = 0; i < p->count; i++)
        if (p->given[i] && !(check_excluded(p, i, why) && check_needed(p, i, why)))
            return false;
    return true;
}

/* ---- Parsing --------------------------------------------------------------------------------- */

static void long_options(const cli_parser *p, struct option *rows) {
    for (size_t i = 0; i < p->count; i++)
        rows[i] =
            (struct option){.name = p->options[i].name,
                            .has_arg = p->options[i].has_value ? required_argument : no_argument,
                            .val = (int)i + CODE_OPTION};
    rows[p->count] = (struct option){.name = "help", .val = 'h'};
    rows[p->count + 1] = (struct option){.name = "version", .val = CODE_VERSION};
    rows[p->count + 2] = (struct option){.name = NULL};
}

int cli_next(cli_parser *p, int argc, char **argv, problem *why) {
    struct option rows[CLI_MOST_OPTIONS + 3];
    long_options(p, rows);
    opterr = 0;
    const int code = getopt_long(argc, argv, ":h", rows, NULL);
    if (code == 'h')
        return CLI_HELP;
    if (code == CODE_VERSION)
        return CLI_VERSION;
    if (code == -1)
        return check_together(p, why) ? CLI_END : CLI_BAD;
    if (code == ':' || code == '?')
        return refuse(p, argv, code, why);
    const int index = code - CODE_OPTION;
    p->given[index]++;
    p->value = optarg;
    return index;
}

int cli_parse(cli_parser *p, int argc, char **argv, void *to, problem *why) {
    int option;
    while ((option = cli_next(p, argc, argv, why)) >= 0)
        if (p->options[option].has_value && !p->set_value(to, option, p->value, why))
            return CLI_BAD;
    if (option == CLI_END && !cli_at_most(p->words, argc, argv, why))
        return CLI_BAD;
    return option;
}

bool cli_at_most(int words, int argc, char **argv, problem *why) {
    if (optind + words >= argc)
        return true;
    return problem_set(why, "unexpected argument '%s'; see --help", argv[optind + words]);
}

const char *cli_word(int argc, char **argv) {
    return optind < argc ? argv[optind] : NULL;
}

/* ---- Values ---------------------------------------------------------------------------------- */

bool cli_u32(const char *option, const char *text, uint32_t min, uint32_t max, uint32_t *value,
             problem *why) {
    const size_t length = strlen(text);
    const bool digits = length > 0 && length <= 10 && strspn(text, "0123456789") == length;
    const unsigned long long number = digits ? strtoull(text, NULL, 10) : 0;
    if (!digits || number < min || number > max)
        return problem_set(why, "%s is '%s', which is not a whole number from %u to %u", option,
                           text, (unsigned)min, (unsigned)max);
    *value = (uint32_t)number;
    return true;
}

bool cli_is_real(const char *text, double *value) {
    const size_t length = strlen(text);
    char *end = NULL;
    errno = 0;
    const double number = strtod(text, &end);
    const bool whole =
        length > 0 && strspn(text, "0123456789.+-eE") == length && end == text + length;
    const bool is_float = number == 0 || (number >= (double)FLT_MIN && number <= (double)FLT_MAX);
    if (!whole || !is_float || errno == ERANGE || signbit(number))
        return false;
    *value = number;
    return true;
}

bool cli_real(const char *option, const char *text, double *value, problem *why) {
    return cli_is_real(text, value) ||
           problem_set(why, "%s is '%s', which is not " CLI_REALS, option, text);
}
