/* Raw weights -> the form the layer's engine reads fastest. */
#include "check/check.h"

clmoe_status clmoe_packed_size(const clmoe_layer *layer, clmoe_mlp mlp, size_t *bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!bytes)
        return fail(CLMOE_INVALID_ARGUMENT, "bytes is NULL");
    *bytes = 0;
    TRY(check_mlp_exists(layer, mlp));
    TRY(gemm_mlp_packed_bytes(layer_mlp_use(layer, mlp), layer_mlp(layer, mlp), layer->desc.dim,
                              bytes));
done:
    return status;
}

clmoe_status clmoe_pack_weights(clmoe_layer *layer, cl_command_queue queue, clmoe_mlp mlp,
                                const clmoe_mlp_weights *raw, clmoe_buf packed, cl_uint num_wait,
                                const cl_event *wait, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    TRY(check_pack(layer, mlp, raw, packed));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(gemm_mlp_pack(layer_mlp_use(layer, mlp), &chain, layer_mlp(layer, mlp), raw,
                      layer->desc.dim, packed));
done:
    return launch_end(&chain, status, event);
}
