/*
 * Purpose: direction normalisation of expert outputs (geometric MoE).
 * Formula: v -> v / |v|; a zero row stays zero.
 * Arrays: pair_of [S] i32; ye [S,D] X in place; rows of padding are left alone.
 * NDRange: one group per slot, its lanes stride over D.
 * Limits: X is the storage type.
 * Repeatability: the norm is summed in lane order, then a tree.
 */
KERNEL(GROUP, 1, 1)
void normalize_rows(IN(int, pair_of), OUT(STORAGE(X), ye), uint dim) {
    __local float tmp[GROUP];
    ulong slot = get_group_id(0);
    uint columns = AT(pair_of)[slot] < 0 ? 0 : dim;
    float best = 0.0f, sum = 0.0f;
    ye = AT(ye) + slot * dim;
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        best = fmax(best, fabs(LOAD(X, ye + d)));
    best = group_max(best, tmp);
    if (best == 0.0f)
        columns = 0;
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        sum += (LOAD(X, ye + d) / best) * (LOAD(X, ye + d) / best);
    float norm = sqrt(group_sum(sum, tmp));
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        STORE(X, LOAD(X, ye + d) / best / norm, ye + d);
}
