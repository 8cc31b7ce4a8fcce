"""Kills training at random moments, starts it again, and compares the end with that of a run nobody disturbed."""

import random
import subprocess
import time
from pathlib import Path
from typing import Any

from work import MOST_SECONDS, environment, last_line, names_of, training_command, weights_of

from hpool_vit.toolkit.training.checkpoints import is_complete, list_checkpoints, step_of


def soak_killed(program: str, photos: Path, folder: Path, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """
    Runs `program` until `kills` of its processes were killed, and the last run has come to its end. A run that ends
    before its kill is compared, and the next one starts in a new folder.

    Returns:
        The `moments` in seconds after the start of a process, the step of the last complete checkpoint that each kill
        left (`kept`), how many runs came to their end, and `lost`: a line for everything that was not as in the
        undisturbed run.
    """
    generator = random.Random(f"{program} {seed}")
    whole = folder / "whole"
    seconds, total = undisturbed(training_command(program, photos, whole, epochs), folder / "log.txt")
    moments, kept, finished, lost = [], [], 0, []
    while len(moments) < kills or (folder / f"run{finished}").exists():
        output_dir = folder / f"run{finished}"
        before = last_step(output_dir)
        # Importing the packages takes most of a short run, and nothing happens in that time.
        moment = round(generator.uniform(0.8 * seconds, total), 2) if len(moments) < kills else None
        status = run_until(training_command(program, photos, output_dir, epochs), moment, folder / "log.txt")
        if status is None:
            moments.append(moment)
            kept.append(last_step(output_dir))
            if kept[-1] < before:
                lost.append(f"{program}: killed at {moment} s, checkpoint-{before} became checkpoint-{kept[-1]}")
        elif status != 0:
            lost.append(f"{program}: ended with {last_line((folder / 'log.txt').read_text())}")
            break
        else:
            lost += differences(program, whole, output_dir)
            finished += 1
    return {"killed": len(moments), "moments": moments, "kept": kept, "finished": finished, "lost": lost}


def undisturbed(words: list[str], log: Path) -> tuple[float, float]:
    """Runs to the end. Returns the seconds until the settings are printed, and until the end."""
    start, begun = time.monotonic(), None
    with log.open("w") as file, subprocess.Popen(words, env=environment(), stdout=file, stderr=file) as process:
        while process.poll() is None:
            if begun is None and log.stat().st_size:
                begun = time.monotonic() - start
            if time.monotonic() - start > MOST_SECONDS:
                process.kill()
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"The run that nobody disturbs failed: {last_line(log.read_text())}")
    return begun, time.monotonic() - start


def run_until(words: list[str], moment: float | None, log: Path) -> int | None:
    """The status of a run, or None if it was still running at this moment and was killed."""
    with log.open("w") as file, subprocess.Popen(words, env=environment(), stdout=file, stderr=file) as process:
        try:
            return process.wait(moment or MOST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return None


def last_step(output_dir: Path) -> int:
    """The step of the last complete checkpoint."""
    return max((step_of(folder) for folder in list_checkpoints(output_dir) if is_complete(folder)), default=0)


def differences(program: str, whole: Path, output_dir: Path) -> list[str]:
    """What the end of a killed run has, lacks, or has otherwise than that of an undisturbed one."""
    expected, found = weights_of(whole), weights_of(output_dir)
    lines = [f"{program}: {name} differs" for name in expected if found.get(name) != expected[name]]
    names = names_of(whole) ^ names_of(output_dir)
    return lines + [f"{program}: {name} is in one of the folders alone" for name in sorted(names)]
