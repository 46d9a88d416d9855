/* clmoe balance: a controller of the load on the router of a checkpoint, batch after batch. */
#include "cli.h"
#include "controller.h"
#include "input.h"
#include "interrupt.h"
#include "model_files.h"
#include "output.h"
#include "place.h"
#include "report.h"
#include "session.h"
#include "tensors.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: clmoe balance MODEL_DIR --layer N --input FILE --tensor NAME [OPTION]...\n"
    "Routes a tensor through the router of layer N of a checkpoint, again and again, while a\n"
    "controller moves the selection bias of the experts, and draws MaxVio = largest load / mean\n"
    "load - 1 over the steps. The bias starts from the checkpoint's own, if it has one. With\n"
    "--place it then says which copies of the experts lie on which device, by the last load.\n"
    "\n"
    "  MODEL_DIR            holds config.json and model.safetensors, or shards with their index\n"
    "  --layer N            the layer, counted from 0\n"
    "  --input FILE         a safetensors file, - for standard input\n"
    "  --tensor NAME        its tensor to route, [T,D] or [B,S,D]\n"
    "\n"
    "Options:\n"
    "  --assume FAMILY      for a model_type that clmoe does not know: the one whose rules it\n"
    "                       follows, or pattern: what the names of its tensors point to\n"
    "  --controller C       bias (default): b += G * sign(v), v = (mean load - load) / mean load;\n"
    "                       proportional: b += G * v; smebu: d = G * tanh(KAPPA * v), less its mean,\n"
    "                       m = BETA * m + (1 - BETA) * d, b += m; quantile: b is what would have\n"
    "                       shared out the batch evenly, for routers without groups and identity\n"
    "                       experts; device: bias by the load of groups of experts; none\n"
    "  --gamma G            the rate G (default 0.001); quantile has none\n"
    "  --kappa KAPPA        of smebu (default 2)\n"
    "  --beta BETA          of smebu, below 1 (default 0.5)\n"
    "  --device-groups N    of device: N groups of neighbouring experts, as many in each\n"
    "  --centred W          bias or delta: the bias, or its change in a step, has the mean 0; none\n"
    "                       (default). smebu has delta, and quantile bias, always\n"
    "  --steps N            batches (default 100; 1 with --place)\n"
    "  --place              places the experts on devices, as clmoe_place() does; needs the next two\n"
    "  --replicas N         the experts' copies on all devices together, as many on each\n"
    "  --devices N          the devices, as many on each node\n"
    "  --nodes N            the nodes (default 1); if --groups is a multiple, a group stays on one\n"
    "  --groups N           the groups of experts (default: those of the model's router, or 1)\n"
    "  --previous FILE      a plan that --plan wrote: what can stays where it is\n"
    "  --max-moves N        the most slots that change against it (default: any number)\n"
    "  --tolerance X        the largest load may be X times that of a new plan above it, if fewer\n"
    "                       slots change then (default 0)\n"
    "  --plan FILE          writes the plan as JSON to a file; - is standard output, instead of the\n"
    "                       report\n"
    "  --csv FILE           writes a line per step to a file; - is standard output, instead of the\n"
    "                       report\n"
    "  --force              overwrites the files of --csv and --plan if there are; never the model's\n"
    "  --json               prints one JSON object instead of the report\n"
    "  --device D           the device: its number in clmoe devices, or part of its name or its\n"
    "                       platform's (default: the first GPU, else 0)\n"
    "  --no-cache           compiles anew: no program is read from or written to the user's cache\n"
    "  --help               this text\n"
    "  --version            the version\n"
    "\n"
    "Exit status: 0 success, 2 bad input, 128 + N stopped by signal N; the steps that were\n"
    "done until then are written.\n";

enum { CHART_ROWS = 12, LABEL_COLUMNS = 10, MAX_STEPS = 1000000, MAX_REPLICAS = 65536 };

typedef struct balance_options {
    const char *model, *assume, *input, *tensor, *device;
    output csv;
    place_options place;
    controller_options controller;
    uint32_t layer, steps;
    bool json, no_cache;
} balance_options;

