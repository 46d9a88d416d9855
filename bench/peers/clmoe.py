"""clmoe-bench as a program: its cases, and what it measures."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass

CASE_LINE = re.compile(r"  (\S+) +T (\d+) +D (\d+) +H (\d+) +E (\d+) +K (\d+) +(.*)")


class BenchError(Exception):
    """What clmoe-bench said, or that it is not there."""


@dataclass(frozen=True)
class Case:
    """A layer and a batch."""

    name: str
    tokens: int
    dim: int
    hidden_dim: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.name}, {self.tokens} tokens"


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BenchError(f"cannot run {command[0]}: {error.strerror}") from error


def parse_cases(text: str) -> list[Case]:
    """Of the lines behind "Cases:" in what --help prints, those with experts."""
    lines = text.partition("\nCases:\n")[2].splitlines()
    found = [match for match in map(CASE_LINE.fullmatch, lines) if match]
    return [Case(m[1], *map(int, m.groups()[1:6])) for m in found if "routing only" not in m[7]]


def list_cases(bench: str) -> list[Case]:
    cases = parse_cases(call([bench, "--help"]).stdout)
    if not cases:
        raise BenchError(f"{bench} --help lists no cases")
    return cases


def choose_cases(cases: list[Case], names: str, tokens: int) -> list[Case]:
    chosen = []
    for name in names.split(","):
        found = [case for case in cases if case.name == name and case.tokens == tokens]
        if not found:
            raise BenchError(f"no case '{name}' of {tokens} tokens; see clmoe-bench --help")
        chosen += found
    return chosen


def parse_rows(text: str, case: Case) -> list[dict]:
    """The rows of the case; the others are the roofline's."""
    try:
        rows = [row for row in json.loads(text) if row["case"] == case.name]
        for row in rows:
            shape = Case(row["case"], *(row[key] for key in ("tokens", "dim", "hidden_dim")),
                         row["experts"], row["top_k"])
            if shape != case:
                raise BenchError(f"clmoe-bench measured {shape}, not {case}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BenchError(f"clmoe-bench printed no rows: {error!r}") from error
    return rows


def measure(command: list[str], case: Case) -> list[dict]:
    """The command is of the program and of options but those of the case and of the output."""
    command = [*command, "--case", case.name, "--tokens", str(case.tokens), "--json", "-"]
    done = call(command)
    if done.returncode not in (0, 1):  # 1: a row says what is wrong
        raise BenchError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr.strip()}")
    return parse_rows(done.stdout, case)
