"""
Fine-tune a trained Vision Transformer with every kind of pooling, equally long, and measure accuracy and speed.

    python examples/research/warm_start_fine_tune.py --weights vit.safetensors --data_dir photos --output_dir results

`--weights` and `--data_dir` are those of warm_start_training_free.py. The program saves its results after every run
and continues where it was interrupted; processes with different seeds may share an output folder.
warm_start_report.py prints the tables and draws the plots.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.utils import logging
from warm_start_training_free import (
    IMAGENET_CLASSES,
    MEAN,
    MERGES,
    RESIZES,
    STD,
    ToMe,
    add_measuring_arguments,
    predict,
    preprocessing,
)

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification
from hpool_vit.toolkit.conversion.vit import convert_vit
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.measuring import Logits, count_macs, measure_speed, time_in_turns


def pool_config(pool_mode: str, blocks: list[int], stage_positions: str = "zero") -> dict[str, Any]:
    """Arguments of `convert_vit` for max or average pooling and the mean of the tokens."""
    return {
        "pool_mode": pool_mode,
        "hvt_pool": blocks,
        "use_class_token": False,
        "stage_positions": stage_positions,
    }


# What is fine-tuned: arguments of `convert_vit`. The first is the reference, and is also sped up after its training.
UNPOOLED = "unpooled, class token"
FINE_TUNED = {
    UNPOOLED: {"hvt_pool": None},
    "unpooled, mean": {"hvt_pool": None, "use_class_token": False},
    **MERGES,
    "max at 1, 5, 9": pool_config("max", [1, 5, 9]),
    "max at 1, 5, 9, pooled positions": pool_config("max", [1, 5, 9], "pooled"),
    "avg at 1, 5, 9": pool_config("avg", [1, 5, 9]),
    "avg at 1, 5, 9, pooled positions": pool_config("avg", [1, 5, 9], "pooled"),
}
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.05

FINE_TUNE_FILE = "warm_start_fine_tune.json"
AUGMENTATION = v2.Compose(
    [
        v2.RandomResizedCrop(224, scale=(0.35, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


@dataclass
class Split:
    """The photos of one split, in `uint8` of shape (3, height, width), and their labels."""

    images: list[torch.Tensor]
    labels: torch.Tensor


def load_splits(data_dir: Path) -> dict[str, Split]:
    splits = datasets.load_dataset("parquet", data_dir=str(data_dir))
    return {
        name: Split(
            [pil_to_tensor(image.convert("RGB")) for image in splits[name]["image"]],
            torch.tensor(splits[name]["label"]),
        )
        for name in ("train", "test")
    }


def train(args: argparse.Namespace, name: str, split: Split, learning_rate: float, seed: int) -> nn.Module:
    """A model of `FINE_TUNED` after `args.epochs` epochs of AdamW with a cosine schedule."""
    torch.manual_seed(seed)
    model = convert_vit(args.weights, num_labels=len(IMAGENET_CLASSES), **FINE_TUNED[name])[0].train()
    optimizer = make_optimizer(model, learning_rate)
    num_steps = args.epochs * math.ceil(len(split.labels) / args.train_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(args.epochs):
        for rows in torch.randperm(len(split.labels)).split(args.train_batch_size):
            images = torch.stack([AUGMENTATION(split.images[row]) for row in rows])
            train_step(model, optimizer, images, split.labels[rows])
            schedule.step()
    return model.eval()


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    exempt = model.no_weight_decay()
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - exempt
    groups = [
        {"params": [p for name, p in model.named_parameters() if name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor):
    model(images, labels=labels).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def with_merging(model: HPoolViTForImageClassification, config: dict[str, Any]) -> HPoolViTForImageClassification:
    """The same weights in a model that merges: merging has no parameters."""
    merging = HPoolViTForImageClassification(HPoolViTConfig(**{**model.config.to_dict(), **config}))
    merging.load_state_dict(model.state_dict())
    return merging.eval()


def faster_variants(model: HPoolViTForImageClassification) -> dict[str, nn.Module]:
    """A trained, unpooled model made faster without further training."""
    variants = {f"then {name}": Logits(with_merging(model, config)) for name, config in MERGES.items()}
    return variants | {f"then ToMe r = {number}": ToMe(model, number) for number in (12, 16)}


def fine_tune(args: argparse.Namespace):
    """Trains and scores every model with every seed, except those that the file in `args.output_dir` has already."""
    path = args.output_dir / FINE_TUNE_FILE
    splits = load_splits(args.data_dir)
    test = torch.stack(list(map(preprocessing(*RESIZES["bicubic 248"]), splits["test"].images)))
    if not path.exists():
        write_json(path, {"epochs": args.epochs, "models": measure_models(args, test), "runs": []})
    for seed in args.seeds:
        for name in args.models:
            run = {"name": name, "learning_rate": args.learning_rate, "seed": seed}
            results = read_runs(path, args.epochs)
            if any(run.items() <= done.items() for done in results["runs"]):
                continue
            run |= train_and_score(args, run, splits["train"], test, splits["test"].labels)
            print(run, flush=True)
            # Read again: another process may have written in the meantime.
            results = read_runs(path, args.epochs)
            results["runs"].append(run)
            write_json(path, results)


def read_runs(path: Path, epochs: int) -> dict[str, Any]:
    results = json.loads(path.read_text())
    if results["epochs"] != epochs:
        raise SystemExit(f"error: {path} holds runs of {results['epochs']} epochs: choose another --output_dir.")
    return results


def train_and_score(
    args: argparse.Namespace, run: dict[str, Any], split: Split, test: torch.Tensor, labels: torch.Tensor
) -> dict[str, Any]:
    start = time.perf_counter()
    model = train(args, run["name"], split, run["learning_rate"], run["seed"])
    results = {"seconds": time.perf_counter() - start, **score(Logits(model), test, labels, args.batch_size)}
    if run["name"] == UNPOOLED:
        variants = faster_variants(model).items()
        results["faster"] = {name: score(variant, test, labels, args.batch_size) for name, variant in variants}
    return results


def score(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Accuracy in % and cross-entropy in nats."""
    logits = predict(model, images, batch_size)
    accuracy = 100 * (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": nn.functional.cross_entropy(logits, labels).item()}


def measure_models(args: argparse.Namespace, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """MACs and speed of what is fine-tuned; the start of the positions changes neither."""
    models = {
        name: convert_vit(args.weights, num_labels=len(IMAGENET_CLASSES), **config)[0]
        for name, config in FINE_TUNED.items()
        if config.get("stage_positions") != "pooled"
    }
    variants = {name: Logits(model) for name, model in models.items()} | faster_variants(models[UNPOOLED])
    speeds = measure_speed(list(variants.values()), images[: args.batch_size], args.rounds)
    results = {
        name: {"macs": count_macs(variant, images[:1]), "images_per_second": speed}
        for (name, variant), speed in zip(variants.items(), speeds, strict=True)
    }
    images = images[: args.train_batch_size]
    labels = torch.zeros(len(images), dtype=torch.long)
    steps = [
        partial(train_step, model.train(), make_optimizer(model, LEARNING_RATE), images, labels)
        for model in models.values()
    ]
    for name, speed in zip(models, time_in_turns(steps, len(images), args.rounds), strict=True):
        results[name]["trained_images_per_second"] = speed
    return results


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measuring_arguments(parser)
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--train_batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--models", nargs="+", choices=FINE_TUNED, default=list(FINE_TUNED), metavar="NAME")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, help="default: %(default)s")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(args.num_threads)
    fine_tune(args)


if __name__ == "__main__":
    main()
