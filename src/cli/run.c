/* clmoe run: the MoE block of a checkpoint on a tensor, checked against another and reported. */
#include "batch.h"
#include "cli.h"
#include "gradients.h"
#include "input.h"
#include "interrupt.h"
#include "model_files.h"
#include "output.h"
#include "report.h"
#include "session.h"
#include "tensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: clmoe run MODEL_DIR --layer N --input FILE --tensor NAME [OPTION]...\n"
    "Runs the MoE block of layer N of a checkpoint on a tensor and reports the routing: load and\n"
    "drops per expert, balance, time per step.\n"
    "\n"
    "  MODEL_DIR            holds config.json and model.safetensors, or shards with their index\n"
    "  --layer N            the layer, counted from 0\n"
    "  --input FILE         a safetensors file, - for standard input\n"
    "  --tensor NAME        its tensor to run on, [T,D] or [B,S,D]\n"
    "\n"
    "Options:\n"
    "  --assume FAMILY      for a model_type that clmoe does not know: the one whose rules it\n"
    "                       follows, or pattern: what the names of its tensors point to\n"
    "  --decode T           allows coded weights of experts, FP8 or MXFP4, which are decoded to f32,\n"
    "                       f16 or bf16; without it such a layer is refused. Changes no others\n"
    "  --output FILE        writes the result to a safetensors file as tensor y [T,D]; - is\n"
    "                       standard output, instead of the report\n"
    "  --force              overwrites the files of --output and --gradients if there are any;\n"
    "                       never the model's\n"
    "  --expect NAME        compares the result with this tensor of the input file\n"
    "  --backward           then runs the backward pass: the gradients of sum(dy * y), and of the\n"
    "                       losses of --loss times their weights; needs --dy\n"
    "  --dy NAME            the tensor of the input file that is dL/dy, shaped as --tensor; it is\n"
    "                       named BLOCK.dy or dy, and dx is then BLOCK.dx or dx\n"
    "  --gradients FILE     writes dx, and as grad.NAME the gradient of each tensor NAME of the\n"
    "                       block, in its own shape, to a safetensors file; - is standard output\n"
    "  --expect-gradients FILE\n"
    "                       compares them with the tensors of those names in a safetensors file\n"
    "  --recompute          keeps less for the backward pass, which computes it again\n"
    "  --tolerance R        most ||y - expect|| / ||expect|| that passes (default 1e-5, for\n"
    "                       gradients 2e-5; f16 2e-3, bf16 2e-2, also for --decode)\n"
    "  --dtype T            f32 (default), f16 or bf16: x and the expert weights are rounded to it\n"
    "  --device D           the device: its number in clmoe devices, or part of its name or its\n"
    "                       platform's (default: the first GPU, else 0)\n"
    "  --engine E           the engine of the experts (default: by device)\n"
    "  --capacity-factor F  rows per expert are T*K*F/E rounded up; 0 drops nothing\n"
    "  --force-routing R    takes R's choice of K experts per token, with weights 1/K, instead of\n"
    "                       the router's: round-robin, by turns, or zipf[:S], expert e, counted\n"
    "                       from 1, with a chance in proportion to 1/e^S (default 1)\n"
    "  --seed N             of zipf; round-robin begins with expert N mod E (default 0)\n"
    "  --stats              prints all statistics too\n"
    "  --loss NAME[:W]      prints the value of a balancing loss; repeatable; ?\n"
    "                       lists the names\n"
    "  --repeat R           times are medians of R runs (default 1)\n"
    "  --no-cache           compiles anew: no program is read from or written to the user's cache\n"
    "  --json               prints one JSON object instead of the report\n"
    "  --help               this text\n"
    "  --version            the version\n"
    "\n"
    "Exit status: 0 success, 1 the result is off its expectation, 2 bad input, 128 + N stopped by\n"
    "signal N: times are then of fewer runs.\n";

enum { MAX_RUN_LOSSES = 16 }; /* as many as clmoe_forward() takes */

#define GRADIENT_TOLERANCE 2e-5 /* of f32 */

