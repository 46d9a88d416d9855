/*
 * Purpose: the first values of the state.
 * Formula: scales 1, all else 0; see clmoe_state in balance.h.
 * Arrays: -> state: state_header, then select_bias [R] f32, ema [R] f32, previous [R] f32,
 *          idle_tokens [R] u32, momentum [R] f32.
 * NDRange: one group; its lanes stride over the columns.
 * Limits: none.
 * Repeatability: integers and constants.
 */
#include "balance/state.clh"

KERNEL(GROUP, 1, 1)
void state_init(OUT(uint, state), uint seed_low, uint seed_high, uint columns) {
    __global state_header *s = (__global state_header *)AT(state);
    __global uint *arrays = (__global uint *)(s + 1);
    for (uint i = get_local_id(0); i < STATE_ARRAY_COUNT * columns; i += GROUP)
        arrays[i] = 0;
    if (get_local_id(0) != 0)
        return;
    s->version = STATE_VERSION;
    s->columns = columns;
    s->seed[0] = seed_low;
    s->seed[1] = seed_high;
    s->step = s->updates = 0;
    s->noise_scale = s->temperature_scale = s->loss_weight = s->capacity_scale = 1.0f;
    for (uint i = 0; i < sizeof s->reserved / sizeof s->reserved[0]; i++)
        s->reserved[i] = 0;
}
