"""
Compare the speed, latency, memory, multiply-accumulates and energy of models, for inference and training steps.

    python examples/benchmark/benchmark.py --short
    python examples/benchmark/benchmark.py --models vit-s hvt-s-1 hvt-s-3 deit_small_patch16_224 my-model \
        --modes sdpa compile roof --batch_sizes 1 8 32 --tasks inference train --output outputs/benchmark
    python examples/benchmark/benchmark.py --models vit-s hvt-s-3 --image_sizes 128 224 384 512 768 1024 \
        --batch_sizes 1

Models: presets, vit-ti, vit-s, vit-b, merge-ti, merge-s, timm's names, folders and Hub ids (see models.py).
Modes: eager, sdpa, flex, flash, compile, compile-max-autotune, compile-reduce-overhead, compile-freezing, aot, bf16,
channels_last, int8, onnx, onnx-int8 and roof, joined by + (see modes.py).

All models take turns in all modes in every round, so that a machine that slows down slows all of them. The report
lists what cannot run, with the reason. The program writes OUTPUT.json after every combination of task, image size and
batch size, and OUTPUT.md and OUTPUT.png at the end.
"""

# The processes that measure memory import this file too, so what only the main one needs is imported where it is used.

import argparse
import gc
import importlib.metadata
import itertools
import math
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from meters import CudaMemory, in_fresh_process, open_energy_meter, short_reason, step_memory
from models import find_model, own_image_size
from modes import TASKS, Row, Step, count_macs_per_image, export_onnx, parse_mode, prepare
from report import Measurement, format_group, format_results, summarise, title
from results import ResultsFile, add_rerun_flags
from roof import square_product

from hpool_vit.toolkit.shared.console import run
from hpool_vit.toolkit.shared.measuring import quartiles, timer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {
    "models": ["vit-s", "hvt-s-1", "hvt-s-3", "hvt-s-4"],
    "modes": ["sdpa", "roof"],
    "tasks": list(TASKS),
    "rounds": 3,
    "min_turn_seconds": 0.0,
    "warm_up": 1,
}
# Packages that only some modes and models need.
OPTIONAL = ("timm", "torchao", "onnxruntime")
SPEED_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "TORCHINDUCTOR_", "CUDA_VISIBLE")
MAX_CALLS = 1000


class Contestant:
    """One row with its step, ready to take its turn in every round."""

    def __init__(self, row: Row, step: Step, meter):
        self.row = row
        self.step = step
        self.meter = meter
        self.result = Measurement(row, state_mb=step.state_bytes and round(step.state_bytes / 1e6, 1))

    def warm_up(self, calls: int, min_turn_seconds: float):
        """Runs a few calls and decides how many fill a turn."""
        start = timer(self.row.device)
        self.step.call()
        self.result.ready_seconds = round(timer(self.row.device) - start, 3)
        for _ in range(max(calls - 1, 1)):
            start = timer(self.row.device)
            self.step.call()
            seconds = timer(self.row.device) - start
        self.result.calls = min(max(math.ceil(min_turn_seconds / seconds), 1), MAX_CALLS)

    def take_turn(self):
        device = self.row.device
        # Not timed: during the other turns, this row's data may have left the caches and even the memory.
        self.step.call()
        joules = self.meter.joules() if self.meter else 0.0
        marks = [timer(device)]
        for _ in range(self.result.calls):
            self.step.call()
            marks.append(time.perf_counter())
        seconds = timer(device) - marks[0]
        if self.meter:
            self.result.joules += self.meter.joules() - joules
        self.result.rates.append(self.result.calls * self.row.batch_size / seconds)
        on_cpu = device == "cpu"
        self.result.seconds += np.diff(marks).tolist() if on_cpu else self.latencies()

    def latencies(self) -> list[float]:
        """The seconds of each of as many calls again. Waiting for the device after each call would cost throughput."""
        seconds = []
        for _ in range(self.result.calls):
            start = timer(self.row.device)
            self.step.call()
            seconds.append(timer(self.row.device) - start)
        return seconds


