/*
 * Purpose: Soft MoE's weights of slots in tokens and of tokens in slots; the mixing itself is GEMM.
 * Formula: l[t,s] = soft_moe.scale * x_t/|x_t| . r_s/|r_s|, 0 where a norm is 0; dispatch[s,t] =
 *          softmax over the tokens of l[:,s], combine[t,s] = softmax over the slots of l[t,:].
 *          Masked tokens and rows with a value that is not finite take no part: their weights are
 *          0.
 * Arrays: rows [n,D] X, token_mask [n] or NULL -> norms [n], -1 for no part; clean [n,D] X or NULL,
 *          such rows as 0. logits [T,N] x . r in place, N = E p; tops [T,2] largest l and sum of
 *          exp of a row; partials [blocks,N,2] and columns [N,2] the same of columns. dispatch
 *          [S,T], combine [T,S]: slot e * stride + i is column e * p + i, those with i >= p are
 *          padding and 0. All f32 but X. The plan: buckets of p rows that never change; slot_of [T]
 *          and weights [T] say that a token's output is one row, with weight 1.
 * NDRange: soft_moe_norms: a group per row. soft_moe_logits: a group per token. soft_moe_partials:
 *          a group per block of block_size tokens. soft_moe_columns: a work-item per column.
 *          soft_moe_dispatch: (stride, E) groups. soft_moe_combine: a group per token.
 *          soft_moe_plan: one work-item per entry of the longest array. soft_moe_clear: (stride -
 *          p, E) groups.
 * Limits: GROUP a power of two; X is a storage type.
 * Repeatability: every sum has a fixed order that depends on GROUP alone.
 */
KERNEL(GROUP, 1, 1)
void soft_moe_norms(__global const STORAGE(X) *rows, ulong rows_off,
                    __global const uchar *token_mask, ulong token_mask_off, __global float *norms,
                    ulong norms_off, __global STORAGE(X) *clean, ulong clean_off, uint dim) {
    __local float tmp[GROUP];
    ulong row = get_group_id(0);
    bool masked = token_mask && !token_mask[token_mask_off + row];
    uint used = masked ? 0 : dim;
    float best = 0.0f, sum = 0.0f;
    rows += rows_off + row * dim;
    for (uint d = get_local_id(0); d < used; d += GROUP)
        best = fmax(best, fabs(LOAD(X, rows + d)));
    best = group_max(best, tmp);
    float unit = best == 0.0f ? 1.0f : best;
    for (uint d = get_local_id(0); d < used; d += GROUP) {
        float part = LOAD(X, rows + d) / unit;
        sum += part * part;
    }
    float norm = unit * sqrt(group_sum(sum, tmp));
    bool in = !masked && isfinite(norm);
    if (get_local_id(0) == 0)
        norms[norms_off + row] = in ? norm : -1.0f;
    uint copied = clean ? dim : 0;
    for (uint d = get_local_id(0); d < copied; d += GROUP)
        clean[clean_off + row * dim + d] = in ? rows[d] : 0;
}

KERNEL(GROUP, 1, 1)
void soft_moe_logits(__global const float *token_norms, ulong token_norms_off,
                     __global const float *slot_norms, ulong slot_norms_off, __global float *logits,
                     ulong logits_off, __global float *tops, ulong tops_off, uint count,
                     float scale) {
    __local float tmp[GROUP];
    ulong token = get_group_id(0);
    float norm = token_norms[token_norms_off + token], best = -INFINITY, sum = 0.0f;
    slot_norms += slot_norms_off;
    logits += logits_off + token * count;
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
        tops[tops_off + 2 * token] = shift;
        tops[tops_off + 2 * token + 1] = sum;
    }
}

