"""The table: every engine of clmoe next to its peer."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

HEAD = """\
| case | T | E | step | peer | ms | rounds | clmoe | ms | rounds | peer / clmoe |
|---|--:|--:|---|---|--:|--:|---|--:|--:|--:|"""


@dataclass
class Times:
    """The median of each round, in ms; the peer's `name`, or an engine's."""

    name: str
    medians: list[float] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.medians)

    def cells(self) -> str:
        return f"{self.median():.3f} | {min(self.medians):.3f} .. {max(self.medians):.3f}"


@dataclass
class Step:
    """A step of a case: the peer's times, and those of clmoe's engines."""

    case: str
    tokens: int
    experts: int
    step: str
    peer: Times
    engines: dict[str, Times] = field(default_factory=dict)
    row: dict = field(default_factory=dict)  # the last one added

    def add(self, rows: list[dict]) -> None:
        """What clmoe-bench has of this step."""
        for row in rows:
            if row["step"] == self.step:
                times = self.engines.setdefault(row["engine"], Times(row["engine"]))
                times.medians.append(row["median_ms"])
                self.row = row


def lines_of(step: Step) -> list[str]:
    head = f"| {step.case} | {step.tokens} | {step.experts} | {step.step} "
    head += f"| {step.peer.name} | {step.peer.cells()} "
    return [
        f"{head}| {times.name} | {times.cells()} | {step.peer.median() / times.median():.2f} |"
        for times in step.engines.values()
    ]


def table(steps: list[Step]) -> str:
    return "\n".join([HEAD] + [line for step in steps for line in lines_of(step)])
