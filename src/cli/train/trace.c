#include "trace.h"
#include "../interrupt.h"

#include <stdlib.h>
#include <string.h>

/* ---- The tokens ------------------------------------------------------------------------------ */

static uint32_t sequences_of(const corpus *text, uint32_t each) {
    return (each + text->sequence - 1) / text->sequence;
}

clmoe_status trace_check_text(const corpus *text, uint32_t each) {
    const uint64_t least = (uint64_t)sequences_of(text, each) * text->sequence + text->context;
    for (uint32_t i = 0; i < text->num_files; i++) {
        const text_file *file = &text->files[i];
        const uint32_t bytes = file->end - file->begin;
        if (bytes < least)
            return cli_fail(CLMOE_BAD_FILE,
                            "--text '%s' has %u bytes, but --tokens %u in sequences of %u needs "
                            "%llu",
                            file->path, (unsigned)bytes, (unsigned)each, (unsigned)text->sequence,
                            (unsigned long long)least);
    }
    return CLMOE_SUCCESS;
}

/* Tokens that are being routed. Batches take sequences of all files in turn. */
typedef struct token_walk {
    const corpus *text;
    uint32_t each;      /* tokens of a file */
    uint32_t sequences; /* of a file */
    uint32_t batch;     /* tokens, whole sequences */
    uint32_t batches;
} token_walk;

static token_walk walk_of(const train_model *m, const corpus *text, uint32_t each) {
    token_walk w = {.text = text,
                    .each = each,
                    .sequences = sequences_of(text, each),
                    .batch = m->settings->batch};
    const uint64_t rows = (uint64_t)w.sequences * text->num_files * text->sequence;
    w.batches = (uint32_t)((rows + w.batch - 1) / w.batch);
    return w;
}

/*
 * The place of row `row` of a batch: position and file. False: it fills the last sequence of a
 * file, or begins the walk anew to fill the last batch, and does not count.
 */
static bool place_of(const token_walk *w, uint32_t batch, uint32_t row, uint32_t *position,
                     uint32_t *file) {
    const uint32_t length = w->text->sequence, files = w->text->num_files;
    const uint64_t all = (uint64_t)w->sequences * files;
    const uint64_t number = (uint64_t)batch * (w->batch / length) + row / length;
    const uint64_t sequence = number % all / files;
    const uint32_t t = row % length;
    *file = (uint32_t)(number % files);
    const text_file *of = &w->text->files[*file];
    const uint64_t room = of->end - of->begin - w->text->context - length;
    const uint64_t start = w->sequences > 1 ? sequence * room / (w->sequences - 1) : 0;
    *position = of->begin + w->text->context - 1 + (uint32_t)start + t;
    return number < all && sequence * length + t < w->each;
}

/* ---- What was chosen ------------------------------------------------------------------------- */

/* Start from {0}. */
typedef struct recording {
    token_walk walk;
    choices *layers; /* [num_layers] */
    uint32_t num_layers;
    token_labels labels[TRACE_LABELS];
    uint32_t pairs;      /* of a batch */
    int32_t *ids;        /* [pairs] */
    int32_t *offsets;    /* [batch + 1] */
    uint32_t *positions; /* [batch] */
    uint32_t tokens;     /* that have been routed */
} recording;

static clmoe_status no_memory(const recording *r) {
    return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for what %u layers choose for --tokens %u",
                    (unsigned)r->num_layers, (unsigned)r->walk.each);
}

static clmoe_status create_layers(recording *r, uint32_t tokens, uint32_t experts) {
    r->layers = calloc(r->num_layers, sizeof *r->layers);
    for (uint32_t l = 0; r->layers != NULL && l < r->num_layers; l++) {
        choices *c = &r->layers[l];
        c->experts = experts;
        c->first = calloc((size_t)tokens + 1, sizeof *c->first);
        c->chosen = malloc((size_t)r->walk.batches * r->pairs * sizeof *c->chosen);
        if (c->first == NULL || c->chosen == NULL)
            return no_memory(r);
    }
    return r->layers != NULL ? CLMOE_SUCCESS : no_memory(r);
}

