"""The file of a benchmark's results: it grows group by group, and no other run overwrites it by accident."""

import argparse
import json
from pathlib import Path
from typing import Any

from hpool_vit.toolkit.shared.files import write_json


# Flags that do not change the numbers.
NO_SETTINGS = ("output", "accuracy", "resume", "overwrite", "short")


def add_rerun_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--resume` and `--overwrite`, which say what becomes of results that there are already."""
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the unfinished run in OUTPUT.json")
    again.add_argument("--overwrite", action="store_true", help="replace the results in OUTPUT.json")


class ResultsFile:
    """
    `OUTPUT.json`, with `complete`, `settings`, `groups`, and the facts that `start` is given.

    Raises:
        ValueError: if there are results already and neither `--resume` nor `--overwrite` is given, or if the results
            to continue were measured with other settings.
    """

    def __init__(self, output: Path, args: argparse.Namespace):
        self.path = output.with_name(f"{output.name}.json")
        settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
        self.results: dict[str, Any] = {"complete": False, "settings": settings, "groups": []}
        if self.path.exists() and not args.overwrite:
            self.go_on(args.resume)

    def go_on(self, resume: bool):
        old = read_results(self.path)
        if not resume:
            remedy = (
                "--overwrite replaces it" if old["complete"] else "--resume continues it, --overwrite starts again"
            )
            state = "a finished" if old["complete"] else "an unfinished"
            raise ValueError(f"{self.path} holds {state} run: {remedy}, or give another --output.")
        new = self.results["settings"]
        if changed := [f"--{name}" for name, value in new.items() if old["settings"].get(name) != value]:
            raise ValueError(
                f"{self.path} was measured with another {', '.join(changed)}: give the same values to --resume it."
            )
        self.results = old

    def start(self, **facts: Any):
        """Records the circumstances of the run, unless it continues an earlier one on the same machine."""
        machine = self.results.get("machine", facts["machine"])
        if machine != facts["machine"]:
            raise ValueError(
                f"{self.path} was measured on another machine or with other versions: give another --output."
            )
        self.results = {"complete": False, **facts, **self.results}
        self.write()

    def has(self, task: str, image_size: int, batch_size: int) -> bool:
        keys = [(group["task"], group["image_size"], group["batch_size"]) for group in self.results["groups"]]
        return (task, image_size, batch_size) in keys

    def add(self, group: dict[str, Any]):
        self.results["groups"].append(group)
        self.write()

    def finish(self):
        self.results["complete"] = True
        self.write()

    def write(self):
        write_json(self.path, self.results)


def read_results(path: Path) -> dict[str, Any]:
    """
    Reads a file of results.

    Raises:
        ValueError: if it is not one.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(results, dict) or not {"complete", "settings", "groups"} <= results.keys():
        raise ValueError(f"{path} is not a results file of benchmark.py.")
    return results
