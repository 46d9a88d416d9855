/*
 * What the files of the self-test share. A trial is one batch of one layer: what it is given, and
 * what comes out, as doubles on the host. They use the public API alone, besides errors and the
 * fields of a context.
 */
#ifndef CLMOE_TRIAL_H
#define CLMOE_TRIAL_H

#include "runtime/context.h"

/* Arrays of a trial: what it is given, then what comes out. */
typedef enum trial_array {
    TRIAL_X,            /* [T,D] */
    TRIAL_MASK,         /* [T] */
    TRIAL_LOGITS,       /* [T,E] */
    TRIAL_DY,           /* [T,D] */
    TRIAL_ROUTER,       /* [E*p,D] */
    TRIAL_GROUP_ROUTER, /* [groups,D] */
    TRIAL_NOISE_ROUTER, /* [E,D] */
    TRIAL_ROUTER_BIAS,  /* [E] */
    TRIAL_GATE,         /* [E,2H,D] */
    TRIAL_DOWN,         /* [E,D,H] */
    TRIAL_SHARED_UP,    /* [2H',D], H' of the shared expert */
    TRIAL_SHARED_DOWN,  /* [D,H'] */
    TRIAL_SHARED_GATE,  /* [D] */
    TRIAL_STATE,        /* [5,E], what is behind trial_state */
    TRIAL_GIVEN,
    TRIAL_IDS = TRIAL_GIVEN, /* [pairs] */
    TRIAL_OFFSETS,           /* [T+1], of lists of pairs */
    TRIAL_WEIGHTS,           /* [pairs] */
    TRIAL_BIAS_COUNTS,       /* [E,bins] */
    TRIAL_COUNTS,            /* the words of the statistics that are u32 */
    TRIAL_STATS,             /* those that are f32 */
    TRIAL_LOSSES,            /* [losses] */
    TRIAL_Y,                 /* [T,D] */
    TRIAL_DLOGITS,           /* [T,E] */
    TRIAL_DNOISE,            /* [T,E], of the losses, on x Wn^T */
    TRIAL_DX,
    TRIAL_DROUTER,
    TRIAL_DGROUP_ROUTER,
    TRIAL_DNOISE_ROUTER,
    TRIAL_DROUTER_BIAS,
    TRIAL_DGATE,
    TRIAL_DDOWN,
    TRIAL_DSHARED_UP,
    TRIAL_DSHARED_DOWN,
    TRIAL_DSHARED_GATE,
    TRIAL_NEXT_COUNTS, /* the state after the update, in the same way */
    TRIAL_NEXT_STATE,
    TRIAL_ARRAYS
} trial_array;

/* How elements lie on the device: a clmoe_type, or one of these. */
enum { TRIAL_I32 = 16, TRIAL_U32, TRIAL_U8 };

typedef struct trial_values {
    double *of[TRIAL_ARRAYS]; /* NULL: not there */
} trial_values;

/* What a batch gives to the router. */
typedef enum batch_kind {
    BATCH_X,
    BATCH_MASKED,
    BATCH_ONE,
    BATCH_TIES,
    BATCH_NONFINITE
} batch_kind;

typedef struct selftest_batch {
    const char *name;
    batch_kind kind;
    uint32_t tokens;
    clmoe_bias_rule rule; /* of the update, where the layer has a selection bias */
} selftest_batch;

typedef struct selftest_layer {
    const char *name;
    uint32_t experts, top_k, dim, hidden;
    void (*set)(clmoe_layer_desc *desc); /* its switches, or NULL */
    bool every_type;                     /* else f32 alone */
    bool training;
    bool logits; /* it may be given logits */
    bool state;  /* it has a state, statistics, losses and an update; one engine runs it */
} selftest_layer;

extern const selftest_layer selftest_layers[];
extern const size_t selftest_num_layers;
extern const selftest_batch selftest_batches[];
extern const size_t selftest_num_batches;

enum { TRIAL_MOST_LOSSES = 16 };

/* The state before the batch; columns are the layer's. */
extern const clmoe_state trial_state;

typedef struct trial {
    const selftest_batch *batch;
    bool state; /* as of selftest_layer */
    clmoe_layer_desc desc;
    uint32_t tokens, pairs;
    size_t counts[TRIAL_ARRAYS]; /* elements; 0: not there */
    uint32_t types[TRIAL_ARRAYS];
    clmoe_loss_desc losses[TRIAL_MOST_LOSSES]; /* as many as TRIAL_LOSSES has elements */
    trial_values given;
} trial;

void trial_desc(const selftest_layer *layer, clmoe_type type, clmoe_layer_desc *desc);
/* Sizes and inputs, which are the same on every machine; the caller sets desc and batch. */
clmoe_status trial_make(trial *t);
void trial_release(trial *t);
const char *trial_array_name(trial_array array);

/* The update's arguments, all but the buffers. */
void trial_update_args(const trial *t, clmoe_balance_args *args);

/* Whether the choice is a list of pairs with offsets. */
bool trial_lists_pairs(const trial *t);

/* Memory for what comes out. */
clmoe_status trial_values_create(const trial *t, trial_values *values);
void trial_values_release(trial_values *values);

/* Numbers that are the same everywhere, in [0, 1). */
double trial_random(uint64_t *seed);

/*
 * The layer in double precision. NaN: any value will do, as of the ids of surplus choices, and of
 * the elements of gradients but some, which are found by differences with the choice held fixed.
 */
clmoe_status host_run(trial *t, trial_values *out);

/*
 * One run on the device: forward, and backward if the layer trains. Waits. `packed`: forward by
 * packed weights; CLMOE_UNSUPPORTED where the engine has none.
 */
clmoe_status device_run(clmoe_context *context, cl_command_queue queue, clmoe_layer *layer,
                        const trial *t, bool packed, trial_values *out);

/* The worst comparison so far, from {0}: see trial_compare(). */
typedef struct trial_verdict {
    bool compared;
    trial_array array;
    const char *against;
    double norm, norm_tolerance, worst, worst_tolerance;
    size_t at; /* the worst element */
    double got, want;
} trial_verdict;

/*
 * Compares all arrays. NaN in `want` is not compared. Once something differs, the verdict is the
 * first array that does.
 */
void trial_compare(const trial *t, const char *against, const trial_values *got,
                   const trial_values *want, trial_verdict *worst);
/* That the bits are the same. */
void trial_compare_bits(const trial *t, const trial_values *got, const trial_values *want,
                        trial_verdict *worst);
bool trial_differs(const trial_verdict *verdict);

#endif
