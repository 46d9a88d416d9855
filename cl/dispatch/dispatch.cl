/*
 * Purpose: the rows of the buckets, for engines that do not gather by themselves.
 * Formula: xe[s] = x[token_of[s]], or 0 for a slot of padding.
 * Arrays: x [T,D] X, token_of [S] i32 -> xe [S,D] X.
 * NDRange: (segments of DISPATCH_SEGMENT columns, S); GROUP work-items along D.
 * Limits: X is the storage type.
 * Repeatability: a copy.
 */
#include "dispatch/dispatch.clh"

KERNEL(GROUP, 1, 1)
void dispatch_rows(__global const STORAGE(X) *x, ulong x_off, __global const int *token_of,
                   ulong token_of_off, __global STORAGE(X) *xe, ulong xe_off, uint dim) {
    ulong slot = get_group_id(1);
    int token = token_of[token_of_off + slot];
    uint begin = get_group_id(0) * DISPATCH_SEGMENT, end = min(begin + DISPATCH_SEGMENT, dim);
    xe += xe_off + slot * dim;
    if (token < 0) {
        for (uint d = begin + get_local_id(0); d < end; d += GROUP)
            xe[d] = 0;
        return;
    }
    x += x_off + (ulong)token * dim;
    for (uint d = begin + get_local_id(0); d < end; d += GROUP)
        xe[d] = x[d];
}
