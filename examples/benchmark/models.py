"""
The models that the benchmark knows by name. Their weights are new, because the values do not change the speed.

    hvt-s-1, …              the paper's models (presets of HPoolViTConfig)
    vit-ti, vit-s, vit-b    Transformers' ViT of width 192, 384 and 768
    merge-ti, merge-s       such a ViT whose most similar tokens merge in four stages (`pool_mode="merge"`)
    deit_small_patch16_224, pit_s_224, swin_tiny_patch4_window7_224, …  any timm model
    a folder or Hub id      any image classifier of Transformers, this package's included

To change fields of the configuration, append them with an `@` each: `hvt-s-3@hvt_pool=1,5@pool_mode=avg`.

No maintained package has token merging as published (ToMe, arXiv 2210.09461): neither timm nor Transformers has it,
the authors' repository supports timm 0.4 and is not on PyPI, and `tomesd` is for diffusion models. `merge-…` stands in
for it: it merges after ToMe's idea, and at equal multiply-accumulates its answers are closer to those of the unpooled
model (docs/results/warm_start.md).
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, ViTConfig

from hpool_vit.configuration_hpool_vit import PRESETS, HPoolViTConfig
from hpool_vit.toolkit.shared.console import parse_value


# Width and heads of Transformers' ViT under each name.
VITS = {"vit-ti": (192, 3), "vit-s": (384, 6), "vit-b": (768, 12)}
# Of 196 tokens 37 merge at each of four blocks: 2.0 times fewer multiply-accumulates with a class token.
MERGING = {
    "pool_mode": "merge",
    "hvt_pool": [1, 3, 5, 7],
    "merge_ratio": [math.ceil(37e6 / tokens) / 1e6 for tokens in (196, 159, 122, 85)],
    "proportional_attention": True,
}
MERGED = {"merge-ti": "vit-ti", "merge-s": "vit-s"}
TIMM_IMAGE_SIZE = 224


class Unavailable(RuntimeError):
    """A model or mode that cannot run here; the message says why."""


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """
    The name before the first `@`, and the fields after it.

    Raises:
        ValueError: if a part after an `@` is not `field=value`.
    """
    base, *parts = name.split("@")
    if not parts:
        return base, {}

    fields = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals or not field.isidentifier():
            raise ValueError(f"--models {name}: `@{part}` is not `@field=value`.")
        fields[field] = parse_value(field, value)
    return base, fields


def find_model(name: str) -> Callable[..., nn.Module]:
    """
    Returns the function that builds the model `name`, with the arguments `image_size` (None: the model's own) and
    `attention` ("eager", "sdpa", "flex_attention", "flash_attention_2").

    Raises:
        ValueError: if the name is unknown, or the model rejects a field.
    """
    base, fields = split_name(name)
    if base in (*PRESETS, *VITS, *MERGED) or is_transformers_model(base):
        try:
            load_config(base, fields)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--models {name}: cannot build this model: {reason}") from error
        return lambda image_size=None, attention="sdpa": build_transformers(base, fields, image_size, attention)
    if is_timm_model(base):
        return lambda image_size=None, attention="sdpa": build_timm(base, fields, image_size, attention)
    raise ValueError(
        f"--models {name}: unknown model. Known are {', '.join((*PRESETS, *VITS, *MERGED))}, folders and Hub "
        "ids of Transformers models, and timm's models" + ("." if has_timm() else " if you run `pip install timm`.")
    )


def is_transformers_model(name: str) -> bool:
    return Path(name).is_dir() or "/" in name


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def is_timm_model(name: str) -> bool:
    if not has_timm():
        return False
    import timm

    return timm.is_model(name)


def load_config(name: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of one of our names, or of a folder or Hub id."""
    if name in PRESETS:
        return HPoolViTConfig.from_preset(name, **fields)
    if name in VITS:
        width, heads = VITS[name]
        shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        return ViTConfig(**{**shape, "num_labels": 1000, **fields})
    if name in MERGED:
        width, heads = VITS[MERGED[name]]
        shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        return HPoolViTConfig.from_preset("hvt-s-0", **{**shape, **MERGING, "use_class_token": True, **fields})
    return AutoConfig.from_pretrained(name, **fields)


def build_transformers(name: str, fields: dict[str, Any], image_size: int | None, attention: str) -> nn.Module:
    if image_size is not None:
        fields = {**fields, "image_size": image_size}
    return AutoModelForImageClassification.from_config(load_config(name, fields), attn_implementation=attention)


def build_timm(name: str, fields: dict[str, Any], image_size: int | None, attention: str) -> nn.Module:
    import timm
    from timm.layers import set_fused_attn, use_fused_attn

    if attention not in ("eager", "sdpa"):
        raise Unavailable(f"timm has no {attention}")
    if image_size is not None and image_size != TIMM_IMAGE_SIZE:
        fields = {**fields, "img_size": image_size}
    fused = use_fused_attn()
    # timm's layers read this when they are built.
    set_fused_attn(attention == "sdpa")
    try:
        return timm.create_model(name, **fields)
    finally:
        set_fused_attn(bool(fused))


def own_image_size(name: str) -> int:
    """The image size that a model is made for; the height if it is not square."""
    base, fields = split_name(name)
    if not (base in (*PRESETS, *VITS, *MERGED) or is_transformers_model(base)):
        return fields.get("img_size", TIMM_IMAGE_SIZE)
    size = getattr(load_config(base, fields), "image_size", TIMM_IMAGE_SIZE)
    return size if isinstance(size, int) else size[0]
