#include "report.h"
#include "tensors.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* More bars than this are folded into ranges of neighbouring experts. */
#define MAX_BARS    64
#define FOLDED_BARS 32

/* Array 0 load, 1 kept, 2 dropped, each [R], behind the statistics. */
static const uint32_t *counts_of(const clmoe_stats *stats, uint32_t which) {
    return (const uint32_t *)(stats + 1) + (size_t)which * stats->columns;
}

/* $COLUMNS, or 0 if it is no number of columns. */
static int columns_wanted(void) {
    const char *text = getenv("COLUMNS");
    const size_t length = text != NULL ? strlen(text) : 0;
    if (length == 0 || length > 4 || strspn(text, "0123456789") < length)
        return 0;
    return atoi(text);
}

int terminal_width(void) {
    enum { LEAST = 40, MOST = 240, USUAL = 80, USUAL_MOST = 120 };
    struct winsize size;
    int width = columns_wanted();
    if (width > 0)
        return width < LEAST ? LEAST : width > MOST ? MOST : width;
    bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    width = known ? size.ws_col : USUAL;
    return width < LEAST ? LEAST : width > USUAL_MOST ? USUAL_MOST : width;
}

static uint64_t range_sum(const uint32_t *values, uint32_t first, uint32_t end) {
    uint64_t sum = 0;
    for (uint32_t i = first; i < end; i++)
        sum += values[i];
    return sum;
}

static void print_bar(const clmoe_stats *stats, uint32_t first, uint32_t end, double scale) {
    uint64_t load = range_sum(counts_of(stats, 0), first, end);
    uint64_t kept = range_sum(counts_of(stats, 1), first, end);
    int full = (int)lround((double)load * scale), solid = (int)lround((double)kept * scale);
    char label[32];
    if (end - first == 1)
        snprintf(label, sizeof label, "%u", (unsigned)first);
    else
        snprintf(label, sizeof label, "%u-%u", (unsigned)first, (unsigned)(end - 1));
    printf("  %9s %8llu%s", label, (unsigned long long)load, full > 0 ? "  " : "");
    for (int i = 0; i < full; i++)
        putchar(i < solid ? '#' : '.');
    putchar('\n');
}

static void print_load(const clmoe_stats *stats, uint32_t experts) {
    uint32_t step = experts > MAX_BARS ? (experts + FOLDED_BARS - 1) / FOLDED_BARS : 1;
    uint64_t most = 1;
    for (uint32_t e = 0; e < experts; e += step) {
        uint32_t end = e + step < experts ? e + step : experts;
        uint64_t load = range_sum(counts_of(stats, 0), e, end);
        most = load > most ? load : most;
    }
    double width = (double)(terminal_width() - 22), scale = width / (double)most;
    printf("\n  %9s %8s  %s\n", step > 1 ? "experts" : "expert", "load", "# kept  . dropped");
    for (uint32_t e = 0; e < experts; e += step)
        print_bar(stats, e, e + step < experts ? e + step : experts, scale);
    if (stats->columns > experts)
        printf("  %9s %8u\n", "identity", (unsigned)stats->identity_pairs);
}

static void print_head(const run_report *r) {
    const clmoe_layer_desc *desc = r->desc;
    char model[256];
    clmoe_printable(r->model_type[0] != '\0' ? r->model_type : "no model_type", model,
                    sizeof model);
    printf("model     %s, layer %u%s%s\n", model, (unsigned)r->layer,
           r->assumed ? ", taken for " : "", r->assumed ? r->assumed : "");
    printf("layer     E %u experts, K %u per token, D %u, H %u", (unsigned)desc->num_experts,
           (unsigned)desc->top_k, (unsigned)desc->dim, (unsigned)desc->experts.hidden_dim);
    if (desc->num_identity_experts > 0)
        printf(", Z %u identity experts", (unsigned)desc->num_identity_experts);
    if (desc->shared.hidden_dim > 0)
        printf(", shared expert of %u", (unsigned)desc->shared.hidden_dim);
    printf("\ndevice    %s\nengine    %s, %s\n", r->device, r->engine, dtype_name(desc->type));
    if (r->coded != NULL)
        printf("weights   %s, decoded to %s\n", r->coded, dtype_name(desc->weight_type));
    printf("batch     %u tokens, ", (unsigned)r->tokens);
    if (r->capacity > 0)
        printf("capacity %u rows per expert\n", (unsigned)r->capacity);
    else
        printf("dropless\n");
    if (r->forced.kind == FORCE_NONE)
        return;
    force_text(&r->forced, model, sizeof model);
    printf("routing   forced: %s\n", model);
}

static void print_balance(const run_report *r) {
    const clmoe_stats *stats = r->stats;
    double pairs = stats->pairs > 0 ? stats->pairs : 1;
    printf("\npairs     %u: %u kept, %u dropped (%.1f %%)\n", (unsigned)stats->pairs,
           (unsigned)stats->kept, (unsigned)stats->dropped, 100.0 * stats->dropped / pairs);
    printf("balance   MaxVio %.3f, entropy %.3f of log E = %.3f\n", (double)stats->max_violation,
           (double)stats->load_entropy, log(r->desc->num_experts));
    printf("          %u idle experts, %u non-finite tokens\n", (unsigned)stats->idle_experts,
           (unsigned)stats->nonfinite_tokens);
}

