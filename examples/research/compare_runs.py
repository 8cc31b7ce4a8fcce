"""
Compare finished training runs: accuracy per seed, MACs, and speed measured side by side.

    python examples/research/compare_runs.py outputs/pooled-seed0 outputs/pooled-seed1 outputs/unpooled-seed0 \
        --reference unpooled --output docs/results/training_digits

Folders whose names differ only in a final `-seed<number>` are seeds of one model. The program writes the numbers to
OUTPUT.json and the curves to OUTPUT.png, and prints a table in Markdown. The models take turns in the timing, because
the speed of a machine drifts: only ratios count.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.toolkit.hub.results import format_comparison
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.measuring import Logits, count_macs, measure_speed


# Of matplotlib's cycle. More models get another style of line.
NUM_COLOURS, LINE_STYLES = 10, ("-", "--", ":")


def read_run(folder: Path) -> dict[str, Any]:
    """The results and the curves of a finished run."""
    try:
        results = json.loads((folder / "all_results.json").read_text())
        log = json.loads((folder / "log.json").read_text())
    except OSError as error:
        sys.exit(f"error: {folder} is not a finished training run: {error.strerror} ({error.filename}).")
    # A run that averages its weights saves the averaged ones.
    top1 = "eval_ema_top1" if "eval_ema_top1" in results else "eval_top1"
    return {
        "accuracy": 100 * results[top1],
        "epochs": round(max(entry["epoch"] for entry in log), 2),
        "train_seconds": results["train_runtime"],
        "loss": [(round(entry["epoch"], 3), round(entry["loss"], 4)) for entry in log if "loss" in entry],
        "top1": [(round(entry["epoch"], 3), round(100 * entry[top1], 2)) for entry in log if top1 in entry],
    }


def group_runs(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """The runs of each model, by name and seed."""
    models: dict[str, dict[str, Any]] = {}
    for folder in folders:
        name, _, seed = re.fullmatch(r"(.+?)(-seed(\d+))?", folder.name).groups()
        model = models.setdefault(name, {"folder": str(folder), "runs": {}})
        model["runs"][seed or "0"] = read_run(folder)
    return models


def measure(models: dict[str, dict[str, Any]], batch_size: int, rounds: int):
    """Adds MACs and images per second of inference to each model."""
    loaded = [HPoolViTForImageClassification.from_pretrained(model.pop("folder")) for model in models.values()]
    modules = [Logits(model.eval()) for model in loaded]
    config = loaded[0].config
    images = torch.randn(batch_size, config.num_channels, *config.image_shape)
    for model, module, speed in zip(models.values(), modules, measure_speed(modules, images, rounds), strict=True):
        model |= {"macs": count_macs(module, images[:1]), "images_per_second": round(speed, 1)}
        model["tokens"] = module.model.config.tokens_per_stage()


def plot_models(models: dict[str, dict[str, Any]], path: Path):
    """Training loss and top-1 on the validation images against epochs, one colour per model, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, (name, model) in enumerate(models.items()):
        for seed, run in enumerate(model["runs"].values()):
            style = {"color": f"C{number}", "label": name if seed == 0 else None, "linewidth": 1}
            style["linestyle"] = LINE_STYLES[number // NUM_COLOURS % len(LINE_STYLES)]
            axes[0].plot(*zip(*run["loss"], strict=True), **style)
            axes[1].plot(*zip(*run["top1"], strict=True), marker=".", **style)
    for axis, title in zip(axes, ("training loss", "top-1 on the validation images (%)"), strict=True):
        axis.set_xlabel("epoch")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of finished runs")
    parser.add_argument("--reference", required=True, help="the model that others are compared with")
    parser.add_argument("--output", type=Path, required=True, help="path of the files to write, without suffix")
    parser.add_argument("--batch_size", type=int, default=32, help="of the timing (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing (default: 7)")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    models = group_runs(args.runs)
    if args.reference not in models:
        sys.exit(f"error: --reference {args.reference} is not one of the runs: {', '.join(models)}.")
    measure(models, args.batch_size, args.rounds)
    write_json(args.output.with_suffix(".json"), models)
    plot_models(models, args.output.with_suffix(".png"))
    print(format_comparison(models, args.reference))


if __name__ == "__main__":
    main()
