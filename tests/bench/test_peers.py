"""bench/peers without a GPU: cases, rows and the table; its turns; what it says of what is missing.

Usage: test_peers.py CLMOE-BENCH
"""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "bench/peers"
BENCH = os.path.abspath(sys.argv.pop(1))
sys.path.insert(0, str(FOLDER))

import clmoe  # noqa: E402
import compare  # noqa: E402
from table import Step, Times, table  # noqa: E402

QWEN3 = clmoe.Case("qwen3-30b-a3b", 8192, 2048, 768, 128, 8)


def row(engine, step, median):
    """As clmoe-bench writes it."""
    return {
        "case": "qwen3-30b-a3b", "engine": engine, "device": "NVIDIA H200",
        "driver": "580.159.04", "dtype": "bf16", "tokens": 8192, "dim": 2048, "hidden_dim": 768,
        "experts": 128, "top_k": 8, "pattern": "uniform", "step": step, "repeat": 15,
        "median_ms": median, "min_ms": median, "p10_ms": median, "p90_ms": median,
        "gbytes_per_s": 1435.8, "gflops": 588101.0, "percent_of_peak": None, "checked": True,
        "clmoe": "0.2.0", "commit": "1acc723", "date": "2026-12-01T12:00:00Z",
    }


ROOFLINE = {"case": "roofline", "engine": "roofline", "step": "copy", "tokens": 0, "checked": True}
ROWS = [
    ROOFLINE,
    row("nv_wgmma-packed", "experts", 1.0),
    row("nv_wgmma-raw", "experts", 1.3),
    row("nv_wgmma-raw", "train", 5.5),
]
WRONG = [{**row("nv_wgmma-raw", "train", 0), "checked": False, "error": "dx of token 3 is nan"}]


class Cases(unittest.TestCase):
    def test_help_lists_them(self):
        cases = clmoe.list_cases(BENCH)
        self.assertIn(QWEN3, cases)
        self.assertFalse([case for case in cases if case.name == "router-256"])

    def test_choice(self):
        other = clmoe.Case("olmoe", 8192, 2048, 1024, 64, 8)
        cases = [QWEN3, clmoe.Case("olmoe", 1, 2048, 1024, 64, 8), other]
        self.assertEqual(clmoe.choose_cases(cases, "olmoe,qwen3-30b-a3b", 8192), [other, QWEN3])
        with self.assertRaisesRegex(clmoe.BenchError, "no case 'qwen3-30b-a3b' of 1 tokens"):
            clmoe.choose_cases(cases, "qwen3-30b-a3b", 1)


class Rows(unittest.TestCase):
    def test_read(self):
        rows = clmoe.parse_rows(json.dumps(ROWS), QWEN3)
        self.assertEqual([r["step"] for r in rows], ["experts", "experts", "train"])

    def test_of_another_shape(self):
        text = json.dumps([{**ROWS[1], "top_k": 4}])
        with self.assertRaisesRegex(clmoe.BenchError, "clmoe-bench measured"):
            clmoe.parse_rows(text, QWEN3)

    def test_no_rows(self):
        for text in ("", "[1]", "[{}]", '{"case": 1}'):
            with self.assertRaisesRegex(clmoe.BenchError, "printed no rows"):
                clmoe.parse_rows(text, QWEN3)

    def test_the_program_itself(self):
        tiny = next(case for case in clmoe.list_cases(BENCH) if case.name == "tiny")
        command = [BENCH, "--engine", "ref", "--step", "experts", "--repeat", "1"]
        if "CLMOE_TEST_DEVICE" in os.environ:
            command += ["--device", os.environ["CLMOE_TEST_DEVICE"]]
        rows = clmoe.measure(command, tiny)
        self.assertEqual([r["engine"] for r in rows], ["ref"])


class Table(unittest.TestCase):
    def test_ratio_of_medians(self):
        step = Step("olmoe", 8192, 64, "experts", Times("triton fused moe", [1.6, 1.8, 1.5]))
        for median in (1.25, 1.2, 1.28):
            rows = [row("nv_wgmma-packed", "experts", median), row("nv_wgmma-raw", "train", 9)]
            step.add(rows)
        self.assertEqual(
            table([step]).splitlines()[2],
            "| olmoe | 8192 | 64 | experts | triton fused moe | 1.600 | 1.500 .. 1.800 "
            "| nv_wgmma-packed | 1.250 | 1.200 .. 1.280 | 1.28 |",
        )
        head, rule, line = table([step]).splitlines()
        self.assertEqual(len({text.count("|") for text in (head, rule, line)}), 1)


