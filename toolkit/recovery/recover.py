"""Recover what pooling costs a converted model: a function for programs, and the command `hpool-vit recover`."""

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from tqdm import tqdm

from ..conversion.sources import is_hpool_vit
from ..hub.card import write_model_card
from ..inspection.stats import format_macs, model_stats
from ..shared.console import check_at_least_one, schedule_name
from ..shared.devices import choose_device
from ..shared.files import check_output_dir, folder_written_whole, write_json
from ..shared.folders import counted
from ..shared.measuring import format_table
from ..shared.options import Device, DisableTqdm, OutputDir, UnlabelledImages
from ..shared.saved_model import SavedModelError, check_complete, segments
from ..speed.costs import MacsCost
from ..speed.evaluation import Evaluator, rounded
from ..speed.inputs import ENOUGH_IMAGES, Photos, load_as_saved, load_model, load_photos, read_pool
from ..speed.report import describe_images, describe_machine, differences_as_numbers, facts_for_card, loss_name
from ..speed.speed_up import BAR, Progress
from ..speed.trials import fingerprint
from .effort import read_effort
from .learning import teach


RECORD = "recovery.json"
EFFORT = "20m"


def recover(
    model: str | Path,
    teacher: str | Path,
    images: str | Path,
    output_dir: str | Path,
    *,
    effort: str | float = EFFORT,
    num_images: int = ENOUGH_IMAGES,
    batch_size: int = 16,
    device: str | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """
    Teaches an HPool-ViT the answers of the model without pooling that it was converted from. The images need no
    labels. Half of `num_images` are for the report; all others of the folder teach.

    If it is killed, call it again with the same arguments: it goes on where it stopped.

    Args:
        model (`str` or `Path`): the folder or Hub id of an HPool-ViT that pools in any way. If it has `speeds` or
            `hvt_pool_choices`, one set of weights learns for all of them.
        teacher (`str` or `Path`): the model without pooling: anything that [`convert`] reads, or the folder or Hub id
            of an HPool-ViT that merges or does not pool.
        images (`str` or `Path`): a folder of images like those that the model is for, at any depth.
        output_dir (`str` or `Path`): a folder that does not exist yet, or is empty.
        effort (`str` or `float`): how long to learn: a time such as `"20m"`, or a number of epochs.
        num_images (`int`): how many images to report on and to learn from at least, half of them each.
        batch_size (`int`): images per forward pass of the report.
        device (`str`, *optional*): `cpu`, `cuda`, `mps`, …. Default: an accelerator if there is one.
        seed (`int`): decides which images are used, and their order.
        show_progress (`bool`): whether to show a progress bar on standard error.

    Returns:
        The content of recovery.json.

    Raises:
        ValueError: for a model, a teacher or images that cannot be used, and if nothing was gained on images held
            back: then nothing is written.
        OSError: if something cannot be written.
    """
    start = time.monotonic()
    output_dir, plan = Path(output_dir), read_effort(effort, "effort")
    check_at_least_one(batch_size=batch_size)
    check_output_dir(output_dir)
    student, image_processor, notes = load_student(str(model))
    original, their_processor, _ = load_model(str(teacher))
    check_pair(student, image_processor, original, their_processor, str(teacher))
    dtype, own = student.dtype, own_schedule(student)
    for network in (student, original):
        network.to(choose_device(device), torch.float32)
    photos = load_photos(images, image_processor, num_images, seed)
    pool = read_pool(photos, image_processor)
    schedules = schedules_of(student)
    labels = photos.labels_held_back(student.config.id2label)
    teacher_evaluator, evaluator = (
        Evaluator(network, photos.held_back, batch_size, max_cache_bytes=0) for network in (original, student)
    )
    evaluator.compare_with(teacher_evaluator)
    macs = MacsCost(original.config).unpooled
    before = measure(evaluator, schedules, macs, labels)
    settings = {"model": fingerprint(student), "teacher": fingerprint(original), "images": photos.files, "seed": seed}
    file = output_dir.resolve().parent / f".{output_dir.name}.recover" / "recovery.pt"
    with tqdm(total=100, desc="recovering", unit="%", disable=not show_progress, bar_format=BAR) as bar:
        result = teach(student, original, pool, list(schedules.values()), plan, file, settings, Progress(bar))
    if not result["is_kept"]:
        remove_place(file)
        raise ValueError(
            f"`effort={effort}` brought nothing on {counted(result['held_back'], 'image')} held back until "
            f"{result['ended']}, so nothing is written. Give it more time or more images."
        )
    after = measure(evaluator, schedules, macs, labels)
    record = {
        "model": str(model),
        "teacher": str(teacher),
        "loss": "kl" if student.config.num_labels else "cosine",
        "seed": seed,
        "images": describe_images(photos),
        "machine": describe_machine(student.device),
        "unpooled": {
            "macs": macs,
            **differences_as_numbers(teacher_evaluator.evaluate({"hvt_pool": None}), labels),
        },
        "schedules": {name: {**row, "before": numbers_of(before[name])} for name, row in after.items()},
        "recovery": result,
        "seconds": rounded(time.monotonic() - start),
        "notes": [note.removeprefix("note: ") for note in [*notes, *photos.notes]],
    }
    student.change_schedule(**own)
    write(output_dir, student.to(dtype), image_processor, record, photos)
    remove_place(file)
    return record


def load_student(name: str) -> tuple[nn.Module, Any, list[str]]:
    """
    An HPool-ViT that pools, its image processor, and notes.

    Raises:
        SavedModelError: if it cannot be loaded, does not pool, or segments images.
    """
    if not is_hpool_vit(name):
        raise SavedModelError(f"{name} is not the folder or Hub id of an HPool-ViT: run `hpool-vit convert` first.")
    if segments(name):
        raise SavedModelError(f"{name} segments images, and only the answers of classifiers and features are learned.")
    model, image_processor, notes, new = load_as_saved(name)
    check_complete(name, model, new)
    if not schedules_of(model):
        raise SavedModelError(f"{name} does not pool, so there is nothing to recover.")
    return model, image_processor, notes


def own_schedule(model: nn.Module) -> dict[str, Any]:
    return {"hvt_pool": model.config.hvt_pool, "merge_ratio": model.config.merge_ratio}


def schedules_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name, the fields of the configuration that give each way in which the model is meant to pool."""
    config = model.config
    schedules = {f"speed {speed:g}": dict(fields) for speed, fields in (config.speeds or {}).items()}
    for blocks in config.schedules if not schedules else []:
        if blocks:
            schedules[schedule_name(blocks)] = {"hvt_pool": blocks, "merge_ratio": config.merge_ratio}
    return schedules


def check_pair(student: nn.Module, processor: Any, teacher: nn.Module, their_processor: Any, name: str) -> None:
    """Raises a `ValueError` if the two do not answer the same question about the same pixels."""
    ours, theirs = student.config, teacher.config
    for what, own, other in (
        ("labels", ours.num_labels, theirs.num_labels),
        ("image size", ours.image_shape, theirs.image_shape),
        ("image mean", list(processor.image_mean), list(their_processor.image_mean)),
        ("image standard deviation", list(processor.image_std), list(their_processor.image_std)),
        *([] if ours.num_labels else [("width of the pooled output", ours.pooled_size, theirs.pooled_size)]),
    ):
        if own != other:
            raise ValueError(
                f"`teacher={name}` does not fit the model: {what} {other} instead of {own}. Give the model that "
                "it was converted from."
            )


def measure(
    evaluator: Evaluator, schedules: dict[str, dict[str, Any]], unpooled_macs: int, labels: torch.Tensor | None
) -> dict[str, dict[str, Any]]:
    """What each schedule costs, and how far it is from the original on the images held back."""
    rows = {}
    for name, fields in schedules.items():
        config = evaluator.model.config.with_schedule(**fields)
        macs = model_stats(config)["macs"]
        rows[name] = {
            **fields,
            "tokens_per_stage": config.tokens_per_stage(),
            "macs": macs,
            "times_fewer_macs": rounded(unpooled_macs / macs),
            **differences_as_numbers(evaluator.evaluate(fields), labels),
        }
    return rows


def numbers_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("loss", "loss_interval", "agreement", "accuracy") if name in row}


def remove_place(file: Path) -> None:
    # A killed run may have left an unfinished file in it.
    shutil.rmtree(file.parent, ignore_errors=True)


def table(record: dict[str, Any]) -> str:
    """What was gained, as a table in Markdown."""
    loss, unpooled = loss_name(record), record["unpooled"]
    shares = [
        (name, label) for name, label in (("agreement", "same answer"), ("accuracy", "accuracy")) if name in unpooled
    ]
    header = ["pooling at", "tokens", "MACs", "fewer MACs", f"{loss} before", loss]
    header += [f"{label}{when}" for _, label in shares for when in (" before", "")]
    rows = []
    for name, row in record["schedules"].items():
        cells = [name, " → ".join(map(str, row["tokens_per_stage"])), format_macs(row["macs"])]
        cells += [f"{row['times_fewer_macs']:.2f} ×", f"{row['before']['loss']:.4f}", f"{row['loss']:.4f}"]
        rows.append(cells + [f"{numbers[key]:.1%}" for key, _ in shares for numbers in (row["before"], row)])
    return format_table(header, rows)


def explain(record: dict[str, Any]) -> str:
    images, recovery = record["images"], record["recovery"]
    accuracy = record["unpooled"].get("accuracy")
    return (
        f"Measured on {images['held_back']} images that the model did not learn from, against {record['teacher']} "
        + (f"without pooling, whose accuracy is {accuracy:.1%}. " if accuracy is not None else "without pooling. ")
        + f"It learned from {recovery['images']} images without labels, {recovery['seconds'] / 60:.1f} minutes and "
        f"{recovery['epochs']:.1f} epochs, until {recovery['ended']}."
    )


def write(output_dir: Path, model: nn.Module, image_processor: Any, record: dict[str, Any], photos: Photos) -> None:
    """Writes the folder, which appears when it is complete."""
    images, first = record["images"], next(iter(record["schedules"].values()))
    with folder_written_whole(output_dir) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        write_json(folder / RECORD, record)
        write_model_card(
            folder,
            **facts_for_card(model, record, first.get("accuracy")),
            teacher=record["teacher"],
            tables={"Recovery": f"{table(record)}\n\n{explain(record)}"},
            bad_images=photos.bad_images.summary() if images["skipped"] else None,
        )


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An HPool-ViT that pools: a saved folder or a Hub id.")
    ],
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="The model without pooling: a saved folder, a file or a Hub id.")
    ],
    images: UnlabelledImages,
    output_dir: OutputDir,
    effort: Annotated[
        str, typer.Option(metavar="TIME|EPOCHS", help="How long to learn: 90s, 20m, 1h, or 10 for 10 epochs.")
    ] = EFFORT,
    num_images: Annotated[
        int, typer.Option(help="Half of this many random images are for the report; all others teach.")
    ] = ENOUGH_IMAGES,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass of the report.")] = 16,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Decides which images are used, and their order.")] = 0,
    disable_tqdm: DisableTqdm = False,
) -> None:
    """
    Recover what pooling costs a trained model, without labels.

    The model learns the answers of the model without pooling that it was converted from. It may pool in any way: by
    maximum, average, on the grid or by merging. Nothing is written if it gains nothing on images held back.

    If the command is killed, run it again: it goes on where it stopped.
    """
    record = recover(
        model,
        teacher,
        images,
        output_dir,
        effort=effort,
        num_images=num_images,
        batch_size=batch_size,
        device=device,
        seed=seed,
        show_progress=not disable_tqdm,
    )
    print("\n".join([table(record), explain(record), *(f"note: {note}" for note in record["notes"])]))
    print(f"Saved in {output_dir}.", file=sys.stdout)
