/*
 * Purpose: how well the next byte is foretold, and the gradient on the head's logits.
 * Formula: with y the byte behind the token and p = softmax(l): loss = log sum exp(l) - l_y;
 *          dl_b = (p_b - [b = y]) / T.
 * Arrays: text [bytes] u8, positions [T] u32, logits [T,256] f32, replaced by dl where `backward` is
 *         1; losses [T] f32.
 * NDRange: a group of GROUP work-items per token.
 * Limits: a byte follows each position. GROUP <= 16.
 * Repeatability: sums in the order of the chunks and group_reduce().
 */
enum { CHUNKS = 256 / 16 };

__kernel __attribute__((reqd_work_group_size(GROUP, 1, 1)))
void cross_entropy(__global const uchar *text, __global const uint *positions,
                   __global float *logits, __global float *losses, uint backward) {
    GROUP_TMP;
    const size_t token = get_group_id(0);
    const uint target = text[positions[token] + 1];
    __global float *l = logits + token * 256;
    float16 most = -INFINITY, sums = 0.0f;
    const float wanted = l[target];
    for (uint c = get_local_id(0); c < CHUNKS; c += GROUP)
        most = fmax(most, vload16(c, l));
    const float top = group_reduce(max16(most), 1, tmp);
    for (uint c = get_local_id(0); c < CHUNKS; c += GROUP)
        sums += exp(vload16(c, l) - top);
    const float sum = group_reduce(sum16(sums), 0, tmp);
    const float scale = 1.0f / (sum * (float)get_num_groups(0));
    if (get_local_id(0) == 0)
        losses[token] = log(sum) + top - wanted;
    for (uint c = get_local_id(0); backward && c < CHUNKS; c += GROUP)
        vstore16(exp(vload16(c, l) - top) * scale, c, l);
    if (backward && target / 16 % GROUP == get_local_id(0))
        l[target] -= 1.0f / (float)get_num_groups(0);
}
