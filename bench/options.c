#include "options.h"
#include "../src/cli/options.h"
#include "device.h"
#include "inputs.h"
#include "peer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_REPEAT = 15, DEFAULT_COLD_REPEAT = 3, MAX_REPEAT = 100000 };

static const char usage[] =
    "Usage: clmoe-bench [OPTION]...\n"
    "Times clmoe's layer and its steps on fixed cases, next to the roofline measured in the same\n"
    "run. Engines take turns; a result is checked on the host before it is timed. NAME is a name,\n"
    "several with commas between them, or all.\n"
    "\n"
    "  --case NAME     cases (default all: those meant for the device's type)\n"
    "  --engine NAME   engines: cpu-packed, cpu-raw, nv_wgmma-packed, nv_wgmma-raw, nv_mma,\n"
    "                  nv_split, tiled, clblast, ref,\n"
    "                  peer:openblas, peer:clblast\n"
    "                  (default all: every one that runs here but ref)\n"
    "  --peer NAME     adds a peer to the engines: openblas, clblast\n"
    "  --step NAME     layer, score, topk, plan, dispatch, experts, combine, stats;\n"
    "                  routing (scores to plan), topk_to_plan (logits to plan);\n"
    "                  routing:expert-choice, routing:sinkhorn, routing:reroute (scores to plan\n"
    "                  by other policies, in the cases of routing only) (default all of these);\n"
    "                  layer:train (with noise and a capacity), layer:train+balance (the same\n"
    "                  with all statistics, losses and dlogits, in turns with it), balance\n"
    "                  (statistics, losses and dlogits alone); bias_counts (of the quantile\n"
    "                  rule: logits to counts); backward (dy to dx and the gradients of all\n"
    "                  weights), backward:data and backward:weights (its two parts), train\n"
    "                  (forward and backward); packed weights take no part\n"
    "  --dtype TYPE    f32, f16 or bf16, of x and the expert weights (default f32)\n"
    "  --gradient-type G\n"
    "                  f32, or weights: the gradients of the experts' weights are of that\n"
    "                  type, or of the weights' (default f32)\n"
    "  --pattern NAME  how tokens choose: uniform, zipf, one-expert (default uniform); or not at\n"
    "                  all: round-robin gives the pairs to the experts by turns, for the steps\n"
    "                  layer, plan, dispatch, experts, combine and stats\n"
    "  --tokens T      of a case with several batch sizes, this one alone\n"
    "  --device D      the device: its number in clmoe devices, or part of its name or its\n"
    "                  platform's (default: the first GPU, else 0)\n"
    "  --repeat N      medians of N runs (default 15; rows of long runs stop earlier)\n"
    "  --cold          times the creation of context and layer instead, in fresh processes:\n"
    "                  create_cold without caches, create_warm with the driver's caches filled,\n"
    "                  create_cached with clmoe's program cache alone (default --repeat 3)\n"
    "  --memory        prints MiB of device memory instead: the experts' weights, x and y, and\n"
    "                  what clmoe_layer_memory() says without and with desc.training, and then\n"
    "                  with desc.recompute too\n"
    "  --tune FILE     finds tile sizes for the engines (cpu, tiled) on a case with experts\n"
    "                  (default: one with many rows per expert), and writes them to FILE, for\n"
    "                  clmoe_context_options.tuning_file; what FILE has of other devices stays;\n"
    "                  - is standard output\n"
    "  --json FILE     writes an array of rows to FILE, - for standard output, instead of a table\n"
    "  --force         changes the FILE of --json or --tune if there is one\n"
    "  --markdown      prints a section of bench/RESULTS.md instead of a table\n"
    "  --help          this text, with the cases\n"
    "  --version       the version\n"
    "\n"
    "GB/s and GFLOP/s count what a step cannot avoid: inputs and touched weights read once, outputs\n"
    "written once. % of peak is the time which those take at the measured bandwidth and f32\n"
    "multiply-add rate, whichever is longer, over the median; - (in JSON null) for GEMMs on matrix units,\n"
    "which that rate does not bound. Steps on what a cache holds can pass 100; before layer and\n"
    "experts the caches are filled with other data.\n"
    "\n"
    "Exit status: 0 success, 1 a result was wrong, 2 bad input or nothing to time, 128 + N stopped\n"
    "by signal N, after the rows until then were written.\n"
    "\n"
    "Cases:\n";

