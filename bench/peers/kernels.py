"""The peers' kernels in Triton: GEMMs of rows grouped by expert, and what lies between them.

A batch has S = T K pairs of a token and an expert. Sorted by expert, they are the slots; expert e
has those from ends[e - 1] to ends[e] - 1. A GEMM cuts each expert's slots into blocks of BLOCK_M,
the last of them padded, so that no tile has rows of two experts.
"""

import triton
import triton.language as tl


@triton.jit
def list_blocks(ends, owners, slots, experts, S, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Block b is of expert owners[b], or -1 behind the last; slots[b, BLOCK_M], S where none is."""
    block = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    end = tl.load(ends + e, mask=e < experts, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    until = tl.cumsum(blocks, 0)
    owner = tl.sum((until <= block).to(tl.int32), 0)
    mine = e == owner
    first = tl.sum(tl.where(mine, begin + (block - until + blocks) * BLOCK_M, 0), 0)
    after = tl.sum(tl.where(mine, end, 0), 0)  # 0 where there is no owner: no slot is less
    tl.store(owners + block, tl.where(owner < experts, owner, -1))
    r = tl.arange(0, BLOCK_M)
    tl.store(slots + block * BLOCK_M + r, tl.where(first + r < after, first + r, S))


@triton.jit
def tile_of(program, rows, columns, together):
    """Row and column of a tile: so many rows are walked together, for L2 to hold what they read."""
    group = together * columns
    first = program // group * together
    height = tl.minimum(rows - first, together)
    within = program % group
    return first + within % height, within // height


@triton.jit(do_not_specialize=["together"])
def grouped_gemm(
    a, b, c, a_rows, c_rows, owners, slots, blocks, S, N, K, b_expert, b_n, b_k, together,
    GATED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """c[c_rows[s], n] = sum over k of a[a_rows[s], k] b[expert of s, n, k], for each slot s.

    Of b, b_expert, b_n and b_k are the strides. GATED: b has 2 N rows, those of the gate first, and
    c is silu(gate) times the other product.
    """
    block, column = tile_of(tl.program_id(0), blocks, tl.cdiv(N, BLOCK_N), together)
    expert = tl.load(owners + block)
    if expert < 0:
        return
    slot = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    live = slot < S
    row = tl.load(a_rows + slot, mask=live, other=0).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + row[:, None] * K + k[None, :]
    b_tile = b + expert.to(tl.int64) * b_expert + (n % N)[None, :] * b_n + k[:, None] * b_k
    sum_ = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(a_tile)
            y = tl.load(b_tile)
        else:
            left = k < K - step * BLOCK_K
            x = tl.load(a_tile, mask=left[None, :], other=0.0)
            y = tl.load(b_tile, mask=left[:, None], other=0.0)
        sum_ = tl.dot(x, y, sum_)
        if GATED:
            if EVEN_K:
                z = tl.load(b_tile + N * b_n)
            else:
                z = tl.load(b_tile + N * b_n, mask=left[:, None], other=0.0)
            up = tl.dot(x, z, up)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * b_k
    if GATED:
        sum_ = sum_ * tl.sigmoid(sum_) * up
    to = tl.load(c_rows + slot, mask=live, other=0).to(tl.int64)
    tl.store(
        c + to[:, None] * N + n[None, :],
        sum_.to(c.dtype.element_ty),
        mask=live[:, None] & (n < N)[None, :],
    )


@triton.jit(do_not_specialize=["together"])
def grouped_outer(
    a, b, c, ends, M, N, together,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """c[e, m, n] = sum over the slots s of expert e of a[s, m] b[s, n]."""
    expert = tl.program_id(1)
    i, j = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), together)
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    s = begin + tl.arange(0, BLOCK_K)
    a_tile = a + s.to(tl.int64)[None, :] * M + (m % M)[:, None]
    b_tile = b + s.to(tl.int64)[:, None] * N + (n % N)[None, :]
    sum_ = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        live = tl.arange(0, BLOCK_K) < end - first
        x = tl.load(a_tile, mask=live[None, :], other=0.0)
        y = tl.load(b_tile, mask=live[:, None], other=0.0)
        sum_ = tl.dot(x, y, sum_)
        a_tile += BLOCK_K * M
        b_tile += BLOCK_K * N
    tl.store(
        c + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :],
        sum_.to(c.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@triton.jit
def swiglu(z, h, H, BLOCK: tl.constexpr):
    """h[s, i] = silu(z[s, i]) z[s, H + i]."""
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(z + s * 2 * H + i, mask=i < H).to(tl.float32)
    up = tl.load(z + s * 2 * H + H + i, mask=i < H).to(tl.float32)
    tl.store(h + s * H + i, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=i < H)


@triton.jit
def swiglu_backward(z, dh, dz, H, BLOCK: tl.constexpr):
    """dz of swiglu()'s z, from dh."""
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < H
    gate = tl.load(z + s * 2 * H + i, mask=live).to(tl.float32)
    up = tl.load(z + s * 2 * H + H + i, mask=live).to(tl.float32)
    d = tl.load(dh + s * H + i, mask=live).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = d * up * share * (1 + gate * (1 - share))
    tl.store(dz + s * 2 * H + i, dgate.to(dz.dtype.element_ty), mask=live)
    tl.store(dz + s * 2 * H + H + i, (d * gate * share).to(dz.dtype.element_ty), mask=live)


@triton.jit
def group_rows(
    x, to, pairs, weights, D,
    TOP_K: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):
    """to[s] = x[token of slot s], times the weight of its pair if SCALED."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(pairs + s)
    value = tl.load(x + (pair // TOP_K).to(tl.int64) * D + d, mask=d < D)
    if SCALED:
        value = value.to(tl.float32) * tl.load(weights + pair)
    tl.store(to + s * D + d, value.to(to.dtype.element_ty), mask=d < D)


@triton.jit
def combine(
    rows, weights, more, y, D,
    TOP_K: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):
    """y[t] = sum over k of rows[t, k], times weights[t, k] if SCALED, else plus more[t]."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_ = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        value = tl.load(rows + (t * TOP_K + k) * D + d, mask=d < D).to(tl.float32)
        if SCALED:
            value *= tl.load(weights + t * TOP_K + k)
        sum_ += value
    if not SCALED:
        sum_ += tl.load(more + t * D + d, mask=d < D)
    tl.store(y + t * D + d, sum_.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def weight_gradients(rows, dy, dweights, D, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """dweights[p] = the product of rows[p] and dy[token of pair p]."""
    p = tl.program_id(0).to(tl.int64)
    sum_ = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        a = tl.load(rows + p * D + d, mask=d < D, other=0.0).to(tl.float32)
        b = tl.load(dy + p // TOP_K * D + d, mask=d < D, other=0.0).to(tl.float32)
        sum_ += a * b
    tl.store(dweights + p, tl.sum(sum_, 0))
