"""
What pooling costs and gains a trained Vision Transformer, with ToMe (arXiv 2210.09461) as the rival.

    python measure_warm_start.py training-free --weights vit.safetensors --data_dir photos --output_dir results
    python measure_warm_start.py rules --weights vit.safetensors --data_dir photos --output_dir results
    python measure_warm_start.py fine-tune --weights vit.safetensors --data_dir photos --output_dir results
    python measure_warm_start.py report --output_dir results

`--weights` is whatever convert_vit_checkpoint.py takes, with ImageNet's 1000 classes; `--data_dir` a folder of parquet
files with the splits `train` and `test` and the columns `image` and `label`, the labels named as in IMAGENET_CLASSES.
Accuracy, multiply-accumulates (MACs) and images per second are measured by the same code for all; the rounds of the
timing are interleaved, because a machine's speed drifts. `fine-tune` writes after every run and continues where it
was interrupted; processes with different seeds may share a folder. `report` prints the tables and draws the plots.
"""

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.utils import logging

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTModel, pooling_hpool_vit
from hpool_vit.toolkit.conversion.vit import convert_vit
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.measuring import count_macs, format_table, measure_speed, time_in_turns


# The index among ImageNet's 1000 classes of each label of the ants-and-bees photos.
IMAGENET_CLASSES = {"ants": 310, "bees": 309}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# How the photos are prepared: torchvision's default, and as DeiT was evaluated.
RESIZES = {"bilinear 256": (256, InterpolationMode.BILINEAR), "bicubic 248": (248, InterpolationMode.BICUBIC)}

# Blocks and tokens merged at each, for 196 patches and 12 blocks.
SCHEDULES = [
    ([3, 5, 7, 9], 23),
    ([3, 5, 7, 9], 33),
    ([3, 5, 7, 9], 37),
    ([3, 5, 7, 9], 42),
    ([1, 3, 5, 7], 32),
    ([2, 4, 6, 8], 39),
    ([1, 3, 5, 7], 37),
    ([1, 3, 5, 7], 42),
]
TOME_NUM_MERGED = [6, 8, 10, 11, 12, 13, 14, 15, 16, 18]


def merge_config(blocks: list[int], number: int, num_patches: int = 196) -> dict[str, Any]:
    """The fields of a configuration that merges `number` tokens at each of `blocks`."""
    left = [num_patches - stage * number for stage in range(len(blocks))]
    ratios = [min(number / tokens, 0.5) for tokens in left]
    return {"pool_mode": "merge", "hvt_pool": blocks, "merge_ratio": ratios, "proportional_attention": True}


def pool_config(pool_mode: str, blocks: list[int], stage_positions: str = "zero") -> dict[str, Any]:
    """Arguments of `convert_vit` for max or average pooling and the mean of the tokens."""
    return {
        "pool_mode": pool_mode,
        "hvt_pool": blocks,
        "use_class_token": False,
        "stage_positions": stage_positions,
    }


# What is fine-tuned: arguments of `convert_vit`. The first is the reference, and is sped up afterwards too.
UNPOOLED = "unpooled, class token"
MERGES = {f"merge 37 at {', '.join(map(str, blocks))}": blocks for blocks in ([3, 5, 7, 9], [1, 3, 5, 7])}
FINE_TUNED = {
    UNPOOLED: {"hvt_pool": None},
    "unpooled, mean": {"hvt_pool": None, "use_class_token": False},
    **{name: merge_config(blocks, 37) for name, blocks in MERGES.items()},
    "max at 1, 5, 9": pool_config("max", [1, 5, 9]),
    "max at 1, 5, 9, pooled positions": pool_config("max", [1, 5, 9], "pooled"),
    "avg at 1, 5, 9": pool_config("avg", [1, 5, 9]),
    "avg at 1, 5, 9, pooled positions": pool_config("avg", [1, 5, 9], "pooled"),
}
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.05

EUCLIDEAN = "Euclidean distance of hidden states"  # the model's own

TRAINING_FREE = "warm_start_training_free.json"
RULES = "warm_start_rules.json"
FINE_TUNE = "warm_start_fine_tune.json"


