/* The `clmoe` tool: picks the subcommand. */
#include "cli.h"

#include <stdio.h>
#include <string.h>

static const char usage[] =
    "Usage: clmoe COMMAND [OPTION]...\n"
    "Runs Mixture-of-Experts layers on any OpenCL device.\n"
    "\n"
    "Commands:\n"
    "  devices    lists the OpenCL devices and the engines that would run on them\n"
    "  run        runs the MoE block of a checkpoint on a tensor and reports the routing\n"
    "  balance    runs a controller of the load on a checkpoint's router\n"
    "\n"
    "Options:\n"
    "  --help     this text; also after a command\n"
    "  --version  the version\n"
    "\n"
    "Exit status: 0 success, 1 a result off its expectation, 2 bad input or no usable device.\n";

static const struct {
    const char *name;
    int (*main)(int argc, char **argv);
} commands[] = {
    {"devices", devices_main},
    {"run", run_main},
    {"balance", balance_main},
};

void print_version(void) {
    printf("clmoe %s\n", clmoe_version());
}

int exit_with_error(const char *command) {
    fprintf(stderr, "clmoe %s: %s\n", command, clmoe_last_error());
    return EXIT_BAD_INPUT;
}

static int dispatch(int argc, char **argv) {
    if (argc < 2) {
        fputs(usage, stderr);
        return EXIT_BAD_INPUT;
    }
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].main(argc - 1, argv + 1);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        fputs(usage, stdout);
        return EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        print_version();
        return EXIT_OK;
    }
    fprintf(stderr, "clmoe: unknown command '%s'; see clmoe --help\n", argv[1]);
    return EXIT_BAD_INPUT;
}

int main(int argc, char **argv) {
    int code = dispatch(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fputs("clmoe: cannot write to standard output\n", stderr);
        return EXIT_BAD_INPUT;
    }
    return code;
}
