#!/usr/bin/env python3
"""Times clmoe next to its peers on one NVIDIA GPU, in one run and by turns.

experts: a fused MoE in Triton in the way of vLLM and SGLang. train: forward and backward in
ScatterMoE's way. Both are written here, checked in double precision, and tuned for each case.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import pathlib
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable

import clmoe
from clmoe import BenchError, Case
from table import Step, Times, table

STEPS = ("experts", "train")
REST_S = 0.5  # between the two sides: a card at its power limit is slower after a burst
EXIT_WRONG, EXIT_MISSING = 1, 2


class Wrong(Exception):
    """A result that is not timed."""


class Stopped(Exception):
    """By the signal of this number."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--bench", default="clmoe-bench", help="the program (default: of PATH)")
    parser.add_argument("--case", default="mixtral-8x7b,qwen3-30b-a3b,olmoe", metavar="LIST",
                        help="cases of clmoe-bench --help (default %(default)s)")
    parser.add_argument("--tokens", type=count, default=8192, metavar="N",
                        help="tokens of the cases (default %(default)s)")
    parser.add_argument("--what", type=step_names, default="experts,train", metavar="LIST",
                        help="experts, train (default both)")
    parser.add_argument("--repeat", type=count, default=15, metavar="N",
                        help="a median is of N runs (default %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N",
                        help="runs of clmoe-bench, between its peers' (default %(default)s)")
    parser.add_argument("--engine", default="nv_wgmma-packed,nv_wgmma-raw", metavar="LIST",
                        help="clmoe's engines (default %(default)s)")
    parser.add_argument("--device", metavar="D", help="clmoe-bench --device")
    parser.add_argument("--tiles", type=pathlib.Path, metavar="FILE",
                        help="keeps the chosen tiles: what FILE has is not tuned")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"compare.py: {text}", file=sys.stderr, flush=True)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)


def step_names(text: str) -> list[str]:
    for name in text.split(","):
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f"'{name}' is not experts or train")
    return text.split(",")


def require_gpu() -> str:
    """The GPU's name."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise BenchError(f"the peers need {package}, which this python3 does not have")
    import torch

    if not torch.cuda.is_available():
        raise BenchError("the peers need an NVIDIA GPU, and PyTorch finds none")
    return torch.cuda.get_device_name()


def load_tiles(file: pathlib.Path | None, gpu: str) -> dict[str, dict]:
    if file is None or not file.exists():
        return {}
    return json.loads(file.read_text()).get(gpu, {})


def save_tiles(file: pathlib.Path | None, gpu: str, tiles: dict[str, dict]) -> None:
    if file is not None:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {gpu: tiles}, indent=1) + "\n")


def make_peers(case: Case, what: list[str], tuner) -> list[tuple[Step, Callable[[], None]]]:
    """Each step with each peer that has it, and what runs it: once it was seen to be right."""
    import peers
    import reference
    import timing

    kinds = {
        "experts": (peers.Experts, reference.check_experts),
        "train": (peers.Training, reference.check_training),
    }
    inputs, runs = peers.Inputs(case), []
    for step in what:
        make, check = kinds[step]
        peer = make(inputs, tuner)
        for name, peer.tiles in peer.variants.items():
            run = timing.Captured(peer.run)
            wrong = check(peer, run)
            if wrong:
                raise Wrong(f"{case}, {name}: {'; '.join(wrong)}")
            runs.append((Step(case.name, case.tokens, case.experts, step, Times(name)), run))
    return runs


def bench_command(o: argparse.Namespace) -> list[str]:
    command = [o.bench, "--engine", o.engine, "--step", ",".join(o.what), "--dtype", "bf16"]
    command += ["--gradient-type", "weights", "--repeat", str(o.repeat)]
    return command + (["--device", o.device] if o.device else [])


def time_peers(runs: list[tuple[Step, Callable[[], None]]], o: argparse.Namespace, tuner) -> None:
    for step, run in runs:
        time.sleep(REST_S)
        step.peer.medians.append(statistics.median(tuner.timer.samples(run, o.repeat)))


def compare_case(case: Case, o: argparse.Namespace, tuner, found: list[Step]) -> None:
    """Adds the steps of a case."""
    say(f"{case}, tuning and checking the peers")
    runs = make_peers(case, o.what, tuner)
    time_peers(runs, o, tuner)
    for turn in range(o.rounds):
        say(f"{case}, round {turn + 1} of {o.rounds}")
        rows = clmoe.measure(bench_command(o), case)
        for row in rows:
            if not row["checked"]:
                raise Wrong(f"{case}, {row['engine']}, {row['step']}: {row['error']}")
        time_peers(runs, o, tuner)
        for step, _ in runs:
            step.add(rows)
        found += [step for step, _ in runs if turn == 0]


def print_head(row: dict, o: argparse.Namespace) -> None:
    """The row is any of clmoe-bench."""
    import torch
    import triton

    today = datetime.datetime.now(datetime.timezone.utc)
    words = " ".join(["bench/peers/compare.py", *sys.argv[1:]])
    print(f"\n## {row['device']}, {today:%Y-%m-%d}, peers\n\n    {words}\n")
    print(f"{row['device']}, driver {row['driver']}")
    print(f"clmoe {row['clmoe']}, commit {row['commit']}; ", end="")
    print(f"PyTorch {torch.__version__}, Triton {triton.__version__}.")
    print(f"bf16. Medians of {o.repeat}, both sides by turns: their median and range.\n")


def compare(o: argparse.Namespace) -> int:
    cases = clmoe.choose_cases(clmoe.list_cases(o.bench), o.case, o.tokens)
    gpu = require_gpu()
    import timing
    import torch

    tuner = timing.Tuner(timing.Timer(), load_tiles(o.tiles, gpu))
    found: list[Step] = []
    code = 0
    for case in cases:
        try:
            compare_case(case, o, tuner, found)
        except Stopped as stopped:
            code = 128 + stopped.args[0]
            break
        except Wrong as wrong:
            say(f"wrong, left out: {wrong}")
            found = [step for step in found if step.case != case.name]
            code = EXIT_WRONG
        except BenchError as error:
            say(str(error))
            code = EXIT_MISSING
        except torch.OutOfMemoryError:
            say(f"{case}: the GPU's memory does not hold the peers")
            code = EXIT_MISSING
        save_tiles(o.tiles, gpu, tuner.chosen())
        torch.cuda.empty_cache()
    steps = [step for step in found if step.engines]
    if steps:
        print_head(steps[0].row, o)
        print(table(steps))
    return code


def stop(number: int, frame: object) -> None:
    raise Stopped(number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    o = options()
    o.bench = shutil.which(o.bench) or o.bench
    try:
        return compare(o)
    except BenchError as error:
        say(str(error))
        return EXIT_MISSING
    except Stopped as stopped:
        return 128 + stopped.args[0]


if __name__ == "__main__":
    sys.exit(main())
