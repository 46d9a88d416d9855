/*
 * Purpose: Grouped GEMM for CPUs: one work-item computes up to PANELS panels of COLUMNS columns of
 *          all rows of a tile, with sums in vector registers. No local memory, no barriers.
 * Formula: as ref.cl.
 * Arrays: as in gemm.clh. W is contiguous along k, w_col 1, or along n, w_row 1, or 2 where gate
 *          and up take turns. PACKED: `up` holds gate and up as cpu_pack.cl made them, and no
 *          strides are read.
 * NDRange: (ceil(n / (panels_at_once * COLUMNS)), ceil(slots / row_tile)), one work-item each:
 *          neighbours share rows of A, and each weight comes from memory once. Tiles from the last
 *          to the first: those without rows lie behind, and threads take fewer groups at a time
 *          towards the end.
 * Limits: row_tile <= MAX_ROWS; DEPTH is a multiple of WIDTH, and PANELS * WIDTH if not PACKED.
 * Repeatability: the order of a sum depends on k and DEPTH alone: the same for every row, tile and
 *          neighbour.
 *
 * WIDTH floats per vector: 4, 8 or 16.
 */
#include "experts/gemm/cpu_vectors.clh"

#define ACT_T VEC
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"

/*
 * The columns of a panel are summed as two vectors side by side: WIDTH columns of gate and of up,
 * or 2 * WIDTH of the one matrix: its two sides. Between their first columns of C lie SIDE_STEP.
 */
#define COLUMNS   (GATED ? WIDTH : 2 * WIDTH)
#define SIDE_STEP (GATED ? 0 : WIDTH)

/* The matrix of a side: gate and up, or up twice. */
static inline __global const STORAGE(W) *matrix_of(const problem *p, uint side) {
    return GATED && side == 0 ? p->gate : p->up;
}

/* Where `count` rows of C from `row` on will be stored. */
static inline void fetch_outputs(const problem *p, uint row, uint count, uint first) {
    const uint line = 64 / sizeof(STORAGE(C));
    for (uint end = row + count; row < end; ++row)
        for (uint column = 0; column < COLUMNS; column += line)
            FETCH_OUTPUT(p->c + (ulong)row * p->n + first + column);
}

#include "experts/gemm/cpu_panels.clh"

#if KEEP_Z
/* z of `count` columns, whose first is at `z`. */
static inline void store_z(const problem *p, VEC gate, VEC up, uint count, __global STORAGE(C) *z) {
    const uint step = p->z_at.step;
#if GATED
    if (step == 2 && z_up(&p->z_at) == 1 && count == WIDTH) {
        STOREN(C, WIDTH, TURNS_LOW(gate, up), z);
        STOREN(C, WIDTH, TURNS_HIGH(gate, up), z + WIDTH);
        return;
    }
    if (step == 1)
        store_vector(gate, count, z);
    else
        store_part(gate, count, step, z);
#endif
    if (step == 1)
        store_vector(up, count, z + z_up(&p->z_at));
    else
        store_part(up, count, step, z + z_up(&p->z_at));
}
#endif

/* The end of the columns [first, first + columns) of a row, WIDTH at a time. */
static inline void store_row(const problem *p, const VEC *sums, const float *gate_bias,
                             const float *up_bias, uint row, uint first, uint columns) {
    const float weight = row_weight_of(p, row);
    __global STORAGE(C) *const c = p->c + (ulong)row * p->n + first;
    for (uint column = 0; column < columns; column += WIDTH) {
        const uint count = min(columns - column, (uint)WIDTH);
        const VEC up = gemm_linear_output(p, sums[GATED || column > 0], VLOAD(up_bias + column),
                                          weight);
        VEC gate = 0.0f, y;
#if GATED
        gate = gemm_linear_output(p, sums[0], VLOAD(gate_bias + column), weight);
#endif
#if KEEP_Z
        if (p->z)
            store_z(p, gate, up, count, row_of_z(p, row) + (first + column) * p->z_at.step);
#endif
        y = gemm_activation(p, gate, up, weight);
        if (!GATED && p->accumulate)
            y += count == WIDTH ? LOADN(C, WIDTH, c + column) : LOAD_PART(C, c + column, count);
        store_vector(y, count, c + column);
    }
}

/* The rows of a tile in the panel that begins with column `first`. */
static inline void store_panel(const problem *p, const rows *tile, uint first, VEC (*sums)[2]) {
    const uint columns = min((uint)COLUMNS, p->n - first);
    float gate_biases[COLUMNS], up_biases[COLUMNS];
    for (uint column = 0; column < COLUMNS; ++column) {
        const uint from = first + min(column, columns - 1);
        gate_biases[column] = bias_at(p, p->gate_bias, tile->expert, from);
        up_biases[column] = bias_at(p, p->up_bias, tile->expert, from);
    }
    for (uint row = tile->first; row < tile->end; ++row)
        store_row(p, sums[row - tile->first], gate_biases, up_biases, row, first, columns);
}

KERNEL(1, 1, 1)
void gemm_cpu(GEMM_PARAMETERS) {
    const problem p = GEMM_PROBLEM;
    const uint index = (slots - 1) / row_tile - GROUP_INDEX(1, 1);
    const rows tile = rows_in_use(&p, index * row_tile, row_tile);
    if (tile.first >= tile.end)
        return;
    const uint most = panels_at_once(&p), first = GROUP_INDEX(0, 1) * most * COLUMNS;
    const uint panels = min(divide_up(n - first, COLUMNS), most);
    VEC sums[PANELS][MAX_ROWS][2];
    sum_tile(&p, &tile, first, panels, sums);
    for (uint panel = 0; panel < panels; ++panel)
        store_panel(&p, &tile, first + panel * COLUMNS, sums[panel]);
}