static clmoe_status create_recording(recording *r, const train_model *m) {
    const token_walk *w = &r->walk;
    const uint32_t tokens = w->each * w->text->num_files;
    r->num_layers = m->settings->layers;
    if ((uint64_t)w->batches * r->pairs > UINT32_MAX)
        return cli_fail(CLMOE_UNSUPPORTED,
                        "--tokens %u of %u texts are more than 2^32 pairs of token and expert",
                        (unsigned)w->each, (unsigned)w->text->num_files);
    r->labels[TRACE_CLASS] = (token_labels){malloc(tokens), BYTE_CLASSES};
    r->labels[TRACE_SOURCE] = (token_labels){malloc(tokens), w->text->num_files};
    r->ids = malloc(r->pairs * sizeof *r->ids);
    r->offsets = malloc(((size_t)w->batch + 1) * sizeof *r->offsets);
    r->positions = malloc(w->batch * sizeof *r->positions);
    if (!r->labels[TRACE_CLASS].of || !r->labels[TRACE_SOURCE].of || !r->ids || !r->offsets ||
        !r->positions)
        return no_memory(r);
    return create_layers(r, tokens, m->settings->experts);
}

static void free_recording(recording *r) {
    for (uint32_t l = 0; r->layers != NULL && l < r->num_layers; l++) {
        free(r->layers[l].first);
        free(r->layers[l].chosen);
    }
    for (int i = 0; i < TRACE_LABELS; i++)
        free(r->labels[i].of);
    free(r->layers);
    free(r->ids);
    free(r->offsets);
    free(r->positions);
}

/* Appends what a layer chose for the tokens of a batch that count. */
static clmoe_status record_layer(recording *r, train_model *m, uint32_t batch, uint32_t layer) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_block *b = &m->blocks[layer];
    const uint32_t rows = r->walk.batch, each = r->pairs / rows;
    choices *c = &r->layers[layer];
    uint32_t position, file, pairs = c->first[c->tokens];
    TRY(model_read(m, b->ids, r->pairs * sizeof *r->ids, r->ids));
    if (b->offsets != NULL)
        TRY(model_read(m, b->offsets, (rows + 1) * sizeof *r->offsets, r->offsets));
    for (uint32_t t = 0; b->offsets == NULL && t <= rows; t++)
        r->offsets[t] = (int32_t)(t * each);
    for (uint32_t t = 0; t < rows; t++) {
        if (!place_of(&r->walk, batch, t, &position, &file))
            continue;
        for (int32_t i = r->offsets[t]; i < r->offsets[t + 1]; i++)
            c->chosen[pairs++] = (uint16_t)r->ids[i];
        c->first[++c->tokens] = pairs;
    }
done:
    return status;
}

/* The batch's positions; the labels of its tokens that count. */
static void label_batch(recording *r, uint32_t batch) {
    uint32_t position, file;
    for (uint32_t t = 0; t < r->walk.batch; t++) {
        const bool counts = place_of(&r->walk, batch, t, &position, &file);
        r->positions[t] = position;
        if (!counts)
            continue;
        r->labels[TRACE_CLASS].of[r->tokens] = (uint8_t)class_of(r->walk.text->bytes[position]);
        r->labels[TRACE_SOURCE].of[r->tokens++] = (uint8_t)file;
    }
}

static clmoe_status record(recording *r, train_model *m, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    for (uint32_t i = 0; i < r->walk.batches; i++) {
        if (interrupt_signal() != 0)
            return cli_fail(CLMOE_INVALID_ARGUMENT, "stopped after %u of %u batches", (unsigned)i,
                            (unsigned)r->walk.batches);
        label_batch(r, i);
        TRY(model_batch(m, r->walk.text, r->positions, false));
        TRY(model_forward(m, step, false));
        for (uint32_t l = 0; l < r->num_layers; l++)
            TRY(record_layer(r, m, i, l));
    }
done:
    return status;
}

/* ---- The trace ------------------------------------------------------------------------------- */

clmoe_status trace_create_counts(const trace *t, uint32_t kinds, trace_counts *counts) {
    counts->kinds = kinds;
    counts->about = calloc(t->layers, sizeof *counts->about);
    counts->pairs = calloc(t->layers, sizeof *counts->pairs);
    bool right = counts->about != NULL && counts->pairs != NULL;
    for (uint32_t l = 0; right && l < t->layers; l++) {
        counts->pairs[l] = calloc((size_t)t->experts * kinds, sizeof *counts->pairs[l]);
        right = counts->pairs[l] != NULL;
    }
    return right ? CLMOE_SUCCESS
                 : cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the counts of %u layers",
                            (unsigned)t->layers);
}

