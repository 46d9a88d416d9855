/* The `clmoe` tool: picks the subcommand. */
#include "cli.h"
#include "interrupt.h"
#include "output.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static const char usage[] =
    "Usage: clmoe COMMAND [OPTION]...\n"
    "Runs Mixture-of-Experts layers on any OpenCL device.\n"
    "\n"
    "Commands:\n"
    "  devices         lists the OpenCL devices and the engines that would run on them\n"
    "  run             runs the MoE block of a checkpoint on a tensor and reports the routing\n"
    "  balance         runs a controller of the load on a checkpoint's router\n"
    "  train           trains a small language model and shows what balancing does\n"
    "  compare         puts such runs side by side\n"
    "  trace           shows which tokens the experts of a trained model get\n"
    "  selftest        compares what a device computes with the host in double precision\n"
    "  help [COMMAND]  this text, or that of a command\n"
    "  version         the version\n"
    "\n"
    "Options:\n"
    "  --help     this text; also after a command\n"
    "  --version  the version\n"
    "\n"
    "Exit status: 0 success, 1 a result off its expectation, 2 bad input or no usable device,\n"
    "128 + N stopped by signal N, after what there was by then was written.\n";

static int help_main(int argc, char **argv);
static int version_main(int argc, char **argv);

static const struct command {
    const char *name;
    int (*main)(int argc, char **argv);
} commands[] = {
    {"devices", devices_main},   {"run", run_main},     {"balance", balance_main},
    {"selftest", selftest_main}, {"train", train_main}, {"compare", compare_main},
    {"trace", trace_main},       {"help", help_main},   {"version", version_main},
};

enum { COMMANDS = sizeof commands / sizeof commands[0] };

static void print_version(void) {
    printf("clmoe %s\n", clmoe_version());
}

void print_usage(int option, const char *text) {
    if (option == CLI_HELP)
        fputs(text, stdout);
    else
        print_version();
}

clmoe_status parse_command(cli_parser *parser, int argc, char **argv, void *to, const char *text,
                           bool *stop) {
    problem why;
    const int end = cli_parse(parser, argc, argv, to, &why);
    *stop = end == CLI_HELP || end == CLI_VERSION;
    if (*stop)
        print_usage(end, text);
    return checked(*stop || end == CLI_END, &why);
}

int exit_with_error(const char *command) {
    fprintf(stderr, "clmoe %s: %s\n", command, cli_error());
    return EXIT_BAD_INPUT;
}

int exit_interrupted(const char *command, const char *what) {
    problem why;
    interrupt_problem(&why, what);
    fprintf(stderr, "clmoe %s: %s\n", command, why.text);
    return interrupt_exit_code();
}

static const struct command *find_command(const char *name) {
    for (size_t i = 0; i < COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0)
            return &commands[i];
    return NULL;
}

static int unknown_command(const char *name) {
    const char *near = cli_nearest(name, &commands[0].name, sizeof commands[0], COMMANDS);
    cli_fail(CLMOE_INVALID_ARGUMENT, "unknown %s '%s'; ", name[0] == '-' ? "option" : "command",
             name);
    fprintf(stderr, "clmoe: %s%s%s\n", cli_error(),
            near ? "did you mean clmoe " : "see clmoe --help", near ? near : "");
    return EXIT_BAD_INPUT;
}

static int version_main(int argc, char **argv) {
    if (argc > 1) {
        cli_fail(CLMOE_INVALID_ARGUMENT, "unexpected argument '%s'", argv[1]);
        return exit_with_error("version");
    }
    print_version();
    return EXIT_OK;
}

static int help_main(int argc, char **argv) {
    char option[] = "--help", *words[] = {argc > 1 ? argv[1] : argv[0], option, NULL};
    const struct command *command = argc > 1 ? find_command(argv[1]) : NULL;
    if (argc > 2) {
        cli_fail(CLMOE_INVALID_ARGUMENT, "unexpected argument '%s'", argv[2]);
        return exit_with_error("help");
    }
    if (argc > 1 && command == NULL)
        return unknown_command(argv[1]);
    if (command != NULL && command->main != help_main && command->main != version_main)
        return command->main(2, words);
    fputs(usage, stdout);
    return EXIT_OK;
}

static int dispatch(int argc, char **argv) {
    if (argc < 2) {
        fputs(usage, stderr);
        return EXIT_BAD_INPUT;
    }
    const struct command *command = find_command(argv[1]);
    if (command != NULL)
        return command->main(argc - 1, argv + 1);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
        return help_main(argc - 1, argv + 1);
    if (strcmp(argv[1], "--version") == 0)
        return version_main(argc - 1, argv + 1);
    return unknown_command(argv[1]);
}

int main(int argc, char **argv) {
    output_guard_streams();
    interrupt_catch();
    int code = dispatch(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "clmoe: cannot write to standard output: %s\n", strerror(errno));
        return EXIT_BAD_INPUT;
    }
    return code;
}