static void print_times(const run_report *r) {
    printf("\ntime      ms, median of %u\n", (unsigned)r->times.runs);
    for (int i = 0; i < STEP_COUNT; i++) {
        if (r->times.steps[i] >= 0)
            printf("  %-8s%10.3f\n", step_names[i], r->times.steps[i]);
        else if (i == STEP_DISPATCH)
            printf("  %-8s%10s  in experts\n", step_names[i], "-");
    }
    printf("  %-8s%10.3f  the whole layer\n", "forward", r->times.forward);
}

static void print_backward(const run_report *r) {
    const backward_times *t = &r->backward_times;
    if (!r->backward)
        return;
    printf("\nbackward  ms, median of %u\n", (unsigned)t->runs);
    for (uint32_t i = 0; i < t->num_steps; i++)
        printf("  %-18s%10.3f\n", t->names[i], t->steps[i]);
    printf("  %-18s%10.3f  the whole layer\n", "backward", t->backward);
}

static void print_checks(const run_report *r) {
    const gradient_errors *g = &r->gradient_errors;
    char worst[512];
    if (r->checked)
        printf("\nresult    relative error %.2e, tolerance %.2e: %s\n", r->relative_error,
               r->tolerance, r->pass ? "pass" : "FAIL");
    if (!r->gradients_checked)
        return;
    clmoe_printable(g->worst, worst, sizeof worst);
    printf("\ngradients relative error at most %.2e, tolerance %.2e: %s\n"
           "          of %s; %zu of %zu tensors compared\n",
           g->error, r->gradient_tolerance, r->gradients_pass ? "pass" : "FAIL", worst, g->compared,
           g->tensors);
}

static void print_losses(const run_report *r) {
    if (r->num_losses > 0)
        printf("\nlosses    without their weights\n");
    for (uint32_t i = 0; i < r->num_losses; i++)
        printf("  %-20s %.6g\n", clmoe_loss_name(r->losses[i].kind), (double)r->loss_values[i]);
}

static clmoe_status print_stats(const run_report *r) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t length = 0;
    char *text = NULL;
    TRY(LIB(clmoe_stats_format(r->stats, r->stats_bytes, NULL, 0, &length)));
    text = malloc(length + 1);
    if (text == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the statistics' text"));
    TRY(LIB(clmoe_stats_format(r->stats, r->stats_bytes, text, length + 1, NULL)));
    printf("\n%s", text);
done:
    free(text);
    return status;
}

clmoe_status report_text(const run_report *r) {
    clmoe_status status = CLMOE_SUCCESS;
    print_head(r);
    print_load(r->stats, r->desc->num_experts);
    print_balance(r);
    print_losses(r);
    print_times(r);
    print_backward(r);
    if (r->all_stats)
        TRY(print_stats(r));
    print_checks(r);
done:
    return status;
}

/* JSON has no NaN and no infinity: null. */
static json_t *json_number_or_null(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *json_counts(const clmoe_stats *stats, uint32_t which) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < stats->columns; i++)
        json_array_append_new(array, json_integer(counts_of(stats, which)[i]));
    return array;
}

static json_t *json_losses(const run_report *r) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < r->num_losses; i++) {
        json_t *loss = json_object();
        json_object_set_new(loss, "kind", json_string(clmoe_loss_name(r->losses[i].kind)));
        json_object_set_new(loss, "weight", json_real((double)r->losses[i].weight));
        json_object_set_new(loss, "value", json_number_or_null((double)r->loss_values[i]));
        json_array_append_new(array, loss);
    }
    return array;
}

static json_t *json_times(const batch_times *times) {
    json_t *object = json_object();
    json_object_set_new(object, "runs", json_integer(times->runs));
    json_object_set_new(object, "forward", json_real(times->forward));
    for (int i = 0; i < STEP_COUNT; i++)
        json_object_set_new(object, step_names[i],
                            times->steps[i] >= 0 ? json_real(times->steps[i]) : json_null());
    return object;
}

static json_t *json_backward_times(const backward_times *times) {
    json_t *object = json_object();
    json_object_set_new(object, "runs", json_integer(times->runs));
    json_object_set_new(object, "backward", json_real(times->backward));
    for (uint32_t i = 0; i < times->num_steps; i++)
        json_object_set_new(object, times->names[i], json_real(times->steps[i]));
    return object;
}

static json_t *json_gradients(const run_report *r) {
    const gradient_errors *g = &r->gradient_errors;
    json_t *object = json_object();
    json_object_set_new(object, "tensors", json_integer((json_int_t)g->tensors));
    json_object_set_new(object, "compared", json_integer((json_int_t)g->compared));
    json_object_set_new(object, "worst", json_string(g->worst));
    json_object_set_new(object, "worst_error", json_number_or_null(g->error));
    json_object_set_new(object, "tolerance", json_real(r->gradient_tolerance));
    json_object_set_new(object, "pass", json_boolean(r->gradients_pass));
    return object;
}

