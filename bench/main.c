/* clmoe-bench: read measure.c for what is timed and how, cases.c for on what. */
#include "../src/cli/interrupt.h"
#include "cold.h"
#include "measure.h"
#include "memory.h"
#include "options.h"
#include "roofline.h"
#include "tune.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { EXIT_OK = 0, EXIT_WRONG = 1, EXIT_BAD_INPUT = 2 };

static clmoe_status add_roofline_row(bench_rows *rows, const bench_device *device, const char *step,
                                     double gbytes_per_s, double gflops) {
    bench_row row = {.case_name = ROOFLINE_CASE,
                     .pattern = "none",
                     .dtype = "f32",
                     .step = step,
                     .engine = ROOFLINE_CASE,
                     .gbytes_per_s = gbytes_per_s,
                     .gflops = gflops,
                     .percent_of_peak = 100,
                     .checked = true};
    snprintf(row.device, sizeof row.device, "%s", device->name);
    snprintf(row.driver, sizeof row.driver, "%s", device->driver);
    return rows_add(rows, &row);
}

static clmoe_status add_roofline(bench_rows *rows, bench_device *device, uint32_t repeat) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(roofline_measure(device, repeat));
    TRY(add_roofline_row(rows, device, "read", device->read_gbs, 0));
    TRY(add_roofline_row(rows, device, "copy", device->copy_gbs, 0));
    TRY(add_roofline_row(rows, device, "fma", 0, device->fma_gflops));
done:
    return status;
}

static clmoe_status measure_cases(measurement *m) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool cpu = m->device->cpu;
    for (const bench_case *c = bench_cases; c->name; c++)
        if (options_choose(m->options, c, cpu))
            m->progress.total += measure_steps(m, c);
    for (const bench_case *c = bench_cases; c->name; c++)
        if (options_choose(m->options, c, cpu))
            TRY(measure_case(m, c));
done:
    progress_clear();
    return status;
}

/* Errors too leave the rows measured so far. */
static clmoe_status measure(const bench_options *options, bench_rows *rows) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_device device = {0};
    measurement m = {.options = options, .device = &device};
    TRY(device_open(options->device, &device));
    TRY(options_check_cases(options, device.cpu));
    TRY(engines_choose(options, &device, &m.engines));
    TRY(device_prepare(&device));
    TRY(add_roofline(&m.rows, &device, m.options->repeat));
    const size_t before = m.rows.count;
    TRY(measure_cases(&m));
    if (m.rows.count == before)
        TRY(cli_fail(CLMOE_UNSUPPORTED, "nothing to time: no case with these steps runs here"));
done:
    *rows = m.rows;
    inputs_release(&m.inputs);
    device_close(&device);
    return status;
}

/* The command line as it can be repeated. */
static void join_words(int argc, char **argv, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "clmoe-bench");
    for (int i = 1; i < argc && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, " %s", argv[i]);
}

/* What was printed is there, too. */
static clmoe_status check_stdout(void) {
    if (fflush(stdout) == 0 && ferror(stdout) == 0)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_IO, "cannot write to standard output: %s", strerror(errno));
}

static clmoe_status report(bench_options *options, const char *command, const bench_rows *rows) {
    if (options->json)
        return rows_write_json(rows, &options->file);
    if (options->markdown)
        rows_print_markdown(rows, command);
    else
        rows_print(rows);
    return check_stdout();
}

/* The code of an error; after a signal, its own. */
static int bad_input(void) {
    fprintf(stderr, "clmoe-bench: %s\n", cli_error());
    return interrupt_signal() != 0 ? interrupt_exit_code() : EXIT_BAD_INPUT;
}

static int run_rows(bench_options *options, const char *command) {
    bench_rows rows = {0};
    int code = EXIT_OK;
    if ((options->cold ? cold_measure : measure)(options, &rows) != CLMOE_SUCCESS)
        code = bad_input();
    if (rows.count > 0 && report(options, command, &rows) != CLMOE_SUCCESS)
        code = bad_input();
    if (code == EXIT_OK && rows.wrong > 0) {
        fprintf(stderr, "clmoe-bench: %zu wrong results, not timed\n", rows.wrong);
        code = EXIT_WRONG;
    }
    rows_free(&rows);
    return code;
}

static int run(bench_options *options, const char *command) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!options->memory && !options->tune)
        return run_rows(options, command);
    TRY(options->memory ? memory_print(options) : tune(options));
    TRY(check_stdout());
done:
    return status == CLMOE_SUCCESS ? EXIT_OK : bad_input();
}

int main(int argc, char **argv) {
    bench_options options;
    char command[256];
    output_guard_streams();
    interrupt_catch();
    join_words(argc, argv, command, sizeof command);
    switch (options_parse(argc, argv, &options)) {
    case PARSE_STOP:
        return check_stdout() == CLMOE_SUCCESS ? EXIT_OK : bad_input();
    case PARSE_BAD:
        return bad_input();
    case PARSE_RUN:
        break;
    }
    return run(&options, command);
}
