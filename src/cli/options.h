/*
 * Command lines, shared with clmoe-bench: a table says what options there are and which of them go
 * together, and whatever does not fit is refused by name.
 */
#ifndef CLMOE_CLI_OPTIONS_H
#define CLMOE_CLI_OPTIONS_H

#include "problem.h"

#include <stddef.h>
#include <stdint.h>

typedef struct cli_option {
    const char *name; /* without the dashes */
    bool has_value;
    bool repeats;         /* may be given more than once */
    const char *needs;    /* names with spaces between, one of which must be given too; or NULL */
    const char *excludes; /* names that it does not go with; a pair stands in one of its rows */
} cli_option;

enum { CLI_MOST_OPTIONS = 64 };

/* What cli_next() gives besides the index of an option in its table. */
enum { CLI_END = -1, CLI_HELP = -2, CLI_VERSION = -3, CLI_BAD = -4 };

/* Puts the value of an option, an index in the table, where it belongs in `to`. */
typedef bool (*cli_set_value)(void *to, int option, const char *value, problem *why);

/*
 * Start from {.options = table, .count = its rows}; for cli_parse() also .set_value, if some option
 * has a value, and .words. --help, -h and --version are in every table.
 */
typedef struct cli_parser {
    const cli_option *options;
    size_t count;
    cli_set_value set_value;
    int words;                        /* that are no options: at most */
    unsigned given[CLI_MOST_OPTIONS]; /* how often */
    const char *value;                /* of the option that cli_next() has just found */
} cli_parser;

/*
 * The next option of the command line, whose first word is the command. At CLI_END all options fit
 * together.
 */
int cli_next(cli_parser *parser, int argc, char **argv, problem *why);

/* All of it, with set_value(to, ...) for each value: what ends it, CLI_END if nothing is refused.
 */
int cli_parse(cli_parser *parser, int argc, char **argv, void *to, problem *why);

/* Whether at CLI_END there are at most that many words that are no options; the next is refused. */
bool cli_at_most(int words, int argc, char **argv, problem *why);

/* The first word that is no option, at CLI_END; NULL if there is none. */
const char *cli_word(int argc, char **argv);

/* The nearest of `count` names, `stride` bytes apart, or NULL if none is near. */
const char *cli_nearest(const char *word, const char *const *names, size_t stride, size_t count);

/* A whole number in range. */
bool cli_u32(const char *option, const char *text, uint32_t min, uint32_t max, uint32_t *value,
             problem *why);

/* Whether a text is such a number, as an f32 can hold it: not one that it rounds to 0. */
#define CLI_REALS "0 or a number from 1.2e-38 to 3.4e+38"
bool cli_is_real(const char *text, double *value);
bool cli_real(const char *option, const char *text, double *value, problem *why);

#endif
