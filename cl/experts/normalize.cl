/*
 * Purpose: direction normalisation of expert outputs (geometric MoE); and the gradient on what
 *          down gave, where it is not a row of dy times a weight.
 * Formula: v -> v / |v|; a zero row stays zero. Backward, with n = v / |v| and g = w dy + dye:
 *          dv = (g - n <n, g>) / |v|, dot = <dy, n>; not normalized, dv = g and dot = <dy, v>.
 * Arrays: pair_of [S] i32; ye [S,D] X in place; rows of padding are left alone. Backward: dy [T,D],
 *          token_of [S], pair_weights [pairs] or NULL (w = 1), dye [S,D] or NULL, ye [S,D] as down
 *          gave it -> rows [S,D] X, dots [S] f32.
 * NDRange: one group per slot, its lanes stride over D.
 * Limits: X is the storage type.
 * Repeatability: the norm is summed in lane order, then a tree.
 */
/* The norm of a row by its largest element, which is 0 where the row is: |v| = best * norm. */
float row_norm(__global const STORAGE(X) *v, uint columns, float best, __local float *tmp) {
    float sum = 0.0f;
    if (best == 0.0f)
        columns = 0;
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        sum += (LOAD(X, v + d) / best) * (LOAD(X, v + d) / best);
    return sqrt(group_sum(sum, tmp));
}

KERNEL(GROUP, 1, 1)
void normalize_rows(IN(int, pair_of), OUT(STORAGE(X), ye), uint dim) {
    __local float tmp[GROUP];
    ulong slot = get_group_id(0);
    uint columns = AT(pair_of)[slot] < 0 ? 0 : dim;
    float best = 0.0f;
    ye = AT(ye) + slot * dim;
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        best = fmax(best, fabs(LOAD(X, ye + d)));
    best = group_max(best, tmp);
    if (best == 0.0f)
        columns = 0;
    const float norm = row_norm(ye, columns, best, tmp);
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        STORE(X, LOAD(X, ye + d) / best / norm, ye + d);
}

KERNEL(GROUP, 1, 1)
void output_backward(IN(STORAGE(X), dy), IN(int, token_of), IN(int, pair_of),
                     IN(float, pair_weights), IN(STORAGE(X), dye), IN(STORAGE(X), ye),
                     OUT(STORAGE(X), rows), OUT(float, dots), uint dim, uint normalized) {
    __local float tmp[GROUP];
    const ulong slot = get_group_id(0);
    const int token = AT(token_of)[slot];
    const uint columns = token < 0 ? 0 : dim;
    const float weight = pair_weights && token >= 0 ? AT(pair_weights)[AT(pair_of)[slot]] : 1.0f;
    float best = 0.0f, norm = 1.0f, along = 0.0f, dot_product = 0.0f;
    dy = AT(dy) + (ulong)max(token, 0) * dim;
    ye = AT(ye) + slot * dim;
    rows = AT(rows) + slot * dim;
    if (dye)
        dye = AT(dye) + slot * dim;
    for (uint d = get_local_id(0); d < (normalized ? columns : 0); d += GROUP)
        best = fmax(best, fabs(LOAD(X, ye + d)));
    best = group_max(best, tmp);
    norm = row_norm(ye, normalized ? columns : 0, best, tmp);
    const bool zero = normalized && best == 0.0f;
    if (!normalized)
        best = norm = 1.0f;
    for (uint d = get_local_id(0); d < (zero ? 0 : columns); d += GROUP) {
        const float n = LOAD(X, ye + d) / best / norm, g = LOAD(X, dy + d);
        dot_product += g * n;
        along += n * (weight * g + (dye ? LOAD(X, dye + d) : 0.0f));
    }
    dot_product = group_sum(dot_product, tmp);
    along = group_sum(along, tmp);
    for (uint d = get_local_id(0); d < columns; d += GROUP) {
        const float n = zero ? 0.0f : LOAD(X, ye + d) / best / norm;
        float g = weight * LOAD(X, dy + d) + (dye ? LOAD(X, dye + d) : 0.0f);
        if (normalized)
            g = zero ? 0.0f : (g - n * along) / best / norm;
        STORE(X, g, rows + d);
    }
    if (get_local_id(0) == 0 && columns > 0)
        AT(dots)[slot] = dot_product;
}
