/*
 * The table of cases: shapes and routing patterns, and what each step of them costs. Shared by
 * clmoe-bench and the tests; plain C, needs no device.
 */
#ifndef BENCH_CASES_H
#define BENCH_CASES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Where a case belongs: `all` takes those of the device's type, the others are run by name. */
typedef enum case_home {
    CASE_CPU,
    CASE_GPU,
    CASE_ANY,
    CASE_BY_NAME,
} case_home;

typedef enum case_pattern {
    ROUTE_UNIFORM,    /* every expert is as likely */
    ROUTE_ZIPF,       /* expert e is about 1/(e+1) as likely as the first */
    ROUTE_ONE_EXPERT, /* the first choice of every token is expert 0 */
    /* Pair i goes to expert i mod E, with weight 1/K: forced, whatever the router's logits are. */
    ROUTE_ROUND_ROBIN,
    ROUTE_PATTERNS
} case_pattern;

/* A layer: softmax router with renormalised weights, experts with gate, silu and no biases. */
typedef struct bench_case {
    const char *name;
    case_home home;
    uint32_t tokens, dim, hidden_dim, experts, top_k;
    bool routing_only; /* score to plan; its experts are a token gesture */
} bench_case;

/* The table, ended by a NULL name. Rows of one name differ in tokens, or are a sweep. */
extern const bench_case bench_cases[];

/*
 * What can be timed: the whole layer, its steps, chains of steps, the routing of other policies,
 * the layer as it is trained (train.h) with and without everything that measures its balance, the
 * counts of the quantile rule, and the backward pass.
 */
typedef enum bench_step {
    STEP_LAYER,
    STEP_SCORE,         /* x -> logits, scores */
    STEP_TOPK,          /* scores -> ids, weights */
    STEP_PLAN,          /* ids -> plan */
    STEP_ROUTING,       /* scores -> plan */
    STEP_EXPERT_CHOICE, /* the same of each policy of policy.h */
    STEP_SINKHORN,
    STEP_REROUTE,
    STEP_TOPK_TO_PLAN, /* logits -> plan */
    STEP_DISPATCH,     /* x, plan -> xe */
    STEP_EXPERTS,      /* both GEMMs with the activation */
    STEP_COMBINE,
    STEP_STATS,
    STEP_TRAIN,         /* x -> y */
    STEP_TRAIN_BALANCE, /* x -> y, stats, values of all losses, dlogits */
    STEP_BALANCE,       /* logits, plan -> stats, values, dlogits */
    STEP_BIAS_COUNTS,   /* logits -> the counts of the quantile rule (counts.h) */
    /* Of backward.h: */
    STEP_BACKWARD,         /* dy -> dx, gradients of all weights */
    STEP_BACKWARD_DATA,    /* dy -> dx */
    STEP_BACKWARD_WEIGHTS, /* what the step before left -> gradients of all weights */
    STEP_FORWARD_BACKWARD, /* x, dy -> y, dx, gradients of all weights */
    STEP_COUNT
} bench_step;

extern const char *const step_names[STEP_COUNT];
extern const char *const pattern_names[ROUTE_PATTERNS];

/* Whether the case has the step. */
bool case_has_step(const bench_case *c, bench_step step);

/* Whether it is one of the last four. */
bool step_is_backward(bench_step step);

/* Whether the step is left out of `all`. */
bool step_is_by_name(bench_step step);

/* Added to the logits of expert e, whose own part has a deviation of about 1. */
float pattern_bias(case_pattern pattern, uint32_t expert);

/* Whether ids are given, not chosen; and whether the step is one that they can be given to. */
bool pattern_is_forced(case_pattern pattern);
bool pattern_has_step(case_pattern pattern, bench_step step);

/* Sizes that depend on the storage types and on the routing. */
typedef struct case_sizes {
    size_t element;   /* bytes of an element of x, y, xe, ye */
    size_t weight;    /* bytes of an element of the expert weights */
    size_t gradient;  /* bytes of an element of their gradients */
    uint32_t touched; /* experts that got a token */
} case_sizes;

/* Whether the step makes gradients of weights. */
bool step_makes_gradients(bench_step step);

/* Whether the step reads all weights of the experts. */
bool step_runs_experts(bench_step step);

/* Multiplications and additions of a step; 0 where it only moves data. */
double case_flops(const bench_case *c, bench_step step);

/*
 * Bytes a step cannot avoid: every input it needs read once, every output written once, and of the
 * weights those of the touched experts. What a step keeps for itself, such as the hidden rows
 * between the two GEMMs, does not count.
 */
double case_bytes(const bench_case *c, bench_step step, const case_sizes *sizes);

/* Bytes of the expert weights. */
double case_weight_bytes(const bench_case *c, size_t weight);

#endif
