"""Make a trained model faster: a function for programs, and the command `hpool-vit speed-up`."""

import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn
from tqdm import tqdm

from ..command import PlainUsageCommand
from ..inspection.stats import format_macs
from ..recovery.effort import Effort, read_effort
from ..shared.console import check_at_least_one, needs, schedule_name
from ..shared.devices import choose_device
from ..shared.figures import save_figure
from ..shared.files import check_output_dir, folder_written_whole, read_json, write_json
from ..shared.options import Device, DisableTqdm, OutputDir, UnlabelledImages
from .costs import MacsCost, TimeCost, seconds_per_image
from .evaluation import Evaluator, rounded
from .inputs import ENOUGH_IMAGES, Photos, load_model, load_photos, read_pool
from .report import (
    PICTURE,
    RECORD,
    describe_images,
    describe_machine,
    describe_search,
    measure_recovered,
    speed_name,
    summary,
    write_card,
)
from .report import measure as measure_speeds
from .schedules import Fitter, Schedule, schedule_fields
from .search import Budget, Search
from .trials import TrialLog, fingerprint


with needs("visualize"):
    from .curve import draw_curve


MINUTES = 10.0
MEASURES = ("macs", "time")
# How far the measured time may miss the wanted one before the search is asked for more.
TIME_TOLERANCE = 0.98
# Rounds of that.
MAX_CORRECTIONS = 3


