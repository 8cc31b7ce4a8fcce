"""What a training run leaves behind: accuracy of each class, pictures, log, model card, speed and hardware."""

import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import hpool_vit

from ..hub.card import write_model_card
from ..shared.console import needs, one_line
from ..shared.figures import save_figure
from ..shared.files import write_json
from ..shared.measuring import resident_bytes
from .arguments import full_record
from .evaluation import check_scores, load_metric


with needs("train"):
    import matplotlib
    import pandas as pd
    import psutil
    from accelerate import Accelerator
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from .run import TrainingRun

# Files in the output folder.
BAD_IMAGES = "bad_images.json"
LOG = "log.json"
SCHEDULES = "schedules.json"
RESULTS = "all_results.json"
CURVES_NAME = "curves.png"
CONFUSION_MATRIX_NAME = "confusion_matrix.png"
PER_CLASS_NAME = "per_class_accuracy.csv"

MAX_CLASSES_WITH_COUNTS = 20
MAX_TICKS = 40
MAX_CLASSES_COARSE = 200
NUM_CONFUSED_PAIRS = 10

# For each panel of the curves: the keys of the log, with the name and color of their curve.
TRAINING, EVALUATION, AVERAGED = ("training", "C0"), ("evaluation", "C1"), ("evaluation, averaged weights", "C2")
CURVES = {
    "loss": {"loss": TRAINING, "eval_loss": EVALUATION, "eval_ema_loss": AVERAGED},
    "top-1 accuracy": {"eval_top1": EVALUATION, "eval_ema_top1": AVERAGED},
    "learning rate": {"learning_rate": TRAINING},
}


def write_report(
    run: "TrainingRun",
    folder: Path,
    model: nn.Module,
    accelerator: Accelerator,
    results: dict[str, Any],
    log: list[dict[str, Any]],
):
    """
    Writes the files and the model card of a finished run. Every process calls this.

    Args:
        run: the run.
        folder: where to write them, of `run.results`.
        model: the model with its final weights, as the loop holds it.
        accelerator: of the loop.
        results: metrics of the last evaluation, and the loop's `train_runtime` and `train_samples_per_second`.
        log: the entries of the log, as for `draw_curves`.
    """
    scores, labels = run.evaluator.predict(model, accelerator)
    by_schedule = run.evaluator.evaluate_schedules(model, accelerator, run.schedules)
    run.records.write(folder / BAD_IMAGES, run.is_main_process)
    if not run.is_main_process:
        return
    if by_schedule:
        write_json(folder / SCHEDULES, by_schedule)
    write_json(folder / LOG, log)
    write_json(folder / RESULTS, results)
    draw_curves(log, folder / CURVES_NAME)
    print(run.records.bad_images.summary(), flush=True)
    final = final_report(scores, labels, run.data.class_names, folder)
    saved = "eval_ema_" if run.average else "eval_"
    shown = {name: results[saved + name] for name in ("top1", "top5", "loss")}
    shown |= {f"top-1 with schedule {name}": f"{top1:.2%}" for name, top1 in by_schedule.items()}
    shown |= {name: final[name] for name in ("num_images", "mean_class_accuracy")}
    write_card(run, folder, shown, results["train_runtime"], results["train_samples_per_second"])


def write_card(run: "TrainingRun", folder: Path, results: dict[str, Any], seconds: float, images_per_second: float):
    """The model card of a finished run, with recipe, data, results and hardware."""
    args, training = run.args, run.args.training
    source = args.data.dataset_name or args.data.train_dir or ", ".join(args.data.train_files)
    write_model_card(
        folder,
        model=run.model,
        label_names=run.data.class_names,
        recipe=full_record(args),
        data={"name": source, **{k: v for k, v in run.data.describe().items() if k != "class_names"}},
        results=results,
        hardware=describe_hardware(training.world_size),
        training={
            "seconds": seconds,
            "images_per_second": images_per_second,
            "epochs": training.num_train_epochs,
            "seed": training.seed,
            "weights": "moving average" if run.average else "of the last step",
            "command": args.command,
        },
        base_model=args.model.model_name_or_path,
        teacher=args.recipe.teacher,
        pictures={"Curves": CURVES_NAME, "Confusion matrix": CONFUSION_MATRIX_NAME},
        bad_images=run.records.bad_images.summary(),
    )


