/*
 * Regions of scratch that are not alive together share memory. In the order of time, the large ones
 * of a layer whose engine gathers:
 *
 *              forward                                      | backward
 *   step       route place disp. first second shared com me | prep. experts comb. shared route
 * disp. weights HIDDEN                       ############               | YE #################### |
 *   SHARED_Y                                  ############# |
 *   SUMS ...                                             ## |
 *   DH, DZ                                                  | #####################################
 *   DXE                                                     |       ###############################
 *   SHARED_DZ                                               | ######################## ROUTER_DX |
 * ########## GRADIENT                                                | #######
 *
 * Forward's regions are free when backward begins, but for those that single steps of both make.
 */
#include "lifetimes.h"

typedef enum moment {
    AT_ROUTE,
    AT_PLACE,
    AT_DISPATCH,
    AT_FIRST, /* gate and up */
    AT_SECOND,
    AT_SHARED,
    AT_COMBINE,
    AT_MEASURE,
    BACK_PREPARE,
    BACK_EXPERTS,
    BACK_COMBINE,
    BACK_SHARED,
    BACK_ROUTE,
    BACK_DISPATCH,
    BACK_WEIGHTS,
    BETWEEN_BATCHES,
} moment;

/* From the first write to the last read, both included. */
typedef struct lifetime {
    region_id id;
    moment first, last;
} lifetime;

#define ALWAYS AT_ROUTE, BACK_WEIGHTS

/* In the order in which they are placed: the long-lived below the others. */
static const lifetime lifetimes[] = {
    /* What forward leaves in `saved`, or single steps of either pass make in scratch. */
    {REGION_LOGITS, ALWAYS},
    {REGION_NOISY, ALWAYS},
    {REGION_NOISE_RAW, ALWAYS},
    {REGION_GROUP_LOGITS, ALWAYS},
    {REGION_DROPOUT, ALWAYS},
    {REGION_JITTERED, ALWAYS},
    {REGION_TOPS, ALWAYS},
    {REGION_REBALANCE, ALWAYS},
    {REGION_SOFT_MOE_X, ALWAYS},
    {REGION_TOKEN_NORMS, ALWAYS},
    {REGION_SLOT_NORMS, ALWAYS},
    {REGION_SOFT_MOE_PARTIALS, ALWAYS},
    {REGION_SOFT_MOE_COLUMNS, ALWAYS},
    {REGION_SOFT_MOE_DISPATCH, ALWAYS},
    {REGION_SOFT_MOE_COMBINE, ALWAYS},
    {REGION_ENGINE, AT_FIRST, BACK_SHARED},
    /* Forward. */
    {REGION_SCORES, AT_ROUTE, AT_MEASURE},
    {REGION_IDS, AT_ROUTE, AT_MEASURE},
    {REGION_WEIGHTS, AT_ROUTE, AT_MEASURE},
    {REGION_LIVE, AT_ROUTE, AT_MEASURE},
    {REGION_TOKEN_OFFSETS, AT_ROUTE, AT_MEASURE},
    {REGION_PLAN, AT_PLACE, AT_MEASURE},
    {REGION_CHOICE_THRESHOLDS, AT_ROUTE, AT_ROUTE},
    {REGION_CHOICE_KEYS, AT_ROUTE, AT_ROUTE},
    {REGION_ROUNDING_IDS, AT_ROUTE, AT_ROUTE},
    {REGION_ROUNDING_WEIGHTS, AT_ROUTE, AT_ROUTE},
    {REGION_ROUNDING_CHOSEN, AT_ROUTE, AT_ROUTE},
    {REGION_SINKHORN_CHOICES, AT_ROUTE, AT_ROUTE},
    {REGION_SINKHORN_D1, AT_ROUTE, AT_ROUTE},
    {REGION_SINKHORN_PARTIALS, AT_ROUTE, AT_ROUTE},
    {REGION_HISTOGRAM, AT_PLACE, AT_PLACE},
    {REGION_SEQUENCES, AT_PLACE, AT_PLACE},
    {REGION_SORT_KEYS, AT_PLACE, AT_PLACE},
    {REGION_SORT_KEYS_2, AT_PLACE, AT_PLACE},
    {REGION_SORT_ORDER, AT_PLACE, AT_PLACE},
    {REGION_SORT_ORDER_2, AT_PLACE, AT_PLACE},
    {REGION_REROUTE, AT_PLACE, AT_PLACE},
    {REGION_REROUTE_COUNT, AT_PLACE, AT_PLACE},
    {REGION_YE, AT_SECOND, AT_COMBINE},
    {REGION_XE, AT_DISPATCH, AT_FIRST},
    {REGION_HIDDEN, AT_FIRST, AT_SECOND},
    {REGION_MIXED, AT_SECOND, AT_COMBINE},
    {REGION_SHARED_Y, AT_SHARED, AT_COMBINE},
    {REGION_SHARED_GATE, AT_SHARED, AT_COMBINE},
    {REGION_SHARED_HIDDEN, AT_SHARED, AT_SHARED},
    {REGION_SUMS_ROWS, AT_MEASURE, AT_MEASURE},
    {REGION_SUMS_PARTIAL, AT_MEASURE, AT_MEASURE},
    {REGION_SUMS, AT_MEASURE, AT_MEASURE},
    {REGION_LOSS_GRADS, AT_MEASURE, AT_MEASURE},
    {REGION_LOSS_VALUES, AT_MEASURE, AT_MEASURE},
    {REGION_LOSS_PARTS, AT_MEASURE, AT_MEASURE},
    {REGION_JOINT, AT_MEASURE, AT_MEASURE},
    {REGION_JOINT_GRADIENT, AT_MEASURE, AT_MEASURE},
    /* Backward. What the gradients of the weights read lives to the end. */
    {REGION_UNMASKED, BACK_PREPARE, BACK_WEIGHTS},
    {REGION_DH, BACK_EXPERTS, BACK_WEIGHTS},
    {REGION_DZ, BACK_EXPERTS, BACK_WEIGHTS},
    {REGION_X_ROWS, BACK_EXPERTS, BACK_WEIGHTS},
    {REGION_DY_ROWS, BACK_EXPERTS, BACK_WEIGHTS},
    {REGION_DDISPATCH, BACK_ROUTE, BACK_WEIGHTS},
    {REGION_SOFT_MOE_SUMS, BACK_ROUTE, BACK_WEIGHTS},
    {REGION_SHARED_DH, BACK_SHARED, BACK_WEIGHTS},
    {REGION_SHARED_DZ, BACK_SHARED, BACK_WEIGHTS},
    {REGION_DGATE, BACK_SHARED, BACK_WEIGHTS},
    {REGION_DLOGITS, BACK_ROUTE, BACK_WEIGHTS},
    {REGION_DNOISE, BACK_ROUTE, BACK_WEIGHTS},
    {REGION_DGROUP_LOGITS, BACK_ROUTE, BACK_WEIGHTS},
    {REGION_DSCALE, BACK_ROUTE, BACK_WEIGHTS},
    {REGION_DXE, BACK_EXPERTS, BACK_DISPATCH},
    {REGION_DCOMBINE, BACK_EXPERTS, BACK_ROUTE},
    {REGION_SOFT_MOE_DY, BACK_EXPERTS, BACK_EXPERTS},
    {REGION_SOFT_MOE_ALONG, BACK_ROUTE, BACK_ROUTE},
    {REGION_SHARED_DX, BACK_SHARED, BACK_DISPATCH},
    {REGION_ROUTER_DX, BACK_ROUTE, BACK_DISPATCH},
    {REGION_DPAIR_WEIGHTS, BACK_COMBINE, BACK_ROUTE},
    {REGION_DOTS, BACK_EXPERTS, BACK_COMBINE},
    {REGION_Z, BACK_EXPERTS, BACK_EXPERTS},
    {REGION_SHARED_Z, BACK_SHARED, BACK_SHARED},
    {REGION_SHARED_DOTS, BACK_SHARED, BACK_SHARED},
    {REGION_RAW_WEIGHTS, BACK_ROUTE, BACK_ROUTE},
    {REGION_DJOINT, BACK_ROUTE, BACK_ROUTE},
    {REGION_REBALANCE_BACK, BACK_ROUTE, BACK_ROUTE},
    {REGION_GRADIENT, BACK_WEIGHTS, BACK_WEIGHTS},
    /* Router orthogonality, when no batch is under way. */
    {REGION_ROUTER_NORMS, BETWEEN_BATCHES, BETWEEN_BATCHES},
    {REGION_ROUTER_UNITS, BETWEEN_BATCHES, BETWEEN_BATCHES},
    {REGION_COSINES, BETWEEN_BATCHES, BETWEEN_BATCHES},
    {REGION_COSINE_SQUARES, BETWEEN_BATCHES, BETWEEN_BATCHES},
    {REGION_COSINE_ROWS, BETWEEN_BATCHES, BETWEEN_BATCHES},
};