void trace_free(trace *t) {
    for (int i = 0; i < TRACE_LABELS; i++) {
        for (uint32_t l = 0; t->by[i].pairs != NULL && l < t->layers; l++)
            free(t->by[i].pairs[l]);
        free(t->by[i].pairs);
        free(t->by[i].about);
    }
    *t = (trace){0};
}

static clmoe_status no_choice(const balance_method *method) {
    return cli_fail(CLMOE_UNSUPPORTED,
                    "the run has --balance %s: every token passes all experts, none is chosen",
                    method->row->name);
}

clmoe_status trace_check_run(const train_settings *s) {
    const balance_method *method = methods_find(&s->methods, METHOD_POLICY);
    const bool soft = method != NULL && method->row->which == CLMOE_POLICY_SOFT_MOE;
    return soft ? no_choice(method) : CLMOE_SUCCESS;
}

/* Whether the layers of a step choose: they may come to do so, or cease to. */
static clmoe_status check_step(const train_model *m, uint32_t step) {
    const balance_method *method = methods_find(&m->settings->methods, METHOD_POLICY);
    if (phases_at(&m->phases, step)->policy != CLMOE_POLICY_ALL_EXPERTS)
        return CLMOE_SUCCESS;
    if (method != NULL && method->row->which == CLMOE_POLICY_ALL_EXPERTS)
        return no_choice(method);
    return cli_fail(CLMOE_UNSUPPORTED,
                    "the run is at step %u of --soft-steps %u: every token passes all experts, "
                    "none is chosen",
                    (unsigned)step + 1, (unsigned)m->settings->soft_steps);
}

clmoe_status trace_measure(trace *t, train_model *m, const corpus *text, uint32_t steps,
                           uint32_t each, uint64_t seed) {
    clmoe_status status = CLMOE_SUCCESS;
    recording r = {.walk = walk_of(m, text, each)};
    const uint32_t step = steps > 0 ? steps - 1 : 0;
    t->layers = m->settings->layers;
    t->experts = m->settings->experts;
    TRY(check_step(m, step));
    TRY(model_choices(m, step, &r.pairs));
    TRY(create_recording(&r, m));
    TRY(record(&r, m, step));
    t->tokens = r.tokens;
    for (int i = 0; i < TRACE_LABELS; i++) {
        trace_counts *counts = &t->by[i];
        TRY(trace_create_counts(t, r.labels[i].kinds, counts));
        TRY(information_measure(r.layers, t->layers, &r.labels[i], seed, counts->pairs,
                                counts->about));
    }
done:
    free_recording(&r);
    return status;
}

/* ---- Shares ---------------------------------------------------------------------------------- */

uint64_t trace_expert_pairs(const trace *t, uint32_t layer, uint32_t expert) {
    uint64_t sum = 0;
    for (int i = 0; i < BYTE_CLASSES; i++)
        sum += t->by[TRACE_CLASS].pairs[layer][(size_t)expert * BYTE_CLASSES + (size_t)i];
    return sum;
}

uint64_t trace_layer_pairs(const trace *t, uint32_t layer) {
    uint64_t sum = 0;
    for (uint32_t e = 0; e < t->experts; e++)
        sum += trace_expert_pairs(t, layer, e);
    return sum;
}

void trace_shares(const trace *t, trace_label label, uint32_t layer, uint32_t expert,
                  double *shares) {
    const uint32_t kinds = t->by[label].kinds;
    const uint32_t first = expert < t->experts ? expert : 0;
    const uint32_t end = expert < t->experts ? expert + 1 : t->experts;
    const uint64_t *pairs = t->by[label].pairs[layer];
    const double all = (double)(expert < t->experts ? trace_expert_pairs(t, layer, expert)
                                                    : trace_layer_pairs(t, layer));
    memset(shares, 0, kinds * sizeof *shares);
    for (uint32_t e = first; e < end; e++)
        for (uint32_t k = 0; k < kinds && all > 0; k++)
            shares[k] += (double)pairs[(size_t)e * kinds + k] / all;
}
