/*
 * Purpose: Soft MoE's weights of slots in tokens and of tokens in slots, and backward what these
 *          weights, the softmaxes and the norms pass on; the mixing itself is GEMM.
 * Formula: l[t,s] = soft_moe.scale * x_t/|x_t| . r_s/|r_s|, 0 where a norm is 0; dispatch[s,t] =
 *          softmax over the tokens of l[:,s], combine[t,s] = softmax over the slots of l[t,:].
 *          Masked tokens and rows with a value that is not finite take no part: their weights are
 *          0.
 *          Backward, of dD and dC on dispatch D and combine C: dl = D (dD - sum_t D dD) + C (dC -
 *          sum_s C dC); with g = scale dl / (|x| |r|), 0 where a norm is 0, dx = sum_s g r - (sum_s
 *          dl l) / |x| x/|x|, and the same of r.
 * Arrays: rows [n,D] X, token_mask [n] or NULL -> norms [n], -1 for no part; clean [n,D] X or NULL,
 *          such rows as 0. logits [T,N] x . r in place, N = E p; tops [T,2] largest l and sum of
 *          exp of a row; partials [blocks,N,2] and columns [N,2] the same of columns. dispatch
 *          [S,T], combine [T,S]: slot e * stride + i is column e * p + i, those with i >= p are
 *          padding and 0; each also takes the sums of the other, as sums, and then has the other's
 *          weights in its own layout. All f32 but X and C. The plan: buckets of p rows that never
 *          change; pair_of [S] has the columns of the slots; slot_of [T] and pair_weights [T] say
 *          that a token's output is one row, with weight 1; without tokens p is 0.
 *          Backward: values [T,S], shares [T,S] or NULL (1) -> partials [blocks,N] and column_sums
 *          [N] of their products. dcombine, ddispatch [T,S], dispatch [T,S] -> dlogits [T,N]: g;
 *          dl l in the place of ddispatch, its sums along [T]. gradient [n,D] C in place: without
 *          along/norm rows/norm, by norms [n].
 * NDRange: soft_moe_norms: a group per row. soft_moe_logits: a group per token. soft_moe_partials:
 *          a group per block of block_size tokens. soft_moe_columns: a work-item per column.
 *          soft_moe_dispatch: (stride, E) groups. soft_moe_combine: a group per token.
 *          soft_moe_plan: one work-item per entry of the longest array. soft_moe_clear: (stride -
 *          p, E) groups. soft_moe_clean, soft_moe_dlogits: a group per token.
 *          soft_moe_column_partials: as soft_moe_partials, soft_moe_column_sums: as
 *          soft_moe_columns. soft_moe_norms_backward: a group per row.
 * Limits: GROUP a power of two; X and C are storage types.
 * Repeatability: every sum has a fixed order that depends on GROUP alone.
 */
GROUP_LENGTH(row_length, X)

KERNEL(GROUP, 1, 1)
void soft_moe_norms(IN(STORAGE(X), rows), IN(uchar, token_mask), OUT(float, norms),
                    OUT(STORAGE(X), clean), uint dim) {
    __local float tmp[GROUP];
    ulong row = get_group_id(0);
    bool masked = token_mask && !AT(token_mask)[row];
    float unit;
    rows = AT(rows) + row * dim;
    float length = row_length(rows, masked ? 0 : dim, &unit, tmp);
    float norm = unit * length;
    bool in = !masked && isfinite(norm);
    if (get_local_id(0) == 0)
        AT(norms)[row] = in ? norm : -1.0f;
    uint copied = clean ? dim : 0;
    for (uint d = get_local_id(0); d < copied; d += GROUP)
        AT(clean)[row * dim + d] = in ? rows[d] : 0;
}

/* gradient -= along / norm * rows / norm: through a norm nothing passes along its row. */
KERNEL(GROUP, 1, 1)
void soft_moe_norms_backward(IN(STORAGE(X), rows), IN(float, norms), IN(float, along),
                             OUT(STORAGE(C), gradient), uint dim) {
    ulong row = get_group_id(0);
    float norm = AT(norms)[row], part = AT(along)[row] / norm;
    uint used = norm > 0.0f ? dim : 0;
    rows = AT(rows) + row * dim;
    gradient = AT(gradient) + row * dim;
    for (uint d = get_local_id(0); d < used; d += GROUP)
        STORE(C, LOAD(C, gradient + d) - part * (LOAD(X, rows + d) / norm), gradient + d);
}

/* Rows of tokens that take no part become 0: they may hold anything, and are multiplied by 0. */
KERNEL(GROUP, 1, 1)
void soft_moe_clean(IN(STORAGE(X), rows), IN(float, token_norms), OUT(STORAGE(X), clean),
                    uint dim) {
    ulong token = get_group_id(0);
    bool in = AT(token_norms)[token] >= 0.0f;
    for (uint d = get_local_id(0); d < dim; d += GROUP)
        AT(clean)[token * dim + d] = in ? AT(rows)[token * dim + d] : 0;
}

