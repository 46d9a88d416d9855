/*
 * Purpose: what a batch adds up to, for statistics and losses: importance, weights and counts by
 *          expert, entropy, confidence and logsumexp of the tokens; per sequence if asked.
 * Formula: see balance.h: p = s(l) / sum s(l) over R, from the noisy logits. Which sums are asked
 *          for is a bit each in shape.asked.
 * Arrays: logits [T,R] that p is made of, noisy [T,R] (the same but for two levels), ranks [T,R]
 *          or NULL: what fresh and first choices are the best of, clean [T,R], noise_raw [T,R] (the
 *          last two for the smooth load alone), token_mask, live, token_offsets, state or NULL;
 *          ids, weight_ids, pair_weights [pairs] -> rows [T] token_row; partial [blocks] and sums
 *          [Q, and one of the batch if Q > 1] records, see balance.clh.
 * NDRange: sums_rows: one group per token. sums_columns, sums_pairs: (columns, blocks), V columns a
 *          work-item. sums_tokens: one group per (device group, one more for invalid ids, one for
 *          the scalars; block). sums_reduce: (words of a record, records), a word a work-item.
 * Limits: GROUP a power of two; with GROUP 1 V is 16.
 * Repeatability: a work-item owns what it sums, and adds in the order of tokens and blocks, with
 *          the rounding error carried along; only sums within a token depend on GROUP.
 * Structs come back through pointers: of returned ones LLVM makes what Oclgrind does not know.
 */
#include "balance/balance.clh"
#include "dispatch/pairs.clh"

/* Largest order with at least `rank` columns at or above it, 0 if there are fewer. */
uint kth_order(__global const float *logits, uint columns, uint rank, __local uint *tmp) {
    uint kth = 0;
    for (uint bit = 32; bit > 0; bit--) {
        uint at = kth | (1u << (bit - 1)), above = 0;
        for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
            UINTV order = ordered_columns(load_columns(logits, e, columns, -INFINITY));
            above += total_columns(order >= at ? (UINTV)(1u) : (UINTV)(0u));
        }
        above = group_total(above, tmp);
        kth = above >= rank ? at : kth;
    }
    return kth;
}

/* The K-th and (K+1)-th best of a row, and the last of those equal to the K-th that is chosen. */
typedef struct choice_bounds {
    uint kth, next, last_tie;
} choice_bounds;

void find_bounds(__global const float *row, uint columns, uint top_k, choice_bounds *bounds,
                 __local uint *tmp) {
    uint at_least = 0, above = 0, next = 0, kth = kth_order(row, columns, top_k, tmp);
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        UINTV order = ordered_columns(load_columns(row, e, columns, -INFINITY));
        at_least += total_columns(order >= kth ? (UINTV)(1u) : (UINTV)(0u));
        above += total_columns(order > kth ? (UINTV)(1u) : (UINTV)(0u));
        next = max(next, largest_columns(order < kth ? order : (UINTV)(0u)));
    }
    at_least = group_total(at_least, tmp);
    above = group_total(above, tmp);
    next = group_largest(next, tmp);
    bounds->kth = kth;
    bounds->next = at_least > top_k ? kth : next;
    bounds->last_tie = columns;
    if (at_least > top_k)
        for (uint e = 0, left = top_k - above; e < columns && left > 0; e++)
            if (isfinite(row[e]) && ordered_bits(row[e]) == kth) {
                bounds->last_tie = e;
                left--;
            }
}

/* Whether columns e ... e + V - 1 are among the chosen, from their ordered values. */
static inline INTV is_chosen(UINTV order, uint kth, uint last_tie, uint e) {
    INTV first_ties = AS_INTV((UINTV)(e)) + LANE_COLUMNS <= (INTV)((int)last_tie);
    return ((order > kth) | ((order == kth) & first_ties)) & (order > 0u);
}

/*
 * The id of the first choice: of the token's pairs the one whose column ranks highest, ties to the
 * lower id; without ranks, the first pair.
 */
