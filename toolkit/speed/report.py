"""What a search found, measured on images that it did not see: as a dictionary, as text and in the model card."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.card import write_model_card
from ..inspection.stats import format_macs
from ..shared.console import hub_id
from ..shared.folders import counted
from ..shared.measuring import format_table
from .costs import MacsCost, seconds_per_image
from .evaluation import Differences, Evaluator, rounded
from .inputs import Photos
from .schedules import Schedule, schedule_fields
from .search import Search


RECORD, PICTURE = "speed_up.json", "speed_up.png"
NUM_RESAMPLES = 1000


def interval(losses: torch.Tensor) -> list[float]:
    """The 95 % interval of the mean, by bootstrap over the images."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(losses), (NUM_RESAMPLES, len(losses)), generator=generator)
    quantiles = losses[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=losses.dtype))
    return [rounded(value) for value in quantiles.tolist()]


def measure(
    model: nn.Module,
    timed: nn.Module,
    photos: Photos,
    macs: MacsCost,
    chosen: dict[float, Schedule],
    batch_size: int,
) -> dict[str, Any]:
    """
    Measures speeds on the images that were held back.

    Args:
        model: the model in float32; its schedule changes.
        timed: the model in the type that it is used in; its schedule changes.
        photos: all images.
        macs: counts the multiply-accumulates.
        chosen: a schedule for each speed.
        batch_size: images per forward pass, also where the time is measured.

    Returns:
        `unpooled` and `speeds`: for each its cost, how fast it is, and how far its answers are from those without
        pooling.
    """
    evaluator = Evaluator(model, photos.held_back, batch_size)
    labels = photos.labels_held_back(model.config.id2label)
    schedules = [(), *chosen.values()]
    batch = photos.held_back[:batch_size].to(timed.device, timed.dtype)
    seconds = seconds_per_image(timed, batch, schedules)
    rows = []
    for schedule, time in zip(schedules, seconds, strict=True):
        fields = schedule_fields(schedule, macs.num_patches)
        row = {
            **fields,
            "tokens_per_stage": model.config.with_schedule(**fields).tokens_per_stage(),
            "macs": macs(schedule),
            "times_fewer_macs": rounded(macs.unpooled / macs(schedule)),
            "images_per_second": rounded(1 / time),
            "times_as_fast": rounded(seconds[0] / time),
        }
        rows.append(row | differences_as_numbers(evaluator.evaluate(fields), labels))
    return {"unpooled": rows[0], "speeds": dict(zip(map(speed_name, chosen), rows[1:], strict=True))}


def measure_recovered(
    record: dict[str, Any], model: nn.Module, original: nn.Module, photos: Photos, batch_size: int
) -> None:
    """
    Replaces in a record what was measured before a recovery. Losses then are the differences of the recovered weights,
    also without pooling, from the original without pooling.
    """
    labels = photos.labels_held_back(model.config.id2label)
    evaluator = Evaluator(model, photos.held_back, batch_size, max_cache_bytes=0)
    evaluator.compare_with(Evaluator(original, photos.held_back, batch_size, max_cache_bytes=0))
    for row in (record["unpooled"], *record["speeds"].values()):
        fields = {name: row[name] for name in ("hvt_pool", "merge_ratio") if name in row}
        numbers = differences_as_numbers(evaluator.evaluate(fields), labels)
        row["before_recovery"] = {name: row[name] for name in numbers}
        row |= numbers


