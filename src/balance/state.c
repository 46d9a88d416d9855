/* The state: its size, and its first values. */
#include "balance/state.clh"
#include "check/check.h"
#include "steps.h"

#include <stddef.h>
#include <string.h>

#define SAME_FIELD(field)                                                                          \
    _Static_assert(offsetof(clmoe_state, field) == offsetof(state_header, field),                  \
                   "cl/balance/state.clh has " #field " elsewhere")
SAME_FIELD(version);
SAME_FIELD(columns);
SAME_FIELD(seed);
SAME_FIELD(step);
SAME_FIELD(updates);
SAME_FIELD(noise_scale);
SAME_FIELD(temperature_scale);
SAME_FIELD(loss_weight);
SAME_FIELD(capacity_scale);
SAME_FIELD(reserved);
_Static_assert(sizeof(clmoe_state) == sizeof(state_header),
               "cl/balance/state.clh has another size");

#define SAME_STATS(field)                                                                          \
    _Static_assert(offsetof(clmoe_stats, field) == offsetof(stats_header, field),                  \
                   "cl/balance/state.clh has clmoe_stats." #field " elsewhere");
SAME_STATS(version)
STATS_FIELDS(SAME_STATS, SAME_STATS)
SAME_STATS(reserved)
_Static_assert(sizeof(clmoe_stats) == sizeof(stats_header),
               "cl/balance/state.clh knows another clmoe_stats");

clmoe_status clmoe_state_size(const clmoe_layer *layer, size_t *bytes) {
    if (!layer || !bytes)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "bytes" : "layer");
    *bytes = layer_state_bytes(layer);
    return CLMOE_SUCCESS;
}

clmoe_status clmoe_state_check(const clmoe_layer *layer, const void *state, size_t bytes) {
    clmoe_state header;
    if (!layer || !state)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "state" : "layer");
    if (bytes < sizeof header)
        return fail(CLMOE_INVALID_ARGUMENT, "bytes is %zu, but the header of a state has %zu",
                    bytes, sizeof header);
    memcpy(&header, state, sizeof header);
    if (header.version != STATE_VERSION)
        return fail(CLMOE_INVALID_ARGUMENT, "state.version is %u, but this library has version %d",
                    header.version, STATE_VERSION);
    if (header.columns != layer->columns)
        return fail(CLMOE_INVALID_ARGUMENT, "state.columns is %u, but the layer has %u",
                    header.columns, layer->columns);
    if (bytes != layer_state_bytes(layer))
        return fail(CLMOE_INVALID_ARGUMENT, "bytes is %zu, but the state has %zu", bytes,
                    layer_state_bytes(layer));
    return CLMOE_SUCCESS;
}

clmoe_status state_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {{KERNEL_STATE_INIT, "state_init"}};
    return GROUP_KERNELS(layer, "balance/state", kernels);
}

static clmoe_status step_state_init(const clmoe_layer *layer, launch *chain, clmoe_buf state,
                                    uint64_t seed) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_STATE_INIT];
    TRY(KERNEL_SET(kernel, ARG_F32(state), ARG_AS(seed_low, ARG_UINT((uint32_t)seed)),
                   ARG_AS(seed_high, ARG_UINT((uint32_t)(seed >> 32))), ARG_UINT(layer->columns)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}

clmoe_status clmoe_state_init(clmoe_layer *layer, cl_command_queue queue, clmoe_buf state,
                              uint64_t seed, cl_uint num_wait, const cl_event *wait,
                              cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    TRY(check_state_init(layer, state));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(step_state_init(layer, &chain, state, seed));
done:
    return launch_end(&chain, status, event);
}
