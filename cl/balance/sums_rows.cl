/*
 * Purpose: what p of each token needs, for statistics and losses: largest logit, sums, entropy,
 *          confidence, logsumexp, the bounds of the smooth load and of the fresh choice.
 * Formula: see token_row in balance.clh, and balance.h: p = s(l) / sum s(l) over R, from the noisy
 *          logits. Which bounds are asked for is a bit each in shape.asked.
 * Arrays: logits [T,R] that p is made of, noisy [T,R] (the same but for two levels), ranks [T,R]
 *          or NULL: what fresh and first choices are the best of, ids [pairs], live, token_mask,
 *          token_offsets, state or NULL -> rows [T] token_row.
 * NDRange: a token per team of TEAM work-items, GROUP / TEAM teams a group.
 * Limits: GROUP and TEAM powers of two; with GROUP 1 V is 16.
 * Repeatability: sums within a token depend on TEAM * V alone, or with GROUP 1 on V.
 * Structs come back through pointers: of returned ones LLVM makes what Oclgrind does not know.
 */
#include "balance/balance.clh"
#include "balance/team.clh"
#include "dispatch/pairs.clh"

/* Largest order with at least `rank` columns at or above it, 0 if there are fewer. */
uint kth_order(__global const float *logits, uint columns, uint rank, __local uint *tmp) {
    uint kth = 0;
    for (uint bit = 32; bit > 0; bit--) {
        uint at = kth | (1u << (bit - 1)), above = 0;
        for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
            UINTV order = ordered_columns(load_columns(logits, e, columns, -INFINITY));
            above += total_columns(order >= at ? (UINTV)(1u) : (UINTV)(0u));
        }
        above = team_total(above, tmp);
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
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        UINTV order = ordered_columns(load_columns(row, e, columns, -INFINITY));
        at_least += total_columns(order >= kth ? (UINTV)(1u) : (UINTV)(0u));
        above += total_columns(order > kth ? (UINTV)(1u) : (UINTV)(0u));
        next = max(next, largest_columns(order < kth ? order : (UINTV)(0u)));
    }
    at_least = team_total(at_least, tmp);
    above = team_total(above, tmp);
    next = team_largest(next, tmp);
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

/*
 * The id of the first choice: of the token's pairs the one whose column ranks highest, ties to the
 * lower id; without ranks, the first pair.
 */
int first_choice(__global const int *ids, pair_range pairs, __global const float *ranks,
                 uint columns, __local uint *tmp) {
    uint best = 0, from_end = 0;
    for (uint pair = pairs.begin + TEAM_LANE; ranks && pair < pairs.end; pair += TEAM)
        best = max(best, (uint)ids[pair] < columns ? ordered_bits(ranks[ids[pair]]) : 0);
    best = team_largest(best, tmp);
    for (uint pair = pairs.begin + TEAM_LANE; ranks && pair < pairs.end; pair += TEAM)
        if ((uint)ids[pair] < columns && ordered_bits(ranks[ids[pair]]) == best)
            from_end = max(from_end, columns - (uint)ids[pair]);
    from_end = team_largest(from_end, tmp);
    if (ranks)
        return from_end > 0 ? (int)(columns - from_end) : -1;
    return pairs.begin < pairs.end ? ids[pairs.begin] : -1;
}

/*
 * Sums over this lane's columns of one token. Those of exp and of scores leave out what equals the
 * largest, so that the entropy of a token that is almost sure keeps its digits.
 */
typedef struct lane_sums {
    column_sums power, power_weighted, score, score_weighted, raw;
    uint ties; /* columns equal to the largest */
    uint first_best;
} lane_sums;

/* Those of the token. */
typedef struct team_sums {
    float power, power_weighted, score, score_weighted, raw;
    uint ties;
} team_sums;

#define LANE_SUMS 6

/*
 * The floats and the ties of all lanes, in one tree: tmp is [LANE_SUMS,GROUP]. A count of columns
 * is exact in a float.
 */
void fold_lanes(const lane_sums *lane, team_sums *sums, __local float *tmp) {
    const int id = get_local_id(0), first = id - id % TEAM;
    tmp[id] = fold_columns(lane->power);
    tmp[GROUP + id] = fold_columns(lane->power_weighted);
    tmp[2 * GROUP + id] = fold_columns(lane->score);
    tmp[3 * GROUP + id] = fold_columns(lane->score_weighted);
    tmp[4 * GROUP + id] = fold_columns(lane->raw);
    tmp[5 * GROUP + id] = (float)lane->ties;
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (int width = TEAM / 2; width > 0; width /= 2) {
        for (int at = id; id - first < width && at < LANE_SUMS * GROUP; at += GROUP)
            tmp[at] += tmp[at + width];
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }
    sums->power = READ_ONCE(__local float, tmp[first]);
    sums->power_weighted = READ_ONCE(__local float, tmp[GROUP + first]);
    sums->score = READ_ONCE(__local float, tmp[2 * GROUP + first]);
    sums->score_weighted = READ_ONCE(__local float, tmp[3 * GROUP + first]);
    sums->raw = READ_ONCE(__local float, tmp[4 * GROUP + first]);
    sums->ties = (uint)READ_ONCE(__local float, tmp[5 * GROUP + first]);
    group_barrier(CLK_LOCAL_MEM_FENCE);
}

