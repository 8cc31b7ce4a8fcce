"""Runs the commands that write on disks that are too small, and looks at what is left."""

import random
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from work import HPOOL_VIT, PROGRAMS, digest, last_line, names_of, run, training_command, weights_of, write_vit

from hpool_vit.toolkit.training.checkpoints import is_complete, list_checkpoints


# A file system in memory, which goes with the process: no root rights, no loop device, and nothing left mounted.
NAMESPACES = (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"])
ON_SMALL_DISK = """
size=$1 disk=$2 copy=$3
shift 3
mount -t tmpfs -o size="$size" tmpfs "$disk" || exit 99
"$@"
status=$?
cp -a "$disk"/. "$copy"
exit $status
"""
BLOCK = 4096


class SmallDisks:
    """Disks of any size, or, where the system allows no mounts, a limit on the size of every file."""

    def __init__(self, folder: Path):
        self.disk = folder / "disk"
        self.disk.mkdir()
        works = [names for names in NAMESPACES if shutil.which(names[0]) and self.try_out(names, folder / "try")]
        self.namespace = works[0] if works else None
        self.kind = "tmpfs" if works else "RLIMIT_FSIZE"

    def try_out(self, namespace: list[str], copy: Path) -> bool:
        copy.mkdir(exist_ok=True)
        words = [*namespace, "sh", "-c", ON_SMALL_DISK, "sh", str(BLOCK), str(self.disk), str(copy), "true"]
        return run(words).returncode == 0

    def run(self, words: list[str], size: int, copy: Path):
        """Runs a command that writes to `self.disk`. What it leaves there is then in `copy`."""
        copy.mkdir()
        if self.namespace:
            arguments = [str(size), str(self.disk), str(copy)]
            return run([*self.namespace, "sh", "-c", ON_SMALL_DISK, "sh", *arguments, *words])
        result = run(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        shutil.copytree(self.disk, copy, dirs_exist_ok=True)
        shutil.rmtree(self.disk)
        self.disk.mkdir()
        return result

    def size(self, fraction: float, folder: Path) -> int:
        """A part of what a result takes: of all its blocks, or of its largest file."""
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        if not self.namespace:
            return max(1, int(fraction * max(sizes)))
        return max(1, int(fraction * sum(-(-size // BLOCK) for size in sizes))) * BLOCK


def soak_full(
    folder: Path, photos: Path, model: Path, times: int, seed: int, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """
    Runs each command, or those in `only`, on `times` disks of random sizes.

    Returns:
        For each command: the sizes, how often it failed, and `lost`, a line for every file that was left incomplete
        and every error of more than one line.
    """
    disks = SmallDisks(folder)
    vit = write_vit(folder / "vit")

    def writing(*words: str) -> Callable[[Path], list[str]]:
        return lambda disk: [*HPOOL_VIT, *(word.format(disk=disk) for word in words)]

    files = ["--output", "{disk}/answers.jsonl", "--contact_sheet", "{disk}/sheet.html", "--disable_tqdm"]
    commands = {
        "hpool-vit convert": writing("convert", str(vit), "--output_dir", "{disk}/out", "--hvt_pool", "1"),
        "hpool-vit export": writing("export", str(model), "--output_dir", "{disk}/out"),
        "hpool-vit export --format torch_export": writing(
            "export", str(model), "--output_dir", "{disk}/out", "--format", "torch_export"
        ),
        "hpool-vit predict": writing("predict", str(model), str(photos), *files),
    }
    seen = ["--output", "{disk}/tokens.png", "--save_tensors", "{disk}/tokens.safetensors"]
    commands["hpool-vit visualize"] = writing("visualize", str(model), str(photos / "ant" / "0.png"), *seen)
    for name in PROGRAMS:
        commands[name] = lambda disk, name=name: training_command(name, photos, disk / "out", epochs=2)
    results: dict[str, Any] = {"disk": disks.kind}
    for number, name in enumerate(only or commands):
        scratch = folder / str(number)
        scratch.mkdir()
        results[name] = soak_command(name, commands[name], disks, scratch, times, random.Random(f"{name} {seed}"))
    return results


def soak_command(
    name: str,
    command: Callable[[Path], list[str]],
    disks: SmallDisks,
    folder: Path,
    times: int,
    generator: random.Random,
) -> dict[str, Any]:
    whole = folder / "whole"
    enough = disks.run(command(disks.disk), 1 << 30, whole)
    if enough.returncode:
        raise RuntimeError(f"{name} failed with enough space: {last_line(enough.stderr)}")
    sizes, failed, lost = [], 0, []
    for number in range(times):
        # One size from each part of the range.
        size = disks.size((number + generator.random()) / times, whole)
        left = folder / f"left{number}"
        result = disks.run(command(disks.disk), size, left)
        sizes.append(size)
        failed += result.returncode != 0
        lines = wrong_error(result) if result.returncode else []
        if name in PROGRAMS:
            lines += wrong_training(command, whole, left)
        else:
            lines += wrong_files(whole, left, missing=result.returncode != 0)
        lost += [f"{name} on {size} bytes: {line}" for line in lines]
    return {"needed": disks.size(1, whole), "sizes": sizes, "failed": failed, "lost": lost}


def wrong_error(result) -> list[str]:
    """An error must be one line, whatever else was reported before."""
    line = last_line(result.stderr)
    if not line.startswith("error: ") or "Traceback" in result.stderr:
        return [f"the error is not one line, but {len(result.stderr.splitlines())}, which end in {line!r}"]
    return []


def wrong_files(whole: Path, left: Path, missing: bool) -> list[str]:
    """Each entry of the folder must be there in full or not at all; all of them unless some may be missing."""
    lines = []
    for entry in {path.name for folder in (whole, left) for path in folder.iterdir()}:
        given, expected = left / entry, whole / entry
        if not expected.exists():
            lines.append(f"{entry} is left")
        elif given.exists():
            different = names_of(given) != names_of(expected) or weights_of(given) != weights_of(expected)
            if different or (given.is_file() and digest(given) != digest(expected)):
                lines.append(f"{entry} is incomplete")
        elif not missing:
            lines.append(f"{entry} is missing")
    return lines


def wrong_training(command: Callable[[Path], list[str]], whole: Path, left: Path) -> list[str]:
    """
    Checkpoints and the model must be there in full or not at all, and the same command with enough space comes to
    the same end.
    """
    output_dir, expected = left / "out", whole / "out"
    checkpoints = list_checkpoints(output_dir)
    lines = [f"{folder.name} is incomplete" for folder in checkpoints if not is_complete(folder)]
    results = {path.name for path in output_dir.glob("*") if path not in checkpoints} - {"training.yaml"}
    all_results = {path.name for path in expected.iterdir() if not path.name.startswith("checkpoint-")}
    if results and results != all_results - {"training.yaml"}:
        lines.append(f"of the results there are only {', '.join(sorted(results))}")
    again = run(command(left))
    if again.returncode:
        return [*lines, f"does not resume: {last_line(again.stderr)}"]
    found = weights_of(output_dir)
    return lines + [
        f"{file} differs after resuming" for file, value in weights_of(expected).items() if found.get(file) != value
    ]