KERNEL(GROUP, 1, 1)
void soft_moe_logits(IN(float, token_norms), IN(float, slot_norms), OUT(float, logits),
                     OUT(float, tops), uint count, float scale) {
    __local float tmp[GROUP];
    ulong token = get_group_id(0);
    float norm = AT(token_norms)[token], best = -INFINITY, sum = 0.0f;
    slot_norms = AT(slot_norms);
    logits = AT(logits) + token * count;
    for (uint s = get_local_id(0); s < count; s += GROUP) {
        float other = slot_norms[s], l = logits[s] / norm / other * scale;
        if (norm == 0.0f || other == 0.0f)
            l = 0.0f;
        if (norm < 0.0f || other < 0.0f || !isfinite(l))
            l = -INFINITY;
        best = fmax(best, l);
        logits[s] = l;
    }
    best = group_max(best, tmp);
    float shift = best == -INFINITY ? 0.0f : best;
    for (uint s = get_local_id(0); s < count; s += GROUP)
        sum += exp(logits[s] - shift);
    sum = group_sum(sum, tmp);
    if (get_local_id(0) == 0) {
        AT(tops)[2 * token] = shift;
        AT(tops)[2 * token + 1] = sum;
    }
}

KERNEL(GROUP, 1, 1)
void soft_moe_partials(IN(float, logits), OUT(float, partials), uint tokens, uint count,
                       uint block_size) {
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, tokens);
    logits = AT(logits);
    partials = AT(partials) + 2 * (ulong)get_group_id(0) * count;
    for (uint s = get_local_id(0); s < count; s += GROUP) {
        float best = -INFINITY, sum = 0.0f;
        for (uint t = begin; t < end; t++)
            best = fmax(best, logits[(ulong)t * count + s]);
        best = best == -INFINITY ? 0.0f : best;
        for (uint t = begin; t < end; t++)
            sum += exp(logits[(ulong)t * count + s] - best);
        partials[2 * s] = best;
        partials[2 * s + 1] = sum;
    }
}

KERNEL(GROUP, 1, 1)
void soft_moe_columns(IN(float, partials), OUT(float, columns), uint blocks, uint count) {
    uint s = get_global_id(0);
    float best = -INFINITY, sum = 0.0f;
    if (s >= count)
        return;
    partials = AT(partials) + 2 * s;
    for (uint block = 0; block < blocks; block++) {
        __global const float *part = partials + 2 * (ulong)block * count;
        best = part[1] > 0.0f ? fmax(best, part[0]) : best;
    }
    for (uint block = 0; block < blocks; block++) {
        __global const float *part = partials + 2 * (ulong)block * count;
        sum += part[1] > 0.0f ? part[1] * exp(part[0] - best) : 0.0f;
    }
    AT(columns)[2 * s] = best;
    AT(columns)[2 * s + 1] = sum;
}

/* Slot s without padding -> with it; Oclgrind has no rest beside a quotient. */
static inline uint slot_at(uint s, uint per_expert, uint stride) {
    return s + s / per_expert * (stride - per_expert);
}

/* exp(l - best) / sum, 0 where l takes no part. */
static inline float share(float l, __global const float *best_and_sum) {
    return l == -INFINITY ? 0.0f : exp(l - best_and_sum[0]) / best_and_sum[1];
}

KERNEL(GROUP, 1, 1)
void soft_moe_dispatch(IN(float, logits), IN(float, sums), OUT(float, dispatch), uint tokens,
                       uint count, uint per_expert, uint by_token) {
    uint i = get_group_id(0), e = get_group_id(1), s = e * per_expert + i;
    bool padding = i >= per_expert;
    logits = AT(logits) + (padding ? 0 : s);
    sums = AT(sums) + 2 * (padding || by_token ? 0 : s);
    dispatch = AT(dispatch) + ((ulong)e * get_num_groups(0) + i) * tokens;
    for (uint t = get_local_id(0); t < tokens; t += GROUP)
        dispatch[t] =
            padding ? 0.0f : share(logits[(ulong)t * count], sums + (by_token ? 2 * t : 0));
}

KERNEL(GROUP, 1, 1)
void soft_moe_combine(IN(float, logits), IN(float, sums), OUT(float, combine), uint count,
                      uint experts, uint per_expert, uint stride, uint by_slot) {
    ulong token = get_group_id(0);
    logits = AT(logits) + token * count;
    sums = AT(sums) + (by_slot ? 0 : 2 * token);
    combine = AT(combine) + token * experts * stride;
    for (uint e = 0; e < experts; e++)
        for (uint i = get_local_id(0); i < stride; i += GROUP) {
            uint s = e * per_expert + i;
            combine[e * stride + i] =
                i < per_expert ? share(logits[s], sums + (by_slot ? 2 * s : 0)) : 0.0f;
        }
}

