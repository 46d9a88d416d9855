#define _XOPEN_SOURCE 700 /* nftw */
#include "cold.h"
#include "../src/cli/interrupt.h"
#include "engines.h"

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* What a child process found. */
typedef struct start {
    clmoe_status status;
    bool none; /* there is no such engine */
    double ms;
    bench_row row;
    char error[256];
} start;

static const bench_case *first_case(const bench_options *options, bool cpu) {
    for (const bench_case *c = bench_cases; c->name; c++)
        if (options_choose(options, c, cpu))
            return c;
    return NULL;
}

static void describe(const bench_options *options, const bench_device *device,
                     const bench_engine *engine, const bench_case *c, bench_row *row) {
    *row = (bench_row){.case_name = c->name,
                       .pattern = pattern_names[options->pattern],
                       .dtype = type_names[options->type],
                       .tokens = c->tokens,
                       .dim = c->dim,
                       .hidden_dim = c->hidden_dim,
                       .experts = c->experts,
                       .top_k = c->top_k,
                       .checked = true};
    snprintf(row->engine, sizeof row->engine, "%s", engine->name);
    snprintf(row->device, sizeof row->device, "%s", device->name);
    snprintf(row->driver, sizeof row->driver, "%s", device->driver);
}

/* The caches of a process: of the drivers, and clmoe's or NULL. */
typedef struct cache_use {
    const char *drivers, *programs;
} cache_use;

static clmoe_status time_creation(bench_device *device, const inputs *in, const char *engine,
                                  const char *cache_dir, double *ms) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc desc = inputs_desc(in, engine);
    clmoe_context_options context_options;
    clmoe_context *context = NULL;
    clmoe_layer *layer = NULL;
    clmoe_context_options_init(&context_options);
    context_options.cache_dir = cache_dir;
    const double begin = host_ms();
    TRY(LIB(clmoe_context_create(device->cl, device->id, &context_options, &context)));
    TRY(LIB(clmoe_layer_create(context, &desc, &layer)));
    *ms = host_ms() - begin;
done:
    clmoe_layer_destroy(layer);
    clmoe_context_destroy(context);
    return status;
}

/* In the child: engine number `index` of those that the options choose, peers left out. */
static clmoe_status create_once(const bench_options *options, size_t index, const char *cache_dir,
                                start *result) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_device device = {0};
    engine_list list = {.count = 0};
    TRY(device_open(options->device, &device));
    TRY(options_check_cases(options, device.cpu));
    TRY(engines_choose(options, &device, &list));
    const bench_case *c = first_case(options, device.cpu);
    result->none = index >= list.count || engine_is_peer(&list.engines[index]) || !c;
    if (result->none)
        goto done;
    const inputs in = {.of = *c, .type = options->type};
    describe(options, &device, &list.engines[index], c, &result->row);
    TRY(time_creation(&device, &in, list.engines[index].library, cache_dir, &result->ms));
done:
    device_close(&device);
    return status;
}

/* The directory of every cache that a driver may keep. */
static void use_driver_caches(const char *directory) {
    static const char *const variables[] = {"POCL_CACHE_DIR", "CUDA_CACHE_PATH", "NEO_CACHE_DIR",
                                            "MESA_SHADER_CACHE_DIR"};
    for (size_t i = 0; i < COUNT_OF(variables); i++)
        setenv(variables[i], directory, 1);
}

static _Noreturn void child(const bench_options *options, size_t index, cache_use caches, int to) {
    start result = {0};
    interrupt_release();
    use_driver_caches(caches.drivers);
    result.status = create_once(options, index, caches.programs, &result);
    snprintf(result.error, sizeof result.error, "%s", cli_error());
    _exit(write(to, &result, sizeof result) == (ssize_t)sizeof result ? 0 : 1);
}

