"""What a training reports: metrics, pictures of its course and of its mistakes, and the machine that it ran on."""

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import evaluate
import matplotlib
import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import hpool_vit

from ..shared.console import one_line
from ..shared.measuring import resident_bytes


METRICS = Path(__file__).resolve().parent / "metrics"
CONFUSION_MATRIX_NAME = "confusion_matrix.png"
PER_CLASS_NAME = "per_class_accuracy.csv"

MAX_CLASSES_WITH_COUNTS = 20
MAX_TICKS = 40
MAX_CLASSES_COARSE = 200
NUM_CONFUSED_PAIRS = 10

# The keys of the log in each panel of the curves, and their curve's name and colour.
TRAINING, EVALUATION, AVERAGED = ("training", "C0"), ("evaluation", "C1"), ("evaluation, averaged weights", "C2")
CURVES = {
    "loss": {"loss": TRAINING, "eval_loss": EVALUATION, "eval_ema_loss": AVERAGED},
    "top-1 accuracy": {"eval_top1": EVALUATION, "eval_ema_top1": AVERAGED},
    "learning rate": {"learning_rate": TRAINING},
}


def compute_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Top-1 and top-5 accuracy.

    Args:
        scores (`np.ndarray` of shape `(num_images, num_labels)`): logits or probabilities of all images.
        labels (`np.ndarray` of shape `(num_images,)`): their labels, integers.

    Returns:
        `{"top1": …, "top5": …}`, each in [0, 1]. A tie with the label's score counts as wrong.

    Raises:
        `ValueError`: shapes that do not fit, no images, scores that are NaN, labels outside the columns of `scores`.
    """
    scores, labels = _check(scores, labels)
    if scores.shape[1] > 6:
        scores, labels = _keep_rivals(scores, labels)
    return _load_metric("topk_accuracy").compute(predictions=scores, references=labels)


def final_report(scores: np.ndarray, labels: np.ndarray, label_names: list[str], output_dir: Path) -> dict[str, Any]:
    """
    Writes the confusion matrix as a picture, and a table of the classes, into `output_dir`.

    Args:
        scores, labels: as in `compute_metrics`, with its errors. The prediction is the first of the highest scores.
        label_names (`list[str]`): one name per column of `scores`.
        output_dir (`Path`): gets `confusion_matrix.png` and `per_class_accuracy.csv`.

    Returns:
        `num_images`; `mean_class_accuracy`, over the classes that have images; `classes_without_images`, their names;
        `most_confused`, up to ten pairs of `label` and `predicted` with the number of `images` and their `share` of
        the label's images, most images first.
    """
    scores, labels = _check(scores, labels)
    if len(label_names) != scores.shape[1]:
        raise ValueError(
            f"label_names has {len(label_names)} names for {scores.shape[1]} columns of scores: give one each."
        )
    metric = _load_metric("confusion_matrix")
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
    """Draws counts of shape `(num_labels, num_labels)`, a row per class; as numbers too where there is room."""
    num_labels = len(matrix)
    images = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, images, out=np.full(matrix.shape, np.nan), where=images > 0)
    with_counts = num_labels <= MAX_CLASSES_WITH_COUNTS
    size = max(4.5, 2.5 + 0.55 * num_labels) if with_counts else 11
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    # No mistake at all is white, and one among hundreds of images already blue.
    blues = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.2, 1, 256)))
    colours = blues.with_extremes(under="white", bad="0.8")
    picture = axes.imshow(share, cmap=colours, norm=PowerNorm(0.5, vmin=1e-9, vmax=1), interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, format=PercentFormatter(1), ticks=[0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the class's images")
    ticks = range(0, num_labels, -(-num_labels // MAX_TICKS))
    names = [
        _shorten(label_names[tick] if len(ticks) == num_labels else f"{tick} {label_names[tick]}") for tick in ticks
    ]
    # `parse_math`: a dollar sign in a name is a dollar sign.
    axes.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true class")
    title = f"{matrix.sum()} images, {np.trace(matrix) / matrix.sum():.2%} right"
    axes.set_title(title + ("; grey: no images" if (images == 0).any() else ""), fontsize=10)
    if with_counts:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if share[row, column] > 0.35 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=colour)
    # At the finer resolution a cell of a thousand by a thousand has two pixels.
    _save(figure, path, dpi=130 if num_labels <= MAX_CLASSES_COARSE else 260)


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> Path | None:
    """
    Draws loss, top-1 accuracy and learning rate against the epoch.

    Args:
        log_history (`list[dict]`): as in Transformers' `TrainerState.log_history`: entries with `epoch` and any of
            `loss`, `learning_rate`, `eval_loss`, `eval_top1`, `eval_ema_loss`, `eval_ema_top1`; others are left out.
            Of several values for one epoch the last counts.
        path (`Path`): the picture.

    Returns:
        `path`, or None where nothing was logged that can be drawn.
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
            label, colour = CURVES[title][key]
            if key.endswith("top1"):
                best = curve.loc[curve[key].idxmax()]
                label += f" (best {best[key]:.2%} at epoch {best['epoch']:g})"
            marker = "o" if len(curve) <= 50 else None
            axes.plot(curve["epoch"], curve[key], color=colour, linewidth=1, marker=marker, markersize=3, label=label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if title == "top-1 accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if title != "learning rate":
            axes.legend(fontsize=8)
    axes.set_xlabel("epoch")
    _save(figure, path)
    return Path(path)


def describe_hardware(num_processes: int) -> dict[str, Any]:
    """
    The machine that this process runs on, for a reader; `num_processes` are those of the whole training.

    Returns:
        `machine`, `cpu`, `cpu_cores` (physical), `cpu_threads` (that this process may use), `torch_threads`, `ram_gb`,
        `gpus` (a text each), `processes` and `versions`. GB are 10⁹ bytes.
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
    The most memory this process has held so far, in GB (10⁹ bytes): `peak_memory_gb`, resident, without the processes
    that load data; on a CUDA device also `peak_gpu_memory_gb`, what PyTorch's tensors took at most.
    """
    memory = {"peak_memory_gb": round(_peak_resident_bytes() / 1e9, 3)}
    if torch.device(device).type == "cuda":
        memory["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return memory


def _check(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.size:
        raise ValueError(
            f"scores has the shape {scores.shape} and labels {labels.shape}: give (num_images, num_labels) and "
            "(num_images,), of one image at least."
        )
    num_labels = scores.shape[1]
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels has the type {labels.dtype}: give integers from 0 to {num_labels - 1}.")
    bad = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(bad):
        raise ValueError(f"labels[{bad[0]}] is {labels[bad[0]]}: give integers from 0 to {num_labels - 1}.")
    bad = np.flatnonzero(np.isnan(scores).any(axis=1))
    if len(bad):
        raise ValueError(
            f"scores is NaN for {len(bad)} of {len(scores)} images, first for image {bad[0]}: the model has diverged; "
            "go back to a checkpoint before that and lower the learning rate."
        )
    return scores, labels.astype(np.int64)


def _keep_rivals(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Only the label's score, now label 0, and the five highest others: the same ranks up to the fifth. `evaluate` makes
    an object of each number, which for 50,000 images and 1,000 labels would take 25 seconds and 2.5 GB.
    """
    rivals = scores.astype(np.float32)
    right = np.take_along_axis(rivals, labels[:, None], axis=1)
    np.put_along_axis(rivals, labels[:, None], -np.inf, axis=1)
    rivals.partition(rivals.shape[1] - 5, axis=1)
    return np.concatenate([right, rivals[:, -5:]], axis=1), np.zeros_like(labels)


def _load_metric(name: str) -> evaluate.Metric:
    # In memory: files in the cache would be shared with every other process that computes the metric.
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


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


def _save(figure: Figure, path: Path, dpi: int = 130):
    with warnings.catch_warnings():
        # Matplotlib's font lacks many scripts; such letters become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=dpi)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _peak_resident_bytes() -> int:
    # Not `getrusage` on Linux, where it starts at the peak of the process that started this one.
    peak = resident_bytes("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
