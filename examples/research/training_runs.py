"""Many runs of `hpool-vit` that are done once each, and compared at the end: what the research programs share."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


COMPARE_RUNS = Path(__file__).resolve().parent / "compare_runs.py"


@dataclass(frozen=True)
class Step:
    """A command, and the file that exists when it is finished."""

    command: list[str]
    result: Path


def hpool_vit(*words: Any, **flags: Any) -> list[str]:
    """The command line of `hpool-vit WORDS --FLAG VALUE …`. A flag without a value (None) is left out."""
    words += tuple(part for name, value in flags.items() if value is not None for part in (f"--{name}", value))
    return [sys.executable, "-m", "hpool_vit.toolkit.command", *map(str, words)]


def training(output_dir: Path, name: str, seed: int, *words: Any, **settings: Any) -> Step:
    """A training of the model `name`, in a folder that compare_runs.py reads."""
    folder = output_dir / f"{name}-seed{seed}"
    command = hpool_vit("train", *words, **settings, seed=seed, output_dir=folder)
    return Step(command, folder / "all_results.json")


def comparison(output_dir: Path, steps: Sequence[Step], reference: str) -> list[str]:
    """The command that compares the trainings among `steps`, when they are finished."""
    folders = [str(step.result.parent) for step in steps if step.result.name == "all_results.json"]
    output = output_dir / "comparison"
    return [sys.executable, str(COMPARE_RUNS), *folders, "--reference", reference, "--output", str(output)]


def run_all(steps: Sequence[Step], compare: list[str], dry_run: bool) -> None:
    """Runs what is not finished, step by step, and then the comparison. A dry run prints the commands."""
    for step in steps:
        if dry_run:
            print(shlex.join(step.command))
        elif not step.result.is_file():
            subprocess.run(step.command, check=True)
    if dry_run:
        print(shlex.join(compare))
    else:
        subprocess.run(compare, check=True)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, help="gets one folder for each model and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and run nothing")
