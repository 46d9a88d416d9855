/* Every call with right arguments, and the buffers in them, for tests that spoil one at a time. */
#ifndef CALL_CASES_H
#define CALL_CASES_H

#include "support.h"

static const shape small = {6, 5, 8, 0, 2, 3};

/* A buffer of an argument struct. */
typedef struct buf_field {
    const char *name;
    size_t offset;
    bool required;
    size_t element;
} buf_field;

typedef clmoe_status (*call)(clmoe_layer *layer, cl_command_queue queue, const void *args,
                             cl_uint num_wait, const cl_event *wait, cl_event *event);

/* One public call with arguments that are right, and the buffers in them. */
typedef struct call_case {
    const char *name;
    call call;
    void *args;
    const buf_field *fields;
    size_t num_fields;
    const clmoe_weights **weights; /* in args */
    const buf_field *weight_fields;
    size_t num_weight_fields;
} call_case;

/* The calls in an order in which each finds what it reads. */
enum {
    CALL_FORWARD,
    CALL_EXPERTS = 7,
    CALL_SHARED,
    CALL_BACKWARD = 11,
    CALL_EXPERTS_BACK,
    CALL_COMBINE_BACK,
    CALL_SHARED_BACK,
    CALL_TOPK_BACK,
    CALL_SCORE_BACK,
    CALL_DISPATCH_BACK,
    CALL_REPLICATE,
    CALLS
};

/* Everything the calls share: right arguments for each. */
typedef struct call_fixture {
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    batch b;
    device_batch d;
    clmoe_weights weights; /* a copy that may be spoilt */
    clmoe_gradients gradients;
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_renorm_after_drop_args renorm;
    clmoe_jitter_args jitter;
    clmoe_replicate_args replicate;
    clmoe_dispatch_args dispatch;
    clmoe_experts_args experts;
    clmoe_shared_expert_args shared;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
    clmoe_backward_args backward;
    clmoe_experts_backward_args experts_back;
    clmoe_combine_backward_args combine_back;
    clmoe_shared_expert_backward_args shared_back;
    clmoe_topk_backward_args topk_back;
    clmoe_score_backward_args score_back;
    clmoe_dispatch_backward_args dispatch_back;
} call_fixture;

/* Of a layer that needs every buffer there is. */
void call_fixture_make(call_fixture *f);
void calls_of(call_fixture *f, call_case calls[CALLS]);

/* Calls with what is now in the arguments; expects an error, no event and no work. */
void expect_refusal(const call_fixture *f, const call_case *c, const char *field,
                    const char *value);

#endif