static void print_help(void) {
    static const char *const homes[] = {"CPU", "GPU", "any", "by name"};
    fputs(usage, stdout);
    for (const bench_case *c = bench_cases; c->name; c++)
        printf("  %-16s T %-6u D %-5u H %-5u E %-4u K %-3u %s%s\n", c->name, (unsigned)c->tokens,
               (unsigned)c->dim, (unsigned)c->hidden_dim, (unsigned)c->experts, (unsigned)c->top_k,
               homes[c->home], c->routing_only ? ", routing only" : "");
}

/* ---- Lists ----------------------------------------------------------------------------------- */

bool list_has(const char *list, const char *name) {
    const size_t length = strlen(name);
    while (*list) {
        const size_t item = strcspn(list, ",");
        if (item == length && memcmp(list, name, length) == 0)
            return true;
        list += item + (list[item] == ',');
    }
    return false;
}

bool list_is_all(const char *list) {
    return list_has(list, "all");
}

bool options_choose(const bench_options *options, const bench_case *c, bool cpu) {
    const bool fits = c->home == CASE_ANY || c->home == (cpu ? CASE_CPU : CASE_GPU);
    if (options->tokens != 0 && options->tokens != c->tokens)
        return false;
    return list_has(options->cases, c->name) || (list_is_all(options->cases) && fits);
}

/* Every item of a list must be "all", or one that `known` knows. */
static clmoe_status check_list(const char *option, const char *list,
                               bool (*known)(const char *name)) {
    char name[64];
    while (true) {
        const size_t length = strcspn(list, ",");
        snprintf(name, sizeof name, "%.*s", (int)length, list);
        if (strcmp(name, "all") != 0 && !known(name))
            return cli_fail(CLMOE_INVALID_ARGUMENT, "%s '%s' is unknown; see --help", option, name);
        if (list[length] == '\0')
            return CLMOE_SUCCESS;
        list += length + 1;
    }
}

static bool known_case(const char *name) {
    for (const bench_case *c = bench_cases; c->name; c++)
        if (strcmp(c->name, name) == 0)
            return true;
    return false;
}

static bool known_step(const char *name) {
    for (int step = 0; step < STEP_COUNT; step++)
        if (strcmp(step_names[step], name) == 0)
            return true;
    return false;
}

/* Of a pattern that gives the choice, the steps that take it. */
static clmoe_status check_pattern(const bench_options *o) {
    for (int step = 0; step < STEP_COUNT; step++)
        if (list_has(o->steps, step_names[step]) && !pattern_has_step(o->pattern, (bench_step)step))
            return cli_fail(CLMOE_INVALID_ARGUMENT, "--step %s does not go with --pattern %s",
                            step_names[step], pattern_names[o->pattern]);
    return CLMOE_SUCCESS;
}

/* ---- Cases ----------------------------------------------------------------------------------- */

/* Tokens of the cases that are chosen by name, once each: "1, 37". */
static void tokens_text(const bench_options *options, bool cpu, char *text, size_t size) {
    bench_options any = *options;
    size_t used = 0;
    any.tokens = 0;
    text[0] = '\0';
    for (const bench_case *c = bench_cases; c->name && used < size; c++) {
        bool known = !options_choose(&any, c, cpu);
        for (const bench_case *b = bench_cases; b < c && !known; b++)
            known = b->tokens == c->tokens && options_choose(&any, b, cpu);
        if (!known)
            used += (size_t)snprintf(text + used, size - used, "%s%u", used > 0 ? ", " : "",
                                     (unsigned)c->tokens);
    }
}