enum { LIFETIMES = sizeof lifetimes / sizeof lifetimes[0] };
_Static_assert((int)LIFETIMES == (int)REGION_COUNT, "a region without a lifetime");

/* A region that has its place. */
typedef struct placed {
    const lifetime *life;
    size_t end; /* of its bytes */
} placed;

static bool meet(const lifetime *a, const lifetime *b) {
    return a->first <= b->last && b->first <= a->last;
}

/* Behind all regions that are alive with it. */
static size_t lowest(const lifetime *life, const placed *others, size_t count) {
    size_t offset = 0;
    for (size_t i = 0; i < count; i++)
        if (meet(life, others[i].life) && others[i].end > offset)
            offset = others[i].end;
    return offset;
}

/*
 * Holes below an offset are left alone: filled, they would make a smaller region's neighbours lie
 * higher.
 */
bool lifetimes_place(workspace_layout *layout) {
    placed others[LIFETIMES];
    size_t count = 0;
    for (size_t i = 0; i < LIFETIMES; i++) {
        const lifetime *life = &lifetimes[i];
        const size_t bytes = layout->bytes[life->id];
        const bool saved = layout->saved[life->id];
        if (bytes == 0 || (saved && !(life->first == AT_ROUTE && life->last == BACK_WEIGHTS)))
            continue;
        const size_t offset = lowest(life, others, count);
        *(saved ? &layout->scratch_offset[life->id] : &layout->offset[life->id]) = offset;
        if (bytes > SIZE_MAX - REGION_ALIGNMENT ||
            !size_add(offset, (bytes + REGION_ALIGNMENT - 1) / REGION_ALIGNMENT * REGION_ALIGNMENT,
                      &others[count].end))
            return false;
        others[count].life = life;
        if (others[count].end > layout->scratch_bytes)
            layout->scratch_bytes = others[count].end;
        count++;
    }
    return true;
}