int first_choice(__global const int *ids, pair_range pairs, __global const float *ranks,
                 uint columns, __local uint *tmp) {
    uint best = 0, from_end = 0;
    for (uint pair = pairs.begin + get_local_id(0); ranks && pair < pairs.end; pair += GROUP)
        best = max(best, (uint)ids[pair] < columns ? ordered_bits(ranks[ids[pair]]) : 0);
    best = group_largest(best, tmp);
    for (uint pair = pairs.begin + get_local_id(0); ranks && pair < pairs.end; pair += GROUP)
        if ((uint)ids[pair] < columns && ordered_bits(ranks[ids[pair]]) == best)
            from_end = max(from_end, columns - (uint)ids[pair]);
    from_end = group_largest(from_end, tmp);
    if (ranks)
        return from_end > 0 ? (int)(columns - from_end) : -1;
    return pairs.begin < pairs.end ? ids[pairs.begin] : -1;
}

/*
 * Sums over this lane's columns of one token. Those of exp and of scores leave out what equals the
 * largest, so that the entropy of a token that is almost sure keeps its digits.
 */
typedef struct lane_sums {
    float power, power_weighted, score, score_weighted, raw;
    uint ties; /* columns equal to the largest */
    uint first_best;
} lane_sums;

#define LANE_SUMS 6

/*
 * The floats and the ties of all lanes, in one tree: tmp is [LANE_SUMS,GROUP]. A count of columns
 * is exact in a float.
 */
void fold_lanes(lane_sums *sums, __local float *tmp) {
    int lane = get_local_id(0);
    tmp[lane] = sums->power;
    tmp[GROUP + lane] = sums->power_weighted;
    tmp[2 * GROUP + lane] = sums->score;
    tmp[3 * GROUP + lane] = sums->score_weighted;
    tmp[4 * GROUP + lane] = sums->raw;
    tmp[5 * GROUP + lane] = (float)sums->ties;
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (int width = GROUP / 2; width > 0; width /= 2) {
        for (int at = lane; lane < width && at < LANE_SUMS * GROUP; at += GROUP)
            tmp[at] += tmp[at + width];
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }
    sums->power = READ_ONCE(__local float, tmp[0]);
    sums->power_weighted = READ_ONCE(__local float, tmp[GROUP]);
    sums->score = READ_ONCE(__local float, tmp[2 * GROUP]);
    sums->score_weighted = READ_ONCE(__local float, tmp[3 * GROUP]);
    sums->raw = READ_ONCE(__local float, tmp[4 * GROUP]);
    sums->ties = (uint)READ_ONCE(__local float, tmp[5 * GROUP]);
    group_barrier(CLK_LOCAL_MEM_FENCE);
}

/* This lane's part of sum exp(l - top). */
static inline float sum_powers(__global const float *noisy, uint columns, float top) {
    float sum = 0.0f;
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        FLOATV raw = load_columns(noisy, e, columns, -INFINITY);
        sum += sum_columns(isfinite(raw) ? exp(raw - top) : (FLOATV)(0.0f));
    }
    return sum;
}

static inline void sum_row(const router_switches *r, float temperature, float best,
                           __global const float *logits, uint columns, lane_sums *lane) {
    lane_sums sums = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0};
    const FLOATV gone = (FLOATV)(0.0f);
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        FLOATV raw = load_columns(logits, e, columns, -INFINITY);
        FLOATV l = prepared_columns(r, temperature, raw);
        INTV other = (l < best) & (l > -INFINITY);
        FLOATV below = below_best(l, best), power = other ? exp(below) : gone;
        UINTV from_end = (UINTV)(columns - e) - AS_UINTV((INTV)LANE_COLUMNS);
        sums.power += sum_columns(power);
        sums.power_weighted += sum_columns(other ? power * below : gone);
        sums.ties += total_columns(l == best ? (UINTV)(1u) : (UINTV)(0u));
        sums.first_best = max(sums.first_best, largest_columns(l == best ? from_end : (UINTV)(0u)));
        if (!is_softmax(r) && r->score != SCORE_IDENTITY) {
            FLOATV s = score_columns(r, best, l);
            sums.score += sum_columns(other ? s : gone);
            sums.score_weighted += sum_columns((other & (s > 0.0f)) ? s * log(s) : gone);
        }
    }
    *lane = sums;
}