static bool has_chosen_step(const bench_options *options, const bench_case *c) {
    for (int step = 0; step < STEP_COUNT; step++)
        if (case_has_step(c, (bench_step)step) &&
            pattern_has_step(options->pattern, (bench_step)step) &&
            (list_is_all(options->steps) || list_has(options->steps, step_names[step])))
            return true;
    return false;
}

clmoe_status options_check_cases(const bench_options *options, bool cpu) {
    bool chosen = false, step = false;
    char tokens[512];
    for (const bench_case *c = bench_cases; c->name; c++)
        if (options_choose(options, c, cpu)) {
            chosen = true;
            step = step || has_chosen_step(options, c);
        }
    if (!chosen) {
        tokens_text(options, cpu, tokens, sizeof tokens);
        return cli_fail(CLMOE_INVALID_ARGUMENT, "--tokens is %u, but the chosen cases have %s",
                        (unsigned)options->tokens, tokens);
    }
    return step ? CLMOE_SUCCESS
                : cli_fail(CLMOE_INVALID_ARGUMENT, "--step %s is in none of the cases %s",
                           options->steps, options->cases);
}

/* ---- Values ---------------------------------------------------------------------------------- */

/* The index of `text` among `count` names. */
static clmoe_status parse_name(const char *option, const char *text, const char *const *names,
                               size_t count, size_t *index) {
    for (*index = 0; *index < count; (*index)++)
        if (strcmp(names[*index], text) == 0)
            return CLMOE_SUCCESS;
    return cli_fail(CLMOE_INVALID_ARGUMENT, "%s '%s' is unknown; see --help", option, text);
}

static clmoe_status parse_peer(const char *text, const char **peer) {
    static const char *const names[] = {PEER_OPENBLAS, PEER_CLBLAST};
    for (size_t i = 0; i < COUNT_OF(names); i++)
        if (strcmp(text, names[i] + strlen("peer:")) == 0) {
            *peer = names[i];
            return CLMOE_SUCCESS;
        }
    return cli_fail(CLMOE_INVALID_ARGUMENT, "--peer '%s' is unknown; see --help", text);
}

enum {
    OPT_CASE,
    OPT_ENGINE,
    OPT_PEER,
    OPT_STEP,
    OPT_DTYPE,
    OPT_GRADIENT_TYPE,
    OPT_PATTERN,
    OPT_TOKENS,
    OPT_DEVICE,
    OPT_REPEAT,
    OPT_COLD,
    OPT_MEMORY,
    OPT_TUNE,
    OPT_MARKDOWN,
    OPT_JSON,
    OPT_FORCE,
};

static const cli_option table[] = {
    [OPT_CASE] = {.name = "case", .has_value = true},
    [OPT_ENGINE] = {.name = "engine", .has_value = true},
    [OPT_PEER] = {.name = "peer", .has_value = true, .excludes = "cold memory tune"},
    [OPT_STEP] = {.name = "step", .has_value = true, .excludes = "cold memory tune"},
    [OPT_DTYPE] = {.name = "dtype", .has_value = true},
    [OPT_GRADIENT_TYPE] = {.name = "gradient-type",
                           .has_value = true,
                           .excludes = "cold memory tune"},
    [OPT_PATTERN] = {.name = "pattern", .has_value = true, .excludes = "cold memory"},
    [OPT_TOKENS] = {.name = "tokens", .has_value = true},
    [OPT_DEVICE] = {.name = "device", .has_value = true},
    [OPT_REPEAT] = {.name = "repeat", .has_value = true, .excludes = "memory"},
    [OPT_COLD] = {.name = "cold", .excludes = "memory tune"},
    [OPT_MEMORY] = {.name = "memory", .excludes = "tune json markdown"},
    [OPT_TUNE] = {.name = "tune", .has_value = true, .excludes = "json markdown"},
    [OPT_MARKDOWN] = {.name = "markdown"},
    [OPT_JSON] = {.name = "json", .has_value = true, .excludes = "markdown"},
    [OPT_FORCE] = {.name = "force", .needs = "json tune"},
};

