"""
Draw the results of one or more runs of benchmark.py, and the accuracy of trained models against their speed.

    python examples/benchmark/plots.py outputs/batches.json outputs/sizes.json --output docs/results/benchmark \
        --accuracy docs/results/*.json

The panels depend on the results: throughput against batch size, time and memory against image size, or speed against
the reference if there is one batch size and image size; and accuracy against throughput for each file of
examples/research (compare_runs.py, warm_start_training_free.py) that has both.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import read_results

from hpool_vit.toolkit.shared.console import run


Records = list[dict[str, Any]]
MARKERS = "os^vDP*X"


@dataclass
class Panel:
    title: str
    draw: Callable[[Axes], None]


def collect(results: list[dict[str, Any]]) -> Records:
    """One record per row that ran, with task, image size and batch size of its group."""
    records = []
    for group in (group for result in results for group in result["groups"]):
        key = {name: group[name] for name in ("task", "image_size", "batch_size")}
        records += [{**key, **row} for row in group["rows"] if "not_run" not in row]
    return records


def curves(records: Records, across: str) -> dict[str, Records]:
    """By label, the records of a model in a mode that differ only in `across`, if there are two or more."""
    fixed = "image_size" if across == "batch_size" else "batch_size"
    by_curve = defaultdict(dict)
    for record in records:
        by_curve[record["model"], record["mode"], record[fixed]].setdefault(record[across], record)
    several_modes = len({record["mode"] for record in records}) > 1
    several_fixed = len({record[fixed] for record in records}) > 1
    found = {}
    for (model, mode, value), points in by_curve.items():
        if len(points) > 1:
            label = f"{model}, {mode}" if several_modes else model
            label += f", {fixed.removesuffix('_size')} {value}" if several_fixed else ""
            found[label] = [points[key] for key in sorted(points)]
    return found


def panels_of(records: Records) -> list[Panel]:
    panels = []
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        by_batch, by_size = curves(mine, "batch_size"), curves(mine, "image_size")
        if by_batch:
            panels.append(Panel(f"{task}: throughput", partial(draw_throughput, by_batch)))
        if by_size:
            panels.append(Panel(f"{task}: time", partial(draw_time, by_size)))
            if any(point["memory_mb"] for points in by_size.values() for point in points):
                panels.append(Panel(f"{task}: memory", partial(draw_memory, by_size)))
        if not by_batch and not by_size:
            panels.append(Panel(f"{task}: speed", partial(draw_bars, mine)))
    return panels


def draw_throughput(by_label: dict[str, Records], axes: Axes):
    for label, points in by_label.items():
        low, rate, high = zip(*(point["images_per_second"] for point in points), strict=True)
        batches = [point["batch_size"] for point in points]
        (line,) = axes.plot(batches, rate, marker="o", markersize=4, label=label)
        axes.fill_between(batches, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="batch", ylabel="images/s", xscale="log", ylim=(0, None))
    ticks(axes, by_label, "batch_size")


def draw_time(by_label: dict[str, Records], axes: Axes):
    for label, points in by_label.items():
        milliseconds = [1e3 / point["images_per_second"][1] for point in points]
        axes.plot([point["image_size"] for point in points], milliseconds, marker="o", markersize=4, label=label)
    axes.set(xlabel="image size", ylabel="ms per image", xscale="log", yscale="log")
    ticks(axes, by_label, "image_size")


def draw_memory(by_label: dict[str, Records], axes: Axes):
    for label, points in by_label.items():
        known = [(point["image_size"], point["memory_mb"]) for point in points if point["memory_mb"]]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=label)
    axes.set(xlabel="image size", ylabel="peak memory (MB)", xscale="log", ylim=(0, None))
    ticks(axes, by_label, "image_size")


def ticks(axes: Axes, by_label: dict[str, Records], name: str):
    """Puts a tick at each measured size, and the legend."""
    values = sorted({point[name] for points in by_label.values() for point in points})
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.legend(fontsize="x-small")


def draw_bars(records: Records, axes: Axes):
    """Speed against the reference, with the multiply-accumulates saved; images/s if there is no reference."""
    labels = [f"{record['model']}, {record['mode']}" for record in records]
    if compared := all("faster" in record for record in records):
        low, middle, high = zip(*(record["faster"] for record in records), strict=True)
    else:
        low, middle, high = zip(*(record["images_per_second"] for record in records), strict=True)
    errors = [
        [m - value for m, value in zip(middle, low, strict=True)],
        [value - m for m, value in zip(middle, high, strict=True)],
    ]
    axes.barh(labels, middle, xerr=errors, capsize=2, color="C0", alpha=0.8)
    if compared:
        macs = [record.get("fewer_macs", float("nan")) for record in records]
        axes.plot(macs, labels, "k|", markersize=14, markeredgewidth=2, label="fewer multiply-accumulates")
        axes.legend(fontsize="x-small")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    axes.set_xlabel("times as fast as the reference (quartiles)" if compared else "images/s (quartiles)")


def read_accuracies(path: Path) -> dict[str, tuple[float, float]]:
    """Images/s and top-1 in percent by model; empty if the file holds other results."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--accuracy {path} cannot be read: {error}") from error
    found = {}
    if isinstance(content, dict):
        for name, model in content.items():
            if isinstance(model, dict) and {"runs", "images_per_second"} <= model.keys():
                accuracy = statistics.mean(run["accuracy"] for run in model["runs"].values())
                found[name] = (model["images_per_second"], accuracy)
    elif isinstance(content, list):
        for setting in content:
            measured = setting.get("results", {}) if isinstance(setting, dict) else {}
            accuracies = [part["accuracy"] for part in measured.values() if isinstance(part, dict)]
            if accuracies and "images_per_second" in measured:
                found[setting["name"]] = (measured["images_per_second"], statistics.mean(accuracies))
    return found


def draw_accuracies(accuracies: dict[str, tuple[float, float]], axes: Axes):
    for number, (name, point) in enumerate(accuracies.items()):
        axes.plot(
            *point, linestyle="", marker=MARKERS[number // 10 % len(MARKERS)], color=f"C{number % 10}", label=name
        )
    axes.set(xlabel="images/s", ylabel="top-1 (%)")
    axes.legend(fontsize="xx-small", ncols=1 + len(accuracies) // 12)


def plot_results(results: list[dict[str, Any]], path: Path, accuracy_files: list[Path] = ()) -> Path:
    """
    Draws results into a PNG file.

    Raises:
        ValueError: if there is nothing to draw, or a file of accuracies cannot be read.
    """
    panels = panels_of(collect(results))
    for file in accuracy_files:
        accuracies = read_accuracies(file)
        if len(accuracies) > 1:  # one model is no comparison
            panels.append(Panel(f"accuracy: {file.stem}", partial(draw_accuracies, accuracies)))
    if not panels:
        raise ValueError("There is nothing to draw: no model ran, and no file has accuracies with speeds.")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmark.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="path of the picture, without suffix")
    parser.add_argument("--accuracy", type=Path, nargs="+", default=[], help="JSON files with accuracy and images/s")
    args = parser.parse_args(argv)
    path = args.output.with_name(f"{args.output.name}.png")
    print(plot_results([read_results(file) for file in args.results], path, args.accuracy))


if __name__ == "__main__":
    run(main)
