/*
 * Purpose: how far the router's rows are from orthogonal, and the gradient on them; the products of
 *          rows are GEMM.
 * Formula: u_i = w_i / |w_i|, 0 where |w_i| < 2^-126; c_ij = u_i . u_j, c_ii = 0; s_i = sum_j
 *          c_ij^2; value = sum_i s_i; with m_i = sum_j c_ij u_j, drouter_i += 4 weight / |w_i| (m_i
 *          - s_i u_i), nothing where u_i = 0. See clmoe_router_orthogonality() in balance.h.
 * Arrays: router [N,D] X -> norms [N], units [N,D]; cosines [N,N] with any diagonal -> with 0
 *          there, squares [N]; squares -> value [1]; norms, units, squares, rows [N,D], the m_i ->
 *          drouter [N,D] C, added. f32 but for X and C.
 * NDRange: one group per row of the router; orthogonality_value: one group.
 * Limits: GROUP a power of two; X and C are storage types.
 * Repeatability: every sum has a fixed order that depends on GROUP alone.
 */
GROUP_LENGTH(row_length, X)

KERNEL(GROUP, 1, 1)
void orthogonality_units(IN(STORAGE(X), router), OUT(float, norms), OUT(float, units), uint dim) {
    __local float tmp[GROUP];
    ulong row = get_group_id(0);
    float unit;
    router = AT(router) + row * dim;
    units = AT(units) + row * dim;
    float length = row_length(router, dim, &unit, tmp);
    bool none = unit * length < FLT_MIN;
    for (uint d = get_local_id(0); d < dim; d += GROUP)
        units[d] = none ? 0.0f : LOAD(X, router + d) / unit / length;
    if (get_local_id(0) == 0)
        AT(norms)[row] = none ? 0.0f : unit * length;
}

KERNEL(GROUP, 1, 1)
void orthogonality_cosines(OUT(float, cosines), OUT(float, squares), uint count) {
    __local float tmp[GROUP];
    ulong row = get_group_id(0);
    float sum = 0.0f;
    cosines = AT(cosines) + row * count;
    for (uint j = get_local_id(0); j < count; j += GROUP) {
        float c = j == row ? 0.0f : cosines[j];
        cosines[j] = c;
        sum += c * c;
    }
    sum = group_sum(sum, tmp);
    if (get_local_id(0) == 0)
        AT(squares)[row] = sum;
}

KERNEL(GROUP, 1, 1)
void orthogonality_value(IN(float, squares), OUT(float, value), uint count) {
    __local float tmp[GROUP];
    float sum = 0.0f;
    for (uint i = get_local_id(0); i < count; i += GROUP)
        sum += AT(squares)[i];
    sum = group_sum(sum, tmp);
    if (get_local_id(0) == 0)
        AT(value)[0] = sum;
}

KERNEL(GROUP, 1, 1)
void orthogonality_gradient(IN(float, norms), IN(float, units), IN(float, squares), IN(float, rows),
                            OUT(STORAGE(C), drouter), uint dim, float weight) {
    ulong row = get_group_id(0);
    float norm = AT(norms)[row], square = AT(squares)[row];
    float factor = 4.0f * weight / norm;
    uint used = norm == 0.0f ? 0 : dim;
    units = AT(units) + row * dim;
    rows = AT(rows) + row * dim;
    drouter = AT(drouter) + row * dim;
    for (uint d = get_local_id(0); d < used; d += GROUP)
        STORE(C, LOAD(C, drouter + d) + factor * (rows[d] - square * units[d]), drouter + d);
}
