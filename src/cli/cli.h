/* What the files of the `clmoe` tool share: exit codes, subcommands, strict option values. */
#ifndef CLMOE_CLI_H
#define CLMOE_CLI_H

#include "../status.h"

#include <stdbool.h>

enum { EXIT_OK = 0, EXIT_MISMATCH = 1, EXIT_BAD_INPUT = 2 };

/* The subcommands; argv[0] is the subcommand's name. Each returns the exit code. */
int devices_main(int argc, char **argv);
int run_main(int argc, char **argv);
int balance_main(int argc, char **argv);

/* "clmoe 0.1.0" on stdout. */
void print_version(void);

/* Prints "clmoe COMMAND: SENTENCE" on stderr, the sentence of the last failure. */
int exit_with_error(const char *command);

/* The sentence for what getopt_long() just refused; `code` is what it returned, ':' or '?'. */
clmoe_status option_refused(char **argv, int code);

/*
 * Values of options: the whole text must be a number in range, or the sentence names the option.
 * A real number is finite and not negative.
 */
clmoe_status parse_u32(const char *option, const char *text, uint32_t min, uint32_t max,
                       uint32_t *value);
clmoe_status parse_real(const char *option, const char *text, double *value);

#endif
