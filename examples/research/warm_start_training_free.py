"""
Measure what merging costs and gains a trained Vision Transformer without training, with ToMe as the rival.

    python examples/research/warm_start_training_free.py settings --weights vit.safetensors --data_dir photos \
        --output_dir results
    python examples/research/warm_start_training_free.py rules --weights vit.safetensors --data_dir photos \
        --output_dir results

`settings` compares speeds and schedules; `rules` compares what tokens are matched by. `--weights` is any ViT that
`hpool-vit convert` reads, with ImageNet's 1000 classes. `--data_dir` is a folder of parquet files with the splits
`train` and `test` and the columns `image` and `label`, whose labels are named as in IMAGENET_CLASSES.

The same code measures the accuracy, multiply-accumulates (MACs) and images per second of every model. The models take
turns in the timing, because the speed of a machine drifts. warm_start_report.py prints the tables and draws the plots.
"""

import argparse
import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from transformers.utils import logging

from hpool_vit import HPoolViTForImageClassification, HPoolViTModel
from hpool_vit.merging_hpool_vit import DistanceRule
from hpool_vit.toolkit.conversion.vit import convert_vit
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.measuring import Logits, count_macs, measure_speed


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

EUCLIDEAN = "Euclidean distance of hidden states"  # the model's own
RULES = (EUCLIDEAN, "cosine of hidden states", "cosine of keys, mean of the heads")

SETTINGS_FILE = "warm_start_training_free.json"
RULES_FILE = "warm_start_rules.json"


def merge_config(blocks: list[int], number: int, num_patches: int = 196) -> dict[str, Any]:
    """The fields of a configuration that merges `number` tokens at each of `blocks`."""
    left = [num_patches - stage * number for stage in range(len(blocks))]
    ratios = [min(number / tokens, 0.5) for tokens in left]
    return {"pool_mode": "merge", "hvt_pool": blocks, "merge_ratio": ratios, "proportional_attention": True}


MERGES = {
    f"merge 37 at {', '.join(map(str, blocks))}": merge_config(blocks, 37) for blocks in ([3, 5, 7, 9], [1, 3, 5, 7])
}


class ToMe(nn.Module):
    """
    ToMe (Bolya et al. 2023, arXiv 2210.09461) as published, around an unpooled model with a class token and pre-norm
    blocks: in every block, between attention and MLP, `num_merged` tokens join the token with the most similar key.
    Attention is proportional to the sizes of the tokens.
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
        """The attention branch, and the mean of the keys over the heads."""
        # (batch, heads, tokens, head_dim)
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
    """
    ToMe's bipartite soft matching (Section 3 of the paper). Tokens at even positions look for the most similar token
    at an odd position, and the `num_merged` best matched of them join it; the class token, at position 0, never does.

    Args:
        hidden_states: (batch, tokens, width).
        sizes: (batch, tokens, 1), the number of patches in each token.
        metric: (batch, tokens, features), what is compared by its cosine.
        num_merged: how many tokens to merge, at most half of the patch tokens.

    Returns:
        The hidden states, (batch, tokens - num_merged, width), and their sizes: first the tokens at even positions
        that are left, then those at odd positions.
    """
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


@dataclass
class Setting:
    """One way to run the trained model; `family` is "none", "merge" or "ToMe"."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    num_merged: int = 0
    results: dict[str, Any] = field(default_factory=dict)


def build(setting: Setting, weights: str) -> nn.Module:
    """The model of a setting, with the trained weights."""
    model, _ = convert_vit(weights, **({"hvt_pool": None} | setting.config))
    return (ToMe(model, setting.num_merged) if setting.family == "ToMe" else Logits(model)).eval()


def list_settings() -> list[Setting]:
    """The unpooled model, ToMe at several speeds, and merging in few stages."""
    settings = [Setting("unpooled", "none")]
    settings += [Setting(f"ToMe r = {number}", "ToMe", num_merged=number) for number in TOME_NUM_MERGED]
    for blocks, number in SCHEDULES:
        name = f"merge {number} at {', '.join(map(str, blocks))}"
        settings.append(Setting(name, "merge", merge_config(blocks, number)))
    return settings