KERNEL(GROUP, 1, 1)
void soft_moe_partials(__global const float *logits, ulong logits_off, __global float *partials,
                       ulong partials_off, uint tokens, uint count, uint block_size) {
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, tokens);
    logits += logits_off;
    partials += partials_off + 2 * (ulong)get_group_id(0) * count;
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
void soft_moe_columns(__global const float *partials, ulong partials_off, __global float *columns,
                      ulong columns_off, uint blocks, uint count) {
    uint s = get_global_id(0);
    float best = -INFINITY, sum = 0.0f;
    if (s >= count)
        return;
    partials += partials_off + 2 * s;
    for (uint block = 0; block < blocks; block++) {
        __global const float *part = partials + 2 * (ulong)block * count;
        best = part[1] > 0.0f ? fmax(best, part[0]) : best;
    }
    for (uint block = 0; block < blocks; block++) {
        __global const float *part = partials + 2 * (ulong)block * count;
        sum += part[1] > 0.0f ? part[1] * exp(part[0] - best) : 0.0f;
    }
    columns[columns_off + 2 * s] = best;
    columns[columns_off + 2 * s + 1] = sum;
}

/* exp(l - best) / sum, 0 where l takes no part. */
static inline float share(float l, __global const float *best_and_sum) {
    return l == -INFINITY ? 0.0f : exp(l - best_and_sum[0]) / best_and_sum[1];
}

KERNEL(GROUP, 1, 1)
void soft_moe_dispatch(__global const float *logits, ulong logits_off,
                       __global const float *columns, ulong columns_off, __global float *dispatch,
                       ulong dispatch_off, uint tokens, uint count, uint per_expert) {
    uint i = get_group_id(0), e = get_group_id(1), s = e * per_expert + i;
    bool padding = i >= per_expert;
    logits += logits_off + (padding ? 0 : s);
    columns += columns_off + 2 * (padding ? 0 : s);
    dispatch += dispatch_off + ((ulong)e * get_num_groups(0) + i) * tokens;
    for (uint t = get_local_id(0); t < tokens; t += GROUP)
        dispatch[t] = padding ? 0.0f : share(logits[(ulong)t * count], columns);
}

KERNEL(GROUP, 1, 1)
void soft_moe_combine(__global const float *logits, ulong logits_off, __global const float *tops,
                      ulong tops_off, __global float *combine, ulong combine_off, uint count,
                      uint experts, uint per_expert, uint stride) {
    ulong token = get_group_id(0);
    logits += logits_off + token * count;
    tops += tops_off + 2 * token;
    combine += combine_off + token * experts * stride;
    for (uint e = 0; e < experts; e++)
        for (uint i = get_local_id(0); i < stride; i += GROUP)
            combine[e * stride + i] =
                i < per_expert ? share(logits[e * per_expert + i], tops) : 0.0f;
}

KERNEL(GROUP, 1, 1)
void soft_moe_plan(__global uint *load, ulong load_off, __global uint *kept, ulong kept_off,
                   __global uint *offsets, ulong offsets_off, __global int *slot_of,
                   ulong slot_of_off, __global int *pair_of, ulong pair_of_off,
                   __global int *token_of, ulong token_of_off, __global int *tile_expert,
                   ulong tile_expert_off, __global float *weights, ulong weights_off, uint tokens,
                   uint experts, uint per_expert, uint stride, uint row_tile) {
    uint i = get_global_id(0), tiles = stride / row_tile;
    if (i < tokens) {
        slot_of[slot_of_off + i] = (int)i;
        weights[weights_off + i] = 1.0f;
    }
    if (i < experts) {
        load[load_off + i] = per_expert;
        kept[kept_off + i] = per_expert;
    }
    if (i <= experts)
        offsets[offsets_off + i] = i * stride;
    if (i < experts * stride) {
        uint expert = i / stride;
        int row = i - expert * stride < per_expert ? (int)i : -1;
        pair_of[pair_of_off + i] = row;
        token_of[token_of_off + i] = row;
    }
    if (i < experts * tiles) {
        uint expert = i / tiles;
        tile_expert[tile_expert_off + i] =
            (i - expert * tiles) * row_tile < per_expert ? (int)expert : -1;
    }
}

/* Rows of padding, which the engines leave undefined, become 0: they are multiplied by 0. */
KERNEL(GROUP, 1, 1)
void soft_moe_clear(__global STORAGE(X) *ye, ulong ye_off, uint dim, uint per_expert, uint stride) {
    ye += ye_off + ((ulong)get_group_id(1) * stride + per_expert + get_group_id(0)) * dim;
    for (uint d = get_local_id(0); d < dim; d += GROUP)
        ye[d] = 0;
}
