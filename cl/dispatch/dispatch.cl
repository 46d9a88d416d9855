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