static void set_layer(json_t *object, const run_report *r) {
    const clmoe_layer_desc *desc = r->desc;
    json_object_set_new(object, "model_type", json_string(r->model_type));
    json_object_set_new(object, "assumed", r->assumed ? json_string(r->assumed) : json_null());
    json_object_set_new(object, "coded", r->coded ? json_string(r->coded) : json_null());
    json_object_set_new(object, "decoded_to",
                        r->coded ? json_string(dtype_name(desc->weight_type)) : json_null());
    json_object_set_new(object, "layer", json_integer(r->layer));
    json_object_set_new(object, "device", json_string(r->device));
    json_object_set_new(object, "engine", json_string(r->engine));
    json_object_set_new(object, "dtype", json_string(dtype_name(desc->type)));
    json_object_set_new(object, "tokens", json_integer(r->tokens));
    json_object_set_new(object, "dim", json_integer(desc->dim));
    json_object_set_new(object, "hidden_dim", json_integer(desc->experts.hidden_dim));
    json_object_set_new(object, "num_experts", json_integer(desc->num_experts));
    json_object_set_new(object, "num_identity_experts", json_integer(desc->num_identity_experts));
    json_object_set_new(object, "top_k", json_integer(desc->top_k));
    json_object_set_new(object, "capacity", json_integer(r->capacity));
    if (r->forced.kind != FORCE_NONE) {
        char forced[64];
        force_text(&r->forced, forced, sizeof forced);
        json_object_set_new(object, "forced_routing", json_string(forced));
    }
}

static void set_stats(json_t *object, const clmoe_stats *stats) {
    json_object_set_new(object, "load", json_counts(stats, 0));
    json_object_set_new(object, "kept", json_counts(stats, 1));
    json_object_set_new(object, "dropped", json_counts(stats, 2));
    json_object_set_new(object, "kept_total", json_integer(stats->kept));
    json_object_set_new(object, "dropped_total", json_integer(stats->dropped));
    json_object_set_new(object, "max_violation", json_number_or_null((double)stats->max_violation));
    json_object_set_new(object, "load_entropy", json_number_or_null((double)stats->load_entropy));
    json_object_set_new(object, "idle_experts", json_integer(stats->idle_experts));
    json_object_set_new(object, "nonfinite_tokens", json_integer(stats->nonfinite_tokens));
}

static json_t *stats_value(const void *base, size_t index, bool is_float) {
    const uint32_t *words = base;
    float value;
    memcpy(&value, &words[index], sizeof value);
    return is_float ? json_number_or_null((double)value) : json_integer(words[index]);
}

/* Every statistic: the fields, the arrays by expert, and what each device group gets. */
static json_t *stats_json(const clmoe_stats *stats) {
    const uint32_t *behind = (const uint32_t *)(stats + 1);
    json_t *object = json_object(), *experts = json_object(), *groups = json_array();
    const char *name;
    size_t offset;
    uint32_t is_float;
    for (uint32_t i = 0; (name = clmoe_stats_field(i, &offset, &is_float)) != NULL; i++)
        json_object_set_new(object, name,
                            stats_value(stats, offset / sizeof(uint32_t), is_float != 0));
    for (uint32_t i = 0; (name = clmoe_stats_array(i, &is_float)) != NULL; i++) {
        json_t *array = json_array();
        for (uint32_t e = 0; e < stats->columns; e++)
            json_array_append_new(array, stats_value(behind, e, is_float != 0));
        json_object_set_new(experts, name, array);
        behind += stats->columns;
    }
    for (uint32_t d = 0; d < stats->device_groups; d++)
        json_array_append_new(groups, json_integer(behind[d]));
    json_object_set_new(object, "experts", experts);
    json_object_set_new(object, "device_tokens", groups);
    return object;
}

clmoe_status report_json(const run_report *r) {
    json_t *object = json_object();
    set_layer(object, r);
    set_stats(object, r->stats);
    json_object_set_new(object, "relative_error",
                        r->checked ? json_number_or_null(r->relative_error) : json_null());
    json_object_set_new(object, "tolerance", r->checked ? json_real(r->tolerance) : json_null());
    json_object_set_new(object, "pass", r->checked ? json_boolean(r->pass) : json_null());
    json_object_set_new(object, "losses", json_losses(r));
    json_object_set_new(object, "milliseconds", json_times(&r->times));
    if (r->backward)
        json_object_set_new(object, "backward_milliseconds",
                            json_backward_times(&r->backward_times));
    if (r->gradients_checked)
        json_object_set_new(object, "gradients", json_gradients(r));
    if (r->all_stats)
        json_object_set_new(object, "statistics", stats_json(r->stats));
    int failed =
        json_dumpf(object, stdout, JSON_COMPACT | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(object);
    return failed ? cli_fail(CLMOE_IO, "cannot write the report as JSON") : CLMOE_SUCCESS;
}