typedef struct run_options {
    const char *model, *assume, *input, *tensor, *expect, *engine, *device;
    const char *dy, *expect_gradients; /* of a backward pass, or NULL */
    output output, gradients;
    uint32_t layer, repeat;
    forced_routing forced;
    clmoe_type dtype;
    clmoe_decode decode;
    double tolerance, gradient_tolerance, capacity_factor;
    clmoe_loss_desc losses[MAX_RUN_LOSSES];
    uint32_t num_losses;
    bool stats, capacity_given, json, no_cache, recompute;
} run_options;

typedef struct run_session {
    clmoe_checkpoint *checkpoint;
    clmoe_tensors *input, *expect_gradients;
    clmoe_layer_desc desc;
    device_session device;
    clmoe_layer *layer;
    clmoe_weights weights;
    batch batch;
    float *x, *y, *expect, *dy, *dx; /* [T,D] */
    char *dx_name;
    gradient_list gradients;
    clmoe_stats *stats;
    float loss_values[MAX_RUN_LOSSES];
    run_report report;
} run_session;

enum {
    OPT_LAYER,
    OPT_ASSUME,
    OPT_DECODE,
    OPT_INPUT,
    OPT_TENSOR,
    OPT_OUTPUT,
    OPT_FORCE,
    OPT_EXPECT,
    OPT_BACKWARD,
    OPT_DY,
    OPT_GRADIENTS,
    OPT_EXPECT_GRADIENTS,
    OPT_RECOMPUTE,
    OPT_TOLERANCE,
    OPT_DTYPE,
    OPT_DEVICE,
    OPT_ENGINE,
    OPT_CAPACITY,
    OPT_FORCE_ROUTING,
    OPT_SEED,
    OPT_REPEAT,
    OPT_STATS,
    OPT_LOSS,
    OPT_JSON,
    OPT_NO_CACHE,
};

static const cli_option table[] = {
    [OPT_LAYER] = {.name = "layer", .has_value = true},
    [OPT_ASSUME] = {.name = "assume", .has_value = true},
    [OPT_DECODE] = {.name = "decode", .has_value = true},
    [OPT_INPUT] = {.name = "input", .has_value = true},
    [OPT_TENSOR] = {.name = "tensor", .has_value = true},
    [OPT_OUTPUT] = {.name = "output", .has_value = true},
    [OPT_FORCE] = {.name = "force", .needs = "output gradients"},
    [OPT_EXPECT] = {.name = "expect", .has_value = true},
    [OPT_BACKWARD] = {.name = "backward", .needs = "dy"},
    [OPT_DY] = {.name = "dy", .has_value = true, .needs = "backward"},
    [OPT_GRADIENTS] = {.name = "gradients", .has_value = true, .needs = "backward"},
    [OPT_EXPECT_GRADIENTS] = {.name = "expect-gradients", .has_value = true, .needs = "backward"},
    [OPT_RECOMPUTE] = {.name = "recompute", .needs = "backward"},
    [OPT_TOLERANCE] = {.name = "tolerance", .has_value = true, .needs = "expect expect-gradients"},
    [OPT_DTYPE] = {.name = "dtype", .has_value = true},
    [OPT_DEVICE] = {.name = "device", .has_value = true},
    [OPT_ENGINE] = {.name = "engine", .has_value = true},
    [OPT_CAPACITY] = {.name = "capacity-factor", .has_value = true},
    [OPT_FORCE_ROUTING] = {.name = "force-routing",
                           .has_value = true,
                           .excludes = "expect expect-gradients loss"},
    [OPT_SEED] = {.name = "seed", .has_value = true, .needs = "force-routing"},
    [OPT_REPEAT] = {.name = "repeat", .has_value = true},
    [OPT_STATS] = {.name = "stats"},
    [OPT_LOSS] = {.name = "loss", .has_value = true, .repeats = true},
    [OPT_JSON] = {.name = "json"},
    [OPT_NO_CACHE] = {.name = "no-cache"},
};