/* p of scores that all are positive, from its sums without the `ties` largest. */
void positive_scores(const router_switches *r, float rest, float weighted, uint ties,
                     token_row *row) {
    float most = max_columns(score_columns(r, row->best, (FLOATV)(row->best)));
    if (most == 0.0f)
        return;
    float extra = (float)(ties - 1) * most;
    rest += extra;
    weighted += extra * log(most);
    float sure = log1p(rest / most);
    row->scores = most + rest;
    row->log_scores = log(most) + sure;
    row->entropy = (most * sure + rest * row->log_scores - weighted) / row->scores;
    row->confidence = most / row->scores;
}

/* Entropy, largest and positive p of scores of either sign, s(l') = l'. */
typedef struct signed_sums {
    float entropy, positive, largest;
} signed_sums;

static inline float sum_identity(const router_switches *r, float temperature,
                                 __global const float *logits, uint columns) {
    float sum = 0.0f;
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        FLOATV raw = load_columns(logits, e, columns, -INFINITY);
        sum += sum_columns(isfinite(raw) ? prepared_columns(r, temperature, raw) : (FLOATV)(0.0f));
    }
    return sum;
}

static inline void sum_signed(const router_switches *r, float temperature, float scores,
                              __global const float *logits, uint columns, signed_sums *lane) {
    signed_sums sums = {0.0f, 0.0f, 0.0f};
    const FLOATV gone = (FLOATV)(0.0f);
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        FLOATV raw = load_columns(logits, e, columns, -INFINITY);
        FLOATV l = prepared_columns(r, temperature, raw);
        FLOATV p = l == -INFINITY ? gone : l / scores;
        sums.entropy -= sum_columns(p > 0.0f ? p * log(p) : gone);
        sums.positive += sum_columns(fmax(p, gone));
        sums.largest = fmax(sums.largest, max_columns(p));
    }
    *lane = sums;
}

/* ... of the scores themselves, which may have either sign. */
void signed_scores(const router_switches *r, float temperature, __global const float *logits,
                   uint columns, token_row *row, __local float *tmp) {
    float scores = group_sum(sum_identity(r, temperature, logits, columns), tmp);
    signed_sums own;
    sum_signed(r, temperature, scores, logits, scores == 0.0f ? 0 : columns, &own);
    row->scores = scores;
    row->entropy = group_sum(own.entropy, tmp);
    row->positive = group_sum(own.positive, tmp);
    row->confidence = group_max(own.largest, tmp);
}

/* p of a token, whatever the score; `columns` is 0 where nothing is known. */
void probabilities(const router_switches *r, float temperature, __global const float *logits,
                   __global const float *noisy, uint columns, float top, token_row *row,
                   __local float *tmp) {
    lane_sums sums;
    sum_row(r, temperature, row->best, logits, columns, &sums);
    sums.raw = sum_powers(noisy, columns, top);
    fold_lanes(&sums, tmp);
    uint from_end = group_largest(sums.first_best, (__local uint *)tmp);
    if (columns == 0)
        return;
    float rest = sums.power + (float)(sums.ties - 1);
    row->first_best = columns - from_end;
    row->lse = top + log(sums.raw);
    row->total = 1.0f + rest;
    row->log_total = log1p(rest);
    row->soft_entropy = row->log_total - sums.power_weighted / row->total;
    if (is_softmax(r)) {
        row->scores = row->total;
        row->log_scores = row->log_total;
        row->entropy = row->soft_entropy;
        row->confidence = 1.0f / row->total;
    } else if (r->score != SCORE_IDENTITY) {
        positive_scores(r, sums.score, sums.score_weighted, sums.ties, row);
    }
}

