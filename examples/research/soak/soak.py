"""
Kill training, fill the disk, crowd the page and `hpool-vit predict` with odd files, and print what was lost.

    python examples/research/soak/soak.py --output outputs/soak.json
    python examples/research/soak/soak.py --short --parts killed full --output outputs/soak.json

Parts:
    killed   training is killed (SIGKILL) at random moments and started again; the final weights must be those of a
             run that nobody disturbed, to the bit
    full     train, convert, export, predict and visualize run on disks that are too small
    crowded  4 clients at once give odd files to the demo page and to `hpool-vit predict`
    memory   the peak memory of decoding the largest images that are allowed

Everything is made by the program, in a temporary folder. It stays on one core, every process and request is bounded in
time, and connections go to this machine alone. The exit status is 0 if nothing was lost. OUTPUT.json keeps the results
of parts that do not run again. `docs/reliability.md` shows the results.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crowded import soak_page, soak_predict
from full import soak_full
from killed import soak_killed
from memory import measure_memory
from odd_files import write_odd_files
from work import PROGRAMS, write_model, write_photos

from hpool_vit.toolkit.shared.console import quiet
from hpool_vit.toolkit.shared.files import read_json, write_json


CLIENTS = 4
# With `--short`: one that writes a folder, one that writes files, and the one that resumes.
SHORT_COMMANDS = ("hpool-vit convert", "hpool-vit predict", "hpool-vit train")


def killed(folder: Path, short: bool, seed: int) -> dict[str, Any]:
    # 20 moments in all.
    kills, epochs, programs = (1, 2, list(PROGRAMS)[:1]) if short else (10, 6, list(PROGRAMS))
    photos = write_photos(folder / "photos")
    results = {}
    for program in programs:
        (folder / program).mkdir()
        results[program] = soak_killed(program, photos, folder / program, kills, epochs, seed)
    return results


def full(folder: Path, short: bool, seed: int) -> dict[str, Any]:
    photos, model = write_photos(folder / "photos"), write_model(folder / "model")
    return soak_full(folder, photos, model, 1 if short else 2, seed, SHORT_COMMANDS if short else None)


def crowded(folder: Path, short: bool, seed: int) -> dict[str, Any]:
    model = write_model(folder / "model")
    files = write_odd_files(folder / "files", 40 if short else 200, seed)
    clients = 2 if short else CLIENTS
    page = soak_page(model, files, clients, folder)
    return {"page": page, "predict": soak_predict(model, files, clients, folder)}


def memory(folder: Path, short: bool, seed: int) -> dict[str, Any]:
    return measure_memory(folder, short)


PARTS: dict[str, Callable[[Path, bool, int], dict[str, Any]]] = {
    "killed": killed,
    "full": full,
    "crowded": crowded,
    "memory": memory,
}


def lines_of(results: Any) -> list[str]:
    """What was lost, wherever it stands in the results."""
    if not isinstance(results, dict):
        return []
    return [*results.get("lost", []), *(line for value in results.values() for line in lines_of(value))]


def describe_machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "pillow", "safetensors", "gradio", "hpool-vit")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def stay_on_one_core():
    """This process and those that it starts leave the other cores to others."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Few kills, commands, files and clients: minutes.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: all.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments, sizes and files.")
    parser.add_argument("--output", type=Path, default=Path("outputs/soak.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    stay_on_one_core()
    quiet()
    results = read_json(args.output) if args.output.exists() else {}
    for name in args.parts:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="hpool-vit-soak-") as folder:
            measured = PARTS[name](Path(folder), args.short, args.seed)
        seconds = round(time.monotonic() - start)
        results[name] = {**measured, "short": args.short, "seconds": seconds, **describe_machine()}
        write_json(args.output, results)
        print(f"{name}: {seconds} s, lost: {len(lines_of(measured))}", flush=True)
    lost = [line for name in args.parts for line in lines_of(results[name])]
    print(*(lost or ["Nothing was lost."]), sep="\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