@dataclass
class Setting:
    """One way to run the trained model: `family` is "none", "merge" or "ToMe"."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    num_merged: int = 0
    results: dict[str, Any] = field(default_factory=dict)


class ToMe(nn.Module):
    """
    ToMe as published, around an unpooled model with a class token: in every block, between attention and MLP,
    `num_merged` tokens join the one with the most similar key, and attention is proportional to the tokens' sizes.
    """

    def __init__(self, model: HPoolViTForImageClassification, num_merged: int):
        super().__init__()
        self.model, self.num_merged = model, num_merged

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.model.hpool_vit.embeddings(pixel_values)
        sizes = torch.ones_like(hidden_states[..., :1])
        for layer in self.model.hpool_vit.layers:
            branch, metric = self.attend(layer.attention, layer.layernorm_before(hidden_states), sizes)
            hidden_states = hidden_states + layer.layer_scale1(branch)
            hidden_states, sizes = merge_most_similar(hidden_states, sizes, metric, self.num_merged)
            hidden_states = hidden_states + layer.layer_scale2(layer.mlp(layer.layernorm_after(hidden_states)))
        return self.model.classifier(self.model.hpool_vit.layernorm(hidden_states[:, 0]))

    @staticmethod
    def attend(attention: nn.Module, hidden_states: torch.Tensor, sizes: torch.Tensor):
        """The attention branch, and the keys' mean over the heads."""
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mask = sizes.log().transpose(1, 2).unsqueeze(1)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attention.o_proj(output.transpose(1, 2).flatten(2)), key.mean(1)


def merge_most_similar(
    hidden_states: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, num_merged: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe's bipartite soft matching (its Section 3): class token, at position 0, protected; order not kept."""
    num_merged = min(num_merged, (hidden_states.shape[1] - 1) // 2)
    if num_merged == 0:
        return hidden_states, sizes
    metric = nn.functional.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, match = similarity.max(-1)
    order = best.argsort(-1, descending=True)
    # Sorted, so that the class token stays first.
    staying, merged = order[:, num_merged:].sort(1).values, order[:, :num_merged]
    match = match.gather(1, merged)

    def join(tokens: torch.Tensor) -> torch.Tensor:
        def index(rows: torch.Tensor) -> torch.Tensor:
            return rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])

        sources, targets = tokens[:, ::2], tokens[:, 1::2]
        targets = targets.scatter_add(1, index(match), sources.gather(1, index(merged)))
        return torch.cat((sources.gather(1, index(staying)), targets), dim=1)

    hidden_states, sizes = join(hidden_states * sizes), join(sizes)
    return hidden_states / sizes, sizes


