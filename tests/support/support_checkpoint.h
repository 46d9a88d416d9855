/* Small checkpoints made by hand: config.json and a safetensors file of any tensors. */
#ifndef SUPPORT_CHECKPOINT_H
#define SUPPORT_CHECKPOINT_H

#include "support_files.h"

/* Two experts, D 4, H 3. */
#define CONFIG                                                                                     \
    "{\"model_type\": \"qwen3_moe\", \"hidden_size\": 4, \"moe_intermediate_size\": 3, "           \
    "\"num_experts\": 2, \"num_experts_per_tok\": 1, \"norm_topk_prob\": true, "                   \
    "\"hidden_act\": \"silu\", \"num_hidden_layers\": 2}"

#define ROUTER    "model.layers.0.mlp.gate.weight F32 2,4;"
#define EXPERT(n) GATE_UP(n) "model.layers.0.mlp.experts." #n ".down_proj.weight F32 4,3;"
#define GATE_UP(n)                                                                                 \
    "model.layers.0.mlp.experts." #n ".gate_proj.weight F32 3,4;"                                  \
    "model.layers.0.mlp.experts." #n ".up_proj.weight F32 3,4;"
#define TENSORS ROUTER EXPERT(0) EXPERT(1) "model.norm.weight F32 4;"
#define SHARED                                                                                     \
    "model.layers.0.mlp.shared_expert.gate_proj.weight F32 5,4;"                                   \
    "model.layers.0.mlp.shared_expert.up_proj.weight F32 5,4;"                                     \
    "model.layers.0.mlp.shared_expert.down_proj.weight F32 4,5;"

/*
 * Writes a file of the tensors "NAME TYPE DIMS;NAME TYPE DIMS;..." in `tensors`, but for those
 * whose names end in `drop`, and of those in `add`.
 */
void write_tensors(const char *path, const char *tensors, const char *drop, const char *add);

/* Writes an index that gives each tensor of `tensors` the file `shard`, and those of `more`
 * another.
 */
void write_index(const char *path, const char *tensors, const char *shard, const char *more,
                 const char *other);

/* Makes the temporary directory `name` with such a file; returns its path. */
const char *write_checkpoint(const char *name, const char *config, const char *tensors);

/* Opens a directory, with an assumption or NULL, and describes layer `layer`. */
clmoe_status describe_as(const char *assume, const char *directory, uint32_t layer,
                         clmoe_layer_desc *desc);
clmoe_status describe(const char *directory, uint32_t layer, clmoe_layer_desc *desc);

/* `text` with its first `find` replaced; to be freed. */
char *replaced(const char *text, const char *find, const char *replace);

#endif