static bool parse_type(const char *option, const char *text, clmoe_type *type, problem *why) {
    const clmoe_type types[] = {CLMOE_F32, CLMOE_F16, CLMOE_BF16};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(text, dtype_name(types[i])) == 0) {
            *type = types[i];
            return true;
        }
    return problem_set(why, "%s is '%s', but must be f32, f16 or bf16", option, text);
}

static bool parse_decode(const char *text, clmoe_decode *decode, problem *why) {
    clmoe_type type = CLMOE_F32;
    if (!parse_type("--decode", text, &type, why))
        return false;
    *decode = type == CLMOE_F32   ? CLMOE_DECODE_F32
              : type == CLMOE_F16 ? CLMOE_DECODE_F16
                                  : CLMOE_DECODE_BF16;
    return true;
}

/* NAME[:WEIGHT] */
static bool parse_loss(run_options *o, const char *text, problem *why) {
    const char *colon = strchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : strlen(text);
    double weight = 1.0;
    if (o->num_losses == MAX_RUN_LOSSES)
        return problem_set(why, "--loss is given more than %d times", MAX_RUN_LOSSES);
    for (clmoe_loss_kind kind = 0; clmoe_loss_name(kind); kind++) {
        const char *name = clmoe_loss_name(kind);
        if (strlen(name) != length || strncmp(name, text, length) != 0)
            continue;
        if (colon && !cli_is_real(colon + 1, &weight))
            return problem_set(why, "--loss is '%s', whose weight is not " CLI_REALS, text);
        o->losses[o->num_losses++] = (clmoe_loss_desc){.kind = kind, .weight = (float)weight};
        return true;
    }
    char names[320] = "";
    size_t used = 0;
    for (clmoe_loss_kind kind = 0; clmoe_loss_name(kind) && used < sizeof names; kind++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", kind ? ", " : "",
                                 clmoe_loss_name(kind));
    return problem_set(why, "--loss is '%.40s', which names no loss: %s", text, names);
}

/* What rounding x and the weights costs, with room. */
static double default_tolerance(const run_options *o) {
    if (o->dtype == CLMOE_BF16 || o->decode == CLMOE_DECODE_BF16)
        return 2e-2;
    return o->dtype == CLMOE_F16 || o->decode == CLMOE_DECODE_F16 ? 2e-3 : 1e-5;
}

static bool set_value(void *to, int option, const char *text, problem *why) {
    run_options *o = to;
    switch (option) {
    case OPT_LAYER:
        return cli_u32("--layer", text, 0, UINT32_MAX, &o->layer, why);
    case OPT_REPEAT:
        return cli_u32("--repeat", text, 1, 1000000, &o->repeat, why);
    case OPT_TOLERANCE:
        return cli_real("--tolerance", text, &o->tolerance, why);
    case OPT_CAPACITY:
        return cli_real("--capacity-factor", text, &o->capacity_factor, why);
    case OPT_FORCE_ROUTING:
        return force_parse("--force-routing", text, &o->forced, why);
    case OPT_SEED:
        return cli_u32("--seed", text, 0, UINT32_MAX, &o->forced.seed, why);
    case OPT_DTYPE:
        return parse_type("--dtype", text, &o->dtype, why);
    case OPT_DECODE:
        return parse_decode(text, &o->decode, why);
    case OPT_LOSS:
        return parse_loss(o, text, why);
    default: { /* a text */
        const char **const texts[] = {[OPT_ASSUME] = &o->assume,
                                      [OPT_INPUT] = &o->input,
                                      [OPT_TENSOR] = &o->tensor,
                                      [OPT_OUTPUT] = &o->output.path,
                                      [OPT_EXPECT] = &o->expect,
                                      [OPT_DEVICE] = &o->device,
                                      [OPT_ENGINE] = &o->engine,
                                      [OPT_DY] = &o->dy,
                                      [OPT_GRADIENTS] = &o->gradients.path,
                                      [OPT_EXPECT_GRADIENTS] = &o->expect_gradients};
        *texts[option] = text;
        return true;
    }
    }
}