static clmoe_status set_named(bench_options *o, int option, const char *text) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t index = 0;
    switch (option) {
    case OPT_DTYPE:
        TRY(parse_name("--dtype", text, type_names, COUNT_OF(type_names), &index));
        o->type = (clmoe_type)index;
        break;
    case OPT_GRADIENT_TYPE:
        TRY(parse_name("--gradient-type", text, gradient_names, COUNT_OF(gradient_names), &index));
        o->gradient_type = (clmoe_gradient_type)index;
        break;
    case OPT_PATTERN:
        TRY(parse_name("--pattern", text, pattern_names, COUNT_OF(pattern_names), &index));
        o->pattern = (case_pattern)index;
        break;
    case OPT_CASE:
        o->cases = text;
        return check_list("--case", text, known_case);
    case OPT_STEP:
        o->steps = text;
        return check_list("--step", text, known_step);
    case OPT_PEER:
        return parse_peer(text, &o->peer);
    default:
        o->engines = text;
        break;
    }
done:
    return status;
}

static clmoe_status set_value(bench_options *o, int option, const char *text) {
    problem why;
    switch (option) {
    case OPT_TOKENS:
        return checked(cli_u32("--tokens", text, 1, UINT32_MAX, &o->tokens, &why), &why);
    case OPT_REPEAT:
        return checked(cli_u32("--repeat", text, 1, MAX_REPEAT, &o->repeat, &why), &why);
    case OPT_DEVICE:
        o->device = text;
        return CLMOE_SUCCESS;
    case OPT_TUNE:
    case OPT_JSON:
        o->file.path = text;
        return CLMOE_SUCCESS;
    default:
        return set_named(o, option, text);
    }
}

static bool check_file(bench_options *o, const cli_parser *parser, problem *why) {
    if (o->file.path == NULL)
        return true;
    return output_check(&o->file, o->tune ? "--tune" : "--json", o->file.path,
                        parser->given[OPT_FORCE] > 0, why);
}

static clmoe_status set_modes(bench_options *o, const cli_parser *parser) {
    problem why;
    o->cold = parser->given[OPT_COLD] > 0;
    o->memory = parser->given[OPT_MEMORY] > 0;
    o->tune = parser->given[OPT_TUNE] > 0;
    o->markdown = parser->given[OPT_MARKDOWN] > 0;
    o->json = parser->given[OPT_JSON] > 0;
    if (o->repeat == 0)
        o->repeat = o->cold ? DEFAULT_COLD_REPEAT : DEFAULT_REPEAT;
    return checked(check_file(o, parser, &why), &why);
}

parse_result options_parse(int argc, char **argv, bench_options *o) {
    clmoe_status status = CLMOE_SUCCESS;
    cli_parser parser = {.options = table, .count = COUNT_OF(table)};
    problem why;
    int option;
    *o = (bench_options){.cases = "all", .engines = "all", .steps = "all"};
    while ((option = cli_next(&parser, argc, argv, &why)) >= 0)
        if (table[option].has_value)
            TRY(set_value(o, option, parser.value));
    if (option == CLI_HELP) {
        print_help();
        return PARSE_STOP;
    }
    if (option == CLI_VERSION) {
        printf("clmoe-bench %s\n", clmoe_version());
        return PARSE_STOP;
    }
    TRY(checked(option == CLI_END && cli_at_most(0, argc, argv, &why), &why));
    TRY(check_pattern(o));
    TRY(set_modes(o, &parser));
done:
    return status == CLMOE_SUCCESS ? PARSE_RUN : PARSE_BAD;
}