class SpeedMeter:
    """Images per second between two entries of the log, and the memory in use."""

    def __init__(self, images_per_step: int, device: torch.device):
        self.images_per_step, self.device = images_per_step, device
        self.last_time, self.last_step = time.perf_counter(), None

    def measure(self, step: int) -> dict[str, float]:
        """The values for the log after `step` steps. The first call starts the clock."""
        now, values = time.perf_counter(), memory_gb(self.device)
        if self.last_step is not None and step > self.last_step:
            images = (step - self.last_step) * self.images_per_step
            values["images_per_second"] = round(images / (now - self.last_time), 1)
        self.last_time, self.last_step = now, step
        return values


def final_report(scores: np.ndarray, labels: np.ndarray, label_names: list[str], output_dir: Path) -> dict[str, Any]:
    """
    Writes a picture of the confusion matrix and a table of the classes into `output_dir`.

    Args:
        scores, labels: as for `compute_metrics`, with its errors. The prediction is the first of the highest scores.
        label_names (`list[str]`): one name per column of `scores`.
        output_dir (`Path`): gets `confusion_matrix.png` and `per_class_accuracy.csv`.

    Returns:
        `num_images`; `mean_class_accuracy` of the classes that have images; `classes_without_images`, the names of
        the others; `most_confused`, up to ten pairs of `label` and `predicted` with the number of `images` and their
        `share` of the label's images, most images first.
    """
    scores, labels = check_scores(scores, labels)
    if len(label_names) != scores.shape[1]:
        raise ValueError(
            f"label_names has {len(label_names)} names for {scores.shape[1]} columns of scores: give one each."
        )
    metric = load_metric("confusion_matrix")
    counted = metric.compute(predictions=scores.argmax(axis=1), references=labels, num_labels=len(label_names))
    matrix = np.array(counted["confusion_matrix"])
    table = pd.DataFrame(
        {
            "name": [one_line(name) for name in label_names],
            "images": matrix.sum(axis=1),
            "right": matrix.diagonal(),
            "accuracy": np.array(counted["per_class_accuracy"], dtype=float),
        }
    )
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    table.to_csv(output_dir / PER_CLASS_NAME, index_label="label", encoding="utf-8")
    draw_confusion_matrix(matrix, table["name"].tolist(), output_dir / CONFUSION_MATRIX_NAME)
    return {
        "num_images": len(labels),
        "mean_class_accuracy": float(table["accuracy"].mean()),
        "classes_without_images": table["name"][table["images"] == 0].tolist(),
        "most_confused": _most_confused(matrix, table["name"]),
    }


