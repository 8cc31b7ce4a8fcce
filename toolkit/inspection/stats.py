"""Parameters, tokens and multiply-accumulates (MACs) of HPool-ViTs."""

import json
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification
from hpool_vit.configuration_hpool_vit import PRESETS


def model_stats(config: HPoolViTConfig) -> dict[str, Any]:
    """
    What a model of this configuration costs for one image of `config.image_size`.

    Args:
        config (`HPoolViTConfig`): the configuration.

    Returns:
        `parameters` and `macs`, plain numbers, and `parts`: the embeddings, each stage and the head, with `name`,
        `blocks` and patch `tokens` (of the stages), `macs` and `share` of the total. A MAC is half of what PyTorch's
        `FlopCounterMode` counts: matrix products and convolutions.
    """
    # On no device: only shapes count. In eager attention each product is seen.
    with torch.device("meta"):
        model = HPoolViTForImageClassification._from_config(config, attn_implementation="eager").eval()
        image = torch.zeros(1, config.num_channels, *config.image_shape, dtype=model.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counts = {name.partition(".")[2]: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    total = counter.get_total_flops() // 2
    parts = [
        ({"name": name, **details}, sum(counts.get(module, 0) for module in modules))
        for name, details, modules in _parts(config)
    ]
    # What is left is the head, and the mean before it.
    parts.append(({"name": "head"}, total - sum(macs for _, macs in parts)))
    return {
        "parameters": model.num_parameters(),
        "macs": total,
        "parts": [{**part, "macs": macs, "share": macs / total} for part, macs in parts],
    }


def _parts(config: HPoolViTConfig) -> list[tuple[str, dict[str, Any], list[str]]]:
    """The parts of the model before the head: name, details, and the names of their modules."""
    starts = [0, *(config.hvt_pool or []), config.num_hidden_layers]
    parts = [("embeddings", {}, ["hpool_vit.embeddings"])]
    for stage, tokens in enumerate(config.tokens_per_stage()):
        blocks = list(range(starts[stage], starts[stage + 1]))
        modules = [f"hpool_vit.layers.{block}" for block in blocks]
        modules += [f"hpool_vit.pooling.{starts[stage]}"] if stage else []
        parts.append((f"stage {stage}", {"blocks": blocks, "tokens": tokens}, modules))
    return parts


def format_stats(name: str, stats: dict[str, Any]) -> str:
    """The table of one model."""
    lines = [f"{name}: {stats['parameters'] / 1e6:.2f} M parameters, {stats['macs'] / 1e9:.2f} G MACs"]
    lines += [f"  {'part':<12}{'blocks':>8}{'tokens':>8}{'MACs G':>9}{'share':>8}"]
    for part in stats["parts"]:
        blocks = part.get("blocks") or []
        span = f"{blocks[0]}–{blocks[-1]}" if len(blocks) > 1 else "".join(map(str, blocks))
        lines.append(
            f"  {part['name']:<12}{span:>8}{part.get('tokens', ''):>8}{part['macs'] / 1e9:>9.3f}{part['share']:>8.1%}"
        )
    return "\n".join(lines)


def format_macs(macs: int) -> str:
    """A number of MACs for people: 1.62 G, 23.4 M."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e8 else f"{macs / 1e6:.1f} M"


def load_config(name: str) -> HPoolViTConfig:
    """The configuration of a preset, or of a saved folder or Hub id."""
    if name in PRESETS:
        return HPoolViTConfig.from_preset(name)
    config = AutoConfig.from_pretrained(name)
    if config.model_type != HPoolViTConfig.model_type:
        raise ValueError(f"`{name}` holds a model of the type {config.model_type!r}, not an HPool-ViT.")
    return config


def command(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL_OR_PRESET]...", help="Presets, saved folders or Hub ids.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """
    Count the parameters, tokens and multiply-accumulates (MACs) of HPool-ViTs, stage by stage.

    A stage is the blocks between two poolings, with the pooling at its start. Without a name, the models of the paper
    are counted.
    """
    stats = {name: model_stats(load_config(name)) for name in models or PRESETS}
    print(json.dumps(stats, indent=2) if json_output else "\n\n".join(map(format_stats, stats, stats.values())))
