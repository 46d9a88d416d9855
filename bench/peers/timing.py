"""Times a step on the device as clmoe-bench does, and picks the fastest of several tiles."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import triton

MIB = 1 << 20
DELAY_CYCLES = 400_000  # about 0.2 ms
TUNING_SAMPLES = 5
REST_S = 0.05  # a card at its power limit is slower after a burst


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a GEMM is compiled for; gated: gate, up and SwiGLU are one kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    together: int = 8
    gated: bool = False

    def __str__(self) -> str:
        text = f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"
        return f"{text}, {self.together} rows together{', gated' if self.gated else ''}"


class Timer:
    """Caches are filled with other data; a short kernel covers the time that launching takes."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        size = min(max(4 * cache, 64 * MIB), 512 * MIB)
        self.other = torch.empty(size, dtype=torch.uint8, device="cuda")

    def sample(self, run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.fill_(1)
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def samples(self, run: Callable[[], None], count: int) -> list[float]:
        """The first run warms up."""
        return [self.sample(run) for _ in range(count + 1)][1:]


class Tuner:
    """Chosen tiles by name, kept so that nothing is tuned twice."""

    def __init__(self, timer: Timer, known: dict[str, dict]) -> None:
        self.timer = timer
        self.tiles = {name: Tile(**fields) for name, fields in known.items()}

    def chosen(self) -> dict[str, dict]:
        return {name: dataclasses.asdict(tile) for name, tile in self.tiles.items()}

    def choose(self, name: str, tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
        """First among the tiles, then among the orders in which the best one is walked."""
        if name not in self.tiles:
            best = self.fastest(tiles, run)
            orders = [dataclasses.replace(best, together=rows) for rows in (2, 8, 32)]
            self.tiles[name] = self.fastest(orders, run)
        return self.tiles[name]

    def fastest(self, tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
        return min(tiles, key=lambda tile: self.time(tile, run))

    def time(self, tile: Tile, run: Callable[[Tile], None]) -> float:
        time.sleep(REST_S)
        try:
            return statistics.median(self.timer.samples(lambda: run(tile), TUNING_SAMPLES))
        except triton.runtime.errors.OutOfResources:
            return float("inf")


class Captured:
    """A step as a graph: Python's launches are not what is compared."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.step = run  # keeps what the graph reads and writes
        self.graph = torch.cuda.CUDAGraph()
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            run()

    def __call__(self) -> None:
        self.graph.replay()