/* Whether an output can be written, and takes nothing that another option names. */
static bool check_output(const run_options *o, output *to, const char *option, bool force,
                         problem *why) {
    if (to->path == NULL)
        return true;
    const bool right = output_check(to, option, to->path, force, why);
    if (output_is_file(to, o->input))
        return problem_set(why, "%s %s is the same file as --input", option, to->path);
    if (o->expect_gradients != NULL && output_is_file(to, o->expect_gradients))
        return problem_set(why, "%s %s is the same file as --expect-gradients", option, to->path);
    if (to->to_stdout && (o->json || o->stats))
        return problem_set(why, "%s %s and --%s both write to standard output", option, to->path,
                           o->json ? "json" : "stats");
    return right;
}

static bool check_outputs(run_options *o, bool force, problem *why) {
    if (!check_output(o, &o->output, "--output", force, why) ||
        !check_output(o, &o->gradients, "--gradients", force, why))
        return false;
    if (o->output.to_stdout && o->gradients.to_stdout)
        return problem_set(why, "--output %s and --gradients %s both write to standard output",
                           o->output.path, o->gradients.path);
    if (o->output.path != NULL && output_is_file(&o->gradients, o->output.path))
        return problem_set(why, "--gradients %s is the same file as --output", o->gradients.path);
    return true;
}

static bool check_options(run_options *o, const cli_parser *parser, problem *why) {
    const char *missing = o->model == NULL            ? "MODEL_DIR"
                          : !parser->given[OPT_LAYER] ? "--layer"
                          : o->input == NULL          ? "--input"
                          : o->tensor == NULL         ? "--tensor"
                                                      : NULL;
    if (missing != NULL)
        return problem_set(why, "%s is missing; see --help", missing);
    if (o->expect_gradients != NULL && o->expect_gradients[0] == '\0')
        return problem_set(why, "--expect-gradients is '', which names no file");
    if (o->model[0] == '\0')
        return problem_set(why, "MODEL_DIR is '', which names no folder");
    o->stats = parser->given[OPT_STATS] > 0;
    o->json = parser->given[OPT_JSON] > 0;
    o->no_cache = parser->given[OPT_NO_CACHE] > 0;
    o->capacity_given = parser->given[OPT_CAPACITY] > 0;
    o->recompute = parser->given[OPT_RECOMPUTE] > 0;
    if (!parser->given[OPT_TOLERANCE])
        o->tolerance = default_tolerance(o);
    o->gradient_tolerance = o->tolerance;
    if (!parser->given[OPT_TOLERANCE] && o->tolerance < GRADIENT_TOLERANCE)
        o->gradient_tolerance = GRADIENT_TOLERANCE;
    return check_outputs(o, parser->given[OPT_FORCE] > 0, why);
}

static clmoe_status parse_options(run_options *o, int argc, char **argv, bool *stop) {
    clmoe_status status = CLMOE_SUCCESS;
    cli_parser parser = {.options = table,
                         .count = sizeof table / sizeof table[0],
                         .set_value = set_value,
                         .words = 1};
    problem why;
    TRY(parse_command(&parser, argc, argv, o, usage, stop));
    if (*stop)
        return status;
    o->model = cli_word(argc, argv);
    TRY(checked(check_options(o, &parser, &why), &why));
done:
    return status;
}

/* Of a layer that is coded, the weights' type is what they are decoded to. */
static void set_desc(const run_options *o, bool coded, clmoe_layer_desc *desc) {
    desc->engine = o->engine;
    desc->balance.enabled = 1;
    desc->type = o->dtype;
    if (!coded)
        desc->weight_type = o->dtype;
    desc->training = o->dy != NULL;
    desc->recompute = o->recompute;
    if (o->capacity_given) {
        desc->capacity.rows = 0;
        desc->capacity.factor = o->capacity_factor;
    }
}

/* A tensor of the input file that has the rows of x. */
static clmoe_status read_beside(const run_options *o, const run_session *s, const char *name,
                                float **rows) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t tokens = 0;
    TRY(rows_read(s->input, name, s->desc.dim, &tokens, rows));
    if (tokens != s->batch.tokens)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s: tensor '%s' has %u tokens, but '%s' has %u", o->input,
                     name, (unsigned)tokens, o->tensor, (unsigned)s->batch.tokens));
