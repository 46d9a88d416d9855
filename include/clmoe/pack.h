/*
 * clmoe, packed weights. Part of clmoe.h, which includes it.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Packing: weights that change rarely, in the order in which the layer's engine reads them fastest.
 * The engines "cpu" and "nv_wgmma" have such a form. It pays for weights that do not change, with
 * many tokens and with few: memory is then read in one stream. Raw weights that change every step
 * are better used as they are.
 *
 *   clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes);
 *   packed.mem = clCreateBuffer(context, CL_MEM_READ_WRITE, bytes, NULL, &code);
 *   clmoe_pack_args args = {.struct_size = sizeof args, .mlp = CLMOE_MLP_EXPERTS,
 *                           .raw = &weights.experts, .packed = packed};
 *   clmoe_pack_weights(layer, queue, &args, 0, NULL, NULL);
 *   weights.experts.packed = packed;
 *
 * The content is opaque: a header of 256 bytes, then the values of the raw weights unchanged,
 * padded to whole vectors (cpu: hidden_dim and dim to multiples of 32) or tiles (nv_wgmma: 256
 * columns of a product, of gate and up 128 each, by a multiple of 128 k); for nv_wgmma at an offset
 * that is a multiple of 16 bytes. It is good for layers with the same num_experts, dim, hidden_dim,
 * weight_type, engine and kind of MLP (gated or plain; raw layouts do not matter) on a like device
 * with a library that writes the same version of it, and for nothing else. clmoe_forward() reads
 * nothing back, so it takes packed weights of another layer for its own, if there are enough of
 * them, and y is meaningless: after packed weights were stored and loaded, ask
 * clmoe_packed_check().
 */
#ifndef CLMOE_PACK_H
#define CLMOE_PACK_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef uint32_t clmoe_mlp;
enum {
    CLMOE_MLP_EXPERTS = 0,
    CLMOE_MLP_SHARED = 1,
};

/*
 * Bytes of the packed weights of one of the layer's MLPs. Errors: CLMOE_UNSUPPORTED, and 0 bytes,
 * where the engine has no packed form; CLMOE_INVALID_ARGUMENT if the layer has no such MLP.
 */
CLMOE_API clmoe_status clmoe_packed_size(const clmoe_layer *layer, clmoe_mlp mlp, size_t *bytes);

typedef struct clmoe_pack_args {
    size_t struct_size; /* sizeof(clmoe_pack_args) */
    clmoe_mlp mlp;
    const clmoe_mlp_weights *raw; /* gate, up and down; its packed and biases are not read */
    clmoe_buf packed;             /* clmoe_packed_size() bytes, apart from those */
} clmoe_pack_args;

/*
 * Enqueues the packing. Wait list and event as in clmoe_forward(). Once the event is complete, the
 * raw buffers may be released.
 */
CLMOE_API clmoe_status clmoe_pack_weights(clmoe_layer *layer, cl_command_queue queue,
                                          const clmoe_pack_args *args, cl_uint num_wait,
                                          const cl_event *wait, cl_event *event);

/*
 * Whether `packed` holds weights that clmoe_pack_weights() made for such a layer: waits for `queue`
 * to read the header back, so the packing must be complete, or before it on an in-order queue.
 * Values are not looked at. Errors: CLMOE_INVALID_ARGUMENT names the first field that differs, or
 * says that there is no header; those of clmoe_packed_size(); a buffer that is too small, or that
 * the host must not read.
 */
CLMOE_API clmoe_status clmoe_packed_check(clmoe_layer *layer, cl_command_queue queue, clmoe_mlp mlp,
                                          clmoe_buf packed);

#ifdef __cplusplus
}
#endif

#endif
