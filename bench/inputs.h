/* Inputs and weights of a case: random, made on the device, and known on the host by index. */
#ifndef BENCH_INPUTS_H
#define BENCH_INPUTS_H

#include "../src/cli/random.clh"
#include "cases.h"
#include "device.h"

/* An array of random values: element i is random_int(stream, i, bits) * scale, exact in its type.
 */
typedef struct values {
    uint32_t stream, bits;
    float scale;
    clmoe_type type;
} values;

static inline float value_at(const values *v, uint64_t index) {
    return (float)random_int(v->stream, index, v->bits) * v->scale;
}

/* Elements `first` to first + count - 1, as floats. */
void values_fill(const values *v, uint64_t first, size_t count, float *to);

/* The first `count` elements, to a buffer of their type. */
clmoe_status values_write(const bench_device *device, const values *v, cl_mem buffer,
                          cl_ulong count);

size_t type_bytes(clmoe_type type);
extern const char *const type_names[3];
extern const char *const gradient_names[2]; /* of clmoe_gradient_type */

/* The arrays of a case. The weights are kept while the next case has the same layer. */
typedef struct inputs {
    bench_case of;
    case_pattern pattern;
    clmoe_type type;
    clmoe_gradient_type gradient_type; /* of the weights */
    values x;                          /* [T,D] */
    values dy;                         /* [T,D]: dL/dy of the backward pass */
    values router;                     /* [E,D] f32 */
    values gate;                       /* [E,2H,D]: gate rows, then up rows */
    values down;                       /* [E,D,H] */
    clmoe_buf x_buf;
    clmoe_weights weights; /* router, router_bias [E], experts.gate, experts.down */
} inputs;

/* Errors: CLMOE_UNSUPPORTED with a sentence if the device has too little memory. */
clmoe_status inputs_set(inputs *in, const bench_device *device, const bench_case *c,
                        case_pattern pattern, clmoe_type type);
void inputs_release(inputs *in);

/* The storage type of the gradients of the experts' weights. */
clmoe_type inputs_gradient_type(const inputs *in);

/* The layer of the inputs, for `engine`. */
clmoe_layer_desc inputs_desc(const inputs *in, const char *engine);

#endif