class Logits(nn.Module):
    """A model that answers with its logits alone, as `ToMe` does."""

    def __init__(self, model: HPoolViTForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def build(setting: Setting, weights: str) -> nn.Module:
    """The model of a setting, with the trained weights."""
    model, _ = convert_vit(weights, **({"hvt_pool": None} | setting.config))
    return (ToMe(model, setting.num_merged) if setting.family == "ToMe" else Logits(model)).eval()


def training_free_settings() -> list[Setting]:
    """The unpooled model, ToMe at several speeds, and merging in few stages."""
    settings = [Setting("unpooled", "none")]
    settings += [Setting(f"ToMe r = {number}", "ToMe", num_merged=number) for number in TOME_NUM_MERGED]
    for blocks, number in SCHEDULES:
        settings.append(
            Setting(f"merge {number} at {', '.join(map(str, blocks))}", "merge", merge_config(blocks, number))
        )
    return settings


def load_photos(data_dir: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All photos of all splits under each resize, `(num_photos, 3, 224, 224)`, and their ImageNet classes."""
    splits = datasets.load_dataset("parquet", data_dir=str(data_dir))
    photos = datasets.concatenate_datasets(list(splits.values()))
    names = photos.features["label"].names
    labels = torch.tensor([IMAGENET_CLASSES[names[label]] for label in photos["label"]])
    images = [image.convert("RGB") for image in photos["image"]]
    return {name: torch.stack(list(map(prepare(*resize), images))) for name, resize in RESIZES.items()}, labels


def prepare(size: int, interpolation: InterpolationMode) -> v2.Compose:
    steps = [v2.Resize(size, interpolation=interpolation), v2.CenterCrop(224), v2.PILToTensor()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def compare(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy in %, and how far the answers are from the unpooled model's: KL divergence in nats, agreement in %."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return {
        "accuracy": 100 * (logits.argmax(-1) == labels).float().mean().item(),
        "divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "agreement": 100 * (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    }


def training_free(args: argparse.Namespace):
    photos, labels = load_photos(args.data_dir)
    settings = training_free_settings()
    models = [build(setting, args.weights) for setting in settings]
    some = next(iter(photos.values()))
    reference = {}
    for setting, model in zip(settings, models, strict=True):
        setting.results["macs"] = count_macs(model, some[:1])
        for resize, images in photos.items():
            logits = predict(model, images, args.batch_size)
            reference.setdefault(resize, logits)  # the first setting is the unpooled model
            setting.results[resize] = compare(logits, reference[resize], labels)
        print(setting.name, setting.results, flush=True)
    speeds = measure_speed(models, some[: args.batch_size], args.rounds)
    for setting, speed in zip(settings, speeds, strict=True):
        setting.results["images_per_second"] = speed
    write_json(args.output_dir / TRAINING_FREE, [asdict(setting) for setting in settings])
    report(args)


def measure_rules(args: argparse.Namespace):
    """What tokens are compared by: the model's own rule against cosines, and the random halves of the photos."""
    photos, labels = load_photos(args.data_dir)
    half = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) < len(labels) // 2
    results = {}
    for resize, images in photos.items():
        reference = predict(build(Setting("unpooled", "none"), args.weights), images, args.batch_size)
        tome = predict(build(Setting("ToMe", "ToMe", num_merged=16), args.weights), images, args.batch_size)
        answers = {("ToMe r = 16", ""): tome}
        for name, blocks in MERGES.items():
            for rule in (EUCLIDEAN, "cosine of hidden states", "cosine of keys, mean of the heads"):
                model = build(Setting(name, "merge", merge_config(blocks, 37)), args.weights)
                with compared_by(rule, model):
                    answers[name, rule] = predict(model, images, args.batch_size)
        for (name, rule), logits in answers.items():
            parts = {"all": slice(None), "half A": half, "half B": ~half}
            scores = {part: compare(logits[i], reference[i], labels[i]) for part, i in parts.items()}
            results.setdefault(f"{name}; {rule or 'its own rule'}", {})[resize] = scores
            print(name, rule, resize, scores, flush=True)
    write_json(args.output_dir / RULES, results)
    report(args)


@contextlib.contextmanager
def compared_by(rule: str, model: nn.Module):
    """Lets the merging stages of `model` compare something else. Of vectors of length 1, the nearest has the largest
    cosine."""
    find_groups = pooling_hpool_vit.find_groups
    backbone = next(module for module in model.modules() if isinstance(module, HPoolViTModel))
    stages = {stage: backbone.layers[int(block)] for block, stage in backbone.pooling.items()}
    current = []

    def compare_keys(tokens, num_merged):
        layer = current[-1]
        keys = layer.attention.k_proj(layer.layernorm_before(tokens)).unflatten(-1, (-1, layer.attention.head_dim))
        return find_groups(nn.functional.normalize(keys.mean(-2), dim=-1), num_merged)

    def compare_directions(tokens, num_merged):
        return find_groups(nn.functional.normalize(tokens, dim=-1), num_merged)

    if rule != EUCLIDEAN:
        pooling_hpool_vit.find_groups = compare_keys if "keys" in rule else compare_directions
    hooks = [stage.register_forward_pre_hook(lambda stage, _: current.append(stages[stage])) for stage in stages]
    try:
        yield
    finally:
        pooling_hpool_vit.find_groups = find_groups
        for hook in hooks:
            hook.remove()


@dataclass
class Split:
    """Photos of one split, as `uint8` of shape `(3, height, width)`, and their labels."""

    images: list[torch.Tensor]
    labels: torch.Tensor


AUGMENTATION = v2.Compose(
    [
        v2.RandomResizedCrop(224, scale=(0.35, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


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
    variants = {f"then {name}": Logits(with_merging(model, FINE_TUNED[name])) for name in MERGES}
    return variants | {f"then ToMe r = {number}": ToMe(model, number) for number in (12, 16)}


def fine_tune(args: argparse.Namespace):
    path = args.output_dir / FINE_TUNE
    splits = load_splits(args.data_dir)
    test = torch.stack(list(map(prepare(*RESIZES["bicubic 248"]), splits["test"].images)))
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
            # Read again: another process may have written.
            results = read_runs(path, args.epochs)
            results["runs"].append(run)
            write_json(path, results)
    report(args)


def read_runs(path: Path, epochs: int) -> dict[str, Any]:
    results = json.loads(path.read_text())
    if results["epochs"] != epochs:
        raise SystemExit(f"{path} holds runs of {results['epochs']} epochs: choose another --output_dir.")
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


def load_splits(data_dir: Path) -> dict[str, Split]:
    splits = datasets.load_dataset("parquet", data_dir=str(data_dir))
    return {
        name: Split(
            [pil_to_tensor(image.convert("RGB")) for image in splits[name]["image"]],
            torch.tensor(splits[name]["label"]),
        )
        for name in ("train", "test")
    }


def score(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Accuracy in % and cross-entropy in nats."""
    logits = predict(model, images, batch_size)
    accuracy = 100 * (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": nn.functional.cross_entropy(logits, labels).item()}


def measure_models(args: argparse.Namespace, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """MACs and speed of what is fine-tuned; how positions start does not matter to either."""
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


def report(args: argparse.Namespace):
    """Prints the tables and draws the plots of what `--output_dir` holds."""
    folder = args.output_dir
    if (folder / TRAINING_FREE).exists():
        settings = [Setting(**setting) for setting in json.loads((folder / TRAINING_FREE).read_text())]
        print(format_settings(settings), format_against_tome(settings), sep="\n\n")
        plot_settings(settings, (folder / TRAINING_FREE).with_suffix(".png"))
    if (folder / RULES).exists():
        print(format_rules(json.loads((folder / RULES).read_text())))
    if (folder / FINE_TUNE).exists():
        results = json.loads((folder / FINE_TUNE).read_text())
        print(format_runs(results))
        plot_runs(results, (folder / FINE_TUNE).with_suffix(".png"))


def mean_accuracy(setting: Setting) -> float:
    return statistics.mean(setting.results[resize]["accuracy"] for resize in RESIZES)


def format_settings(settings: list[Setting]) -> str:
    """The results of `training-free` as a Markdown table."""
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
    """Merging against ToMe at equal MACs, between whose points the line is straight, as a Markdown table."""
    tome = sorted((s for s in settings if s.family in ("none", "ToMe")), key=lambda s: s.results["macs"])
    macs = [setting.results["macs"] for setting in tome]
    rows = []
    for setting in (s for s in settings if s.family == "merge"):
        here = setting.results["macs"]
        rival, rival_kl = (np.interp(here, macs, [f(s) for s in tome]) for f in (mean_accuracy, mean_divergence))
        gain = mean_accuracy(setting) - rival
        row = [f"{settings[0].results['macs'] / here:.2f} ×", setting.name, f"{mean_accuracy(setting):.1f}"]
        rows.append([*row, f"{rival:.1f}", f"{gain:+.1f}", f"{mean_divergence(setting):.3f}", f"{rival_kl:.3f}"])
    return format_table(["MACs fewer", "setting", "top-1", "ToMe", "difference", "KL", "KL of ToMe"], rows)


def format_rules(results: dict[str, Any]) -> str:
    """The results of `rules` as a Markdown table: accuracy under each resize and mean KL, of all photos and halves."""
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
    """By model and learning rate, the accuracy of each seed; first those at `LEARNING_RATE`."""
    accuracies = {}
    for run in results["runs"]:
        learning_rate = run["learning_rate"]
        scores = {run["name"]: run, **(run.get("faster", {}) if learning_rate == LEARNING_RATE else {})}
        for name, scored in scores.items():
            accuracies.setdefault((name, learning_rate), {})[run["seed"]] = scored["accuracy"]
    order = list(dict.fromkeys([*FINE_TUNED, *results["models"]]))
    return dict(sorted(accuracies.items(), key=lambda item: (item[0][1] != LEARNING_RATE, order.index(item[0][0]))))


def measured_model(results: dict[str, Any], name: str) -> dict[str, float]:
    """MACs and speed of a name in `accuracies_of`."""
    return results["models"][name.removesuffix(", pooled positions")]


def format_runs(results: dict[str, Any]) -> str:
    """The results of `fine-tune` as a Markdown table."""
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
    """Two panels beside each other, each filled by `draw(axis, name, scale)`."""
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output_dir", type=Path, required=True, help="for raw numbers and plots")
    measuring = argparse.ArgumentParser(add_help=False, parents=[common])
    measuring.add_argument("--weights", required=True, help="a source of convert_vit_checkpoint.py")
    measuring.add_argument("--data_dir", type=Path, required=True, help="folder of parquet files")
    measuring.add_argument("--batch_size", type=int, default=32)
    measuring.add_argument("--rounds", type=int, default=5, help="of the timing (default: 5)")
    measuring.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    command = commands.add_parser("training-free", parents=[measuring], help="merge in the trained model, no training")
    command.set_defaults(run=training_free)
    command = commands.add_parser("rules", parents=[measuring], help="what tokens are compared by, no training")
    command.set_defaults(run=measure_rules)
    command = commands.add_parser("fine-tune", parents=[measuring], help="train every kind of pooling equally long")
    command.set_defaults(run=fine_tune)
    command.add_argument("--epochs", type=int, default=4)
    command.add_argument("--train_batch_size", type=int, default=16)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--models", nargs="+", choices=FINE_TUNED, default=list(FINE_TUNED), metavar="NAME")
    command.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    command = commands.add_parser("report", parents=[common], help="tables and plots of what has been measured")
    command.set_defaults(run=report)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if hasattr(args, "num_threads"):
        torch.set_num_threads(args.num_threads)
    args.run(args)


if __name__ == "__main__":
    main()