class Group:
    """All rows of one task, image size and batch size."""

    def __init__(self, args: argparse.Namespace, task: str, image_size: int, batch_size: int, meter, scratch: Path):
        self.args = args
        self.key = {"task": task, "image_size": image_size, "batch_size": batch_size}
        self.rows = [
            Row(model, parse_mode(mode, DTYPES[args.dtype]), device=args.device, threads=args.threads, **self.key)
            for model, mode in itertools.product(args.models, args.modes)
        ]
        self.meter = meter
        self.scratch = scratch
        self.contestants: list[Contestant] = []
        self.failed: dict[Row, str] = {}

    def measure(self) -> dict[str, Any]:
        """The group's record for JSON."""
        memories = {row: self.enter(row) for row in self.rows}
        peaks = {dtype: self.peak(dtype) for dtype in {row.mode.dtype for row in self.rows}}
        for number in range(self.args.rounds):
            self.run_round(number, list(peaks.values()))
        results = []
        measured = {contestant.row: contestant.result for contestant in self.contestants}
        for row in self.rows:
            result = Measurement(row) if row in self.failed else measured[row]
            result.reason, result.memory_mb = self.failed.get(row), memories[row]
            result.macs = self.macs(row)
            results.append(result)
        by_dtype = {dtype: peak.result for dtype, peak in peaks.items()}
        return {
            **self.key,
            "matrix_peak_tflops": {
                str(dtype).removeprefix("torch."): quartiles([2e-12 * peak.macs * rate for rate in peak.rates])
                for dtype, peak in by_dtype.items()
            },
            "rows": summarise(results, self.args.reference, by_dtype, self.meter is not None),
        }

    def enter(self, row: Row) -> float | None:
        """Makes a row ready to run and returns the memory that a step takes. Notes the reason if a row cannot run."""
        start = time.perf_counter()
        memory = None
        try:
            row.check()
            if row.mode.engine in ("onnx", "onnx-int8"):
                in_fresh_process(export_onnx, row, self.scratch)
            takes_memory = self.args.memory and row.mode.engine != "roof"  # its tensors are not the model's
            if takes_memory and row.device == "cpu":
                # This comes first: if there is not enough memory, that process ends and this one goes on.
                memory = in_fresh_process(step_memory, row, self.scratch)
            on_gpu = CudaMemory(row.device) if takes_memory and row.device != "cpu" else None
            contestant = Contestant(row, prepare(row, self.scratch), self.meter)
            contestant.warm_up(self.args.warm_up, self.args.min_turn_seconds)
            if on_gpu:
                on_gpu.reset()
                contestant.step.call()
                memory = on_gpu.peak_mb()
            self.contestants.append(contestant)
        except Exception as error:
            self.fail(row, error)
        ready = self.failed.get(row) or f"ready in {time.perf_counter() - start:.1f} s"
        print(f"{title(self.key)}: {row.model}, {row.mode.name}: {ready}", file=sys.stderr, flush=True)
        return memory

    def fail(self, row: Row, error: Exception):
        self.failed[row] = short_reason(error)
        # The traceback holds the model's tensors.
        error.__traceback__ = None
        gc.collect()
        if row.device != "cpu":
            torch.cuda.empty_cache()

    def macs(self, row: Row) -> int | None:
        try:
            return count_macs_per_image(row.model, row.image_size, row.task)
        except Exception:  # the model cannot be built, which its row says
            return None

    def peak(self, dtype: torch.dtype) -> Contestant:
        call, macs = square_product(torch.device(self.args.device), dtype)
        row = Row("matrix product", parse_mode("sdpa", dtype), "inference", 0, 1, self.args.device)
        contestant = Contestant(row, Step(call), None)
        contestant.warm_up(2, self.args.min_turn_seconds)
        contestant.result.macs = macs
        return contestant

    def run_round(self, number: int, peaks: list[Contestant]):
        """One turn of each; every round starts with another one."""
        turns = [*(one for one in self.contestants if one.row not in self.failed), *peaks]
        first = number % len(turns)
        for contestant in turns[first:] + turns[:first]:
            try:
                contestant.take_turn()
            except Exception as error:
                self.fail(contestant.row, error)