KERNEL(GROUP, 1, 1)
void sums_rows(IN(float, logits), IN(float, noisy), IN(float, ranks), IN(int, ids), IN(int, live),
               IN(uchar, token_mask), IN(int, token_offsets), IN(uint, state), OUT(float, rows),
               sums_shape s, router_switches r, int best_first) {
    __local float tmp[LANE_SUMS * GROUP];
    __local uint uint_tmp[GROUP];
    float temperature = temperature_of(&r, STATE_OF(state));
    token_owner owner = OWNER_INIT(s.top_k, s.pairs, s.token_pairs);
    uint token = get_group_id(0), R = s.columns;
    ulong at = (ulong)token * R;
    bool masked = token_mask && !AT(token_mask)[token];
    uint columns = masked || !logits ? 0 : R;
    token_row row = {.best = -INFINITY, .positive = 1.0f, .flags = masked ? 0 : TOKEN_UNMASKED};
    if (!masked && live && AT(live)[token] < (int)s.top_k)
        row.flags |= TOKEN_NONFINITE;
    logits = logits ? AT(logits) + at : 0;
    noisy = noisy ? AT(noisy) + at : 0;
    ranks = ranks ? AT(ranks) + at : 0;

    float top = -INFINITY;
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        FLOATV l = load_columns(logits, e, columns, -INFINITY);
        FLOATV raw = load_columns(noisy, e, columns, -INFINITY);
        row.best = fmax(row.best, max_columns(prepared_columns(&r, temperature, l)));
        top = fmax(top, max_columns(isfinite(raw) ? raw : (FLOATV)(-INFINITY)));
    }
    row.best = group_max(row.best, tmp);
    top = group_max(top, tmp);
    if (row.best == -INFINITY)
        columns = 0;
    probabilities(&r, temperature, logits, noisy, columns, top, &row, tmp);
    /* Loops, not conditions, around barriers: see types.clh. */
    for (int times = r.score == SCORE_IDENTITY; times > 0; times--)
        signed_scores(&r, temperature, logits, columns, &row, tmp);
    /* The smooth load and the fresh choice in one call: Intel's compiler crashes on two. */
    row.last_tie = row.fresh_last_tie = R;
    const int begin = s.asked & SUM_BIT(SUM_SMOOTH) ? 0 : 1;
    const int end = s.asked & COUNT_BIT(COUNT_FRESH) ? 2 : 1;
    for (int fresh = begin; fresh < end; fresh++) {
        choice_bounds found;
        find_bounds(fresh ? ranks : noisy, columns, s.top_k, &found, uint_tmp);
        row.kth = fresh ? row.kth : found.kth;
        row.next = fresh ? row.next : found.next;
        row.last_tie = fresh ? row.last_tie : found.last_tie;
        row.fresh_kth = found.kth;
        row.fresh_last_tie = found.last_tie;
    }
    for (int times = (s.asked & COUNT_BIT(COUNT_FIRST)) != 0; times > 0; times--)
        row.first = first_choice(AT(ids), owned_pairs(&owner, token), best_first ? 0 : ranks,
                                 R, uint_tmp);
    if (get_local_id(0) == 0)
        ((__global token_row *)AT(rows))[token] = row;
}

typedef struct token_range {
    uint begin, end;
} token_range;

/* The tokens of a block. */
static inline token_range block_tokens(const sums_shape *s, uint block) {
    uint sequence = block / s->blocks_each;
    uint begin = sequence * s->sequence + (block - sequence * s->blocks_each) * s->block;
    uint end = min(min(begin + s->block, (sequence + 1) * s->sequence), s->tokens);
    token_range range = {begin, end};
    return range;
}

/* Phi((l - thr) / sigma), sigma 0 included: the smooth load of a token. */
static inline FLOATV smooth_load(FLOATV clean, FLOATV threshold, FLOATV sigma) {
    FLOATV z = (clean - threshold) / sigma;
    FLOATV hard = clean > threshold ? (FLOATV)(1.0f) : (FLOATV)(0.0f);
    return sigma > 0.0f ? 0.5f * erfc(-0.70710678118654752f * z) : hard;
}

