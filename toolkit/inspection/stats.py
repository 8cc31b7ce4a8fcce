"""The command `hpool-vit stats`: parameters, tokens and multiply-accumulates (MACs) of HPool-ViTs."""

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedModel

from hpool_vit import (
    HPoolViTBackbone,
    HPoolViTConfig,
    HPoolViTForImageClassification,
    HPoolViTForSemanticSegmentation,
)
from hpool_vit.configuration_hpool_vit import PRESETS
from hpool_vit.pooling_hpool_vit import importance_macs

from ..shared.console import hub_id, one_line
from ..shared.options import Speed


# What a saved configuration names in `architectures`; any other one is counted as a classifier.
MODELS = {model.__name__: model for model in (HPoolViTForSemanticSegmentation, HPoolViTBackbone)}


def model_stats(config: HPoolViTConfig) -> dict[str, Any]:
    """
    Counts what a model costs for one image of `config.image_size`: a classifier, or the model for segmentation or the
    backbone that `config.architectures` names.

    Args:
        config (`HPoolViTConfig`): the configuration of the model.

    Returns:
        A dictionary with the numbers `parameters` and `macs`, and with `parts`: the embeddings, each stage and the
        head. Each part has its `name`, `macs` and `share` of the total, and each stage its `blocks` and patch
        `tokens`. MACs are half of what PyTorch's `FlopCounterMode` counts: matrix products and convolutions.
    """
    # Only shapes matter, so nothing is allocated. Eager attention shows each of its products.
    with torch.device("meta"):
        model = model_class(config)._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        image = torch.zeros(1, config.num_channels, *config.image_shape, dtype=model.dtype)
    # With gradients, because the counter fails at a parameter that is a module's input without them.
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(image)
    counts = {name.partition(".")[2]: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    total = counter.get_total_flops() // 2
    parts = []
    for name, details, modules, extra in _parts(config):
        macs = sum(counts.get(module, 0) for module in modules)
        # After its last map a backbone runs nothing.
        parts.append(({"name": name, **details}, macs + extra if macs else 0))
    # The rest is the head, with the mean before it.
    parts.append(({"name": "head"}, total - sum(macs for _, macs in parts)))
    return {
        "parameters": model.num_parameters(),
        "macs": total,
        "parts": [{**part, "macs": macs, "share": macs / total} for part, macs in parts],
    }


def model_class(config: HPoolViTConfig) -> type[PreTrainedModel]:
    named = [MODELS[name] for name in config.architectures or [] if name in MODELS]
    return named[0] if named else HPoolViTForImageClassification


def _parts(config: HPoolViTConfig) -> list[tuple[str, dict[str, Any], list[str], int]]:
    """The parts of the model before the head: their names, details, modules, and the MACs that no module counts."""
    starts = [0, *(config.hvt_pool or []), config.num_hidden_layers]
    parts = [("embeddings", {}, ["hpool_vit.embeddings"], 0)]
    all_tokens = config.tokens_per_stage()
    for stage, tokens in enumerate(all_tokens):
        blocks = list(range(starts[stage], starts[stage + 1]))
        modules = [f"hpool_vit.layers.{block}" for block in blocks]
        modules += [f"hpool_vit.pooling.{starts[stage]}"] if stage else []
        before = all_tokens[stage - 1] if stage else tokens
        # The block at whose input tokens merge says what they are worth, outside of its own pass.
        extra = importance_macs(config, before) if tokens < before else 0
        parts.append((f"stage {stage}", {"blocks": blocks, "tokens": tokens}, modules, extra))
    return parts


def format_stats(name: str, stats: dict[str, Any]) -> str:
    """
    The result of [`model_stats`] as a table.

    Args:
        name (`str`): the name of the model.
        stats (`dict`): its statistics.
    """
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
    """A number of MACs in a readable unit: 1.62 G, 23.4 M."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e8 else f"{macs / 1e6:.1f} M"


def load_config(name: str) -> HPoolViTConfig:
    """
    The configuration of a preset, a saved folder or a Hub id.

    Raises:
        ValueError: if the name is none of these, or if the model is not an HPool-ViT.
    """
    if name in PRESETS:
        return HPoolViTConfig.from_preset(name)
    if not Path(name).exists() and hub_id(name) is None:
        raise ValueError(
            f"{name} is neither a folder here nor an id on the Hub nor a preset. The presets are {', '.join(PRESETS)}."
        )
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} has no config.json: give the folder of a saved model.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"The configuration of {name} cannot be loaded: {one_line(error)}") from error
    if config.model_type != HPoolViTConfig.model_type:
        raise ValueError(f"{name} is a model of the type {config.model_type!r}, not an HPool-ViT.")
    return config


def at_speed(config: HPoolViTConfig, speed: float | None) -> HPoolViTConfig:
    """The configuration at one of its speeds. Raises a `ValueError` for one that it does not offer."""
    return config if speed is None else config.with_schedule(**config.fields_of_speed(speed))


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL_OR_PRESET]...",
            help=f"Saved folders, Hub ids or presets ({', '.join(PRESETS)}). Default: all presets.",
            show_default=False,
        ),
    ] = None,
    speed: Speed = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """
    Count the parameters, tokens and multiply-accumulates (MACs) of HPool-ViTs, stage by stage.

    A stage begins with a pooling and ends before the next one. The presets are the models of the paper. Only the
    configuration of a model is read, not its weights.
    """
    stats = {name: model_stats(at_speed(load_config(name), speed)) for name in models or PRESETS}
    print(json.dumps(stats, indent=2) if json_output else "\n\n".join(map(format_stats, stats, stats.values())))
