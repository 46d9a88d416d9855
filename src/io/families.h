/*
 * What is known of model families, as tables: how a family routes, and how tensors are named.
 *
 * To add a family whose tensor names are known: one row of `families`. For new names: rows of
 * `patterns`. fields.c has the fields that only some families
 * have; nothing else in src/io knows a family by name.
 */
#ifndef CLMOE_FAMILIES_H
#define CLMOE_FAMILIES_H

#include "runtime/status.h"

#include <stdbool.h>

typedef enum renorm_rule {
    RENORM_NEVER,
    RENORM_ALWAYS,
    RENORM_DEFAULT_OFF, /* the file's norm_topk_prob decides, false if absent */
    RENORM_DEFAULT_ON,
    RENORM_BY_FLAG, /* the file's norm_topk_prob decides and must be there */
    RENORM_NORM,    /* by the p-norm that the file names; null: none */
} renorm_rule;

typedef enum group_rule {
    GROUPS_NONE,
    GROUPS_MAX, /* if topk_method is group_limited_greedy */
    GROUPS_TOP2,
} group_rule;

/* A row of the table: the switches of a family, and the defaults of fields a file may omit. */
typedef struct family {
    const char *model_type;
    bool deduced; /* from what a file says, for a model_type outside the table */
    clmoe_score_function score;
    bool score_by_field; /* the file's scoring_func decides, `score` if absent */
    clmoe_order order;
    renorm_rule renorm;
    float renorm_eps;
    float scale;     /* default of the file's scale; 0: the family has none */
    bool null_scale; /* its files may have null, and mean the default */
    group_rule groups;
    uint32_t num_groups, topk_groups; /* defaults; 0: no groups */
    /* Tensors that the family has, or may have; others' are an error. */
    bool router_bias;
    bool select_bias; /* must be there, unless the file turns it off */
    bool expert_biases;
    bool shared_beside; /* what the file says of one is of a neighbour, whose output is added later
                         */
    bool shared;        /* must be there if the file gives it a size or a count, but not a 0 */
    bool shared_gate;
    bool output_bias;
    bool identity_experts; /* as many as the file says */
    clmoe_weight_at weight_at;
    const char *activation;         /* of the experts, whatever the file says; NULL: the file's */
    const char *default_activation; /* where the file says none; NULL: "silu" */
    bool interleaved;               /* gate and up rows alternate */
    float limit, alpha, up_shift;
    bool clamp_by_field;     /* the file's swiglu_limit and swiglu_alpha, these if absent */
    bool softcap;            /* the file's, none if absent */
    uint32_t experts, top_k; /* defaults; 0: the file must say */
    uint32_t only_top_k;     /* the only K that the family computes; 0: any */
} family;

/* As an assumption about a model_type outside the table: family_deduce() decides. */
#define FAMILY_PATTERN "pattern"

/* The row of a model_type, "_text" ignored at its end; NULL if there is none. */
const family *family_find(const char *model_type);

/*
 * For a model_type outside the table: the family whose mark the block bears. A mark is a tensor of
 * the block, or a field of the config, or both. `bears` answers for one mark; NULL is a name that
 * every block has. Without a mark, what the fields say is taken:
 *   score       scoring_func; if absent sigmoid with a selection bias, softmax without one
 *   order       score, then top-k
 *   renorm      norm_topk_prob, which must be there unless there is a selection bias; eps 1e-20
 *   scale       routed_scaling_factor
 *   activation  hidden_act, which must be there
 *   clamps      a swiglu_limit is an error, for its form is not known
 *   groups      n_group and topk_group; by the sum of the two best with a selection bias or
 *               without a topk_method, else by the maximum if that is group_limited_greedy
 */
typedef bool (*mark_test)(const void *context, const char *tensor, const char *field);
const family *family_deduce(mark_test bears, const void *context, bool has_select_bias,
                            bool has_topk_method);

/* A family that clmoe cannot run, and why; NULL for all others. */
const char *family_unsupported(const char *model_type);

/* ---- Tensor names --------------------------------------------------------------------------- */

/* The tensors of an MLP, of the experts or of the shared expert. */
typedef enum mlp_part {
    PART_GATE,
    PART_UP,
    PART_GATE_UP, /* both in one */
    PART_DOWN,
    PART_GATE_BIAS,
    PART_UP_BIAS,
    PART_GATE_UP_BIAS,
    PART_DOWN_BIAS,
    PART_COUNT
} mlp_part;

/* What a tensor of the block is for. */
typedef enum tensor_role {
    ROLE_ROUTER,                             /* [R,D] */
    ROLE_ROUTER_BIAS,                        /* [R] */
    ROLE_SELECT_BIAS,                        /* [R] or [1,R] */
    ROLE_SHARED_GATE,                        /* [1,D] */
    ROLE_OUTPUT_BIAS,                        /* [D] */
    ROLE_EXPERTS,                            /* + mlp_part */
    ROLE_SHARED = ROLE_EXPERTS + PART_COUNT, /* + mlp_part */
    ROLE_COUNT = ROLE_SHARED + PART_COUNT
} tensor_role;

/* How an MLP's matrix [N,K] is stored; biases go without the K. */
typedef enum tensor_form {
    FORM_MATRIX,    /* [N,K], one tensor for each expert */
    FORM_STACK,     /* [E,N,K] */
    FORM_STACK_T,   /* [E,K,N] */
    FORM_STACK_ANY, /* [E,N,K] or [E,K,N]: the shapes tell, for N = 2H and K = H are never both D */
    FORM_FLAT,      /* [E*N,K] */
    FORM_FLAT_T,    /* [E*K,N] */
} tensor_form;

typedef struct name_pattern {
    const char *name; /* below the block; '#' is an expert's number */
    int role;         /* tensor_role, + mlp_part for an MLP's */
    tensor_form form;
    const char *model_type; /* NULL: of any family */
} name_pattern;

/*
 * The pattern of a tensor of the block, and the expert's number if the pattern has one. A pattern
 * of `model_type` alone comes before those of any family. NULL: clmoe has no use for the tensor.
 */
const name_pattern *pattern_find(const char *name, const char *model_type, uint32_t *expert);

/* What is special about a tensor of the block that has no pattern, if that is known; else NULL. */
const char *tensor_unsupported(const char *name);

/* The usual names of a role's tensor, for messages: "gate.weight". */
const char *role_example(int role);

/*
 * The place of a layer's block in a tensor's full name: the length of "...layers.N.mlp." if the
 * name is of an expert of layer `layer`, else 0. What lies beside that prefix is not of the block,
 * also if a model adds its output: LongCat's "mlps", Granite's "shared_mlp".
 */
size_t block_prefix_length(const char *name, uint32_t layer);

#endif