def draw_confusion_matrix(matrix: np.ndarray, label_names: list[str], path: Path):
    """Draws counts of shape `(num_labels, num_labels)`, one row per class, with numbers if there is room for them."""
    num_labels = len(matrix)
    images = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, images, out=np.full(matrix.shape, np.nan), where=images > 0)
    with_counts = num_labels <= MAX_CLASSES_WITH_COUNTS
    size = max(4.5, 2.5 + 0.55 * num_labels) if with_counts else 11
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    # A cell without mistakes is white; one mistake among hundreds of images is already blue.
    blues = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.2, 1, 256)))
    colors = blues.with_extremes(under="white", bad="0.8")
    picture = axes.imshow(share, cmap=colors, norm=PowerNorm(0.5, vmin=1e-9, vmax=1), interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, format=PercentFormatter(1), ticks=[0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the class's images")
    ticks = range(0, num_labels, -(-num_labels // MAX_TICKS))
    names = [
        _shorten(label_names[tick] if len(ticks) == num_labels else f"{tick} {label_names[tick]}") for tick in ticks
    ]
    # Without `parse_math`, a dollar sign in a name is just a dollar sign.
    axes.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true class")
    title = f"{matrix.sum()} images, {np.trace(matrix) / matrix.sum():.2%} right"
    axes.set_title(title + ("; grey: no images" if (images == 0).any() else ""), fontsize=10)
    if with_counts:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if share[row, column] > 0.35 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=color)
    # At the finer resolution, each of 1,000 × 1,000 cells has two pixels.
    save_figure(figure, path, dpi=130 if num_labels <= MAX_CLASSES_COARSE else 260)


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> Path | None:
    """
    Draws loss, top-1 accuracy and learning rate against the epoch.

    Args:
        log_history (`list[dict]`): as `TrainerState.log_history` in Transformers: entries with `epoch` and any of
            `loss`, `learning_rate`, `eval_loss`, `eval_top1`, `eval_ema_loss`, `eval_ema_top1`; others are ignored.
            If an epoch has several values, the last one counts.
        path (`Path`): the picture.

    Returns:
        `path`, or None if the log holds nothing to draw.
    """
    log = pd.DataFrame(log_history).reindex(columns=["epoch", *(key for keys in CURVES.values() for key in keys)])
    log = log.apply(pd.to_numeric, errors="coerce").dropna(subset="epoch").sort_values("epoch", kind="stable")
    panels = {title: [key for key in keys if log[key].notna().any()] for title, keys in CURVES.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        return None
    figure = Figure(figsize=(8, 2.6 * len(panels) + 0.4), layout="constrained")
    for axes, (title, keys) in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False).flat, panels.items(), strict=True
    ):
        for key in keys:
            curve = log[["epoch", key]].dropna().drop_duplicates("epoch", keep="last")
            label, color = CURVES[title][key]
            if key.endswith("top1"):
                best = curve.loc[curve[key].idxmax()]
                label += f" (best {best[key]:.2%} at epoch {best['epoch']:g})"
            marker = "o" if len(curve) <= 50 else None
            axes.plot(curve["epoch"], curve[key], color=color, linewidth=1, marker=marker, markersize=3, label=label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if title == "top-1 accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if title != "learning rate":
            axes.legend(fontsize=8)
    axes.set_xlabel("epoch")
    save_figure(figure, path)
    return Path(path)


def describe_hardware(num_processes: int) -> dict[str, Any]:
    """
    Describes the machine that this process runs on; `num_processes` is the number of processes of the whole training.

    Returns:
        `machine`, `cpu`, `cpu_cores` (physical), `cpu_threads` (available to this process), `torch_threads`, `ram_gb`,
        `gpus` (a text each), `processes` and `versions`. A GB is 10⁹ bytes.
    """
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ("torch", "torchvision", "transformers", "accelerate", "datasets", "evaluate")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB" for gpu in gpus],
        "processes": num_processes,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
            "hpool_vit": hpool_vit.__version__,
        },
    }


def memory_gb(device: torch.device | str) -> dict[str, float]:
    """
    The peak memory of this process so far, in GB (10⁹ bytes): `peak_memory_gb`, the resident memory without the
    processes that load data, and on a CUDA device `peak_gpu_memory_gb`, the memory of PyTorch's tensors.
    """
    memory = {"peak_memory_gb": round(_peak_resident_bytes() / 1e9, 3)}
    if torch.device(device).type == "cuda":
        memory["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return memory


def _most_confused(matrix: np.ndarray, names: pd.Series) -> list[dict[str, Any]]:
    mistakes = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_CONFUSED_PAIRS]
    pairs = zip(*np.unravel_index(order, matrix.shape), strict=True)
    return [
        {
            "label": names[row],
            "predicted": names[column],
            "images": int(matrix[row, column]),
            "share": float(matrix[row, column] / matrix[row].sum()),
        }
        for row, column in pairs
        if mistakes[row, column]
    ]


def _shorten(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _peak_resident_bytes() -> int:
    # On Linux, `getrusage` would start at the peak of the parent process.
    peak = resident_bytes("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
