/*
 * Purpose: the gradient on the shared expert's gate.
 * Formula: y += s(g) v, v the shared expert's output: dg = <dy, v> s(g) (1 - s(g)), with <dy, v> =
 *          dots + <dy, down_bias>; 0 for a masked token.
 * Arrays: dy [T,D] X, down_bias [D] W or NULL, shared_gate [T] f32: g, dots [T] f32, token_mask [T]
 *          or NULL -> dgate [T] f32.
 * NDRange: one group per token; its lanes stride over D.
 * Limits: GROUP a power of two; X and W are storage types.
 * Repeatability: the products are summed in lane order, then by a tree.
 */
KERNEL(GROUP, 1, 1)
void shared_gate_backward(IN(STORAGE(X), dy), IN(STORAGE(W), down_bias), IN(float, shared_gate),
                          IN(float, dots), IN(uchar, token_mask), OUT(float, dgate), uint dim) {
    __local float tmp[GROUP];
    const ulong token = get_group_id(0);
    const bool masked = token_mask && !AT(token_mask)[token];
    const uint columns = down_bias && !masked ? dim : 0;
    const float gate = AT(shared_gate)[token], open = SIGMOID(gate);
    float sum = 0.0f;
    dy = AT(dy) + token * dim;
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        sum += LOAD(X, dy + d) * LOAD(W, AT(down_bias) + d);
    sum = group_sum(sum, tmp);
    if (get_local_id(0) == 0)
        AT(dgate)[token] = masked ? 0.0f : (sum + AT(dots)[token]) * open / (1.0f + exp(gate));
}