done:
    return status;
}

static clmoe_status read_files(const run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    problem why;
    TRY(open_model(o->model, o->assume, o->decode, &s->checkpoint));
    TRY(checked(model_is_spared(o->model, &o->output, "--output", &why), &why));
    TRY(checked(model_is_spared(o->model, &o->gradients, "--gradients", &why), &why));
    TRY(LIB(clmoe_checkpoint_layer(s->checkpoint, o->layer, &s->desc)));
    s->report.coded = clmoe_checkpoint_coded(s->checkpoint, o->layer);
    set_desc(o, s->report.coded != NULL, &s->desc);
    TRY(input_open(o->input, &s->input));
    TRY(rows_read(s->input, o->tensor, s->desc.dim, &s->batch.tokens, &s->x));
    if (o->expect != NULL)
        TRY(read_beside(o, s, o->expect, &s->expect));
    if (o->dy != NULL) {
        s->dx_name = dx_name_for(o->dy);
        if (s->dx_name == NULL)
            TRY(cli_fail(CLMOE_INVALID_ARGUMENT, "--dy is '%s', which does not end in dy", o->dy));
        TRY(read_beside(o, s, o->dy, &s->dy));
    }
    if (o->expect_gradients != NULL)
        TRY(LIB(clmoe_tensors_open(o->expect_gradients, &s->expect_gradients)));
done:
    return status;
}

static clmoe_status open_device(const run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(session_open(&s->device, o->device, !o->no_cache));
    snprintf(s->report.device, sizeof s->report.device, "%s", s->device.name);
done:
    return status;
}

static clmoe_status write_output(run_options *o, const run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    problem why;
    FILE *stream = output_open(&o->output, &why);
    if (stream == NULL)
        return cli_fail(CLMOE_IO, "%s", why.text);
    TRY(tensor_write(stream, o->output.path, "y", s->batch.tokens, s->desc.dim, s->y));
    if (!output_close(&o->output, &why))
        TRY(cli_fail(CLMOE_IO, "%s", why.text));
done:
    output_drop(&o->output);
    return status;
}

/* Uninitialised rows [T,D]. */
static float *new_rows(const run_session *s) {
    const size_t count = (size_t)s->batch.tokens * s->desc.dim;
    return malloc(count > 0 ? count * sizeof(float) : 1);
}

