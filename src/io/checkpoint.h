/* A model directory: its config, its safetensors files and one list of all their tensors. */
#ifndef CLMOE_CHECKPOINT_H
#define CLMOE_CHECKPOINT_H

#include "config.h"
#include "families.h"
#include "safetensors.h"

struct coded;

typedef struct file_tensor {
    const safetensors *file;
    const st_tensor *tensor;
    struct coded *coded; /* of a block's matrix that is coded, whose `plain` is `tensor`; or NULL */
} file_tensor;

struct clmoe_checkpoint {
    char *directory;
    config *config;
    const family *family; /* whose rules hold; NULL: each block's own tensors tell */
    bool assumed;         /* `family` is an assumption of the caller's */
    uint32_t decode;      /* clmoe_decode */
    safetensors **files;
    size_t num_files;
    file_tensor *tensors; /* of all files, sorted by name */
    size_t num_tensors;
};

/* The place of the first tensor whose name is not before `name`. */
size_t checkpoint_lower_bound(const clmoe_checkpoint *c, const char *name);

/* The tensor of that name, or NULL. */
const file_tensor *checkpoint_find(const clmoe_checkpoint *c, const char *name);

/*
 * Decides whose rules hold, by config.json and the caller's assumption, or NULL. Errors:
 * CLMOE_UNSUPPORTED, CLMOE_INVALID_ARGUMENT.
 */
clmoe_status checkpoint_choose_family(clmoe_checkpoint *c, const char *assume);

/* ---- The MoE block of a layer, block.c ------------------------------------------------------ */

#define MAX_PREFIX 256

/* The tensors that have a role: one, or one for each expert. */
typedef struct block_role {
    const name_pattern *pattern; /* NULL: no such tensor */
    file_tensor *tensors;
    uint32_t count;
} block_role;

typedef struct block {
    const clmoe_checkpoint *checkpoint;
    config_reader config;
    uint32_t layer;
    char prefix[MAX_PREFIX]; /* "model.layers.0.mlp." */
    const family *family;
    uint32_t experts, identity_experts;
    block_role roles[ROLE_COUNT];
    const char *coded; /* the format of the first matrix that is coded, or NULL */
} block;

/* Finds the block of a layer and whose rules hold. CLMOE_BAD_FILE: the layer has none. */
clmoe_status block_find(const clmoe_checkpoint *c, uint32_t layer, block *b);

/*
 * Gives every tensor under the block its role, once `experts` and `identity_experts` are known.
 * Errors: CLMOE_BAD_FILE for a tensor missing or without use, CLMOE_UNSUPPORTED.
 */
clmoe_status block_collect(block *b);

/* CLMOE_BAD_FILE: the block has a tensor, but `why` it should not. */
clmoe_status block_refuse(const block *b, const file_tensor *t, const char *why);

/* Numbers [first, first + count) of a tensor of the block as f32, decoded if it is coded. */
clmoe_status block_read_f32(const file_tensor *t, uint64_t first, size_t count, float *out);

void block_release(block *b);

static inline bool block_has(const block *b, int role) {
    return b->roles[role].pattern != NULL;
}

/* ---- Its descriptor, describe.c ------------------------------------------------------------- */

/* Finds, collects and describes the block of a layer; `b` is to be released also on an error. */
clmoe_status checkpoint_describe(const clmoe_checkpoint *c, uint32_t layer, clmoe_layer_desc *desc,
                                 block *b);

#endif
