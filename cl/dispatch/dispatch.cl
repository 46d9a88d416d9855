/*
 * Purpose: the rows of the buckets, for engines that do not gather by themselves.
 * Formula: xe[s] = x[token_of[s]], or 0 for a slot of padding; weighted_rows: times the weight of
 *          the slot's pair.
 * Arrays: x [T,D] X, token_of [S] i32, pair_of [S] i32, pair_weights [pairs] f32 -> xe [S,D] X.
 * NDRange: (segments of DISPATCH_SEGMENT columns, S); GROUP work-items along D.
 * Limits: X is the storage type.
 * Repeatability: a copy, or one product each.
 */
#include "dispatch/dispatch.clh"

KERNEL(GROUP, 1, 1)
void dispatch_rows(IN(STORAGE(X), x), IN(int, token_of), OUT(STORAGE(X), xe), uint dim) {
    ulong slot = get_group_id(1);
    int token = AT(token_of)[slot];
    uint begin = get_group_id(0) * DISPATCH_SEGMENT, end = min(begin + DISPATCH_SEGMENT, dim);
    xe = AT(xe) + slot * dim;
    if (token < 0) {
        for (uint d = begin + get_local_id(0); d < end; d += GROUP)
            xe[d] = 0;
        return;
    }
    x = AT(x) + (ulong)token * dim;
    for (uint d = begin + get_local_id(0); d < end; d += GROUP)
        xe[d] = x[d];
}

KERNEL(GROUP, 1, 1)
void weighted_rows(IN(STORAGE(X), x), IN(int, token_of), IN(int, pair_of), IN(float, pair_weights),
                   OUT(STORAGE(X), xe), uint dim) {
    ulong slot = get_group_id(1);
    int token = AT(token_of)[slot];
    uint begin = get_group_id(0) * DISPATCH_SEGMENT, end = min(begin + DISPATCH_SEGMENT, dim);
    float weight = token < 0 ? 0.0f : AT(pair_weights)[AT(pair_of)[slot]];
    xe = AT(xe) + slot * dim;
    x = AT(x) + (ulong)max(token, 0) * dim;
    for (uint d = begin + get_local_id(0); d < end; d += GROUP)
        STORE(X, token < 0 ? 0.0f : weight * LOAD(X, x + d), xe + d);
}