/* This lane's part of sum exp(l - top). */
static inline column_sums sum_powers(__global const float *noisy, uint columns, float top) {
    column_sums sum = 0.0f;
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV raw = load_columns(noisy, e, columns, -INFINITY);
        ADD_COLUMNS(sum, isfinite(raw) ? exp(raw - top) : (FLOATV)(0.0f));
    }
    return sum;
}

static inline void sum_row(const router_switches *r, float temperature, float best,
                           __global const float *logits, uint columns, lane_sums *lane) {
    lane_sums sums = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0};
    const FLOATV gone = (FLOATV)(0.0f);
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV raw = load_columns(logits, e, columns, -INFINITY);
        FLOATV l = prepared_columns(r, temperature, raw);
        INTV other = (l < best) & (l > -INFINITY);
        FLOATV below = below_best(l, best), power = other ? exp(below) : gone;
        UINTV from_end = (UINTV)(columns - e) - AS_UINTV((INTV)LANE_COLUMNS);
        ADD_COLUMNS(sums.power, power);
        ADD_COLUMNS(sums.power_weighted, other ? power * below : gone);
        sums.ties += total_columns(l == best ? (UINTV)(1u) : (UINTV)(0u));
        sums.first_best = max(sums.first_best, largest_columns(l == best ? from_end : (UINTV)(0u)));
        if (!is_softmax(r) && r->score != SCORE_IDENTITY) {
            FLOATV s = score_columns(r, best, l);
            ADD_COLUMNS(sums.score, other ? s : gone);
            ADD_COLUMNS(sums.score_weighted, (other & (s > 0.0f)) ? s * log(s) : gone);
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
    column_sums entropy, positive;
    float largest;
} signed_sums;

static inline column_sums sum_identity(const router_switches *r, float temperature,
                                       __global const float *logits, uint columns) {
    column_sums sum = 0.0f;
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV raw = load_columns(logits, e, columns, -INFINITY);
        ADD_COLUMNS(sum, isfinite(raw) ? prepared_columns(r, temperature, raw) : (FLOATV)(0.0f));
    }
    return sum;
}

static inline void sum_signed(const router_switches *r, float temperature, float scores,
                              __global const float *logits, uint columns, signed_sums *lane) {
    signed_sums sums = {0.0f, 0.0f, 0.0f};
    const FLOATV gone = (FLOATV)(0.0f);
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV raw = load_columns(logits, e, columns, -INFINITY);
        FLOATV l = prepared_columns(r, temperature, raw);
        FLOATV p = l == -INFINITY ? gone : l / scores;
        ADD_COLUMNS(sums.entropy, -(p > 0.0f ? p * log(p) : gone));
        ADD_COLUMNS(sums.positive, fmax(p, gone));
        sums.largest = fmax(sums.largest, max_columns(p));
    }
    *lane = sums;
}

/* ... of the scores themselves, which may have either sign. */
void signed_scores(const router_switches *r, float temperature, __global const float *logits,
                   uint columns, token_row *row, __local float *tmp) {
    float scores = team_sum(fold_columns(sum_identity(r, temperature, logits, columns)), tmp);
    signed_sums own;
    sum_signed(r, temperature, scores, logits, scores == 0.0f ? 0 : columns, &own);
    row->scores = scores;
    row->entropy = team_sum(fold_columns(own.entropy), tmp);
    row->positive = team_sum(fold_columns(own.positive), tmp);
    row->confidence = team_max(own.largest, tmp);
}

/* p of a token, whatever the score; `columns` is 0 where nothing is known. */
void probabilities(const router_switches *r, float temperature, __global const float *logits,
                   __global const float *noisy, uint columns, float top, token_row *row,
                   __local float *tmp) {
    lane_sums lane;
    team_sums sums;
    sum_row(r, temperature, row->best, logits, columns, &lane);
    lane.raw = sum_powers(noisy, columns, top);
    fold_lanes(&lane, &sums, tmp);
    uint from_end = team_largest(lane.first_best, (__local uint *)tmp);
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
    uint token = get_group_id(0) * (GROUP / TEAM) + get_local_id(0) / TEAM, R = s.columns;
    ulong at = (ulong)token * R;
    bool there = token < s.tokens;
    bool masked = !there || (token_mask && !AT(token_mask)[token]);
    pair_range pairs = {0, 0};
    if (there)
        pairs = owned_pairs(&owner, token);
    uint columns = masked || !logits ? 0 : R;
    token_row row = {.best = -INFINITY, .positive = 1.0f, .flags = masked ? 0 : TOKEN_UNMASKED};
    if (!masked && live && AT(live)[token] < (int)s.top_k)
        row.flags |= TOKEN_NONFINITE;
    logits = logits ? AT(logits) + at : 0;
    noisy = noisy ? AT(noisy) + at : 0;
    ranks = ranks ? AT(ranks) + at : 0;

    float top = -INFINITY;
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV l = load_columns(logits, e, columns, -INFINITY);
        FLOATV raw = load_columns(noisy, e, columns, -INFINITY);
        row.best = fmax(row.best, max_columns(prepared_columns(&r, temperature, l)));
        top = fmax(top, max_columns(isfinite(raw) ? raw : (FLOATV)(-INFINITY)));
    }
    row.best = team_max(row.best, tmp);
    top = team_max(top, tmp);
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
        row.first = first_choice(AT(ids), pairs, best_first ? 0 : ranks, R, uint_tmp);
    if (TEAM_LANE == 0 && there)
        ((__global token_row *)AT(rows))[token] = row;
}
