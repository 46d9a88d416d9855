/*
 * What the sweeps share: a rig is what is swept, a phase one thing that is done with it, a source
 * what can fail meanwhile. sweep() has every call of a phase fail.
 */
#ifndef FAULT_SWEEP_H
#define FAULT_SWEEP_H

#include "layer.h"
#include "support.h"

enum { TOKENS = 13, OUTPUTS = 8 };

extern bool everything; /* all phases, layers and queues; else a sample of them */
extern bool every_code; /* for each call; else codes take turns */
extern unsigned one_in; /* calls */
extern unsigned tried;  /* faults */

/* ---- What can fail -------------------------------------------------------------------------- */

extern const fault_layer *opencl;

typedef struct source {
    const char *name;
    void (*arm)(unsigned nth, cl_int code, bool lasting);
    unsigned (*calls)(void);
    const char *(*failed)(void);
} source;

extern const source host_memory; /* where the linker sends the library's calls */

/* Whether blocks count and may fail; gives what was before. The test's own are not to. */
bool memory_watch(bool watched);
void *jansson_malloc(size_t bytes);
/* Puts the layer between the loader and the driver; false if this loader takes none. */
bool load_layer(void);

/* ---- What is done --------------------------------------------------------------------------- */

/* Everything between a model directory, or a descriptor, and an output. */
typedef struct rig {
    const char *engine, *model;
    uint32_t number; /* of the layer in the checkpoint */
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc;
    clmoe_context *context;
    clmoe_layer *layer;
    clmoe_weights weights;
    clmoe_buf packed; /* of the experts, where the engine has such a form */
    cl_command_queue queue;
    clmoe_forward_args args;
    struct {
        clmoe_score_args score;
        clmoe_topk_args topk;
        clmoe_plan_args plan;
        clmoe_replicate_args replicate;
        clmoe_dispatch_args dispatch;
        clmoe_experts_args experts;
        clmoe_shared_expert_args shared;
        clmoe_combine_args combine;
        clmoe_stats_args stats;
        clmoe_loss_args loss;
        clmoe_router_orthogonality_args orthogonality; /* where the layer has it */
        clmoe_bias_counts_args counts;                 /* where the update reads them */
    } steps;
    clmoe_backward_args back; /* of the batch */
    clmoe_gradients gradients;
    struct {
        clmoe_experts_backward_args experts;
        clmoe_combine_backward_args combine;
        clmoe_shared_expert_backward_args shared;
        clmoe_topk_backward_args topk;
        clmoe_score_backward_args score;
        clmoe_dispatch_backward_args dispatch;
    } back_steps;
    void *dx, *down; /* of a backward without faults: and gradients.experts.down */
    clmoe_balance_args balance;
    void *first_state, *next_state; /* before and after an update */
    size_t state_bytes;
    void *y, *stats, *ids, *logits; /* of a run without faults */
    struct {
        clmoe_buf buf;
        size_t bytes;
        const char *name;
        void *want;
    } outputs[OUTPUTS];
} rig;

/* Contexts and layers of a rig; what a failed call gives back is looked at. */
clmoe_status run_context(rig *r);
void undo_context(rig *r);
clmoe_status run_layer(rig *r);
void fresh_context(rig *r);
void undo_layer(rig *r);
clmoe_status event_is_right(clmoe_status status, cl_event event);

/* A step after the one before, whose event is given back. */
#define STEP(call, args)                                                                           \
    do {                                                                                           \
        cl_event event = (cl_event)(void *)r;                                                      \
        status = call(r->layer, r->queue, (args), last != NULL, last ? &last : NULL, &event);      \
        CHECK((status == CLMOE_SUCCESS) == (event != NULL), "an event of a failed " #call "\n");   \
        if (last)                                                                                  \
            clReleaseEvent(last);                                                                  \
        last = event;                                                                              \
        if (status != CLMOE_SUCCESS)                                                               \
            return status;                                                                         \
    } while (0)

/*
 * May succeed: trouble with the cache is no error. No blocks: asks for no host memory. Light: makes
 * no object, compiles, copies and waits for nothing. No queue: is given none, or always the same,
 * so that one kind of queue is enough.
 */
enum { MAY_SUCCEED = 1, NO_BLOCKS = 2, LIGHT = 4, NO_QUEUE = 8 };

typedef struct phase {
    const char *name;
    unsigned traits;
    void (*before)(rig *r);
    clmoe_status (*run)(rig *r);
    void (*compare)(rig *r);
    void (*undo)(rig *r);
    void (*again)(rig *r); /* before a retry */
} phase;

/* Whether the rig's kind of queue has this phase: those without a queue are swept once. */
bool phase_has_queue(const rig *r, const phase *p);

/* Has the calls of a phase fail, one after the other. */
void sweep(rig *r, const phase *p, const source *from);

/* Layers with every policy and controller, their states, statistics and losses. */
void sweep_balance(const source *from, cl_command_queue queue);

#endif
