/*
 * Purpose: what a batch did to the load.
 * Formula: see clmoe_stats in clmoe.h.
 * Arrays: load [R] u32, kept [R] u32, live [T] or NULL, token_mask [T] or NULL -> header (32 words:
 *         the fields of clmoe_stats in order), then load, kept, dropped [R] u32 each.
 * NDRange: one group; its lanes stride over experts and tokens.
 * Limits: none.
 * Repeatability: integers; the entropy is a compensated sum per lane, then a tree.
 */
#define HEADER_WORDS 32

uint group_total(uint value, __local uint *tmp) {
    uint total;
    group_scan(value, &total, tmp);
    return total;
}

uint group_largest(uint value, __local uint *tmp) {
    int lane = get_local_id(0);
    tmp[lane] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int width = GROUP / 2; width > 0; width /= 2) {
        if (lane < width)
            tmp[lane] = max(tmp[lane], tmp[lane + width]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    uint largest = tmp[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return largest;
}

/* -sum F log F over this lane's experts, F = load / sum. */
static inline float lane_entropy(__global const uint *load, uint experts, uint sum) {
    float entropy = 0.0f, lost = 0.0f;
    for (uint e = get_local_id(0); e < experts; e += GROUP) {
        float share = (float)load[e] / (float)sum;
        float term = (load[e] == 0 ? 0.0f : -share * log(share)) - lost;
        float next = entropy + term;
        lost = (next - entropy) - term;
        entropy = next;
    }
    return entropy;
}

KERNEL(GROUP, 1, 1)
void stats_of_plan(__global const uint *load, ulong load_off, __global const uint *kept,
                   ulong kept_off, __global const int *live, ulong live_off,
                   __global const uchar *token_mask, ulong token_mask_off, __global uint *stats,
                   ulong stats_off, uint tokens, uint experts, uint columns, int top_k) {
    __local uint tmp[GROUP];
    __local float float_tmp[GROUP];
    load += load_off;
    kept += kept_off;
    live += live_off;
    token_mask += token_mask_off;
    stats += stats_off;

    uint pairs = 0, places = 0, expert_pairs = 0, idle = 0, largest = 0, smallest = 0;
    for (uint e = get_local_id(0); e < columns; e += GROUP) {
        __global uint *column = stats + HEADER_WORDS + e;
        column[0] = load[e];
        column[columns] = kept[e];
        column[2 * columns] = load[e] - kept[e];
        pairs += load[e];
        places += kept[e];
        if (e < experts) {
            expert_pairs += load[e];
            idle += load[e] == 0;
            largest = max(largest, load[e]);
            smallest = max(smallest, ~load[e]);
        }
    }
    uint real = 0, nonfinite = 0;
    for (uint t = get_local_id(0); t < tokens; t += GROUP) {
        bool masked = token_mask && !token_mask[t];
        real += !masked;
        nonfinite += !masked && live && live[t] < top_k;
    }
    pairs = group_total(pairs, tmp);
    places = group_total(places, tmp);
    expert_pairs = group_total(expert_pairs, tmp);
    idle = group_total(idle, tmp);
    real = group_total(real, tmp);
    nonfinite = group_total(nonfinite, tmp);
    largest = group_largest(largest, tmp);
    smallest = ~group_largest(smallest, tmp);
    float entropy = group_sum(expert_pairs ? lane_entropy(load, experts, expert_pairs) : 0.0f,
                              float_tmp);
    if (get_local_id(0) != 0)
        return;

    /* In integers, so that a balanced batch gives 0 on every device: largest / mean - 1. */
    ulong over = (ulong)largest * experts - expert_pairs;
    stats[0] = real;
    stats[1] = columns;
    stats[2] = pairs;
    stats[3] = places;
    stats[4] = pairs - places;
    stats[5] = pairs - expert_pairs;
    stats[6] = nonfinite;
    stats[7] = idle;
    stats[8] = largest;
    stats[9] = smallest;
    stats[10] = as_uint(expert_pairs ? (float)over / (float)expert_pairs : 0.0f);
    stats[11] = as_uint(entropy);
    for (int word = 12; word < HEADER_WORDS; word++)
        stats[word] = 0;
}
