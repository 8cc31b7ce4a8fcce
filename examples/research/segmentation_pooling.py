"""
Measure what pooling costs a segmentation model and what it saves: mean IoU of the same trunk without pooling, with
merging that is undone, and with pooling on the grid, each under a linear head.

    python examples/research/segmentation_pooling.py --model_name_or_path deit_tiny.safetensors --train train.parquet \
        --validation val.parquet --class_names sky,building,pole --ignored 11 --output segmentation.json

`--frozen` trains the head alone, on the maps of the trunk as it is: minutes instead of hours, and no choice of a
training recipe in it. Without it the whole model is fine-tuned for `--epochs`; with `--head_first`, from such a head.
A CPU with units for bfloat16 computes its products in that.

`--speed` needs no data, and measures images per second and memory at each size instead. Run it on a quiet machine:

    python examples/research/segmentation_pooling.py --model_name_or_path deit_tiny.safetensors \
        --speed 352x480 704x960 --output speed.json
"""

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL
from hpool_vit.toolkit.dense.augmentation import train_pair_transform, validation_pair_transform
from hpool_vit.toolkit.dense.data import SegmentationDataset, load_masked_images, read_class_names
from hpool_vit.toolkit.dense.evaluation import count_batch, mean_iou, resize_scores
from hpool_vit.toolkit.dense.model import start_segmenter
from hpool_vit.toolkit.shared.devices import mixed_precision
from hpool_vit.toolkit.shared.measuring import time_in_turns
from hpool_vit.toolkit.training.report import describe_hardware


# Every head reads the same two blocks, so that no model gets more to read than another.
BLOCKS = {"out_indices": [6, 12]}
MERGE = {"pool_mode": "merge", "hvt_pool": [3, 5, 7, 9], "merge_rule": "distance", "proportional_attention": True}
IMPORTANCE = {"merge_rule": "importance"}
GRID = {"pool_mode": "avg", "pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
MODELS = {
    "unpooled": {"hvt_pool": None, **BLOCKS},
    "merging, 19 % at 3, 5, 7, 9": {**MERGE, "merge_ratio": 0.19, **BLOCKS},
    "merging, 30 % at 3, 5, 7, 9": {**MERGE, "merge_ratio": 0.3, **BLOCKS},
    "merging by importance, 19 % at 3, 5, 7, 9": {**MERGE, **IMPORTANCE, "merge_ratio": 0.19, **BLOCKS},
    "merging by importance, 30 % at 3, 5, 7, 9": {**MERGE, **IMPORTANCE, "merge_ratio": 0.3, **BLOCKS},
    "grid, average of 2 × 2 at 9": {**GRID, "hvt_pool": [9], **BLOCKS},
    "grid, average of 2 × 2 at 6": {**GRID, "hvt_pool": [6], **BLOCKS},
    "unpooled, last block only": {"hvt_pool": None, "out_indices": [12]},
    "merging, 30 % at 3, 5, 7, 9, last block only": {**MERGE, "merge_ratio": 0.3, "out_indices": [12]},
}
# Frozen: the head sees each map this often, against labels of this resolution times that of the map.
FROZEN_EPOCHS, FROZEN_SCALE, FROZEN_RATE = 20, 2, 3e-3
TRUNK_RATE, HEAD_RATE, WEIGHT_DECAY = 1e-4, 1e-3, 0.05


def build(args, name: str, image_size: tuple[int, int] | None = None):
    torch.manual_seed(args.seed)
    size = image_size or args.image_size
    return start_segmenter(args.model_name_or_path, "linear", args.class_names, size, **MODELS[name])[:2]


def gmacs(model: nn.Module, size: tuple[int, int]) -> float:
    """Multiply-accumulates of one image in attention, projections and head, in billions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2e9


@torch.no_grad()
def head_inputs(model: nn.Module, dataset: SegmentationDataset, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads of each image, in float16, and the labels."""
    seen = []
    hook = model.decode_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].half()))
    labels = []
    for index in tqdm(range(len(dataset)), desc=name, mininterval=10):
        example = dataset[index]
        model.eval()(example["pixel_values"][None])
        labels.append(example["labels"].to(torch.uint8))
    hook.remove()
    return torch.cat(seen), torch.stack(labels)