typedef enum buffer_id {
    BUFFER_X,
    BUFFER_LOGITS,
    BUFFER_SCORES,
    BUFFER_IDS,
    BUFFER_WEIGHTS,
    BUFFER_LIVE,
    BUFFER_PLAN,
    BUFFER_SCRATCH,
    BUFFER_STATS,
    BUFFER_STATE,
    BUFFER_BIAS_COUNTS,
    BUFFER_COUNT
} buffer_id;

typedef struct balance_session {
    clmoe_checkpoint *checkpoint;
    clmoe_tensors *input;
    clmoe_layer_desc desc;
    device_session device;
    clmoe_layer *layer;
    clmoe_weights weights;
    cl_mem buffers[BUFFER_COUNT];
    uint32_t tokens;
    float *x;           /* [T,D] */
    clmoe_stats *steps; /* [steps]: the headers */
    placement placement;
} balance_session;

enum {
    OPT_LAYER,
    OPT_ASSUME,
    OPT_INPUT,
    OPT_TENSOR,
    OPT_CONTROLLER,
    OPT_GAMMA,
    OPT_KAPPA,
    OPT_BETA,
    OPT_DEVICE_GROUPS,
    OPT_CENTRED,
    OPT_STEPS,
    OPT_PLACE,
    OPT_REPLICAS,
    OPT_DEVICES,
    OPT_NODES,
    OPT_GROUPS,
    OPT_PREVIOUS,
    OPT_MAX_MOVES,
    OPT_TOLERANCE,
    OPT_PLAN,
    OPT_CSV,
    OPT_FORCE,
    OPT_JSON,
    OPT_DEVICE,
    OPT_NO_CACHE,
};

static const cli_option table[] = {
    [OPT_LAYER] = {.name = "layer", .has_value = true},
    [OPT_ASSUME] = {.name = "assume", .has_value = true},
    [OPT_INPUT] = {.name = "input", .has_value = true},
    [OPT_TENSOR] = {.name = "tensor", .has_value = true},
    [OPT_CONTROLLER] = {.name = "controller", .has_value = true},
    [OPT_GAMMA] = {.name = "gamma", .has_value = true},
    [OPT_KAPPA] = {.name = "kappa", .has_value = true},
    [OPT_BETA] = {.name = "beta", .has_value = true},
    [OPT_DEVICE_GROUPS] = {.name = "device-groups", .has_value = true},
    [OPT_CENTRED] = {.name = "centred", .has_value = true},
    [OPT_STEPS] = {.name = "steps", .has_value = true},
    [OPT_PLACE] = {.name = "place"},
    [OPT_REPLICAS] = {.name = "replicas", .has_value = true, .needs = "place"},
    [OPT_DEVICES] = {.name = "devices", .has_value = true, .needs = "place"},
    [OPT_NODES] = {.name = "nodes", .has_value = true, .needs = "place"},
    [OPT_GROUPS] = {.name = "groups", .has_value = true, .needs = "place"},
    [OPT_PREVIOUS] = {.name = "previous", .has_value = true, .needs = "place"},
    [OPT_MAX_MOVES] = {.name = "max-moves", .has_value = true, .needs = "previous"},
    [OPT_TOLERANCE] = {.name = "tolerance", .has_value = true, .needs = "previous"},
    [OPT_PLAN] = {.name = "plan", .has_value = true, .needs = "place"},
    [OPT_CSV] = {.name = "csv", .has_value = true},
    [OPT_FORCE] = {.name = "force", .needs = "csv plan"},
    [OPT_JSON] = {.name = "json"},
    [OPT_DEVICE] = {.name = "device", .has_value = true},
    [OPT_NO_CACHE] = {.name = "no-cache"},
};

/* ---- Options ------------------------------------------------------------------------------- */

