/* The routing of a case by other policies than plain token choice: scores -> plan. */
#ifndef BENCH_POLICY_H
#define BENCH_POLICY_H

#include "inputs.h"

typedef enum policy_kind {
    POLICY_EXPERT_CHOICE, /* capacity factor 1 */
    POLICY_SINKHORN,      /* dropless; the default bounds: 100 iterations, tolerance 1e-4 */
    POLICY_REROUTE,       /* token choice with capacity factor 1 and overflow reroute */
    POLICY_KINDS
} policy_kind;

typedef enum policy_buffer {
    POLICY_SCORES,  /* [T,E] f32: what the policy chooses by */
    POLICY_IDS,     /* [pairs] i32 */
    POLICY_WEIGHTS, /* [pairs] f32 */
    POLICY_LIVE,    /* [T] i32; not with expert choice */
    POLICY_OFFSETS, /* [T+1] i32; with expert choice */
    POLICY_PLAN,
    POLICY_SCRATCH,
    POLICY_BUFFERS
} policy_buffer;

typedef struct bench_policy {
    const bench_device *device;
    const inputs *in;
    policy_kind kind;
    clmoe_layer *layer;
    clmoe_plan_layout plan;
    cl_mem buffers[POLICY_BUFFERS];
} bench_policy;

/* Creates the layer and its buffers, and the scores. */
clmoe_status policy_create(const bench_device *device, const inputs *in, const char *engine,
                           policy_kind kind, bench_policy *p);
void policy_release(bench_policy *p);

clmoe_status policy_enqueue(bench_policy *p, cl_event *event);

#endif