/* Runs backward, and writes and compares what it gives. */
static clmoe_status run_backward(run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    gradient_source source = {.checkpoint = s->checkpoint,
                              .layer = o->layer,
                              .desc = &s->desc,
                              .queue = s->device.queue,
                              .gradients = &s->batch.gradients,
                              .dx_name = s->dx_name,
                              .tokens = s->batch.tokens};
    s->dx = new_rows(s);
    if (s->dx == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for dx"));
    source.dx = s->dx;
    TRY(batch_backward(&s->batch, s->dx));
    TRY(gradient_list_make(&source, &s->gradients));
    if (o->gradients.path != NULL)
        TRY(gradients_write(&source, &s->gradients, &o->gradients));
    if (s->expect_gradients != NULL)
        TRY(gradients_compare(&source, &s->gradients, s->expect_gradients,
                              &s->report.gradient_errors));
done:
    return status;
}

static clmoe_status run_layer(run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(LIB(clmoe_layer_create(s->device.context, &s->desc, &s->layer)));
    TRY(LIB(clmoe_checkpoint_upload(s->checkpoint, o->layer, &s->desc, s->device.cl,
                                    s->device.queue, &s->weights)));
    if (s->dy != NULL)
        TRY(LIB(clmoe_gradients_create(s->layer, &s->batch.gradients)));
    s->y = new_rows(s);
    if (s->y == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the result"));
    s->batch.dy = s->dy;
    s->batch.layer = s->layer;
    s->batch.desc = &s->desc;
    s->batch.weights = &s->weights;
    s->batch.queue = s->device.queue;
    s->batch.losses = o->losses;
    s->batch.num_losses = o->num_losses;
    s->batch.forced = o->forced;
    TRY(batch_create(&s->batch, s->device.cl, s->x));
    TRY(batch_forward(&s->batch, s->y, &s->stats));
    TRY(LIB(clmoe_stats_size(s->layer, &s->report.stats_bytes)));
    TRY(batch_losses(&s->batch, s->loss_values));
    if (s->dy != NULL)
        TRY(run_backward(o, s));
    TRY(batch_time(&s->batch, o->repeat, &s->report.times));
    if (s->dy != NULL)
        TRY(batch_time_backward(&s->batch, o->repeat, &s->report.backward_times));
    if (o->output.path != NULL)
        TRY(write_output(o, s));
done:
    return status;
}

static clmoe_status print_report(const run_options *o, run_session *s) {
    run_report *report = &s->report;
    report->model_type = clmoe_checkpoint_model_type(s->checkpoint);
    report->assumed = clmoe_checkpoint_assumed(s->checkpoint, o->layer);
    report->layer = o->layer;
    report->engine = clmoe_layer_engine(s->layer);
    report->desc = &s->desc;
    report->tokens = s->batch.tokens;
    report->capacity = s->batch.capacity;
    report->forced = o->forced;
    report->stats = s->stats;
    report->all_stats = o->stats;
    report->losses = o->losses;
    report->num_losses = o->num_losses;
    report->loss_values = s->loss_values;
    report->checked = o->expect != NULL;
    report->tolerance = o->tolerance;
    if (report->checked)
        report->relative_error =
            relative_error(s->y, s->expect, (size_t)s->batch.tokens * s->desc.dim);
    /* Written so that NaN does not pass. */
    report->pass = report->relative_error <= report->tolerance;
    report->backward = o->dy != NULL;
    report->gradient_tolerance = o->gradient_tolerance;
    report->gradients_checked = o->expect_gradients != NULL;
    report->gradients_pass = report->gradient_errors.error <= report->gradient_tolerance;
    if (o->output.to_stdout || o->gradients.to_stdout)
        return CLMOE_SUCCESS;
    return o->json ? report_json(report) : report_text(report);
}

static void release(run_session *s) {
    if (s->device.queue != NULL)
        clFinish(s->device.queue);
    batch_release(&s->batch);
    clmoe_weights_release(&s->weights);
    clmoe_gradients_release(&s->batch.gradients);
    clmoe_layer_destroy(s->layer);
    session_close(&s->device);
    clmoe_tensors_close(s->input);
    clmoe_tensors_close(s->expect_gradients);
    clmoe_checkpoint_close(s->checkpoint);
    free(s->x);
    free(s->y);
    free(s->expect);
    free(s->dy);
    free(s->dx);
    free(s->dx_name);
    gradient_list_free(&s->gradients);
    free(s->stats);
}

static int exit_code(const run_session *s, clmoe_status status) {
    const int code = status != CLMOE_SUCCESS ? exit_with_error("run") : EXIT_OK;
    if (interrupt_signal() != 0) /* which makes a compiler at work fail, too */
        return exit_interrupted("run", code == EXIT_OK ? "the result is whole" : "no result");
    if (code != EXIT_OK)
        return code;
    const run_report *r = &s->report;
    const bool off = (r->checked && !r->pass) || (r->gradients_checked && !r->gradients_pass);
    return off ? EXIT_MISMATCH : EXIT_OK;
}

int run_main(int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    run_options options = {.repeat = 1};
    run_session session = {0};
    bool stop = false;
    TRY(parse_options(&options, argc, argv, &stop));
    if (stop)
        return EXIT_OK;
    TRY(read_files(&options, &session));
    TRY(open_device(&options, &session));
    TRY(run_layer(&options, &session));
    TRY(print_report(&options, &session));
done:;
    int code = exit_code(&session, status);
    if (status == CLMOE_BUILD_FAILED && session.device.log != NULL)
        fputs(session.device.log, stderr);
    release(&session);
    return code;
}
