/*
 * The model of `clmoe train`: the last n bytes -> embedding, L blocks of (RMSNorm, clmoe layer,
 * residual), RMSNorm, a head for the next byte; its optimiser, AdamW. All of it on the device, in
 * f32, or rows and experts in bf16 with f32 master weights. One in-order queue; nothing but
 * model_loss() and what reads waits.
 */
#ifndef CLMOE_CLI_TRAIN_MODEL_H
#define CLMOE_CLI_TRAIN_MODEL_H

#include "kernels.h"
#include "marks.h"
#include "parameters.h"
#include "phases.h"

enum { MOST_LOSSES = MOST_METHODS + 2 };

/* A norm and what it feeds: a layer, or for the last one the head. */
typedef struct train_block {
    cl_mem x, h, inverse; /* [T,D], its norm [T,D], 1 / rms [T] */
    cl_mem gain, dgain;   /* [D] */
    /* The rest is of layers alone. */
    clmoe_weights weights, frozen; /* frozen: with the state's bias, for layers without a state */
    clmoe_gradients gradients;
    cl_mem state, stats, saved;
    cl_mem dlogits, dnoise; /* [T,E] of losses */
    cl_mem loss_values;     /* [losses] */
    cl_mem bias_counts;     /* of the quantile rule, or NULL */
    cl_mem ids, offsets;    /* of model_choices(), or NULL */
} train_block;

/* Start from {0}. */
typedef struct train_model {
    const train_settings *settings;
    device_session *device;
    parameters parameters;
    train_kernels kernels;
    train_phases phases;
    clmoe_layer *head; /* a router over 256 bytes */
    clmoe_weights head_weights;
    clmoe_gradients head_gradients;
    train_block *blocks; /* [L + 1] */
    /* Of the parameters: values, gradients, moments [elements] f32, the copy in the model's type */
    cl_mem values, gradients, mean, square, copy;
    cl_mem table, dtable;
    cl_mem text, positions, rows, first; /* of embed.cl */
    cl_mem dy, dh;                       /* [T,D] */
    cl_mem logits, scores;               /* [T,256] */
    cl_mem losses;                       /* [T] */
    cl_mem partial, sums[3];
    cl_mem scratch;
    size_t state_bytes, stats_bytes;
    /* If `timed`: around the step and each call of a layer. */
    queue_marks marks;
    bool timed;
    cl_mem *owned; /* all of them */
    uint32_t num_owned, owned_room;
    uint64_t bytes; /* of the buffers */
} train_model;

/* The text goes to the device once. Values and states are zeros: model_init() or state_load(). */
clmoe_status model_create(train_model *m, const train_settings *s, const corpus *text,
                          device_session *device);
void model_release(train_model *m);

/* Writes the first values and states, by the seed. */
clmoe_status model_init(train_model *m);
/* Writes the first states of the layers: a part of it. */
clmoe_status model_start(train_model *m);

/* The batch for the next calls; `training`: also what embed_backward reads. Waits. */
clmoe_status model_batch(train_model *m, const corpus *text, const uint32_t *positions,
                         bool training);

/* Forward with the layers of a step; in training, what backward needs is kept. */
clmoe_status model_forward(train_model *m, uint32_t step, bool training);
clmoe_status model_backward(train_model *m, uint32_t step);
/* The step of the optimiser and of the controllers. */
clmoe_status model_update(train_model *m, uint32_t step);

/* Mean of -log p of the next byte, in nats, of the last forward. Waits. */
clmoe_status model_loss(train_model *m, double *loss);

/*
 * From here on forward leaves what the layers of `step` choose in blocks[].ids [pairs] i32, as
 * clmoe_forward_args has it, with expert choice also offsets [T+1] i32; outside of training. Once.
 */
clmoe_status model_choices(train_model *m, uint32_t step, uint32_t *pairs);

/* Enqueues zeros. */
clmoe_status model_clear(train_model *m, cl_mem mem, size_t bytes);

/* Buffers to the host and back; they wait. */
clmoe_status model_read(train_model *m, cl_mem from, size_t bytes, void *to);
clmoe_status model_write(train_model *m, cl_mem to, size_t bytes, const void *from);

/* After m->values was written: the copy in the model's type. Changes `values`. */
clmoe_status model_round(train_model *m, float *values);

/* The losses of a step, in the order of loss_values; their number. */
uint32_t model_losses(const train_model *m, uint32_t step, clmoe_loss_desc *losses);

#endif