class Turns(unittest.TestCase):
    """The whole program with stand-ins of PyTorch, of the peers, and of clmoe-bench."""

    def setUp(self):
        self.log, self.wrong, self.rows = [], [], ROWS
        timer = types.SimpleNamespace(samples=self.samples)
        tuner = types.SimpleNamespace(timer=timer, chosen=lambda: {"what": {"m": 128}})
        cuda = types.SimpleNamespace(empty_cache=lambda: None)
        stand_ins = {
            "torch": types.SimpleNamespace(__version__="2.11.0", cuda=cuda),
            "triton": types.SimpleNamespace(__version__="3.6.0"),
            "timing": types.SimpleNamespace(
                Timer=lambda: timer, Tuner=lambda *_: tuner, Captured=lambda run: run),
            "peers": types.SimpleNamespace(
                Inputs=lambda case: case,
                Experts=self.peer("experts"),
                Training=self.peer("train")),
            "reference": types.SimpleNamespace(
                check_experts=lambda peer, run: [], check_training=lambda peer, run: self.wrong),
        }
        for patch in (
            mock.patch.dict(sys.modules, stand_ins),
            mock.patch.object(clmoe, "list_cases", lambda bench: [QWEN3]),
            mock.patch.object(clmoe, "call", self.call),
            mock.patch.object(compare, "require_gpu", lambda: "NVIDIA H200"),
            mock.patch.object(compare, "REST_S", 0),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def peer(self, name):
        return lambda inputs, tuner: types.SimpleNamespace(
            run=lambda: self.log.append(name), variants={f"peer of {name}": {}})

    def samples(self, run, count):
        run()
        return [2.0, 100.0, 1.0][:count]

    def call(self, command):
        self.log.append("clmoe")
        self.command = command
        return subprocess.CompletedProcess(command, 0, json.dumps(self.rows), "")

    def run_main(self, *arguments):
        self.out, self.err = io.StringIO(), io.StringIO()
        words = ["compare.py", "--case", "qwen3-30b-a3b", "--repeat", "3", *arguments]
        with (
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(self.out),
            contextlib.redirect_stderr(self.err),
        ):
            return compare.main()

    def test_both_by_turns(self):
        with tempfile.TemporaryDirectory() as folder:
            tiles = pathlib.Path(folder) / "tiles.json"
            self.assertEqual(self.run_main("--rounds", "2", "--tiles", str(tiles)), 0)
            self.assertEqual(json.loads(tiles.read_text()), {"NVIDIA H200": {"what": {"m": 128}}})
        peers = ["experts", "train"]
        self.assertEqual(self.log, [*peers, "clmoe", *peers, "clmoe", *peers])
        for word in ("nv_wgmma-packed,nv_wgmma-raw", "experts,train", "bf16", "weights", "3"):
            self.assertIn(word, self.command)
        lines = self.out.getvalue().splitlines()
        self.assertIn("clmoe 0.2.0, commit 1acc723; PyTorch 2.11.0, Triton 3.6.0.", lines)
        self.assertEqual([line[-7:] for line in lines[-3:]], [" 2.00 |", " 1.54 |", " 0.36 |"])

    def test_a_wrong_peer_is_not_timed(self):
        self.wrong = ["dx is off by nan"]
        self.assertEqual(self.run_main(), 1)
        self.assertEqual((self.log, self.out.getvalue()), ([], ""))
        self.assertIn("dx is off by nan", self.err.getvalue())

    def test_a_wrong_engine_is_not_in_the_table(self):
        self.rows = WRONG
        self.assertEqual(self.run_main(), 1)
        self.assertEqual(self.out.getvalue(), "")
        self.assertEqual(self.log, ["experts", "train", "clmoe"])
        self.assertIn("dx of token 3 is nan", self.err.getvalue())

    def test_a_signal_leaves_what_was_measured(self):
        def call(command):
            if "clmoe" in self.log:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.call(command)

        with mock.patch.object(clmoe, "call", call):
            self.assertEqual(self.run_main(), 128 + signal.SIGTERM)
        self.assertEqual(self.log.count("clmoe"), 1)
        self.assertIn("| nv_wgmma-raw | 5.500 | 5.500 .. 5.500 | 0.36 |", self.out.getvalue())

    def test_clmoe_bench_fails(self):
        bad = subprocess.CompletedProcess([], 2, "", "clmoe-bench: nothing to time")
        with mock.patch.object(clmoe, "call", lambda command: bad):
            self.assertEqual(self.run_main(), 2)
        self.assertIn("clmoe-bench: nothing to time", self.err.getvalue())


def interpreter_is_missing():
    """Why Triton's interpreter does not run here, or None."""
    for package in ("torch", "triton", "numpy"):
        if importlib.util.find_spec(package) is None:
            return f"no {package}"
    import numpy

    new = tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    return "numpy is too new for Triton's interpreter" if new else None


@unittest.skipIf(interpreter_is_missing(), interpreter_is_missing())
class Kernels(unittest.TestCase):
    """The peers on the host, against their reference: f16, as Triton's interpreter has no bf16."""

    @classmethod
    def setUpClass(cls):
        os.environ["TRITON_INTERPRET"] = "1"
        import peers
        import reference

        cls.peers, cls.reference = peers, reference

    def inputs(self, *shape):
        import torch

        torch.manual_seed(1)
        return self.peers.Inputs(clmoe.Case("small", *shape), torch.float16, "cpu")

    def test_are_right(self):
        for shape in ((37, 48, 32, 6, 2), (70, 70, 90, 3, 2)):
            for wanted in (0, -1):  # -1: gated
                tuner = types.SimpleNamespace(choose=lambda name, tiles, run: tiles[wanted])
                with self.subTest(shape=shape, tile=wanted):
                    inputs = self.inputs(*shape)
                    step = self.peers.Experts(inputs, tuner)
                    self.assertEqual(step.tiles["up"].gated, wanted == -1)
                    self.assertEqual(self.reference.check_experts(step, step.run), [])
                    step = self.peers.Training(inputs, tuner)
                    for step.tiles in step.variants.values():
                        self.assertEqual(self.reference.check_training(step, step.run), [])

    def test_what_is_wrong_is_seen(self):
        tuner = types.SimpleNamespace(choose=lambda name, tiles, run: tiles[0])
        inputs = self.inputs(37, 48, 32, 6, 2)
        step = self.peers.Experts(inputs, tuner)
        step.run_down = lambda tile: None
        wrong = self.reference.check_experts(step, step.run)
        self.assertRegex(wrong[0], "y of an expert is off by nan")
        step = self.peers.Training(inputs, tuner)
        step.run_ddown = lambda tile: step.ddown.fill_(0)
        wrong = self.reference.check_training(step, step.run)
        self.assertRegex(wrong[0], "ddown of an expert is off by 1")


class Missing(unittest.TestCase):
    """In a Python without packages."""

    def run_program(self, *arguments):
        command = [sys.executable, "-S", str(FOLDER / "compare.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        return done.stderr

    def test_torch(self):
        self.assertIn("the peers need torch", self.run_program("--bench", BENCH))

    def test_clmoe_bench(self):
        self.assertIn("cannot run /no/bench", self.run_program("--bench", "/no/bench"))

    def test_case(self):
        self.assertIn("no case 'huge'", self.run_program("--bench", BENCH, "--case", "huge"))

    def test_options(self):
        self.assertIn("'layer' is not experts or train", self.run_program("--what", "layer"))
        self.assertIn("'0' is no number from 1 on", self.run_program("--repeat", "0"))


class Source(unittest.TestCase):
    def test_compiles(self):
        for file in sorted(FOLDER.glob("*.py")):
            compile(file.read_text(), str(file), "exec")

    def test_lines_are_short(self):
        for file in [*FOLDER.glob("*.py"), pathlib.Path(__file__)]:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                self.assertLessEqual(len(line), 100, f"{file.name}:{number}")


if __name__ == "__main__":
    unittest.main()
