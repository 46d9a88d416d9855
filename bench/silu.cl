/*
 * Purpose: The activation between the two GEMMs of peer:clblast.
 * Formula: hidden[i] = silu(gate[i]) * up[i]
 * Arrays: gate_up [rows, 2 * columns] f32, gate first -> hidden [rows, columns] f32
 * NDRange: any number of groups of GROUP work-items, which stride over the elements
 * Limits: none
 * Repeatability: elementwise
 */
__kernel __attribute__((reqd_work_group_size(GROUP, 1, 1))) void
silu_rows(__global const float *gate_up, __global float *hidden, ulong rows, ulong columns) {
    for (ulong i = get_global_id(0); i < rows * columns; i += get_global_size(0)) {
        const ulong at = i / columns * 2 * columns + i % columns;
        hidden[i] = gate_up[at] / (1.0f + exp(-gate_up[at])) * gate_up[at + columns];
    }
}
