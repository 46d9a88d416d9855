/* The command line of clmoe-bench. */
#ifndef BENCH_OPTIONS_H
#define BENCH_OPTIONS_H

#include "../src/cli/output.h"
#include "bench.h"
#include "cases.h"

typedef struct bench_options {
    const char *cases, *engines, *steps; /* names separated by commas, or "all" */
    output file;                         /* of --json or --tune; without a path a table */
    const char *peer;                    /* NULL: none but those that `engines` names */
    const char *device;                  /* NULL: the first GPU, else the first device */
    clmoe_type type;
    clmoe_gradient_type gradient_type; /* of the weights */
    case_pattern pattern;
    uint32_t tokens; /* 0: any */
    uint32_t repeat;
    bool markdown; /* a section for RESULTS.md instead of a table */
    bool json, cold, memory, tune;
} bench_options;

typedef enum parse_result { PARSE_RUN, PARSE_STOP, PARSE_BAD } parse_result;

/* PARSE_STOP after --help and --version; PARSE_BAD leaves a sentence. */
parse_result options_parse(int argc, char **argv, bench_options *options);

/* Whether `name` is one of a list of names; whether "all" is. */
bool list_has(const char *list, const char *name);
bool list_is_all(const char *list);

/*
 * Whether they choose any case on a device of this kind; the sentence says which option is why not.
 */
clmoe_status options_check_cases(const bench_options *options, bool cpu);

/* Whether the options choose a case of the table, on a device of this kind. */
bool options_choose(const bench_options *options, const bench_case *c, bool cpu);

#endif
