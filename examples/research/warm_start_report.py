"""
Print the tables and draw the plots of warm_start_training_free.py and warm_start_fine_tune.py.

    python examples/research/warm_start_report.py docs/results

Reads whichever files of raw numbers the folder has, and writes the plots beside them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from warm_start_fine_tune import FINE_TUNE_FILE, FINE_TUNED, LEARNING_RATE, UNPOOLED
from warm_start_training_free import RESIZES, RULES_FILE, SETTINGS_FILE, Setting

from hpool_vit.toolkit.shared.measuring import format_table


def report(folder: Path):
    """Prints the tables of the results in `folder`, and draws their plots there."""
    settings_file, rules_file, runs_file = (folder / name for name in (SETTINGS_FILE, RULES_FILE, FINE_TUNE_FILE))
    if settings_file.exists():
        settings = [Setting(**setting) for setting in json.loads(settings_file.read_text())]
        print(format_settings(settings), format_against_tome(settings), sep="\n\n", end="\n\n")
        plot_settings(settings, settings_file.with_suffix(".png"))
    if rules_file.exists():
        print(format_rules(json.loads(rules_file.read_text())), end="\n\n")
    if runs_file.exists():
        results = json.loads(runs_file.read_text())
        print(format_runs(results))
        plot_runs(results, runs_file.with_suffix(".png"))


def mean_accuracy(setting: Setting) -> float:
    return statistics.mean(setting.results[resize]["accuracy"] for resize in RESIZES)


def format_settings(settings: list[Setting]) -> str:
    """The results of every setting as a Markdown table."""
    macs, speed = (settings[0].results[name] for name in ("macs", "images_per_second"))
    header = ["setting", "MACs G", "fewer", *(f"top-1 {name}" for name in RESIZES), "KL", "images/s", "faster"]
    rows = []
    for setting in settings:
        results = setting.results
        accuracies = [f"{results[name]['accuracy']:.1f}" for name in RESIZES]
        divergence = statistics.mean(results[name]["divergence"] for name in RESIZES)
        rate = results["images_per_second"]
        fewer, faster = f"{macs / results['macs']:.2f} ×", f"{rate / speed:.2f} ×"
        row = [setting.name, f"{results['macs'] / 1e9:.3f}", fewer, *accuracies, f"{divergence:.3f}", f"{rate:.0f}"]
        rows.append([*row, faster])
    return format_table(header, rows)


def mean_divergence(setting: Setting) -> float:
    return statistics.mean(setting.results[resize]["divergence"] for resize in RESIZES)


def format_against_tome(settings: list[Setting]) -> str:
    """Merging against ToMe at equal MACs, interpolated linearly between its points, as a Markdown table."""
    tome = sorted((s for s in settings if s.family in ("none", "ToMe")), key=lambda s: s.results["macs"])
    macs = [setting.results["macs"] for setting in tome]
    rows = []
    for setting in (s for s in settings if s.family == "merge"):
        here = setting.results["macs"]
        rival, rival_kl = (np.interp(here, macs, [f(s) for s in tome]) for f in (mean_accuracy, mean_divergence))
        gain = mean_accuracy(setting) - rival
        name = setting.name.removeprefix("merge ")
        row = [f"{settings[0].results['macs'] / here:.2f} ×", name, f"{mean_accuracy(setting):.1f}"]
        rows.append([*row, f"{rival:.1f}", f"{gain:+.1f}", f"{mean_divergence(setting):.3f}", f"{rival_kl:.3f}"])
    return format_table(["MACs fewer", "setting", "top-1", "ToMe", "difference", "KL", "KL of ToMe"], rows)


def format_rules(results: dict[str, Any]) -> str:
    """The results of every rule as a Markdown table: top-1 under each resize and mean KL, all photos and by half."""
    parts = ("all", "half A", "half B")
    rows = []
    for name, scores in results.items():
        row = []
        for part in parts:
            accuracies = " / ".join(f"{scores[resize][part]['accuracy']:.1f}" for resize in RESIZES)
            divergence = statistics.mean(scores[resize][part]["divergence"] for resize in RESIZES)
            row.append(f"{accuracies}, {divergence:.3f}")
        rows.append([*name.split("; "), *row])
    return format_table(["setting", "similarity", *parts], rows)


def accuracies_of(results: dict[str, Any]) -> dict[tuple[str, float], dict[int, float]]:
    """The accuracy of each seed, by model and learning rate; those at `LEARNING_RATE` come first."""
    accuracies = {}
    for run in results["runs"]:
        learning_rate = run["learning_rate"]
        scores = {run["name"]: run, **(run.get("faster", {}) if learning_rate == LEARNING_RATE else {})}
        for name, scored in scores.items():
            accuracies.setdefault((name, learning_rate), {})[run["seed"]] = scored["accuracy"]
    order = list(dict.fromkeys([*FINE_TUNED, *results["models"]]))
    return dict(sorted(accuracies.items(), key=lambda item: (item[0][1] != LEARNING_RATE, order.index(item[0][0]))))


def measured_model(results: dict[str, Any], name: str) -> dict[str, float]:
    """The MACs and speed of a name in `accuracies_of`."""
    return results["models"][name.removesuffix(", pooled positions")]


def format_runs(results: dict[str, Any]) -> str:
    """The fine-tuned models as a Markdown table."""
    unpooled = results["models"][UNPOOLED]
    header = ["model", "rate", "accuracy: mean", "per seed", "MACs G", "fewer", "images/s", "training, images/s"]
    rows = []
    for (name, learning_rate), by_seed in accuracies_of(results).items():
        model = measured_model(results, name)
        speeds = [
            "–" if field not in model else f"{model[field]:.0f} ({model[field] / unpooled[field]:.2f} ×)"
            for field in ("images_per_second", "trained_images_per_second")
        ]
        rate = f"{learning_rate:.0e}"
        per_seed = ", ".join(f"{by_seed[seed]:.1f}" for seed in sorted(by_seed))
        fewer = f"{unpooled['macs'] / model['macs']:.2f} ×"
        row = [name, rate, f"{statistics.mean(by_seed.values()):.1f}", per_seed, f"{model['macs'] / 1e9:.3f}", fewer]
        rows.append([*row, *speeds])
    return format_table(header, rows)


def plot_settings(settings: list[Setting], path: Path):
    """Accuracy against MACs and against images per second, one line per family."""

    def draw(axis: Any, name: str, scale: float):
        for family, style in (("none", "k*"), ("ToMe", "o--"), ("merge", "s-")):
            chosen = sorted((s for s in settings if s.family == family), key=lambda s: s.results[name])
            values = [s.results[name] / scale for s in chosen]
            label = "unpooled" if family == "none" else family
            axis.plot(values, list(map(mean_accuracy, chosen)), style, label=label)

    plot(draw, "top-1 of 1000, no training (%)", path)


def plot_runs(results: dict[str, Any], path: Path):
    """Accuracy after fine-tuning, mean and range over the seeds, against MACs and against images per second."""
    markers = {"unpooled": "*", "merge": "s", "max": "^", "avg": "v", "then merge": "D", "then ToMe": "o"}

    def draw(axis: Any, name: str, scale: float):
        for (label, learning_rate), by_seed in accuracies_of(results).items():
            if learning_rate != LEARNING_RATE:
                continue
            marker = next(marker for start, marker in markers.items() if label.startswith(start))
            mean = statistics.mean(by_seed.values())
            spread = [[mean - min(by_seed.values())], [max(by_seed.values()) - mean]]
            value = measured_model(results, label)[name] / scale
            axis.errorbar(value, mean, spread, fmt=marker, capsize=2, label=label)

    plot(draw, "ants or bees, fine-tuned (%)", path)


def plot(draw: Callable[[Any, str, float], None], label: str, path: Path):
    """Two panels side by side, each filled by `draw(axis, name, scale)`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    columns = (("macs", 1e9, "MACs (G)"), ("images_per_second", 1, "images/s"))
    for axis, (name, scale, title) in zip(axes, columns, strict=True):
        draw(axis, name, scale)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of raw numbers, and of the plots")
    args = parser.parse_args(argv)
    if not any((args.folder / name).exists() for name in (SETTINGS_FILE, RULES_FILE, FINE_TUNE_FILE)):
        raise SystemExit(
            f"error: {args.folder} has no results of warm_start_training_free.py or warm_start_fine_tune.py."
        )
    report(args.folder)


if __name__ == "__main__":
    main()
