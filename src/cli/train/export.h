/*
 * model.safetensors and config.json: a trained model as others open it, Hugging Face transformers
 * and `clmoe run`.
 *
 * A block is a decoder layer whose attention adds exactly 0: zeros for its matrices. The norm of a
 * block is post_attention_layernorm, the table of distance 0 embed_tokens. The tables of the other
 * distances are in a tensor that only clmoe knows, clmoe.context_tables [n - 1,256,D]: with
 * --context 1 transformers computes this very model, with more it lacks what lies further back.
 * Values are the f32 that the optimiser keeps, also with --dtype bf16.
 *
 * Capacity, noise and dropout are of training: no file has them. Which model_type the file has is
 * told by what the layer of the last step computes without them; E and K are of that step:
 *   mixtral       softmax, the K best, divided by their sum; all experts, where K is E
 *   qwen3_moe     not divided: K = 1
 *   qwen2_moe     either, beside a shared expert. Its gate is sigmoid(0) = 1/2, so the shared
 *                 expert's down matrix is doubled, which is exact
 *   ernie4_5_moe  a selection bias, divided, K > 1; a shared expert if its H is a multiple of the
 *                 experts'
 *   clmoe_train   all else, so that nothing takes it for what it is not; names as Mixtral's. With a
 *                 selection bias `clmoe run --assume pattern` computes it; what chooses by no top-k
 *                 of a token, or rebalances weights, has a field router_methods, which it refuses.
 */
#ifndef CLMOE_CLI_TRAIN_EXPORT_H
#define CLMOE_CLI_TRAIN_EXPORT_H

#include "model.h"

/*
 * Writes both files, after a last step with the layer of `step`. Each is whole at any moment, and
 * a config.json is never beside the tensors of another one.
 */
clmoe_status model_export(train_model *m, const char *folder, uint32_t step);

#endif