def speed_up(
    model: str | Path,
    images: str | Path,
    output_dir: str | Path,
    *,
    faster: Sequence[float] = (2.0,),
    measure: Literal["macs", "time"] = "macs",
    minutes: float | None = None,
    trials: int | None = None,
    recover: str | float | None = None,
    num_images: int = ENOUGH_IMAGES,
    batch_size: int = 16,
    device: str | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """
    Searches where a model can merge its tokens to become faster at the least change of its answers, and writes a
    folder that offers the speeds: `model.set_speed(2)`, or `from_pretrained(output_dir, speed=2)`. The images need no
    labels. Half of them are for the search, and the other half for the report. Nothing is trained, unless you ask to
    `recover`: then the faster model learns the original's answers.

    If it is killed, call it again with the same arguments: it goes on where it stopped.

    Args:
        model (`str` or `Path`): anything that [`convert`] reads, or the folder or Hub id of an HPool-ViT that merges
            or does not pool.
        images (`str` or `Path`): a folder of images like those that the model is for, at any depth.
        output_dir (`str` or `Path`): a folder that does not exist yet, or is empty.
        faster (`Sequence[float]`): the wanted speeds, each above 1. The folder opens at the first of them.
        measure (`str`): what a speed is: `"macs"`, how many times fewer multiply-accumulates than without pooling, or
            `"time"`, how many times less time on this machine in batches of `batch_size`.
        minutes (`float`, *optional*): how long to search. Default: 10, unless `trials` is given.
        trials (`int`, *optional*): how many schedules to try at most. Then the same images and settings give the same
            result on every run, if `measure="macs"`.
        recover (`str` or `float`, *optional*): how long to learn from the original, for all speeds together: a time
            such as `"20m"`, or a number of epochs. The images for the search teach, and those of the folder that
            neither the search nor the report uses. One set of weights then serves all speeds, also 1.
        num_images (`int`): how many images of the folder to use, random ones, for search and report.
        batch_size (`int`): images per forward pass.
        device (`str`, *optional*): `cpu`, `cuda`, `mps`, …. Default: an accelerator if there is one.
        seed (`int`): decides which images are used, and the order of what is tried.
        show_progress (`bool`): whether to show a progress bar on standard error.

    Returns:
        The content of speed_up.json.

    Raises:
        ValueError: for a model, images or a speed that cannot be used. For a speed that cannot be reached, the message
            names the fastest one that can.
        OSError: if something cannot be written.
    """
    start = time.monotonic()
    output_dir = Path(output_dir)
    speeds = check_arguments(faster, measure, minutes, trials, batch_size)
    effort = None if recover is None else plan_recovery(recover)
    check_output_dir(output_dir)
    network, image_processor, notes = load_model(str(model))
    dtype = network.dtype
    network.to(choose_device(device), torch.float32)
    # Losses are measured in float32, and time in what the folder is saved in.
    timed = network if dtype == torch.float32 else copy.deepcopy(network).to(dtype)
    photos = load_photos(images, image_processor, num_images, seed)
    pool = None if effort is None else read_pool(photos, image_processor)
    macs = MacsCost(network.config)
    if measure == "macs":
        check_reachable(speeds, measure, macs, network)
    settings = {"model": fingerprint(network), "config": network.config.to_json_string(), "images": photos.files}
    settings |= {"measure": measure, "batch_size": batch_size, "seed": seed}
    settings |= {"device": describe_machine(network.device), "dtype": str(dtype)} if measure == "time" else {}
    log = TrialLog(working_place(output_dir) / "trials.jsonl", settings)
    cost = macs
    if measure == "time":
        cost = time_cost(timed, photos, macs, log, batch_size)
        try:
            check_reachable(speeds, measure, cost, network)
        except ValueError:
            log.remove()
            raise
    minutes = MINUTES if minutes is None and trials is None else minutes
    with tqdm(total=100, desc="searching", unit="%", disable=not show_progress, bar_format=BAR) as bar:
        budget = Budget(None if minutes is None else 60 * minutes, trials, Progress(bar))
        evaluator = Evaluator(network, photos.pixel_values[: photos.num_searched], batch_size)
        search = Search(evaluator, log, budget, max(network.config.num_hidden_layers // 2, 4), seed)
        chosen = search_all(search, cost, sorted(speeds), timed, batch_size)
        bar.update(bar.total - bar.n)
        evaluator.forget()
    chosen = {speed: chosen[speed] for speed in speeds}
    record = {
        "model": str(model),
        "loss": "kl" if evaluator.has_head else "cosine",
        "measure": measure,
        "batch_size": batch_size,
        "seed": seed,
        "default": speeds[0],
        "images": {**describe_images(photos), "searched": photos.num_searched},
        "machine": describe_machine(network.device),
        "timed_in": str(dtype).removeprefix("torch."),
        **measure_speeds(network, timed, photos, macs, chosen, batch_size),
        "tried": describe_search(search, cost, macs),
        "trials": budget.used_trials,
        "seconds": rounded(time.monotonic() - start),
        "notes": [note.removeprefix("note: ") for note in [*notes, *photos.notes]],
    }
    for speed, schedule in chosen.items():
        found = search.try_out(schedule, len(search.ends) - 1)
        row = record["speeds"][speed_name(speed)]
        row["searched"] = {"loss": rounded(found.loss)}
        row["searched"] |= {} if found.agreement is None else {"agreement": rounded(found.agreement)}
        if measure == "time" and row["times_as_fast"] < TIME_TOLERANCE * speed:
            record["notes"].append(f"Speed {speed_name(speed)} came out as {row['times_as_fast']:.2f} times as fast.")
    offered = {speed: schedule_fields(schedule, macs.num_patches) for speed, schedule in chosen.items()}
    if effort is not None:
        original = copy.deepcopy(network)
        record["recovery"] = recovered(network, original, pool, offered, effort, log, settings, show_progress)
        if record["recovery"]["is_kept"]:
            measure_recovered(record, network, original, photos, batch_size)
    offer(network, offered)
    write(output_dir, network.to(dtype), image_processor, record, photos)
    log.remove()
    return record


def plan_recovery(recover: str | float) -> Effort:
    """The effort. Learning needs packages that a search does not; this says so before the search."""
    from ..recovery import learning  # noqa: F401

    return read_effort(recover)


def recovered(
    model: nn.Module,
    original: nn.Module,
    pool: torch.Tensor,
    speeds: dict[float, dict[str, Any]],
    effort: Effort,
    log: TrialLog,
    settings: dict[str, Any],
    show_progress: bool,
) -> dict[str, Any]:
    """Teaches the model, at the fields of each speed, what the original says to the images of `pool`."""
    from ..recovery.learning import teach

    original.change_schedule(hvt_pool=None)
    with tqdm(total=100, desc="recovering", unit="%", disable=not show_progress, bar_format=BAR) as bar:
        file = log.path.with_name("recovery.pt")
        return teach(model, original, pool, list(speeds.values()), effort, file, settings, Progress(bar))


BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left{postfix}"


class Progress:
    """Moves a progress bar to the used share of a budget."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, share: float) -> None:
        self.bar.update(100 * share - self.bar.n)


def check_arguments(
    faster: Sequence[float], measure: str, minutes: float | None, trials: int | None, batch_size: int
) -> list[float]:
    """The speeds as numbers, each once; raises a `ValueError` for arguments that make no sense."""
    speeds = [float(speed) for speed in faster]
    if not speeds or not all(1 < speed < math.inf for speed in speeds):
        raise ValueError(f"`faster={list(faster)}` must be numbers above 1, such as 1.5 or 2.")
    if measure not in MEASURES:
        raise ValueError(f"`measure={measure}` is unknown: choose {' or '.join(MEASURES)}.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"`minutes={minutes}` must be more than 0.")
    check_at_least_one(trials=trials, batch_size=batch_size)
    return list(dict.fromkeys(speeds))


def check_reachable(speeds: list[float], measure: str, cost: Any, model: nn.Module) -> None:
    """Raises a `ValueError` for a speed that not even the schedule of the lowest cost reaches."""
    fitter = fitter_for(cost, model)
    lowest = cost(fitter.cheapest)
    fastest = cost.unpooled / lowest
    if max(speeds) <= fastest:
        return
    if measure == "macs":
        details = f"times fewer MACs ({format_macs(lowest)} instead of {format_macs(cost.unpooled)})"
    else:
        details = f"times less time ({1000 * lowest:.2f} ms an image instead of {1000 * cost.unpooled:.2f} ms)"
    blocks = schedule_name([block for block, _ in fitter.cheapest])
    # Rounded down, so that it can be reached.
    raise ValueError(
        f"`faster={speed_name(max(speeds))}` cannot be reached: the fastest is {math.floor(100 * fastest) / 100:g} "
        f"{details}, with half of the tokens merged at blocks {blocks}. Ask for less."
    )


def fitter_for(cost: Any, model: nn.Module) -> Fitter:
    return Fitter(cost, model.config.tokens_per_stage()[0], model.config.num_hidden_layers)


def working_place(output_dir: Path) -> Path:
    """Where the search keeps what it tried until the output folder is written."""
    output_dir = output_dir.resolve()
    return output_dir.parent / f".{output_dir.name}.speed-up"


def time_cost(model: nn.Module, photos: Photos, macs: MacsCost, log: TrialLog, batch_size: int) -> TimeCost:
    """The cost in seconds, measured, or as a search that was killed has measured it."""
    file = log.path.with_name("timing.json")
    batch = photos.pixel_values[:batch_size].to(model.device, model.dtype)
    if not (log.num_resumed and file.is_file()):
        write_json(file, TimeCost.measure(model, batch, macs))
    return TimeCost(macs, [(tuple(map(tuple, schedule)), seconds) for schedule, seconds in read_json(file)])


def search_all(
    search: Search, cost: Any, speeds: list[float], timed: nn.Module, batch_size: int
) -> dict[float, Schedule]:
    """The best schedule for each speed. Each gets an equal part of the budget, and what the speeds before it left."""
    chosen: dict[float, Schedule] = {}
    fitter = fitter_for(cost, timed)
    for number, speed in enumerate(speeds, start=1):
        search.budget.share = number / len(speeds)
        limit = cost.unpooled / speed
        found = search.find(fitter, limit, chosen.values())
        if cost.name == "time":
            found = corrected(search, fitter, limit, found, speed, timed, batch_size)
        chosen[speed] = found
    return chosen


def corrected(
    search: Search, fitter: Fitter, limit: float, found: Schedule, speed: float, timed: nn.Module, batch_size: int
) -> Schedule:
    """Lowers the limit until the schedule is as fast as wanted, because the time of a schedule is only estimated."""
    batch = search.evaluator.pixel_values[:batch_size].to(timed.device, timed.dtype)
    for _ in range(MAX_CORRECTIONS):
        without, seconds = seconds_per_image(timed, batch, [(), found])
        if without / seconds >= TIME_TOLERANCE * speed:
            break
        limit *= without / seconds / speed
        slower, found = found, search.find(fitter, limit, [found])
        if found is None:
            return slower
    return found


def offer(model: nn.Module, speeds: dict[float, dict[str, Any]]) -> None:
    """Writes the speeds into the configuration and chooses the first."""
    model.config.speeds = speeds
    model.set_speed(next(iter(speeds)))


def write(output_dir: Path, model: nn.Module, image_processor: Any, record: dict[str, Any], photos: Photos) -> None:
    """Writes the folder, which appears when it is complete."""
    skipped = photos.bad_images.summary() if photos.bad_images.of_kind("skipped") else None
    with folder_written_whole(output_dir) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        write_json(folder / RECORD, record)
        save_figure(draw_curve(record), folder / PICTURE)
        write_card(folder, model, record, skipped)


class SpeedsCommand(PlainUsageCommand):
    """Takes several numbers after `--faster`: `--faster 1.5 2 3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        taking = False
        for word in args:
            taking = word == "--faster" or (taking and is_number(word))
            # Each number gets a flag of its own.
            if taking and word != "--faster" and words[-1] != "--faster":
                words.append("--faster")
            words.append(word)
        return super().parse_args(ctx, words)


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


COMMAND_SETTINGS = {"cls": SpeedsCommand}


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A trained ViT or HPool-ViT: a saved folder, a file or a Hub id.")
    ],
    images: UnlabelledImages,
    output_dir: OutputDir,
    faster: Annotated[
        list[float], typer.Option(metavar="NUMBERS", help="How many times faster, one or several: 1.5 2 3.")
    ] = [2.0],  # noqa: B006 - typer copies it
    measure: Annotated[
        Literal["macs", "time"],
        typer.Option(help="What counts: multiply-accumulates, or seconds on this machine at --batch_size."),
    ] = "macs",
    minutes: Annotated[
        float | None, typer.Option(help="How long to search. Default: 10, unless --trials is given.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="How many schedules to try at most; the result is then the same on every run.")
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|EPOCHS",
            help="Learn the original's answers for this long, for all speeds: 90s, 20m, 1h, or 10 for 10 epochs.",
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(help="How many images to use, random ones: half to search with, half to report on.")
    ] = ENOUGH_IMAGES,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 16,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Decides which images are used, and the order of what is tried.")] = 0,
    disable_tqdm: DisableTqdm = False,
) -> None:
    """
    Make a trained model faster, and choose where to merge its tokens on your own images.

    The search looks for the blocks and numbers of tokens that change the model's answers least at each speed that you
    ask for. Half of the images are for the search, the others for the report. Nothing is trained, unless you pass
    --recover: then one set of weights learns to answer as the original does, at all speeds.

    The output folder offers all speeds: `hpool-vit predict OUTPUT_DIR photo.jpg --speed 2`. It holds the report as
    README.md, speed_up.json and speed_up.png. If the search is killed, run the same command again: it goes on.
    """
    record = speed_up(
        model,
        images,
        output_dir,
        faster=faster,
        measure=measure,
        minutes=minutes,
        trials=trials,
        recover=recover,
        num_images=num_images,
        batch_size=batch_size,
        device=device,
        seed=seed,
        show_progress=not disable_tqdm,
    )
    print(summary(record))
    print(f"Saved in {output_dir}.", file=sys.stdout)