def differences_as_numbers(differences: Differences, labels: torch.Tensor | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {"loss": rounded(differences.loss), "loss_interval": interval(differences.losses)}
    if differences.agreement is not None:
        numbers["agreement"] = rounded(differences.agreement)
    if labels is not None and differences.answers is not None:
        numbers["accuracy"] = rounded((differences.answers == labels).float().mean().item())
    return numbers


def speed_name(speed: float) -> str:
    return f"{speed:g}"


def describe_search(search: Search, cost: Any, macs: MacsCost) -> list[dict[str, Any]]:
    """All schedules that were tried, with the images that they got: those that lose much got few."""
    described = []
    for tried in search.tried():
        row = {
            **schedule_fields(tried.schedule, macs.num_patches),
            "macs": macs(tried.schedule),
            "times_fewer_macs": rounded(macs.unpooled / macs(tried.schedule)),
            "faster": rounded(cost.unpooled / cost(tried.schedule)),
            "num_images": tried.num_images,
            "loss": rounded(tried.loss),
        }
        described.append(row | ({} if tried.agreement is None else {"agreement": rounded(tried.agreement)}))
    return described


def describe_images(photos: Photos) -> dict[str, Any]:
    return {
        "folder": photos.folder,
        "found": photos.num_found,
        "held_back": len(photos.held_back),
        "skipped": photos.bad_images.of_kind("skipped"),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def loss_name(record: dict[str, Any]) -> str:
    return "KL" if record["loss"] == "kl" else "1 − cosine"


def table(record: dict[str, Any]) -> str:
    """The speeds as a table in Markdown."""
    rows = {"1": record["unpooled"], **record["speeds"]}
    has_head, has_labels = record["loss"] == "kl", "accuracy" in record["unpooled"]
    header = ["speed", "blocks", "tokens", "MACs", "fewer MACs", "images/s", "as fast", loss_name(record)]
    header += ["same answer"] * has_head + ["accuracy"] * has_labels
    is_recovered = "before_recovery" in record["unpooled"]
    header += [f"{loss_name(record)} before", *["accuracy before"] * has_labels] * is_recovered
    lines = []
    for name, row in rows.items():
        low, high = row["loss_interval"]
        before = row.get("before_recovery", {})
        lines.append(
            [
                name,
                ", ".join(map(str, row["hvt_pool"] or [])) or "none",
                " → ".join(map(str, row["tokens_per_stage"])),
                format_macs(row["macs"]),
                f"{row['times_fewer_macs']:.2f} ×",
                f"{row['images_per_second']:,.1f}",
                f"{row['times_as_fast']:.2f} ×",
                f"{row['loss']:.4f} ({low:.4f}–{high:.4f})" if row["hvt_pool"] or is_recovered else "0",
                *([f"{row['agreement']:.1%}"] if has_head else []),
                *([f"{row['accuracy']:.1%}"] if has_labels else []),
                *([f"{before['loss']:.4f}" if row["hvt_pool"] else "0"] if before else []),
                *([f"{before['accuracy']:.1%}"] if before and has_labels else []),
            ]
        )
    return format_table(header, lines)


def explain(record: dict[str, Any]) -> str:
    """What the table shows, measured on what."""
    images = record["images"]
    what = (
        "KL is the KL divergence of the class probabilities from those without pooling"
        if record["loss"] == "kl"
        else "1 − cosine compares the pooled output with that without pooling"
    )
    return (
        f"Measured on {images['held_back']} images that the search did not see, of the folder "
        f"{Path(images['folder']).resolve().name}; the search used {images['searched']} others. {what}, with the 95 % "
        f"interval of its mean. The images per second were measured in turns, in {record['timed_in']} and batches of "
        f"{record['batch_size']}, with {counted(record['machine']['torch_threads'], 'thread')} of "
        f"{record['machine']['cpu'] or 'an unknown CPU'}"
        + (f" and {record['machine']['gpu']}." if record["machine"]["gpu"] else ".")
        + (f" {explain_recovery(record['recovery'])}" if "recovery" in record else "")
    )


def explain_recovery(recovery: dict[str, Any]) -> str:
    spent = f"{recovery['seconds'] / 60:.1f} minutes and {recovery['epochs']:.1f} epochs"
    if not recovery["is_kept"]:
        return f"A recovery of {spent} brought nothing on images held back, and the weights are the original's."
    return (
        f"The weights then learned the original's answers to {recovery['images']} images without labels in {spent}, "
        f"until {recovery['ended']}. All speeds share them, also 1, and are compared with the original. "
        '"Before" means with the weights of the original.'
    )


def facts_for_card(model: nn.Module, record: dict[str, Any], accuracy: float | None) -> dict[str, Any]:
    """What the model card says of a model, its source, and the images that it was measured on."""
    images = record["images"]
    return {
        "model": model,
        "label_names": [str(model.config.id2label[index]) for index in range(model.config.num_labels)],
        "data": {"name": Path(images["folder"]).resolve().name, "split": f"{images['held_back']} images held back"},
        "results": {} if accuracy is None else {"top1": accuracy},
        "hardware": record["machine"],
        "base_model": record["model"] if hub_id(record["model"]) else None,
    }


def write_card(folder: Path, model: nn.Module, record: dict[str, Any], bad_images: str | None) -> None:
    accuracy = record["speeds"][speed_name(record["default"])].get("accuracy")
    speeds = ", ".join(["1", *record["speeds"]])
    write_model_card(
        folder,
        **facts_for_card(model, record, accuracy),
        tables={
            "Speeds": f"`model.set_speed(…)`, or `from_pretrained(…, speed=…)`, takes {speeds}; the folder opens at "
            f"{speed_name(record['default'])}.\n\n{table(record)}\n\n{explain(record)}"
        },
        pictures={"What the search tried": PICTURE},
        bad_images=bad_images,
    )


def summary(record: dict[str, Any]) -> str:
    """The result for people, on the terminal."""
    images = record["images"]
    lines = [
        table(record),
        explain(record),
        f"{counted(record['trials'], 'schedule')} tried in {record['seconds'] / 60:.1f} minutes. "
        f"The folder opens at speed {speed_name(record['default'])}.",
    ]
    if images["skipped"]:
        lines.append(f"{counted(len(images['skipped']), 'image')} skipped:")
        lines += [f"  {skipped['name']}: {skipped['reason']}" for skipped in images["skipped"][:20]]
    return "\n".join([*lines, *(f"note: {note}" for note in record["notes"])])