def load_photos(data_dir: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All photos of all splits under each resize, (photos, 3, 224, 224), and their ImageNet classes."""
    splits = datasets.load_dataset("parquet", data_dir=str(data_dir))
    photos = datasets.concatenate_datasets(list(splits.values()))
    names = photos.features["label"].names
    labels = torch.tensor([IMAGENET_CLASSES[names[label]] for label in photos["label"]])
    images = [image.convert("RGB") for image in photos["image"]]
    return {name: torch.stack(list(map(preprocessing(*resize), images))) for name, resize in RESIZES.items()}, labels


def preprocessing(size: int, interpolation: InterpolationMode) -> v2.Compose:
    steps = [v2.Resize(size, interpolation=interpolation), v2.CenterCrop(224), v2.PILToTensor()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def compare(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy in %, KL divergence from the unpooled model's answers in nats, and agreement with them in %."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return {
        "accuracy": 100 * (logits.argmax(-1) == labels).float().mean().item(),
        "divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "agreement": 100 * (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    }


def measure_settings(args: argparse.Namespace):
    """Writes MACs, accuracy and speed of every setting."""
    photos, labels = load_photos(args.data_dir)
    settings = list_settings()
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
    write_json(args.output_dir / SETTINGS_FILE, [asdict(setting) for setting in settings])


def measure_rules(args: argparse.Namespace):
    """Writes the accuracy of the model's own rule and of cosines, on all photos and on two random halves."""
    photos, labels = load_photos(args.data_dir)
    half = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) < len(labels) // 2
    parts = {"all": slice(None), "half A": half, "half B": ~half}
    results = {}
    for resize, images in photos.items():
        reference = predict(build(Setting("unpooled", "none"), args.weights), images, args.batch_size)
        for name, logits in answers_by_rule(args, images).items():
            scores = {part: compare(logits[i], reference[i], labels[i]) for part, i in parts.items()}
            results.setdefault(name, {})[resize] = scores
            print(name, resize, scores, flush=True)
    write_json(args.output_dir / RULES_FILE, results)


def answers_by_rule(args: argparse.Namespace, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits of each schedule under each rule, and of ToMe."""
    tome = build(Setting("ToMe", "ToMe", num_merged=16), args.weights)
    answers = {"ToMe r = 16; its own rule": predict(tome, images, args.batch_size)}
    for name, config in MERGES.items():
        for rule in RULES:
            model = build(Setting(name, "merge", config), args.weights)
            with compared_by(rule, model):
                answers[f"{name}; {rule}"] = predict(model, images, args.batch_size)
    return answers


@contextlib.contextmanager
def compared_by(rule: str, model: nn.Module):
    """Makes the merging stages of `model` compare something else. Among unit vectors the nearest has the largest
    cosine."""
    find_roots = DistanceRule.find_roots
    backbone = next(module for module in model.modules() if isinstance(module, HPoolViTModel))
    stages = {stage: backbone.layers[int(block)] for block, stage in backbone.pooling.items()}
    current = []

    def compare_keys(self, tokens, weights, num_merged):
        layer = current[-1]
        keys = layer.attention.k_proj(layer.layernorm_before(tokens)).unflatten(-1, (-1, layer.attention.head_dim))
        return find_roots(self, nn.functional.normalize(keys.mean(-2), dim=-1), weights, num_merged)

    def compare_directions(self, tokens, weights, num_merged):
        return find_roots(self, nn.functional.normalize(tokens, dim=-1), weights, num_merged)

    if rule != EUCLIDEAN:
        DistanceRule.find_roots = compare_keys if "keys" in rule else compare_directions
    hooks = [stage.register_forward_pre_hook(lambda stage, _: current.append(stages[stage])) for stage in stages]
    try:
        yield
    finally:
        DistanceRule.find_roots = find_roots
        for hook in hooks:
            hook.remove()


def add_measuring_arguments(parser: argparse.ArgumentParser):
    """The flags that all measurements of warm starts share."""
    parser.add_argument("--weights", required=True, help="a ViT that `hpool-vit convert` reads")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of parquet files")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the raw numbers")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=("settings", "rules"))
    add_measuring_arguments(parser)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(args.num_threads)
    (measure_settings if args.measurement == "settings" else measure_rules)(args)


if __name__ == "__main__":
    main()
