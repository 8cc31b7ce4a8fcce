"""Kills training at random moments, starts it again, and compares the end with that of a run nobody disturbed."""

import random
import subprocess
import time
from pathlib import Path
from typing import Any

from work import MOST_SECONDS, environment, last_line, names_of, training_command, weights_of

from hpool_vit.toolkit.training.checkpoints import is_complete, list_checkpoints, step_of


# A process is killed up to so many steps, and then seconds, after where it started.
MOST_STEPS = 9
MOST_DELAY = 1.5


def soak_killed(program: str, photos: Path, folder: Path, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """
    Runs `program` until `kills` of its processes were killed, and the last run has come to its end. A run that ends
    before its kill is compared, and the next one starts in a new folder.

    Returns:
        The `moments`, each a step and the seconds after it, the step of the last complete checkpoint that each kill
        left (`kept`), how many runs came to their end, and `lost`: a line for everything that was not as in the
        undisturbed run.
    """
    generator = random.Random(f"{program} {seed}")
    whole, log = folder / "whole", folder / "log.txt"
    status = run_until(training_command(program, photos, whole, epochs), whole, None, log)
    if status != 0:
        raise RuntimeError(f"The run that nobody disturbs failed: {last_line(log.read_text())}")
    moments, kept, finished, lost = [], [], 0, []
    while len(moments) < kills or (folder / f"run{finished}").exists():
        output_dir = folder / f"run{finished}"
        before = last_step(output_dir)
        # Importing the packages takes most of a short run, and nothing happens in that time.
        moment = (before + generator.randrange(MOST_STEPS), round(generator.uniform(0, MOST_DELAY), 3))
        moment = moment if len(moments) < kills else None
        status = run_until(training_command(program, photos, output_dir, epochs), output_dir, moment, log)
        if status is None:
            moments.append(moment)
            kept.append(last_step(output_dir))
            if kept[-1] < before:
                lost.append(f"{program}: killed at {moment}, checkpoint-{before} became checkpoint-{kept[-1]}")
        elif status != 0:
            lost.append(f"{program}: ended with {last_line(log.read_text())}")
            break
        else:
            lost += differences(program, whole, output_dir)
            finished += 1
    return {"killed": len(moments), "moments": moments, "kept": kept, "finished": finished, "lost": lost}


def run_until(words: list[str], output_dir: Path, moment: tuple[int, float] | None, log: Path) -> int | None:
    """
    Runs a training.

    Args:
        words: the command.
        output_dir: its output folder.
        moment: kill it so many seconds after it has begun a checkpoint of this step or a later one; None: never.
        log: the file for its output.

    Returns:
        Its exit status, or None if it was killed at the moment.
    """
    start, reached = time.monotonic(), None
    with log.open("w") as file, subprocess.Popen(words, env=environment(), stdout=file, stderr=file) as process:
        while process.poll() is None:
            now = time.monotonic()
            # Its first words are its settings, before the first step.
            if moment and reached is None and log.stat().st_size and begun_step(output_dir) >= moment[0]:
                reached = now
            if reached is not None and now - reached >= moment[1]:
                process.kill()
                return None
            if now - start > MOST_SECONDS:
                process.kill()
            time.sleep(0.005)
    return process.returncode


def begun_step(output_dir: Path) -> int:
    """The step of the last checkpoint, complete or not."""
    return max(map(step_of, list_checkpoints(output_dir)), default=0)


def last_step(output_dir: Path) -> int:
    """The step of the last complete checkpoint."""
    return max((step_of(folder) for folder in list_checkpoints(output_dir) if is_complete(folder)), default=0)


def differences(program: str, whole: Path, output_dir: Path) -> list[str]:
    """What the end of a killed run has, lacks, or has otherwise than that of an undisturbed one."""
    expected, found = weights_of(whole), weights_of(output_dir)
    lines = [f"{program}: {name} differs" for name in expected if found.get(name) != expected[name]]
    names = names_of(whole) ^ names_of(output_dir)
    return lines + [f"{program}: {name} is in one of the folders alone" for name in sorted(names)]
