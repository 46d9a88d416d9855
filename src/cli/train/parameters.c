#include "parameters.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

/* Of parts of the array, in elements: as sub-buffers they begin on any device's alignment. */
enum { BYTES = 256, ALIGNMENT = 256 };

/* Slots so that all experts together have as many rows as with token choice, times the value. */
static uint32_t slots_of(const train_settings *s, const balance_method *soft) {
    const double rows = soft->value * s->batch * s->top_k / s->experts;
    return rows < 1 ? 1 : rows > MOST_SLOTS ? MOST_SLOTS + 1 : (uint32_t)rows;
}

uint32_t router_rows(const train_settings *s) {
    const balance_method *policy = methods_find(&s->methods, METHOD_POLICY);
    if (policy != NULL && policy->row->which == CLMOE_POLICY_SOFT_MOE)
        return s->experts * slots_of(s, policy);
    return s->experts;
}

/* The shape of a kind; false if the model has none of it. */
static bool shape_of(const train_settings *s, parameter_kind kind, parameter *row) {
    const uint32_t d = s->dim;
    const uint32_t shapes[PARAMETER_KINDS][3] = {
        [PARAMETER_GATE_UP] = {s->experts, 2 * s->hidden, d},
        [PARAMETER_DOWN] = {s->experts, d, s->hidden},
        [PARAMETER_SHARED_GATE_UP] = {1, 2 * s->shared, d},
        [PARAMETER_SHARED_DOWN] = {1, d, s->shared},
        [PARAMETER_ROUTER] = {1, router_rows(s), d},
        [PARAMETER_NOISE_ROUTER] = {1, s->noise == CLMOE_NOISE_LEARNED ? s->experts : 0, d},
        [PARAMETER_HEAD] = {1, BYTES, d},
        [PARAMETER_TABLE] = {s->context, BYTES, d},
        [PARAMETER_GAIN] = {1, 1, d},
    };
    row->kind = kind;
    row->count = 1;
    for (uint32_t i = 0; i < 3; i++) {
        row->shape[i] = shapes[kind][i];
        row->count *= row->shape[i];
    }
    return row->count > 0;
}

/* Blocks that have a kind: the head and the tables are of block 0, its gain of one more. */
static uint32_t blocks_of(const train_settings *s, parameter_kind kind) {
    if (kind == PARAMETER_HEAD || kind == PARAMETER_TABLE)
        return 1;
    return s->layers + (kind == PARAMETER_GAIN);
}

static void append(parameters *p, const train_settings *s, parameter_kind kind, uint32_t block) {
    parameter row = {.block = block};
    if (!shape_of(s, kind, &row))
        return;
    row.first = p->elements;
    p->rows[p->count++] = row;
    p->elements += (row.count + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

clmoe_status parameters_create(parameters *p, const train_settings *s) {
    const size_t most = (size_t)PARAMETER_KINDS * (s->layers + 1);
    *p = (parameters){.rows = malloc(most * sizeof *p->rows)};
    if (p->rows == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the model's parameters");
    for (parameter_kind kind = 0; kind < PARAMETER_KINDS; kind++) {
        if (kind == PARAMETER_ROUTER)
            p->copied = p->elements;
        if (kind == PARAMETER_TABLE)
            p->decayed = p->elements;
        for (uint32_t block = 0; block < blocks_of(s, kind); block++)
            append(p, s, kind, block);
    }
    if (p->elements > UINT32_MAX)
        return cli_fail(CLMOE_UNSUPPORTED, "the model has %zu parameters, more than 2^32 - 1",
                        p->elements);
    return CLMOE_SUCCESS;
}

void parameters_free(parameters *p) {
    free(p->rows);
    *p = (parameters){0};
}

const parameter *parameters_find(const parameters *p, parameter_kind kind, uint32_t block) {
    for (uint32_t i = 0; i < p->count; i++)
        if (p->rows[i].kind == kind && p->rows[i].block == block)
            return &p->rows[i];
    return NULL;
}

/* ---- First values ------------------------------------------------------------------------------
 */

enum { MOST_THREADS = 64, LEAST_STRETCH = 1 << 16 };

/* In (0, 1). */
static double uniform(uint64_t bits) {
    return ((double)(bits >> 11) + 0.5) * 0x1p-53;
}

/* N(0,1) by Box and Muller. */
static double normal(uint64_t key, uint64_t index) {
    const double u = uniform(random_bits(key, 2 * index));
    const double v = uniform(random_bits(key, 2 * index + 1));
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static double deviation_of(const train_settings *s, const parameter *row) {
    if (row->kind == PARAMETER_TABLE)
        return 1 / sqrt(s->context);
    return 1 / sqrt(row->shape[2]);
}

/* The row of a router that is larger, for --init skewed. */
static double skew_of(const train_settings *s, const parameter *row, size_t index) {
    if (!s->skewed || row->kind != PARAMETER_ROUTER)
        return 1;
    return 1 + 3.0 * (double)(index / s->dim) / row->shape[1];
}

/* The elements [begin, end) of the array; each is a function of its place alone. */
typedef struct stretch {
    const parameters *p;
    const train_settings *s;
    float *values;
    size_t begin, end;
    pthread_t thread;
    bool begun; /* the thread */
} stretch;

/* Of a parameter, its elements [begin, end). */
static void init_row(const train_settings *s, const parameter *row, size_t begin, size_t end,
                     float *values) {
    const double deviation = deviation_of(s, row);
    const uint64_t key = random_bits(s->seed, ((uint64_t)row->kind << 32) + row->block);
    for (size_t i = begin; i < end; i++)
        values[i] = row->kind == PARAMETER_GAIN
                        ? 1
                        : (float)(normal(key, i) * deviation * skew_of(s, row, i));
}

static void *init_stretch(void *of) {
    const stretch *t = of;
    for (size_t i = t->begin; i < t->end; i++)
        t->values[i] = 0;
    for (uint32_t r = 0; r < t->p->count; r++) {
        const parameter *row = &t->p->rows[r];
        const size_t begin = t->begin > row->first ? t->begin - row->first : 0;
        const size_t end = t->end > row->first ? t->end - row->first : 0;
        init_row(t->s, row, begin, end < row->count ? end : row->count, t->values + row->first);
    }
    return NULL;
}

/* A thread for each processor, but not for a few elements. */
static size_t threads_for(size_t elements) {
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    const size_t most = processors < 1              ? 1
                        : processors > MOST_THREADS ? MOST_THREADS
                                                    : (size_t)processors;
    const size_t useful = elements / LEAST_STRETCH + 1;
    return useful < most ? useful : most;
}

void parameters_init(const parameters *p, const train_settings *s, float *values) {
    stretch all[MOST_THREADS];
    const size_t count = threads_for(p->elements), each = p->elements / count + 1;
    for (size_t t = 0; t < count; t++) {
        const size_t begin = t * each, end = begin + each;
        all[t] = (stretch){.p = p, .s = s, .values = values, .begin = begin};
        all[t].end = end < p->elements ? end : p->elements;
        all[t].begun =
            t + 1 < count && pthread_create(&all[t].thread, NULL, init_stretch, &all[t]) == 0;
        if (!all[t].begun)
            init_stretch(&all[t]);
    }
    for (size_t t = 0; t < count; t++)
        if (all[t].begun)
            pthread_join(all[t].thread, NULL);
}
