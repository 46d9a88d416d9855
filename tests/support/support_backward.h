/* Batches that go forward and backward: host arrays, device buffers, the oracle's gradients. */
#ifndef SUPPORT_BACKWARD_H
#define SUPPORT_BACKWARD_H

#include "ref_backward.h"
#include "support.h"

/* What a batch has besides x and dy. */
enum {
    WITH_MASK = 1,
    WITH_LOGITS_IN = 2,
    WITH_IDS_IN = 4,  /* repeated ones, and some out of range */
    WITH_DLOGITS = 8, /* and dgroup_logits with two levels */
    WITH_DYE = 16,
    WITH_NAN_ROWS = 32 /* x and dy of masked tokens */
};

typedef struct training_batch {
    batch b;
    const clmoe_state *state;  /* optional, with its arrays */
    const float *noise_router; /* [R,D], with learned noise */
    device_batch d;
    const ref_result *forward;
    float *dy, *dlogits, *dgroup_logits, *dye;
    ref_backward_result want;
    clmoe_layer *layer;
    clmoe_gradients gradients;
    clmoe_backward_args args;
} training_batch;

/* Every array that clmoe_backward() wrote. */
enum { TRAINING_OUTPUTS = 3 + REF_GRADIENT_FIELDS };
typedef struct training_outputs {
    const char *name[TRAINING_OUTPUTS];
    void *data[TRAINING_OUTPUTS]; /* NULL where there is none */
    size_t bytes[TRAINING_OUTPUTS];
} training_outputs;

bool needs_a_state(const clmoe_layer_desc *desc);
/* Whether a state masks activations. */
bool drops_out(const clmoe_layer_desc *desc);

/* Random arrays, by a seed whose choices do not hang on last bits, and the oracle's gradients. */
training_batch *training_make(const clmoe_layer_desc *desc, uint32_t tokens, uint32_t inputs);
/* Computes the oracle's results again, after the batch's inputs were changed. */
void training_update(training_batch *t);
/* The layer, and the forward; then arguments of a backward with every output, all poisoned. */
void training_forward(training_batch *t, uint32_t group_size);
/* clmoe_backward() on the in-order queue; waits. */
void training_backward(training_batch *t);
/* New poisoned outputs. */
void training_new_outputs(training_batch *t);

/* Compares all outputs with the oracle; worst errors are noted by `name`, if it is not NULL. */
void training_compare(const training_batch *t, const char *name);
training_outputs training_read(const training_batch *t);
void compare_outputs(const training_outputs *got, const training_outputs *want);

/* Of one field: its buffer, and the type of its elements. */
clmoe_buf *gradients_field(clmoe_gradients *gradients, size_t field);
clmoe_type gradient_type_of(const clmoe_layer_desc *desc, size_t field);

#endif
