"""
Measure what pooling costs a segmentation model and what it saves: mean IoU of the same trunk without pooling, with
merging that is undone, and with pooling on the grid, each under a linear head.

    python examples/research/segmentation_pooling.py --model_name_or_path deit_tiny.safetensors --train train.parquet \
        --validation val.parquet --class_names sky,building,pole --ignored 11 --output segmentation.json

`--frozen` trains the head alone, on the maps of the trunk as it is: minutes instead of hours, and no choice of a
training recipe in it. Without it the whole model is fine-tuned for `--epochs`. `--speed` measures images per second,
the models by turns; run it on a quiet machine.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL
from hpool_vit.toolkit.dense.augmentation import train_pair_transform, validation_pair_transform
from hpool_vit.toolkit.dense.data import SegmentationDataset, load_masked_images, read_class_names
from hpool_vit.toolkit.dense.evaluation import count_batch, mean_iou, resize_scores
from hpool_vit.toolkit.dense.model import start_segmenter


# Every head reads the same two blocks, so that no model gets more to read than another.
BLOCKS = {"out_indices": [6, 12]}
MERGE = {"pool_mode": "merge", "hvt_pool": [3, 5, 7, 9], "merge_rule": "distance", "proportional_attention": True}
GRID = {"pool_mode": "avg", "pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
MODELS = {
    "unpooled": {"hvt_pool": None, **BLOCKS},
    "merging, 19 % at 3, 5, 7, 9": {**MERGE, "merge_ratio": 0.19, **BLOCKS},
    "merging, 30 % at 3, 5, 7, 9": {**MERGE, "merge_ratio": 0.3, **BLOCKS},
    "grid, average of 2 × 2 at 9": {**GRID, "hvt_pool": [9], **BLOCKS},
    "grid, average of 2 × 2 at 6": {**GRID, "hvt_pool": [6], **BLOCKS},
    "unpooled, last block only": {"hvt_pool": None, "out_indices": [12]},
    "merging, 30 % at 3, 5, 7, 9, last block only": {**MERGE, "merge_ratio": 0.3, "out_indices": [12]},
}
# Frozen: the head sees each map this often, against labels of this resolution times that of the map.
FROZEN_EPOCHS, FROZEN_SCALE, FROZEN_RATE = 20, 2, 3e-3
TRUNK_RATE, HEAD_RATE, WEIGHT_DECAY = 1e-4, 1e-3, 0.05


def build(args, name: str):
    torch.manual_seed(args.seed)
    return start_segmenter(args.model_name_or_path, "linear", args.class_names, args.image_size, **MODELS[name])[:2]


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


def measure_frozen(args, name: str) -> list[float]:
    model, processor = build(args, name)
    transform = validation_pair_transform(processor)
    train, validation = (
        head_inputs(model, SegmentationDataset(images, transform), name) for images in (args.train, args.validation)
    )
    return [
        evaluate_maps(train_head(model.decode_head, *train, seed=seed), *validation)
        for seed in range(args.seed, args.seed + args.num_seeds)
    ]


def measure_tuned(args, name: str) -> list[float]:
    return [tune(args, name, seed) for seed in range(args.seed, args.seed + args.num_seeds)]


def tune(args, name: str, seed: int) -> float:
    """Fine-tunes the whole model, and returns the mean IoU of its last weights."""
    model, processor = build(args, name)
    torch.manual_seed(seed)
    dataset = SegmentationDataset(args.train, train_pair_transform(processor))
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)
    head = list(model.decode_head.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": model.hpool_vit.parameters(), "lr": TRUNK_RATE}, {"params": head, "lr": HEAD_RATE}],
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, len(loader) * args.epochs, power=0.9)
    model.train()
    for epoch in range(args.epochs):
        for batch in tqdm(loader, desc=f"{name}, seed {seed}, epoch {epoch}", mininterval=10):
            optimizer.zero_grad()
            model(**batch).loss.backward()
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


@torch.no_grad()
def measure_speed(args, names: list[str], num_rounds: int = 9, batch_size: int = 4) -> dict[str, float]:
    """Images per second of the whole model, median of the rounds; in each round every model has its turn."""
    models = {name: build(args, name)[0].eval() for name in names}
    images = torch.randn(batch_size, 3, *args.image_size)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(num_rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: batch_size / statistics.median(values[1:]) for name, values in seconds.items()}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="ViT to convert, or HPool-ViT")
    parser.add_argument("--train", required=True, help="Parquet file, or folder with images and masks")
    parser.add_argument("--validation", required=True, help="the same for validation")
    parser.add_argument("--class_names", required=True, type=read_class_names, help="names with commas, or a file")
    parser.add_argument("--ignored", type=int, nargs="*", default=[], help="numbers of pixels that do not count")
    parser.add_argument("--image_size", type=int, nargs=2, default=(352, 480), help="height and width")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--frozen", action="store_true", help="train only the head")
    parser.add_argument("--speed", action="store_true", help="measure images per second too")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--max_images", type=int, help="use only the first images, to try the program")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; models that it holds are not repeated")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
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
    if args.speed:
        for name, speed in measure_speed(args, args.models).items():
            results[name]["images_per_second"] = round(speed, 2)
        results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