KERNEL(GROUP, 1, 1)
void sums_columns(IN(float, logits), IN(float, noisy), IN(float, clean), IN(float, noise_raw),
                  IN(float, ranks), IN(uint, state), IN(float, rows), OUT(uint, partial),
                  sums_shape s, router_switches r) {
    __global const token_row *row = (__global const token_row *)AT(rows);
    __global const state_header *header = STATE_OF(state);
    float temperature = temperature_of(&r, header);
    uint e = (get_group_id(0) * GROUP + get_local_id(0)) * V, R = s.columns;
    token_range range = block_tokens(&s, get_group_id(1));
    const FLOATV none = (FLOATV)(0.0f);
    FLOATV normalised = none, normalised_lost = none, raw = none, raw_lost = none;
    FLOATV softmax = none, softmax_lost = none, smooth = none, smooth_lost = none;
    UINTV fresh = (UINTV)(0u);
    if (e >= R)
        return;
    for (uint token = range.begin; token < range.end; token++) {
        token_row t = row[token];
        ulong at = (ulong)token * R;
        if (!(t.flags & TOKEN_UNMASKED) || t.best == -INFINITY)
            continue;
        FLOATV l = prepared_columns(&r, temperature,
                                    load_columns(AT(logits) + at, e, R, -INFINITY));
        FLOATV score = score_columns(&r, t.best, l);
        if (s.asked & SUM_BIT(SUM_NORMALISED) && t.scores != 0.0f)
            ADD_CAREFULLY(FLOATV, normalised, normalised_lost, score / t.scores);
        if (s.asked & SUM_BIT(SUM_RAW)) {
            FLOATV value = is_softmax(&r) ? l : score;
            ADD_CAREFULLY(FLOATV, raw, raw_lost, l == -INFINITY ? none : value * s.raw_scale);
        }
        if (s.asked & SUM_BIT(SUM_SOFTMAX))
            ADD_CAREFULLY(FLOATV, softmax, softmax_lost,
                          l == -INFINITY ? none : exp(l - t.best) / t.total);
        if (s.asked & COUNT_BIT(COUNT_FRESH)) {
            UINTV order = ordered_columns(load_columns(AT(ranks) + at, e, R, -INFINITY));
            INTV in = is_chosen(order, t.fresh_kth, t.fresh_last_tie, e);
            fresh += in ? (UINTV)(1u) : (UINTV)(0u);
        }
        if (s.asked & SUM_BIT(SUM_SMOOTH)) {
            UINTV order = ordered_columns(load_columns(AT(noisy) + at, e, R, -INFINITY));
            FLOATV threshold = is_chosen(order, t.kth, t.last_tie, e)
                                   ? (FLOATV)(float_of_order(t.next))
                                   : (FLOATV)(float_of_order(t.kth));
            FLOATV value = smooth_load(
                load_columns(AT(clean) + at, e, R, -INFINITY), threshold,
                noise_deviation(&s, header, noise_raw ? AT(noise_raw) + at : 0, e));
            ADD_CAREFULLY(FLOATV, smooth, smooth_lost, order > 0u ? value : none);
        }
    }
    __global uint *record = AT(partial) + (ulong)get_group_id(1) * record_words(&s);
    __global float *sums = (__global float *)record;
    store_columns(sums + SUM_NORMALISED * R, e, R, normalised);
    store_columns(sums + SUM_RAW * R, e, R, raw);
    store_columns(sums + SUM_SOFTMAX * R, e, R, softmax);
    store_columns(sums + SUM_SMOOTH * R, e, R, smooth);
    store_counts(record + count_at(&s, COUNT_FRESH), e, R, fresh);
}

