"""Two peers on one layer: a fused MoE's experts step, and forward and backward in ScatterMoE's way.

Shapes: T tokens of D, K of E experts of H each, S = T K pairs, sorted by expert into slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import kernels
import torch
import triton
from clmoe import Case
from timing import Tile, Tuner
from torch import Tensor

BLOCK = 1024  # of kernels without a GEMM
ROW_TILES = [
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 4),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 4, 4),
    Tile(64, 256, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(16, 128, 128, 4, 4),
]
GATED_TILES = [
    Tile(128, 128, 64, 8, 3, gated=True),
    Tile(128, 128, 64, 8, 4, gated=True),
    Tile(64, 128, 64, 4, 4, gated=True),
    Tile(16, 128, 128, 4, 3, gated=True),
]
SCATTERMOE_TILE = Tile(128, 128, 32, 4, 4, together=1)  # all of its GEMMs have this one
OUTER_TILES = [
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 4, 4),
]


def values(shape: tuple[int, ...], deviation: float, dtype: torch.dtype, device: str) -> Tensor:
    """Uniform values as clmoe-bench has them, which the type represents exactly."""
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    scale = 2.0 ** (round(math.log2(deviation * math.sqrt(3))) - (bits - 1))
    whole = torch.empty(shape, dtype=dtype, device=device)
    return whole.random_(-(1 << (bits - 1)), 1 << (bits - 1)).mul_(scale)


class Inputs:
    """x, dy [T,D]; router [E,D] in f32; gate_up [E,2H,D], the gate's rows first; down [E,D,H]."""

    def __init__(
        self, case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
    ) -> None:
        of, d, h = case, case.dim**-0.5, case.hidden_dim**-0.5
        self.case = case
        self.x = values((of.tokens, of.dim), 1, dtype, device)
        self.dy = values((of.tokens, of.dim), 1, dtype, device)
        self.router = values((of.experts, of.dim), d, torch.float32, device)
        self.gate_up = values((of.experts, 2 * of.hidden_dim, of.dim), d, dtype, device)
        self.down = values((of.experts, of.dim, of.hidden_dim), h, dtype, device)

    def rows(self, count: int, width: int) -> Tensor:
        """Poisoned, so that what nothing wrote is seen."""
        return self.x.new_full((count, width), float("nan"))

    def most_rows(self) -> int:
        """Of a block: more would be padding."""
        return max(16, 2 * self.case.tokens * self.case.top_k // self.case.experts)


@dataclass
class Routing:
    """The choice: probabilities [T,E]; ids [T,K]; weights [T,K], which were divided by total."""

    probabilities: Tensor
    ids: Tensor
    weights: Tensor
    total: Tensor


def route(x: Tensor, router: Tensor, top_k: int) -> Routing:
    probabilities = torch.softmax(x @ router.T, dim=1)
    chosen, ids = torch.topk(probabilities, top_k, dim=1)
    total = chosen.sum(dim=1, keepdim=True)
    return Routing(probabilities, ids, chosen / total, total)


class Plan:
    """Pairs sorted by expert: the pair and the token of a slot, slots themselves, and ends [E]."""

    def __init__(self, ids: Tensor, experts: int) -> None:
        order, pairs = ids.flatten().int().sort(stable=True)
        every = torch.arange(experts, dtype=torch.int32, device=ids.device)
        self.pairs = pairs.int()
        self.tokens = self.pairs // ids.shape[1]
        self.slots = torch.arange(len(pairs), dtype=torch.int32, device=ids.device)
        self.ends = torch.searchsorted(order, every, right=True, out_int32=True)
        self.lists: dict[int, tuple[Tensor, Tensor]] = {}

    def blocks(self, rows: int) -> tuple[Tensor, Tensor]:
        """Owners [B] and slots [B,rows] of blocks of so many rows; there may be more than owned."""
        if rows not in self.lists:
            slots, experts = len(self.slots), len(self.ends)
            owners = self.ends.new_empty(min(slots, slots // rows + experts))
            padded = self.ends.new_empty((len(owners), rows))
            width = triton.next_power_of_2(experts)
            kernels.list_blocks[(len(owners),)](
                self.ends, owners, padded, experts, slots, BLOCK_M=rows, WIDTH=width
            )
            self.lists[rows] = (owners, padded)
        return self.lists[rows]


def gemm(
    plan: Plan, tile: Tile, a: Tensor, a_rows: Tensor, b: Tensor, c: Tensor, c_rows: Tensor
) -> None:
    """c[c_rows[s]] = b[expert of slot s] a[a_rows[s]]; b [E,N,K] may be a transposed view."""
    owners, padded = plan.blocks(tile.m)
    width, depth = c.shape[1], a.shape[1]
    kernels.grouped_gemm[(len(owners) * triton.cdiv(width, tile.n),)](
        a, b, c, a_rows, c_rows, owners, padded, len(owners), len(plan.slots), width, depth,
        b.stride(0), b.stride(1), b.stride(2), tile.together,
        GATED=tile.gated, EVEN_K=depth % tile.k == 0,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )


def outer(plan: Plan, tile: Tile, a: Tensor, b: Tensor, c: Tensor) -> None:
    """c[e] = the sum of a[s] b[s]^T over the slots of expert e."""
    experts, height, width = c.shape
    tiles = triton.cdiv(height, tile.m) * triton.cdiv(width, tile.n)
    kernels.grouped_outer[(tiles, experts)](
        a, b, c, plan.ends, height, width, tile.together,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )


def by_rows(rows: Tensor, width: int) -> tuple[int, int]:
    """The grid of a kernel that takes BLOCK elements of a row."""
    return len(rows), triton.cdiv(width, BLOCK)


class Experts:
    """x to y [S,D], sorted by expert; who goes where is known before, as for clmoe-bench's step."""

    def __init__(self, inputs: Inputs, tuner: Tuner) -> None:
        of, self.inputs = inputs.case, inputs
        self.plan = Plan(route(inputs.x.float(), inputs.router, of.top_k).ids, of.experts)
        slots = of.tokens * of.top_k
        self.z = inputs.rows(slots, 2 * of.hidden_dim)
        self.h = inputs.rows(slots, of.hidden_dim)
        self.y = inputs.rows(slots, of.dim)
        plain = [tile for tile in ROW_TILES if tile.m <= inputs.most_rows()]
        gated = [tile for tile in GATED_TILES if tile.m <= inputs.most_rows()]
        self.tiles = {
            "up": tuner.choose(f"{of}, experts, up", plain + gated, self.run_up),
            "down": tuner.choose(f"{of}, experts, down", plain, self.run_down),
        }
        self.variants = {"triton fused moe": self.tiles}

    def run_up(self, tile: Tile) -> None:
        weights = self.inputs.gate_up
        to = self.h if tile.gated else self.z
        gemm(self.plan, tile, self.inputs.x, self.plan.tokens, weights, to, self.plan.slots)
        if not tile.gated:
            hidden = self.inputs.case.hidden_dim
            kernels.swiglu[by_rows(self.z, hidden)](self.z, self.h, hidden, BLOCK=BLOCK)

    def run_down(self, tile: Tile) -> None:
        slots = self.plan.slots
        gemm(self.plan, tile, self.h, slots, self.inputs.down, self.y, slots)

    def run(self) -> None:
        self.run_up(self.tiles["up"])
        self.run_down(self.tiles["down"])


class Training:
    """x and dy to y, dx and the gradients of all weights, in ScatterMoE's way.

    GEMMs scatter what they write or gather what they read; the backward pass first groups copies
    of x and of dy times the pairs' weights, then multiplies them. With tuned tiles, and with those
    that ScatterMoE has.
    """

    def __init__(self, inputs: Inputs, tuner: Tuner) -> None:
        of, self.inputs = inputs.case, inputs
        self.make_buffers()
        block = 128 if inputs.most_rows() >= 256 else 64
        rows = [tile for tile in ROW_TILES if tile.m == block]
        gemms = {
            "up": (rows, self.run_up),
            "down": (rows, self.run_down),
            "dh": (rows, self.run_dh),
            "dx": (rows, self.run_dx),
            "ddown": (OUTER_TILES, self.run_ddown),
            "dgate_up": (OUTER_TILES, self.run_dgate_up),
        }
        self.tiles = dict.fromkeys(gemms, SCATTERMOE_TILE)
        self.run()  # for tuning: products of nothing are faster
        tuned = {
            name: tuner.choose(f"{of}, train, {name}", tiles, run)
            for name, (tiles, run) in gemms.items()
        }
        self.variants = {"triton scattermoe": tuned, "scattermoe's tiles": self.tiles}

    def make_buffers(self) -> None:
        inputs, of = self.inputs, self.inputs.case
        pairs, dim, hidden = of.tokens * of.top_k, of.dim, of.hidden_dim
        self.z, self.dz = inputs.rows(pairs, 2 * hidden), inputs.rows(pairs, 2 * hidden)
        self.h, self.dh = inputs.rows(pairs, hidden), inputs.rows(pairs, hidden)
        self.y_pairs, self.dx_pairs = inputs.rows(pairs, dim), inputs.rows(pairs, dim)
        self.x_slots, self.dy_slots = inputs.rows(pairs, dim), inputs.rows(pairs, dim)
        self.y, self.dx = inputs.rows(of.tokens, dim), inputs.rows(of.tokens, dim)
        self.dweights = torch.empty_like(self.y_pairs[:, 0], dtype=torch.float32)
        self.dgate_up = torch.full_like(inputs.gate_up, float("nan"))
        self.ddown = torch.full_like(inputs.down, float("nan"))
        self.drouter = torch.empty_like(inputs.router)

    def run(self) -> None:
        self.route()
        self.forward()
        self.backward()

    def route(self) -> None:
        self.x = self.inputs.x.float()
        self.routing = route(self.x, self.inputs.router, self.inputs.case.top_k)
        self.plan = Plan(self.routing.ids, self.inputs.case.experts)

    def forward(self) -> None:
        of = self.inputs.case
        self.run_up(self.tiles["up"])
        kernels.swiglu[by_rows(self.z, of.hidden_dim)](self.z, self.h, of.hidden_dim, BLOCK=BLOCK)
        self.run_down(self.tiles["down"])
        kernels.combine[by_rows(self.y, of.dim)](
            self.y_pairs, self.routing.weights, None, self.y, of.dim,
            TOP_K=of.top_k, SCALED=True, BLOCK=BLOCK,
        )

    def backward(self) -> None:
        of = self.inputs.case
        kernels.weight_gradients[(len(self.y_pairs),)](
            self.y_pairs, self.inputs.dy, self.dweights, of.dim, TOP_K=of.top_k, BLOCK=BLOCK
        )
        self.group(self.inputs.dy, self.dy_slots, scaled=True)
        self.run_ddown(self.tiles["ddown"])
        self.run_dh(self.tiles["dh"])
        kernels.swiglu_backward[by_rows(self.z, of.hidden_dim)](
            self.z, self.dh, self.dz, of.hidden_dim, BLOCK=BLOCK
        )
        self.group(self.inputs.x, self.x_slots, scaled=False)
        self.run_dgate_up(self.tiles["dgate_up"])
        self.run_dx(self.tiles["dx"])
        dlogits = self.dlogits()
        torch.mm(dlogits.T, self.x, out=self.drouter)
        kernels.combine[by_rows(self.dx, of.dim)](
            self.dx_pairs, None, dlogits @ self.inputs.router, self.dx, of.dim,
            TOP_K=of.top_k, SCALED=False, BLOCK=BLOCK,
        )

    def group(self, rows: Tensor, to: Tensor, scaled: bool) -> None:
        of = self.inputs.case
        kernels.group_rows[by_rows(to, of.dim)](
            rows, to, self.plan.pairs, self.routing.weights, of.dim,
            TOP_K=of.top_k, SCALED=scaled, BLOCK=BLOCK,
        )

    def dlogits(self) -> Tensor:
        """Of a softmax, and of weights divided by their sum."""
        r = self.routing
        dweights = self.dweights.view_as(r.weights)
        dchosen = (dweights - (dweights * r.weights).sum(dim=1, keepdim=True)) / r.total
        d = torch.zeros_like(r.probabilities).scatter_(1, r.ids, dchosen)
        return r.probabilities * (d - (d * r.probabilities).sum(dim=1, keepdim=True))

    def run_up(self, tile: Tile) -> None:
        plan, inputs = self.plan, self.inputs
        gemm(plan, tile, inputs.x, plan.tokens, inputs.gate_up, self.z, plan.slots)

    def run_down(self, tile: Tile) -> None:
        plan = self.plan
        gemm(plan, tile, self.h, plan.slots, self.inputs.down, self.y_pairs, plan.pairs)

    def run_dh(self, tile: Tile) -> None:
        plan, weights = self.plan, self.inputs.down.transpose(1, 2)
        gemm(plan, tile, self.dy_slots, plan.slots, weights, self.dh, plan.slots)

    def run_dx(self, tile: Tile) -> None:
        plan, weights = self.plan, self.inputs.gate_up.transpose(1, 2)
        gemm(plan, tile, self.dz, plan.slots, weights, self.dx_pairs, plan.pairs)

    def run_ddown(self, tile: Tile) -> None:
        outer(self.plan, tile, self.dy_slots, self.h, self.ddown)

    def run_dgate_up(self, tile: Tile) -> None:
        outer(self.plan, tile, self.dz, self.x_slots, self.dgate_up)