static clmoe_status in_child(const bench_options *options, size_t index, cache_use caches,
                             start *result) {
    int ends[2];
    size_t got = 0;
    ssize_t bytes = 1;
    if (pipe(ends) != 0)
        return cli_fail(CLMOE_IO, "no pipe: %s", strerror(errno));
    const pid_t pid = fork();
    if (pid == 0)
        child(options, index, caches, ends[1]);
    close(ends[1]);
    while (pid > 0 && got < sizeof *result && bytes > 0) {
        bytes = read(ends[0], (char *)result + got, sizeof *result - got);
        got += bytes > 0 ? (size_t)bytes : 0;
    }
    close(ends[0]);
    if (pid > 0)
        waitpid(pid, NULL, 0);
    if (got != sizeof *result && interrupt_signal() != 0)
        return bench_go_on();
    if (got != sizeof *result)
        return cli_fail(CLMOE_IO, "a process that creates a layer failed");
    if (result->status != CLMOE_SUCCESS)
        return cli_fail(result->status, "%s", result->error);
    return CLMOE_SUCCESS;
}

typedef enum start_kind { START_COLD, START_WARM, START_CACHED, START_KINDS } start_kind;

static const char *const start_names[START_KINDS] = {"create_cold", "create_warm", "create_cached"};

/* The processes of one round, in directories of their own below `base`. */
static clmoe_status run_round(const bench_options *options, size_t index, const char *base,
                              start starts[START_KINDS]) {
    clmoe_status status = CLMOE_SUCCESS;
    char drivers[3][64], programs[64];
    start filler = {0};
    snprintf(programs, sizeof programs, "%s/programs", base);
    for (int i = 0; i < 3; i++) {
        snprintf(drivers[i], sizeof drivers[i], "%s/drivers%d", base, i);
        if (mkdir(drivers[i], 0700) != 0)
            return cli_fail(CLMOE_IO, "no directory %s: %s", drivers[i], strerror(errno));
    }
    TRY(in_child(options, index, (cache_use){drivers[0], NULL}, &starts[START_COLD]));
    if (starts[START_COLD].none)
        goto done;
    TRY(in_child(options, index, (cache_use){drivers[0], NULL}, &starts[START_WARM]));
    TRY(in_child(options, index, (cache_use){drivers[1], programs}, &filler));
    TRY(in_child(options, index, (cache_use){drivers[2], programs}, &starts[START_CACHED]));
done:
    return status;
}

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *place) {
    (void)status, (void)kind, (void)place;
    return remove(path);
}

static clmoe_status run_round_in_new_directory(const bench_options *options, size_t index,
                                               start starts[START_KINDS]) {
    char base[] = "/tmp/clmoe-bench-XXXXXX";
    if (!mkdtemp(base))
        return cli_fail(CLMOE_IO, "no directory for caches: %s", strerror(errno));
    clmoe_status status = run_round(options, index, base, starts);
    nftw(base, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return status;
}

/* *more: there is an engine number `index`. */
static clmoe_status measure_engine(const bench_options *options, size_t index, bench_rows *rows,
                                   bool *more) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t repeat = options->repeat;
    start starts[START_KINDS] = {{0}};
    double *samples = calloc(START_KINDS * repeat, sizeof *samples);
    *more = true;
    if (!samples)
        TRY(bench_no_memory("times"));
    for (size_t i = 0; i < repeat && *more; i++) {
        TRY(bench_go_on());
        TRY(run_round_in_new_directory(options, index, starts));
        *more = !starts[START_COLD].none;
        for (size_t kind = 0; kind < START_KINDS; kind++)
            samples[kind * repeat + i] = starts[kind].ms;
    }
    for (size_t kind = 0; kind < START_KINDS && *more; kind++) {
        bench_row row = starts[kind].row;
        row.step = start_names[kind];
        row_set_times(&row, samples + kind * repeat, options->repeat);
        TRY(rows_add(rows, &row));
    }
done:
    free(samples);
    return status;
}

clmoe_status cold_measure(const bench_options *options, bench_rows *rows) {
    clmoe_status status = CLMOE_SUCCESS;
    bool more = true;
    for (size_t index = 0; more; index++)
        TRY(measure_engine(options, index, rows, &more));
done:
    return status;
}