KERNEL(GROUP, 1, 1)
void sums_pairs(IN(int, ids), IN(int, weight_ids), IN(float, pair_weights), IN(int, live),
                IN(uchar, token_mask), IN(int, token_offsets), IN(float, rows), OUT(uint, partial),
                sums_shape s) {
    token_owner owner = OWNER_INIT(s.top_k, s.pairs, s.token_pairs);
    uint e = (get_group_id(0) * GROUP + get_local_id(0)) * V, R = s.columns;
    token_range range = block_tokens(&s, get_group_id(1));
    __global const token_row *row = (__global const token_row *)AT(rows);
    const INTV column = (INTV)((int)e) + LANE_COLUMNS;
    const FLOATV none = (FLOATV)(0.0f);
    FLOATV sum = none, lost = none;
    UINTV assigned = (UINTV)(0u), first = (UINTV)(0u);
    if (e >= R)
        return;
    ids = AT(ids);
    weight_ids = AT(weight_ids);
    pair_weights = AT(pair_weights);
    for (uint token = range.begin; token < range.end; token++) {
        pair_range pairs = owned_pairs(&owner, token);
        for (uint pair = pairs.begin; pair < pairs.end; pair++) {
            INTV match = column == (INTV)(ids[pair]);
            assigned += match ? (UINTV)(1u) : (UINTV)(0u);
            if (s.asked & SUM_BIT(SUM_WEIGHTS)) {
                match = column == (INTV)(weight_ids[pair]);
                ADD_CAREFULLY(FLOATV, sum, lost, match ? (FLOATV)(pair_weights[pair]) : none);
            }
        }
        if (s.asked & COUNT_BIT(COUNT_FIRST) && pairs.begin < pairs.end)
            first += column == (INTV)(row[token].first) ? (UINTV)(1u) : (UINTV)(0u);
    }
    __global uint *record = AT(partial) + (ulong)get_group_id(1) * record_words(&s);
    store_columns((__global float *)record + SUM_WEIGHTS * R, e, R, sum);
    store_counts(record + count_at(&s, COUNT_ASSIGNED), e, R, assigned);
    store_counts(record + count_at(&s, COUNT_FIRST), e, R, first);
}

/* This lane's part of the tokens of the range with a pair in device group [low, high). */
static inline uint tokens_in_group(const token_owner *owner, __global const int *ids,
                                   token_range range, int low, int high) {
    uint count = 0;
    for (uint token = range.begin + get_local_id(0); token < range.end; token += GROUP) {
        pair_range pairs = owned_pairs(owner, token);
        bool in = false;
        for (uint pair = pairs.begin; pair < pairs.end; pair++)
            in = in || (ids[pair] >= low && ids[pair] < high);
        count += in;
    }
    return count;
}

/* This lane's part of the pairs of the range whose id is no column. */
static inline uint invalid_ids(const token_owner *owner, __global const int *ids, token_range range,
                               uint columns) {
    uint count = 0;
    for (uint token = range.begin + get_local_id(0); token < range.end; token += GROUP) {
        pair_range pairs = owned_pairs(owner, token);
        for (uint pair = pairs.begin; pair < pairs.end; pair++)
            count += (uint)ids[pair] >= columns;
    }
    return count;
}

/* What the scalars are sums of: fetched is [SCALAR_TERMS,GROUP]. */
#define SCALAR_TERMS 5
#define SCALAR_TERMS_OF(t)                                                                         \
    (float4)(fetched[t], fetched[GROUP + (t)], fetched[2 * GROUP + (t)], fetched[3 * GROUP + (t)])

/*
 * Each lane fetches a token, then one lane adds them up, in the order of tokens. `scalars`
 * may be NULL: nothing is written.
 */