def train_head(head: nn.Conv2d, maps: torch.Tensor, labels: torch.Tensor, seed: int) -> nn.Conv2d:
    """A new head on fixed maps, whose channels are normalised first; the norm becomes part of the head."""
    torch.manual_seed(seed)
    sample = maps[::4].float()
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)) + 1e-5
    trained = nn.Conv2d(head.in_channels, head.out_channels, 1)
    nn.init.trunc_normal_(trained.weight, std=0.02)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=FROZEN_RATE, weight_decay=1e-4)
    size = [side * FROZEN_SCALE for side in maps.shape[2:]]
    small = nn.functional.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    steps = [rows for _ in range(FROZEN_EPOCHS) for rows in torch.randperm(len(maps)).split(16)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for rows in steps:
        normed = (maps[rows].float() - mean[:, None, None]) / std[:, None, None]
        loss = nn.functional.cross_entropy(
            resize_scores(trained(normed), size), small[rows], ignore_index=IGNORED_LABEL
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        head.weight.copy_(trained.weight / std[:, None, None])
        head.bias.copy_(trained.bias - (trained.weight[:, :, 0, 0] * mean / std).sum(1))
    return head


@torch.no_grad()
def evaluate_maps(head: nn.Conv2d, maps: torch.Tensor, labels: torch.Tensor) -> float:
    batches = zip(maps.split(8), labels.split(8), strict=True)
    return mean_iou(torch.cat([count_batch(head(part.float()), truth.long()) for part, truth in batches]))["mean_iou"]


def frozen_inputs(model: nn.Module, processor, images, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return head_inputs(model, SegmentationDataset(images, validation_pair_transform(processor)), name)


def measure_frozen(args, name: str) -> list[float]:
    model, processor = build(args, name)
    train, validation = (frozen_inputs(model, processor, images, name) for images in (args.train, args.validation))
    return [
        evaluate_maps(train_head(model.decode_head, *train, seed=seed), *validation)
        for seed in range(args.seed, args.seed + args.num_seeds)
    ]


def measure_tuned(args, name: str) -> list[float]:
    return [tune(args, name, seed) for seed in range(args.seed, args.seed + args.num_seeds)]


def tune(args, name: str, seed: int) -> float:
    """Fine-tunes the whole model, and returns the mean IoU of its last weights."""
    model, processor = build(args, name)
    if args.head_first:
        train_head(model.decode_head, *frozen_inputs(model, processor, args.train, name), seed=seed)
    torch.manual_seed(seed)
    dataset = SegmentationDataset(args.train, train_pair_transform(processor))
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)
    # A trained head is no longer far behind the trunk.
    head, head_rate = list(model.decode_head.parameters()), TRUNK_RATE if args.head_first else HEAD_RATE
    optimizer = torch.optim.AdamW(
        [{"params": model.hpool_vit.parameters(), "lr": TRUNK_RATE}, {"params": head, "lr": head_rate}],
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, len(loader) * args.epochs, power=0.9)
    model.train()
    for epoch in range(args.epochs):
        for batch in tqdm(loader, desc=f"{name}, seed {seed}, epoch {epoch}", mininterval=10):
            optimizer.zero_grad()
            with mixed_precision(torch.device("cpu")):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    validation = SegmentationDataset(args.validation, validation_pair_transform(processor))
    with torch.no_grad():
        counts = [
            count_batch(model(batch["pixel_values"]).logits, batch["labels"]) for batch in DataLoader(validation)
        ]
    return mean_iou(torch.cat(counts))["mean_iou"]


def measure_speed(args, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Images per second of each whole model, which take turns, and the memory that one image takes."""
    models = {name: build(args, name, size)[0].eval() for name in args.models}
    images = torch.randn(args.speed_batch_size, 3, *size)
    labels = torch.zeros(1, *size, dtype=torch.long)
    with torch.inference_mode():
        rates = time_in_turns([partial(model, images) for model in models.values()], len(images), args.rounds)
        peaks = [peak_bytes(partial(model, images[:1])) for model in models.values()]
    training_peaks = [
        peak_bytes(lambda model=model: model(images[:1], labels=labels).loss.backward()) for model in models.values()
    ]
    return {
        name: {
            "images_per_second": round(rate, 3),
            "peak_mb": round(peak / 1e6, 3),
            "training_peak_mb": round(training_peak / 1e6, 3),
            "gmacs": round(gmacs(model, size), 3),
        }
        for (name, model), rate, peak, training_peak in zip(models.items(), rates, peaks, training_peaks, strict=True)
    }


def peak_bytes(call) -> int:
    """The most that PyTorch's tensors take at a time during a call, besides those from before: weights and images."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def report_speed(args) -> dict:
    """What `--speed` writes."""
    load = os.getloadavg()
    sizes = {f"{width} × {height}": measure_speed(args, (height, width)) for height, width in args.speed}
    return {
        "command": shlex.join(sys.argv),
        "hardware": describe_hardware(1),
        "load_before_and_after": [[round(value, 2) for value in loads] for loads in (load, os.getloadavg())],
        "batch_size": args.speed_batch_size,
        "rounds": args.rounds,
        "sizes": sizes,
    }


def read_size(text: str) -> tuple[int, int]:
    """Height and width of a text such as 352x480."""
    height, width = text.split("x")
    return int(height), int(width)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="ViT to convert, or HPool-ViT")
    parser.add_argument("--train", help="Parquet file, or folder with images and masks")
    parser.add_argument("--validation", help="the same for validation")
    parser.add_argument("--class_names", type=read_class_names, help="names with commas, or a file")
    parser.add_argument("--ignored", type=int, nargs="*", default=[], help="numbers of pixels that do not count")
    parser.add_argument("--image_size", type=int, nargs=2, default=(352, 480), help="height and width")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--frozen", action="store_true", help="train only the head")
    parser.add_argument("--head_first", action="store_true", help="train the head alone before the whole model")
    parser.add_argument("--speed", type=read_size, nargs="+", metavar="HEIGHTxWIDTH", help="measure only the speed")
    parser.add_argument("--speed_batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each model; the median counts")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--max_images", type=int, help="use only the first images, to try the program")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; models that it holds are not repeated")
    args = parser.parse_args(argv)
    if args.speed:
        args.class_names = args.class_names or [f"class {number}" for number in range(11)]
    elif not (args.train and args.validation and args.class_names):
        parser.error("give --train, --validation and --class_names, or --speed")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if args.speed:
        args.output.write_text(json.dumps(report_speed(args), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    for split in ("train", "validation"):
        images = load_masked_images(getattr(args, split), args.class_names, ignored=tuple(args.ignored))
        if args.max_images:
            images.rows = [images.rows[index] for index in range(min(args.max_images, len(images)))]
        setattr(args, split, images)
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for name in args.models:
        if name not in results:
            values = (measure_frozen if args.frozen else measure_tuned)(args, name)
            results[name] = {"mean_iou": values, "gmacs": round(gmacs(build(args, name)[0], args.image_size), 3)}
            args.output.write_text(json.dumps(results, indent=2) + "\n")
            print(name, results[name], flush=True)


if __name__ == "__main__":
    main()
