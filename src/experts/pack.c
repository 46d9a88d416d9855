/* Raw weights -> the form the layer's engine reads fastest, behind a header that says what it is.
 */
#include "experts/pack.clh"
#include "check/check.h"
#include "runtime/structs.h"

#include <string.h>

/* "moep"; the version counts changes of the header or of an engine's panels. */
enum { MAGIC = 0x70656f6d, VERSION = 1 };

enum { ENGINE_BYTES = (PACKED_LAYOUT - PACKED_ENGINE) * sizeof(uint32_t) };

clmoe_status pack_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {{KERNEL_PACK_HEADER, "pack_header"}};
    if (!layer->experts.engine->pack)
        return CLMOE_SUCCESS;
    return GROUP_KERNELS(layer, "experts/pack", kernels);
}

static packed_header header_of(const clmoe_layer *layer, clmoe_mlp mlp) {
    const gemm_use *use = layer_mlp_use(layer, mlp);
    packed_header header = {.word = {[PACKED_MAGIC] = MAGIC,
                                     [PACKED_VERSION] = VERSION,
                                     [PACKED_LAYOUT] = use->engine->packed_layout(use->state),
                                     [PACKED_WEIGHT_TYPE] = use->shape.w_type,
                                     [PACKED_EXPERTS] = use->shape.experts,
                                     [PACKED_DIM] = use->shape.dim,
                                     [PACKED_HIDDEN_DIM] = use->shape.hidden_dim,
                                     [PACKED_GATED] = use->shape.form == GEMM_GATED}};
    const char *name = use->engine->name;
    const size_t length = strlen(name);
    memcpy(&header.word[PACKED_ENGINE], name, length < ENGINE_BYTES ? length : ENGINE_BYTES);
    return header;
}

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

static clmoe_status write_header(const clmoe_layer *layer, launch *chain,
                                 const clmoe_pack_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_PACK_HEADER];
    const packed_header header = header_of(layer, args->mlp);
    const uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_STRUCT(header), ARG_U16(args->packed)));
    TRY(launch_1d(chain, kernel, divide_up(PACKED_HEADER_BYTES / 2, group), group));
done:
    return status;
}

clmoe_status clmoe_pack_weights(clmoe_layer *layer, cl_command_queue queue,
                                const clmoe_pack_args *args, cl_uint num_wait, const cl_event *wait,
                                cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    clmoe_pack_args own = {0};
    TRY(STRUCT_TAKE_ARGS(args, &own));
    TRY(check_pack(layer, &own));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(write_header(layer, &chain, &own));
    TRY(gemm_mlp_pack(layer_mlp_use(layer, own.mlp), &chain, layer_mlp(layer, own.mlp), own.raw,
                      layer->desc.dim, own.packed));
done:
    return launch_end(&chain, status, event);
}

/* The sentence names the first field that differs. */
static clmoe_status compare(const packed_header *got, const packed_header *want) {
    static const struct {
        const char *name;
        int word;
    } fields[] = {
        {"the format's version", PACKED_VERSION},
        {"the engine's layout", PACKED_LAYOUT},
        {"weight_type", PACKED_WEIGHT_TYPE},
        {"experts", PACKED_EXPERTS},
        {"dim", PACKED_DIM},
        {"hidden_dim", PACKED_HIDDEN_DIM},
        {"the MLP's gate", PACKED_GATED},
    };
    const void *engine = &got->word[PACKED_ENGINE], *expected = &want->word[PACKED_ENGINE];
    if (got->word[PACKED_MAGIC] != MAGIC)
        return fail(CLMOE_INVALID_ARGUMENT, "packed holds no weights of clmoe_pack_weights()");
    if (memcmp(engine, expected, ENGINE_BYTES) != 0)
        return fail(CLMOE_INVALID_ARGUMENT, "packed is of engine %.*s, but the layer has %.*s",
                    (int)ENGINE_BYTES, (const char *)engine, (int)ENGINE_BYTES,
                    (const char *)expected);
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        const uint32_t has = got->word[fields[i].word], needs = want->word[fields[i].word];
        if (has != needs)
            return fail(CLMOE_INVALID_ARGUMENT, "packed: %s is %u, but the layer has %u",
                        fields[i].name, has, needs);
    }
    return CLMOE_SUCCESS;
}

clmoe_status clmoe_packed_check(clmoe_layer *layer, cl_command_queue queue, clmoe_mlp mlp,
                                clmoe_buf packed) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    packed_header got, want;
    TRY(check_packed_read(layer, mlp, packed));
    TRY(launch_begin(&chain, layer->context, queue, 0, NULL));
    TRY(launch_read(&chain, packed, sizeof got, &got));
    want = header_of(layer, mlp);
    TRY(compare(&got, &want));
done:
    return launch_end(&chain, status, NULL);
}