KERNEL(GROUP, 1, 1)
void soft_moe_column_partials(IN(float, shares), IN(float, values), OUT(float, partials),
                              uint tokens, uint slots, uint count, uint per_expert, uint stride,
                              uint block_size) {
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, tokens);
    for (uint s = get_local_id(0); s < count; s += GROUP) {
        ulong place = slot_at(s, per_expert, stride);
        float sum = 0.0f;
        for (uint t = begin; t < end; t++) {
            ulong at = (ulong)t * slots + place;
            sum += (shares ? AT(shares)[at] : 1.0f) * AT(values)[at];
        }
        AT(partials)[(ulong)get_group_id(0) * count + s] = sum;
    }
}

KERNEL(GROUP, 1, 1)
void soft_moe_column_sums(IN(float, partials), OUT(float, column_sums), uint blocks, uint count) {
    uint s = get_global_id(0);
    float sum = 0.0f;
    if (s >= count)
        return;
    for (uint block = 0; block < blocks; block++)
        sum += AT(partials)[(ulong)block * count + s];
    AT(column_sums)[s] = sum;
}

KERNEL(GROUP, 1, 1)
void soft_moe_dlogits(IN(float, logits), IN(float, tops), IN(float, token_norms),
                      IN(float, slot_norms), IN(float, dispatch), IN(float, dcombine),
                      IN(float, column_sums), OUT(float, ddispatch), OUT(float, dlogits),
                      OUT(float, along), uint slots, uint count, uint per_expert, uint stride,
                      float scale) {
    __local float tmp[GROUP];
    ulong token = get_group_id(0);
    float norm = AT(token_norms)[token], products = 0.0f, all = 0.0f;
    logits = AT(logits) + token * count;
    tops = AT(tops) + 2 * token;
    dispatch = AT(dispatch) + token * slots;
    dcombine = AT(dcombine) + token * slots;
    ddispatch = AT(ddispatch) + token * slots;
    dlogits = AT(dlogits) + token * count;
    for (uint s = get_local_id(0); s < count; s += GROUP)
        products += share(logits[s], tops) * dcombine[slot_at(s, per_expert, stride)];
    products = group_sum(products, tmp);
    for (uint s = get_local_id(0); s < count; s += GROUP) {
        uint place = slot_at(s, per_expert, stride);
        float l = logits[s], other = AT(slot_norms)[s];
        float dl = dispatch[place] * (ddispatch[place] - AT(column_sums)[s]) +
                   share(l, tops) * (dcombine[place] - products);
        if (l == -INFINITY || norm == 0.0f || other == 0.0f)
            dl = l = 0.0f;
        dlogits[s] = dl == 0.0f ? 0.0f : dl / norm / other * scale;
        ddispatch[place] = dl * l;
        all += dl * l;
    }
    all = group_sum(all, tmp);
    if (get_local_id(0) == 0)
        AT(along)[token] = all;
}

KERNEL(GROUP, 1, 1)
void soft_moe_plan(OUT(uint, load), OUT(uint, kept), OUT(uint, offsets), OUT(int, slot_of),
                   OUT(int, pair_of), OUT(int, token_of), OUT(int, tile_expert),
                   OUT(float, pair_weights), uint tokens, uint experts, uint per_expert,
                   uint stride, uint row_tile) {
    uint i = get_global_id(0), tiles = stride / row_tile;
    if (i < tokens) {
        AT(slot_of)[i] = (int)i;
        AT(pair_weights)[i] = 1.0f;
    }
    if (i < experts) {
        AT(load)[i] = per_expert;
        AT(kept)[i] = per_expert;
    }
    if (i <= experts)
        AT(offsets)[i] = i * stride;
    if (i < experts * stride) {
        uint expert = i / stride;
        bool used = i - expert * stride < per_expert;
        AT(pair_of)[i] = used ? (int)(i - expert * (stride - per_expert)) : -1;
        AT(token_of)[i] = used ? (int)i : -1;
    }
    if (i < experts * tiles) {
        uint expert = i / tiles;
        AT(tile_expert)[i] =
            (i - expert * tiles) * row_tile < per_expert ? (int)expert : -1;
    }
}

/* Rows of padding, which the engines leave undefined, become 0: they are multiplied by 0. */
KERNEL(GROUP, 1, 1)
void soft_moe_clear(OUT(STORAGE(X), ye), uint dim, uint per_expert, uint stride) {
    ye = AT(ye) + ((ulong)get_group_id(1) * stride + per_expert + get_group_id(0)) * dim;
    for (uint d = get_local_id(0); d < dim; d += GROUP)
        ye[d] = 0;
}