void sum_scalars(__global const token_row *rows, token_range range, __local float *fetched,
                 __local uint *tmp, __global uint *scalars) {
    uint lane = get_local_id(0), tokens = 0, nonfinite = 0;
    float4 sum = (float4)(0.0f), lost = (float4)(0.0f);
    float soft = 0.0f, soft_lost = 0.0f;
    for (uint first = range.begin; first < range.end; first += GROUP) {
        if (first + lane < range.end) {
            token_row row = rows[first + lane];
            tokens += (row.flags & TOKEN_UNMASKED) != 0;
            nonfinite += (row.flags & TOKEN_NONFINITE) != 0;
            fetched[lane] = row.entropy;
            fetched[GROUP + lane] = row.confidence;
            fetched[2 * GROUP + lane] = ldexp(row.lse, -LOGIT_POWER);
            fetched[3 * GROUP + lane] = row.lse * row.lse;
            fetched[4 * GROUP + lane] = row.soft_entropy;
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = 0; lane == 0 && i < min((uint)GROUP, range.end - first); i++) {
            ADD_CAREFULLY(float4, sum, lost, SCALAR_TERMS_OF(i));
            ADD_CAREFULLY(float, soft, soft_lost, fetched[4 * GROUP + i]);
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }
    tokens = group_total(tokens, tmp);
    nonfinite = group_total(nonfinite, tmp);
    if (lane > 0 || !scalars)
        return;
    scalars[SCALAR_TOKENS] = tokens;
    scalars[SCALAR_NONFINITE] = nonfinite;
    scalars[SCALAR_SEQUENCES] = 0;
    scalars[SCALAR_ENTROPY] = as_uint(sum.x);
    scalars[SCALAR_SOFT_ENTROPY] = as_uint(soft);
    scalars[SCALAR_CONFIDENCE] = as_uint(sum.y);
    scalars[SCALAR_LSE] = as_uint(sum.z);
    scalars[SCALAR_LSE_SQUARED] = as_uint(sum.w);
}

KERNEL(GROUP, 1, 1)
void sums_tokens(IN(int, ids), IN(int, live), IN(uchar, token_mask), IN(int, token_offsets),
                 IN(float, rows), OUT(uint, partial), sums_shape s) {
    __local float fetched[SCALAR_TERMS * GROUP];
    __local uint tmp[GROUP];
    token_owner owner = OWNER_INIT(s.top_k, s.pairs, s.token_pairs);
    uint group = get_group_id(0), block = get_group_id(1);
    uint groups = s.asked & DEVICE_BIT ? s.device_groups : 0;
    token_range range = block_tokens(&s, block);
    __global uint *record = AT(partial) + (ulong)block * record_words(&s);
    token_range mine = {range.begin, group == groups + 1 ? range.end : range.begin};
    uint count = 0, place = scalars_at(&s) + SCALAR_INVALID;
    if (group < groups) {
        int each = (int)(s.experts / groups), low = (int)group * each;
        count = tokens_in_group(&owner, AT(ids), range, low, low + each);
        place = devices_at(&s) + group;
    } else if (group == groups && s.asked & INVALID_BIT) {
        count = invalid_ids(&owner, AT(ids), range, s.columns);
    }
    count = group_total(count, tmp);
    if (get_local_id(0) == 0 && group <= groups)
        record[place] = count;
    sum_scalars((__global const token_row *)AT(rows), mine, fetched, tmp,
                group == groups + 1 ? record + scalars_at(&s) : 0);
}

/* Sequences of [first, end) with an unmasked token. */
static inline uint unmasked_sequences(const sums_shape *s, __global const uint *partial, uint first,
                                  uint end) {
    uint count = 0;
    for (uint sequence = first; sequence < end; sequence++) {
        uint tokens = 0;
        for (uint i = 0; i < s->blocks_each; i++)
            tokens += partial[(ulong)(sequence * s->blocks_each + i) * record_words(s) +
                              scalars_at(s) + SCALAR_TOKENS];
        count += tokens > 0;
    }
    return count;
}

KERNEL(GROUP, 1, 1)
void sums_reduce(IN(uint, partial), OUT(uint, sums), sums_shape s) {
    uint word = get_group_id(0) * GROUP + get_local_id(0), record = get_group_id(1);
    uint words = record_words(&s), whole = batch_record(&s);
    uint first = record == whole ? 0 : record, end = record == whole ? s.sequences : record + 1;
    if (word >= words)
        return;
    uint kind = min(word / s.columns, (uint)(SUM_SOURCES + COUNT_SOURCES));
    bool asked = word >= scalars_at(&s) || (s.asked & (1u << kind));
    bool is_float = word < SUM_SOURCES * s.columns || word >= scalars_at(&s) + SCALAR_ENTROPY;
    uint count = 0;
    float sum = 0.0f, lost = 0.0f;
    partial = AT(partial);
    for (uint block = first * s.blocks_each; asked && block < end * s.blocks_each; block++) {
        uint value = partial[(ulong)block * words + word];
        if (is_float)
            ADD_CAREFULLY(float, sum, lost, as_float(value));
        else
            count += value;
    }
    if (word == scalars_at(&s) + SCALAR_SEQUENCES)
        count = unmasked_sequences(&s, partial, first, end);
    AT(sums)[(ulong)record * words + word] = is_float ? as_uint(sum) : count;
}