static bool set_value(void *to, int option, const char *text, problem *why) {
    balance_options *o = to;
    switch (option) {
    case OPT_LAYER:
        return cli_u32("--layer", text, 0, UINT32_MAX, &o->layer, why);
    case OPT_CONTROLLER:
        return controller_parse(text, &o->controller.rule, why);
    case OPT_GAMMA:
        return cli_real("--gamma", text, &o->controller.gamma, why);
    case OPT_KAPPA:
        return cli_real("--kappa", text, &o->controller.kappa, why);
    case OPT_BETA:
        return cli_real("--beta", text, &o->controller.beta, why);
    case OPT_DEVICE_GROUPS:
        return cli_u32("--device-groups", text, 1, MAX_REPLICAS, &o->controller.device_groups, why);
    case OPT_CENTRED:
        return controller_parse_centred(text, &o->controller.centred, why);
    case OPT_STEPS:
        return cli_u32("--steps", text, 1, MAX_STEPS, &o->steps, why);
    case OPT_REPLICAS:
        return cli_u32("--replicas", text, 1, MAX_REPLICAS, &o->place.replicas, why);
    case OPT_DEVICES:
        return cli_u32("--devices", text, 1, MAX_REPLICAS, &o->place.devices, why);
    case OPT_NODES:
        return cli_u32("--nodes", text, 1, MAX_REPLICAS, &o->place.nodes, why);
    case OPT_GROUPS:
        return cli_u32("--groups", text, 1, MAX_REPLICAS, &o->place.groups, why);
    case OPT_MAX_MOVES:
        return cli_u32("--max-moves", text, 1, MAX_REPLICAS, &o->place.max_moves, why);
    case OPT_TOLERANCE:
        return cli_real("--tolerance", text, &o->place.tolerance, why);
    default: { /* a text */
        const char **const texts[] = {
            [OPT_ASSUME] = &o->assume,        [OPT_INPUT] = &o->input,
            [OPT_TENSOR] = &o->tensor,        [OPT_PREVIOUS] = &o->place.previous,
            [OPT_PLAN] = &o->place.plan.path, [OPT_CSV] = &o->csv.path,
            [OPT_DEVICE] = &o->device};
        *texts[option] = text;
        return true;
    }
    }
}

static bool check_output(const balance_options *o, output *to, const char *option, bool force,
                         problem *why) {
    if (to->path == NULL)
        return true;
    const bool right = output_check(to, option, to->path, force, why);
    if (output_is_file(to, o->input))
        return problem_set(why, "%s %s is the same file as --input", option, to->path);
    if (to->to_stdout && o->json)
        return problem_set(why, "%s %s and --json both write to standard output", option, to->path);
    return right;
}

static bool check_outputs(balance_options *o, bool force, problem *why) {
    output *plan = &o->place.plan;
    if (!check_output(o, &o->csv, "--csv", force, why) ||
        !check_output(o, plan, "--plan", force, why))
        return false;
    if (o->csv.to_stdout && plan->to_stdout)
        return problem_set(why, "--csv %s and --plan %s both write to standard output", o->csv.path,
                           plan->path);
    if (plan->path != NULL && o->csv.path != NULL && !o->csv.to_stdout &&
        output_is_file(plan, o->csv.path))
        return problem_set(why, "--plan %s is the same file as --csv", plan->path);
    if (o->csv.path != NULL && o->place.previous != NULL &&
        output_is_file(&o->csv, o->place.previous))
        return problem_set(why, "--csv %s is the same file as --previous", o->csv.path);
    return true;
}

static bool check_options(balance_options *o, const cli_parser *parser, problem *why) {
    const controller_given given = {.gamma = parser->given[OPT_GAMMA] > 0,
                                    .centred = parser->given[OPT_CENTRED] > 0,
                                    .kappa = parser->given[OPT_KAPPA] > 0,
                                    .beta = parser->given[OPT_BETA] > 0,
                                    .device_groups = parser->given[OPT_DEVICE_GROUPS] > 0};
    const char *missing = o->model == NULL            ? "MODEL_DIR"
                          : !parser->given[OPT_LAYER] ? "--layer"
                          : o->input == NULL          ? "--input"
                          : o->tensor == NULL         ? "--tensor"
                          : !parser->given[OPT_PLACE] ? NULL
                          : o->place.replicas == 0    ? "--replicas"
                          : o->place.devices == 0     ? "--devices"
                                                      : NULL;
    if (missing != NULL)
        return problem_set(why, "%s is missing; see --help", missing);
    if (o->model[0] == '\0')
        return problem_set(why, "MODEL_DIR is '', which names no folder");
    if (!controller_check(&o->controller, &given, why))
        return false;
    o->json = parser->given[OPT_JSON] > 0;
    o->no_cache = parser->given[OPT_NO_CACHE] > 0;
    o->place.wanted = parser->given[OPT_PLACE] > 0;
    if (o->place.wanted && !parser->given[OPT_STEPS])
        o->steps = 1;
    return check_outputs(o, parser->given[OPT_FORCE] > 0, why);
}

