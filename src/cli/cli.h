/* What the files of the `clmoe` tool share: exit codes, subcommands, strict option values. */
#ifndef CLMOE_CLI_H
#define CLMOE_CLI_H

#include "error.h"
#include "options.h"

#include <stdbool.h>
#include <stdio.h>

enum { EXIT_OK = 0, EXIT_MISMATCH = 1, EXIT_BAD_INPUT = 2 };

/* The subcommands; argv[0] is the subcommand's name. Each returns the exit code. */
int devices_main(int argc, char **argv);
int run_main(int argc, char **argv);
int balance_main(int argc, char **argv);
int selftest_main(int argc, char **argv);
int train_main(int argc, char **argv);
int compare_main(int argc, char **argv);
int trace_main(int argc, char **argv);

/* Prints "clmoe COMMAND: SENTENCE" on stderr, the sentence of the last failure. */
int exit_with_error(const char *command);

/* The exit code of a command that a signal stopped; prints the signal and what is left of it. */
int exit_interrupted(const char *command, const char *what);

/*
 * The command line of a subcommand, as cli_parse() has it; *stop: --help and --version are done,
 * and there is nothing to run.
 */
clmoe_status parse_command(cli_parser *parser, int argc, char **argv, void *to, const char *usage,
                           bool *stop);

/* The usage of a command on stdout for CLI_HELP, the version for CLI_VERSION. */
void print_usage(int option, const char *usage);

#endif