def measure(args: argparse.Namespace, file: ResultsFile):
    """Measures all groups that the file does not have yet."""
    meter, energy = open_energy_meter(args.device)
    file.start(
        command=shlex.join(["python", *sys.argv]),
        machine=describe_machine(),
        load_average=[round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        energy=energy,
    )
    with tempfile.TemporaryDirectory() as scratch:
        for key in itertools.product(args.tasks, args.image_sizes, args.batch_sizes):
            if file.has(*key):
                continue
            torch.compiler.reset()
            record = Group(args, *key, meter, Path(scratch)).measure()
            gc.collect()
            file.add(record)
            print(f"\n## {title(record)}\n\n{format_group(record, args.reference)}\n", flush=True)
    file.finish()


def describe_machine() -> dict[str, Any]:
    from hpool_vit.toolkit.training.report import describe_hardware

    machine = describe_hardware(1)
    # These decide how threads wait and how memory is allocated, and so the speed of small products.
    machine["environment"] = {name: value for name, value in os.environ.items() if name.startswith(SPEED_VARIABLES)}
    for name in OPTIONAL:
        try:
            machine["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return machine


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["vit-s", "hvt-s-1", "hvt-s-3", "hvt-s-4"], metavar="NAME")
    add("--modes", nargs="+", default=["sdpa"], metavar="MODE", help="default: sdpa")
    add("--tasks", nargs="+", choices=TASKS, default=["inference"], help="default: inference")
    add("--batch_sizes", type=positive, nargs="+", default=[8], help="default: 8")
    add("--image_sizes", type=positive, nargs="+", help="default: that of the first model")
    add(
        "--reference",
        help="the model that others are compared with in the same mode, or MODEL/MODE; default: the first model",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights, if the mode does not have bf16")
    add("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--rounds", type=positive, default=9, help="default: %(default)s")
    add("--warm_up", type=positive, default=3, help="calls before the first round (default: %(default)s)")
    add(
        "--min_turn_seconds",
        type=float,
        default=0.2,
        help="how long a row repeats its step in each round (default: 0.2)",
    )
    add(
        "--no_memory",
        dest="memory",
        action="store_false",
        help="do not measure memory, which takes one process per row",
    )
    add("--output", type=Path, default=Path("outputs/benchmark"), help="path of the files, without suffix")
    add(
        "--accuracy",
        type=Path,
        nargs="+",
        default=[],
        help="results of compare_runs.py: accuracies to plot against speed",
    )
    add("--short", action="store_true", help="four models, inference and training, three rounds: about two minutes")
    add_rerun_flags(parser)
    if parser.parse_known_args(argv)[0].short:
        parser.set_defaults(**SHORT)
    return complete(parser.parse_args(argv))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """
    Fills in what depends on other flags.

    Raises:
        ValueError: if a model, mode, reference or device does not exist, before anything is measured.
    """
    for name in args.models:
        find_model(name)
    for name in args.modes:
        parse_mode(name, DTYPES[args.dtype])
    for name in ("models", "modes", "tasks", "batch_sizes", "image_sizes"):
        values = getattr(args, name) or []
        setattr(args, name, list(dict.fromkeys(values)))
    args.image_sizes = args.image_sizes or [own_image_size(args.models[0])]
    args.reference = args.reference or args.models[0]
    names = [*args.models, *(f"{model}/{mode}" for model in args.models for mode in args.modes)]
    if args.reference not in names:
        raise ValueError(f"--reference {args.reference} is not one of the models: {', '.join(args.models)}.")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: give cpu, cuda or cuda:1.")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch finds no CUDA device; use --device cpu.")
    return args


def main(argv: list[str] | None = None):
    from plots import plot_results

    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    file = ResultsFile(args.output, args)
    try:
        measure(args, file)
    except KeyboardInterrupt:
        sys.exit(f"error: interrupted; run the same command with --resume to continue {file.path}.")
    args.output.with_name(f"{args.output.name}.md").write_text(format_results(file.results), encoding="utf-8")
    picture = plot_results([file.results], args.output.with_name(f"{args.output.name}.png"), args.accuracy)
    print(f"Results in {args.output}.json, {args.output}.md and {picture}.")


if __name__ == "__main__":
    run(main)