static clmoe_status parse_options(balance_options *o, int argc, char **argv, bool *stop) {
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

/* ---- Running ------------------------------------------------------------------------------- */

static clmoe_buf place(const balance_session *s, buffer_id id) {
    return (clmoe_buf){s->buffers[id], 0};
}

static clmoe_status read_files(const balance_options *o, balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    problem why;
    TRY(open_model(o->model, o->assume, CLMOE_DECODE_NO, &s->checkpoint));
    TRY(checked(model_is_spared(o->model, &o->csv, "--csv", &why), &why));
    TRY(checked(model_is_spared(o->model, &o->place.plan, "--plan", &why), &why));
    TRY(LIB(clmoe_checkpoint_layer(s->checkpoint, o->layer, &s->desc)));
    TRY(checked(controller_fits(&o->controller, &s->desc, &why), &why));
    if (o->place.wanted)
        TRY(placement_open(&o->place, &s->desc, &s->placement));
    TRY(input_open(o->input, &s->input));
    TRY(rows_read(s->input, o->tensor, s->desc.dim, &s->tokens, &s->x));
    s->steps = calloc(o->steps, sizeof *s->steps);
    if (s->steps == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u steps", (unsigned)o->steps));
done:
    return status;
}

/* The layer with a selection bias, and its weights with the checkpoint's own one, if any. */
static clmoe_status open_layer(const balance_options *o, balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc biased;
    s->desc.type = s->desc.weight_type = CLMOE_F32;
    s->desc.balance.enabled = 1;
    s->desc.balance.device_groups = o->controller.device_groups;
    TRY(session_open(&s->device, o->device, !o->no_cache));
    TRY(LIB(clmoe_checkpoint_upload(s->checkpoint, o->layer, &s->desc, s->device.cl,
                                    s->device.queue, &s->weights)));
    biased = s->desc;
    biased.router.select_bias = 1;
    TRY(LIB(clmoe_layer_create(s->device.context, &biased, &s->layer)));
done:
    return status;
}

static clmoe_status create_buffers(const balance_options *o, balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_plan_layout plan;
    size_t sizes[BUFFER_COUNT] = {0}, saved, tokens = s->tokens, f32 = sizeof(float);
    size_t x_bytes = tokens * s->desc.dim * f32;
    TRY(LIB(clmoe_plan_layout_get(s->layer, s->tokens, &plan)));
    TRY(LIB(clmoe_layer_memory(s->layer, s->tokens, &saved, &sizes[BUFFER_SCRATCH])));
    TRY(LIB(clmoe_state_size(s->layer, &sizes[BUFFER_STATE])));
    sizes[BUFFER_X] = x_bytes;
    sizes[BUFFER_LOGITS] = sizes[BUFFER_SCORES] = tokens * clmoe_layer_columns(s->layer) * f32;
    sizes[BUFFER_IDS] = sizes[BUFFER_WEIGHTS] = tokens * s->desc.top_k * f32;
    sizes[BUFFER_LIVE] = tokens * f32;
    sizes[BUFFER_PLAN] = plan.bytes;
    TRY(LIB(clmoe_stats_size(s->layer, &sizes[BUFFER_STATS])));
    if (o->controller.rule == CLMOE_BIAS_QUANTILE)
        TRY(LIB(clmoe_bias_counts_size(s->layer, &sizes[BUFFER_BIAS_COUNTS])));
    for (int id = 0; id < BUFFER_COUNT; id++) {
        cl_int code;
        size_t bytes = sizes[id] > 0 ? sizes[id] : f32; /* OpenCL has no empty buffers */
        s->buffers[id] = clCreateBuffer(s->device.cl, CL_MEM_READ_WRITE, bytes, NULL, &code);
        TRY(cli_cl(code, "clCreateBuffer"));
    }
    if (x_bytes > 0)
        TRY(CL(clEnqueueWriteBuffer(s->device.queue, s->buffers[BUFFER_X], CL_TRUE, 0, x_bytes,
                                    s->x, 0, NULL, NULL)));
done:
    return status;
}

/* The scores, which do not change, and the state with the checkpoint's bias. */
static clmoe_status begin(balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_score_args score = {.struct_size = sizeof score,
                              .tokens = s->tokens,
                              .weights = &s->weights,
                              .x = place(s, BUFFER_X),
                              .logits = place(s, BUFFER_LOGITS),
                              .scores = place(s, BUFFER_SCORES)};
    clmoe_buf own = s->weights.select_bias;
    TRY(LIB(clmoe_score(s->layer, s->device.queue, &score, 0, NULL, NULL)));
    TRY(LIB(clmoe_state_init(s->layer, s->device.queue, place(s, BUFFER_STATE), 0, 0, NULL, NULL)));
    if (own.mem != NULL)
        TRY(CL(clEnqueueCopyBuffer(s->device.queue, own.mem, s->buffers[BUFFER_STATE], own.offset,
                                   sizeof(clmoe_state),
                                   clmoe_layer_columns(s->layer) * sizeof(float), 0, NULL, NULL)));
done:
    return status;
}

/* What the quantile rule reads, of the batch under the present bias. */
static clmoe_status count_bias(balance_session *s) {
    const clmoe_bias_counts_args counts = {.struct_size = sizeof counts,
                                           .tokens = s->tokens,
                                           .weights = &s->weights,
                                           .logits = place(s, BUFFER_LOGITS),
                                           .state = place(s, BUFFER_STATE),
                                           .scratch = place(s, BUFFER_SCRATCH),
                                           .bias_counts = place(s, BUFFER_BIAS_COUNTS)};
    return LIB(clmoe_bias_counts(s->layer, s->device.queue, &counts, 0, NULL, NULL));
}

static clmoe_status update(const balance_options *o, balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_balance_args args;
    clmoe_balance_args_init(&args);
    args.state = place(s, BUFFER_STATE);
    args.stats = place(s, BUFFER_STATS);
    controller_fill(&o->controller, &args);
    if (o->controller.rule == CLMOE_BIAS_QUANTILE) {
        TRY(count_bias(s));
        args.bias_counts = place(s, BUFFER_BIAS_COUNTS);
    }
    TRY(LIB(clmoe_balance_update(s->layer, s->device.queue, &args, 0, NULL, NULL)));
done:
    return status;
}

/* One batch and the controller's answer to it. */
static clmoe_status step(const balance_options *o, balance_session *s, clmoe_stats *seen) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_command_queue queue = s->device.queue;
    clmoe_weights routing = s->weights;
    clmoe_topk_args topk = {.struct_size = sizeof topk,
                            .tokens = s->tokens,
                            .weights = &routing,
                            .scores = place(s, BUFFER_SCORES),
                            .ids = place(s, BUFFER_IDS),
                            .pair_weights = place(s, BUFFER_WEIGHTS),
                            .live = place(s, BUFFER_LIVE),
                            .state = place(s, BUFFER_STATE)};
    clmoe_plan_args plan = {.struct_size = sizeof plan,
                            .tokens = s->tokens,
                            .ids = topk.ids,
                            .pair_weights = topk.pair_weights,
                            .live = topk.live,
                            .scratch = place(s, BUFFER_SCRATCH),
                            .plan = place(s, BUFFER_PLAN)};
    clmoe_stats_args stats = {.struct_size = sizeof stats,
                              .tokens = s->tokens,
                              .weights = &routing,
                              .logits = place(s, BUFFER_LOGITS),
                              .ids = topk.ids,
                              .pair_weights = topk.pair_weights,
                              .plan = plan.plan,
                              .live = topk.live,
                              .scratch = plan.scratch,
                              .stats = place(s, BUFFER_STATS)};
    routing.select_bias = (clmoe_buf){NULL, 0}; /* the state's, then */
    TRY(LIB(clmoe_topk(s->layer, queue, &topk, 0, NULL, NULL)));
    TRY(LIB(clmoe_plan(s->layer, queue, &plan, 0, NULL, NULL)));
    TRY(LIB(clmoe_stats_compute(s->layer, queue, &stats, 0, NULL, NULL)));
    TRY(update(o, s));
    TRY(CL(clEnqueueReadBuffer(queue, s->buffers[BUFFER_STATS], CL_TRUE, 0, sizeof *seen, seen, 0,
                               NULL, NULL)));
done:
    return status;
}

/* o->steps becomes the steps until a signal. */
static clmoe_status run_steps(balance_options *o, balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(create_buffers(o, s));
    TRY(begin(s));
    for (uint32_t i = 0; i < o->steps; i++) {
        TRY(step(o, s, &s->steps[i]));
        if (interrupt_signal() != 0)
            o->steps = i + 1;
    }
done:
    return status;
}

/* By the load of the last step. */
static clmoe_status place_experts(balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t experts = s->desc.num_experts;
    uint32_t *load = calloc(experts, sizeof *load);
    if (load == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u experts", (unsigned)experts));
    TRY(CL(clEnqueueReadBuffer(s->device.queue, s->buffers[BUFFER_STATS], CL_TRUE,
                               sizeof(clmoe_stats), experts * sizeof *load, load, 0, NULL, NULL)));
    TRY(placement_make(&s->placement, load));
done:
    free(load);
    return status;
}

/* ---- Report -------------------------------------------------------------------------------- */

/* Mean MaxVio of the steps that share column `column` of `columns`. */
static double column_value(const balance_session *s, uint32_t steps, uint32_t column,
                           uint32_t columns) {
    uint32_t first = (uint32_t)((uint64_t)steps * column / columns);
    uint32_t end = (uint32_t)((uint64_t)steps * (column + 1) / columns);
    double sum = 0;
    for (uint32_t i = first; i < end; i++)
        sum += (double)s->steps[i].max_violation;
    return sum / (end - first);
}

static void print_chart(const balance_session *s, uint32_t steps) {
    uint32_t wide = (uint32_t)terminal_width() - LABEL_COLUMNS;
    uint32_t columns = steps < wide ? steps : wide;
    double most = 0;
    for (uint32_t c = 0; c < columns; c++) {
        double value = column_value(s, steps, c, columns);
        most = value > most ? value : most;
    }
    printf("\n  MaxVio\n");
    for (int row = CHART_ROWS; row > 0; row--) {
        printf("%7.3f |", most * row / CHART_ROWS);
        for (uint32_t c = 0; c < columns; c++) {
            double height = most > 0 ? column_value(s, steps, c, columns) / most * CHART_ROWS : 0;
            putchar(height > row - 0.5 ? '#' : ' ');
        }
        putchar('\n');
    }
    printf("        +");
    for (uint32_t c = 0; c < columns; c++)
        putchar('-');
    printf("\n         step 0 to %u\n\n", (unsigned)(steps - 1));
}

static uint32_t least_step(const balance_options *o, const balance_session *s) {
    uint32_t least = 0;
    for (uint32_t i = 1; i < o->steps; i++)
        if (s->steps[i].max_violation < s->steps[least].max_violation)
            least = i;
    return least;
}

static void print_report(const balance_options *o, const balance_session *s) {
    const uint32_t least = least_step(o, s);
    const char *assumed = clmoe_checkpoint_assumed(s->checkpoint, o->layer);
    char model[256], controller[256];
    controller_describe(&o->controller, controller, sizeof controller);
    clmoe_printable(clmoe_checkpoint_model_type(s->checkpoint), model, sizeof model);
    printf("%s layer %u%s%s on %s\n", model, (unsigned)o->layer, assumed ? ", taken for " : "",
           assumed ? assumed : "", s->device.name);
    printf("routing   %u tokens, %u experts, top %u; controller %s\n", (unsigned)s->tokens,
           (unsigned)s->desc.num_experts, (unsigned)s->desc.top_k, controller);
    if (o->place.wanted)
        placement_print(&s->placement);
    if (o->place.wanted && o->steps == 1)
        return;
    print_chart(s, o->steps);
    printf("MaxVio    first %.3f, last %.3f, least %.3f at step %u\n",
           (double)s->steps[0].max_violation, (double)s->steps[o->steps - 1].max_violation,
           (double)s->steps[least].max_violation, (unsigned)least);
}

static json_t *step_json(const clmoe_stats *seen, uint32_t step) {
    return json_pack("{sI sf sf sI sI sI}", "step", (json_int_t)step, "max_violation",
                     (double)seen->max_violation, "load_entropy", (double)seen->load_entropy,
                     "min_load", (json_int_t)seen->min_load, "max_load", (json_int_t)seen->max_load,
                     "idle_experts", (json_int_t)seen->idle_experts);
}

static clmoe_status print_json(const balance_options *o, const balance_session *s) {
    const char *assumed = clmoe_checkpoint_assumed(s->checkpoint, o->layer);
    json_t *steps = json_array();
    for (uint32_t i = 0; i < o->steps; i++)
        json_array_append_new(steps, step_json(&s->steps[i], i));
    json_t *object = json_pack("{ss ss? sI ss sI sI sI}", "model_type",
                               clmoe_checkpoint_model_type(s->checkpoint), "assumed", assumed,
                               "layer", (json_int_t)o->layer, "device", s->device.name, "tokens",
                               (json_int_t)s->tokens, "num_experts",
                               (json_int_t)s->desc.num_experts, "top_k", (json_int_t)s->desc.top_k);
    controller_json(&o->controller, object);
    json_object_set_new(object, "steps", steps);
    if (o->place.wanted)
        json_object_set_new(object, "placement", placement_json(&s->placement));
    bool written =
        object != NULL &&
        json_dumpf(object, stdout, JSON_COMPACT | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(9)) == 0;
    putchar('\n');
    json_decref(object);
    return written ? CLMOE_SUCCESS : cli_fail(CLMOE_IO, "cannot write the report as JSON");
}

static clmoe_status write_csv(balance_options *o, const balance_session *s) {
    problem why;
    FILE *file = output_open(&o->csv, &why);
    if (file == NULL)
        return cli_fail(CLMOE_IO, "%s", why.text);
    fprintf(file, "step,max_violation,load_entropy,min_load,max_load,idle_experts\n");
    for (uint32_t i = 0; i < o->steps; i++)
        fprintf(file, "%u,%.9g,%.9g,%u,%u,%u\n", (unsigned)i, (double)s->steps[i].max_violation,
                (double)s->steps[i].load_entropy, (unsigned)s->steps[i].min_load,
                (unsigned)s->steps[i].max_load, (unsigned)s->steps[i].idle_experts);
    return output_close(&o->csv, &why) ? CLMOE_SUCCESS : cli_fail(CLMOE_IO, "%s", why.text);
}

static clmoe_status report(balance_options *o, const balance_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    if (o->csv.path != NULL)
        TRY(write_csv(o, s));
    if (o->place.plan.path != NULL)
        TRY(placement_write(&o->place, &s->placement));
    if (o->json)
        return print_json(o, s);
    if (!o->csv.to_stdout && !o->place.plan.to_stdout)
        print_report(o, s);
done:
    return status;
}

static void release(balance_session *s) {
    if (s->device.queue != NULL)
        clFinish(s->device.queue);
    for (int id = 0; id < BUFFER_COUNT; id++)
        if (s->buffers[id] != NULL)
            clReleaseMemObject(s->buffers[id]);
    clmoe_weights_release(&s->weights);
    clmoe_layer_destroy(s->layer);
    session_close(&s->device);
    clmoe_tensors_close(s->input);
    clmoe_checkpoint_close(s->checkpoint);
    placement_close(&s->placement);
    free(s->x);
    free(s->steps);
}

int balance_main(int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    balance_options options = {
        .controller = CONTROLLER_DEFAULTS, .steps = 100, .place = {.nodes = 1}};
    balance_session session = {0};
    bool stop = false;
    TRY(parse_options(&options, argc, argv, &stop));
    if (stop)
        return EXIT_OK;
    TRY(read_files(&options, &session));
    TRY(open_layer(&options, &session));
    TRY(run_steps(&options, &session));
    if (options.place.wanted)
        TRY(place_experts(&session));
    TRY(report(&options, &session));
done:;
    int code = status != CLMOE_SUCCESS ? exit_with_error("balance") : EXIT_OK;
    if (interrupt_signal() != 0) /* which makes a compiler at work fail, too */
        code = exit_interrupted("balance", code == EXIT_OK ? "there are fewer steps" : "no result");
    if (status == CLMOE_BUILD_FAILED && session.device.log != NULL)
        fputs(session.device.log, stderr);
    release(&session);
    return code;
}
