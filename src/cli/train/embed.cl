/*
 * Purpose: a token is the last n bytes of a text; its row is the sum of what each byte means at its
 *          distance. And the gradient on these tables.
 * Formula: x_t = sum over j < n of table[j, text[position_t - j]];
 *          dtable[j, b] = sum over the t with text[position_t - j] = b of dx_t, in ascending t.
 * Arrays: text [bytes] u8, positions [T] u32, table and dtable [n,256,D] f32, x and dx [T,D];
 *         rows [n,T] u32: for each j the tokens by their byte; first [n * 256 + 1] u32: where those
 *         of each (j, b) begin in rows.
 * NDRange: embed: {D / 16, T}. embed_backward: {D / 16, n * 256}.
 * Limits: D is a multiple of 16; position_t >= n - 1.
 * Repeatability: one work-item per output, sums in the order above.
 */
__kernel void embed(__global const uchar *text, __global const uint *positions,
                    __global const float *table, __global stored *x, uint context) {
    const size_t chunk = get_global_id(0), chunks = get_global_size(0), token = get_global_id(1);
    __global const uchar *last = text + positions[token];
    float16 sum = 0.0f;
    for (uint j = 0; j < context; j++)
        sum += vload16((j * 256 + last[-(long)j]) * chunks + chunk, table);
    row_store(sum, token * chunks + chunk, x);
}

__kernel void embed_backward(__global const uint *rows, __global const uint *first,
                             __global const stored *dx, __global float *dtable) {
    const size_t chunk = get_global_id(0), chunks = get_global_size(0), entry = get_global_id(1);
    float16 sum = 0.0f;
    for (uint i = first[entry]; i < first[entry + 1]; i++)
        sum += row_load(rows[i] * chunks + chunk, dx);
    vstore16(sum, entry * chunks + chunk, dtable);
}
