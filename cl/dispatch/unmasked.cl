/*
 * Purpose: the tokens that are not masked, as the rows of a bucket: what the gradients of dense
 *          weights are summed over, whatever lies in the rows of padding.
 * Formula: list[0 .. count) are the tokens with token_mask not 0, ascending; offsets {0, T}, kept
 *          {count}.
 * Arrays: token_mask [T] u8 -> list [T] i32, offsets [2] u32, kept [1] u32.
 * NDRange: one group.
 * Limits: GROUP a power of two.
 * Repeatability: integers.
 */
KERNEL(GROUP, 1, 1)
void unmasked_tokens(IN(uchar, token_mask), OUT(int, list), OUT(uint, offsets), OUT(uint, kept),
                     uint tokens) {
    __local uint tmp[GROUP];
    const uint lane = get_local_id(0), each = divide_up(tokens, GROUP);
    const uint begin = min(lane * each, tokens), end = min(begin + each, tokens);
    uint mine = 0, all;
    for (uint t = begin; t < end; t++)
        mine += AT(token_mask)[t] != 0;
    uint place = group_scan(mine, &all, tmp);
    for (uint t = begin; t < end; t++)
        if (AT(token_mask)[t] != 0)
            AT(list)[place++] = (int)t;
    if (lane == 0) {
        AT(offsets)[0] = 0;
        AT(offsets)[1] = tokens;
        AT(kept)[0] = all;
    }
}
