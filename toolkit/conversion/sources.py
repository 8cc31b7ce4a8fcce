"""Reads a trained ViT from a file, a folder or the Hub. A kind of model that can be read is one row of a table."""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig
from transformers.utils import cached_file

from hpool_vit import HPoolViTConfig

from ..shared.console import hub_id
from ..shared.files import read_json
from .checkpoint import Checkpoint, ConversionError, read_checkpoint
from .image_processor import read_image_processor, read_timm_data_config
from .kinds import (
    PACKED,
    PLAIN_MLP_NAMES,
    REFUSED_MODEL_TYPES,
    TIMM_ACTIVATIONS,
    TIMM_ARGUMENTS,
    TIMM_NEEDS_ARCHITECTURE,
    TIMM_POOLS,
    TIMM_VITS,
    TRANSFORMERS_KINDS,
    TimmKind,
    TransformersKind,
    rename,
    timm_kind,
)


FILE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")

# What a checkpoint of two towers has beside the tower for images.
NOT_VISION = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


@dataclass
class Source:
    """
    A trained ViT.

    Args:
        checkpoint: its tensors, which you ask for by our names.
        readout: what its head reads, or what its pooled features are without one: a name in `READOUTS`.
        fields: what else is known about it, as fields of our configuration.
        image_processor: the attributes of its image processor; None if they are unknown.
        notes: what the user should know about it.
        rotary_order: how it orders the channels of rotary positions, a name in `ROTARY_ORDERS`; None: as we do.
    """

    checkpoint: Checkpoint
    readout: str
    fields: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    rotary_order: str | None = None

    @property
    def has_class_token(self) -> bool:
        """Whether it has a class token, which its head need not read."""
        return "embeddings.cls_token" in self.checkpoint


def is_checkpoint_file(name_or_path: str | Path) -> bool:
    """Whether this names a file of tensors, be it there or not, rather than a folder or a repository on the Hub."""
    path = Path(name_or_path)
    return path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir())


def is_hpool_vit(name: str) -> bool:
    """
    Whether a saved folder, or an id on the Hub, holds an HPool-ViT. What cannot be found does not.

    Raises:
        ValueError: if its configuration is damaged.
    """
    if is_checkpoint_file(name):
        return False
    if hub_id(name) is None:
        file = Path(name) / "config.json"
    else:
        file = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
    if file is None or not Path(file).is_file():
        return False
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return config.get("model_type") == HPoolViTConfig.model_type


def read_source(model_name_or_path: str | Path, use_ema: bool = False, architecture: str | None = None) -> Source:
    """
    Reads a trained ViT.

    Args:
        model_name_or_path (`str`): a file, a folder or a Hub id, as for [`convert_vit`].
        use_ema (`bool`, defaults to `False`):
            Whether to take the moving average of the weights, if the source is a training checkpoint that has one.
        architecture (`str`, *optional*):
            timm's name of the model, such as `"vit_base_patch16_clip_224"`, for a file whose tensors do not tell.

    Raises:
        ConversionError: for a source that cannot be read, or is not a ViT of a known kind.
    """
    if is_checkpoint_file(model_name_or_path):
        return timm_source(read_checkpoint(model_name_or_path, use_ema), architecture=architecture)
    name = str(model_name_or_path)
    for option, given in (("use_ema", use_ema), ("architecture", architecture)):
        if given:
            kind = "training checkpoint" if option == "use_ema" else "file of tensors"
            raise ConversionError(f"`{option}` is for a {kind}, and `{name}` is not a file.")
    config = _read_config(name)
    if kind := TRANSFORMERS_KINDS.get(config.get("model_type")):
        return _read_transformers(name, kind)
    if "architecture" in config:
        weights = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        return timm_source(read_checkpoint(weights or cached_file(name, "pytorch_model.bin")), config)
    raise _unknown_model_type(name, config.get("model_type"))


def _unknown_model_type(name: str, model_type: str | None) -> ConversionError:
    reason = REFUSED_MODEL_TYPES.get(model_type)
    why = f" and cannot be converted: it is or has {reason}" if reason else ""
    return ConversionError(
        f"`{name}` has the `model_type` {model_type!r}{why}. These can be converted: "
        f"{', '.join(TRANSFORMERS_KINDS)}, and ViT, DeiT, EVA-02, DINOv3 and Perception Encoder of timm."
    )


def _read_config(name: str) -> dict[str, Any]:
    if not Path(name).is_dir() and hub_id(name) is None:
        raise ConversionError(f"`{name}` is neither a file nor a folder, and it cannot be an id on the Hub.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConversionError(f"`{name}` has no config.json: pass the folder of a saved model, or a file of tensors.")
    return read_json(cached_file(name, "config.json"))


def _read_transformers(name: str, kind: TransformersKind) -> Source:
    config = AutoConfig.from_pretrained(name)
    has_head = any("ForImageClassification" in architecture for architecture in config.architectures or [])
    if has_head:
        tensors = _load_tensors(name, config, AutoModelForImageClassification, kind)
    else:
        tower_class = getattr(transformers, kind.tower_class) if kind.tower_class else AutoModel
        tensors = _load_tensors(name, _tower_of(config, kind), tower_class, kind)
    source = transformers_source(tensors, config, has_head)
    size = source.fields["image_size"]
    source.image_processor = read_image_processor(name, kind.image_processor, size, source.notes)
    return source


def _tower_of(config: PreTrainedConfig, kind: TransformersKind) -> PreTrainedConfig:
    return getattr(config, kind.tower) if kind.tower else config


def transformers_source(tensors: dict[str, torch.Tensor], config: PreTrainedConfig, has_head: bool) -> Source:
    """
    A ViT of Transformers, without its image processor.

    Args:
        tensors: its state dict.
        config: its configuration, of a type in `TRANSFORMERS_KINDS`.
        has_head: whether it has a head for image classification.
    """
    kind = TRANSFORMERS_KINDS[config.model_type]
    vision = _tower_of(config, kind)
    fields = _fields_of(vision, kind) | kind.fixed
    fields |= kind.head_features if has_head and kind.head_readout else kind.features
    if has_head:
        fields |= {"id2label": config.id2label, "label2id": config.label2id}
    others = [tensor for tensor in tensors if tensor.startswith(NOT_VISION)]
    tensors = {tensor: value for tensor, value in tensors.items() if tensor not in others}
    checkpoint = Checkpoint(_in_our_names(tensors, kind, vision))
    source = Source(checkpoint, (has_head and kind.head_readout) or kind.readout, fields, notes=list(kind.notes))
    if kind.tower and others:
        source.notes.append(
            f"Dropped the text tower and the projections ({len(others)} tensors), which images do not need."
        )
    if source.readout == "attention" and "readout.probe" not in checkpoint:
        source.readout = "mean"
        source.notes.append("The source has no pooled features: these are the mean of the patches.")
    return source


def _fields_of(config: PreTrainedConfig, kind: TransformersKind) -> dict[str, Any]:
    """Our fields, from a configuration of Transformers."""
    return {
        ours: theirs(config) if callable(theirs) else getattr(config, theirs) for ours, theirs in kind.fields.items()
    }


def _in_our_names(
    tensors: dict[str, torch.Tensor], kind: TransformersKind, config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """The tensors of a model of Transformers under our names, in our shapes, and each parameter by itself."""
    renamed = {}
    for theirs, tensor in tensors.items():
        name = rename(theirs, kind.names)
        for pattern, parts in PACKED:
            if match := re.match(pattern, name):
                renamed |= zip((match.expand(part) for part in parts), tensor.chunk(len(parts)), strict=True)
                break
        else:
            renamed[name] = kind.shapes[name](tensor, config) if name in kind.shapes else tensor
    if not any(".mlp.gate_proj." in name for name in renamed):
        renamed = {rename(name, PLAIN_MLP_NAMES): tensor for name, tensor in renamed.items()}
    return renamed


def _load_tensors(
    name: str, config: PreTrainedConfig, auto_class: Any, kind: TransformersKind
) -> dict[str, torch.Tensor]:
    """The tensors of a saved model under Transformers' names. Those that its class does not know are empty."""
    try:
        model, loading = auto_class.from_pretrained(name, config=config, output_loading_info=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ConversionError(f"The weights of `{name}` cannot be read: {error}") from error
    tensors = model.state_dict()
    for tensor in sorted(loading["missing_keys"]):
        if not tensor.startswith(kind.unneeded):
            raise ConversionError(f"The tensor `{tensor}` is missing: `{name}` is incomplete.")
        del tensors[tensor]
    return tensors | {tensor: torch.empty(0) for tensor in loading["unexpected_keys"]}


def timm_source(
    checkpoint: Checkpoint, config: dict[str, Any] | None = None, architecture: str | None = None
) -> Source:
    """
    A ViT in timm's naming.

    Args:
        checkpoint: its tensors.
        config: the `config.json` of a timm folder, if there is one.
        architecture: timm's name of the model, if there is no folder.
    """
    config = config or {}
    architecture = (config.get("architecture") or architecture or "").partition(".")[0]
    if architecture:
        _check_architecture(architecture)
    else:
        _ask_for_architecture(checkpoint)
    kind = timm_kind(architecture)
    arguments = config.get("model_args", {})
    source = Source(checkpoint, _timm_readout(checkpoint, config, kind), dict(kind.fields))
    source.rotary_order = kind.rotary_order
    _check_pooled_tokens(source, arguments.get("pool_include_prefix", bool(kind.pools_prefix)))
    source.fields |= {ours: arguments[theirs] for theirs, ours in TIMM_ARGUMENTS.items() if theirs in arguments}
    if checkpoint.is_gated:
        source.fields.setdefault("hidden_act", "silu")
    if activation := source.fields.get("hidden_act"):
        source.fields["hidden_act"] = TIMM_ACTIVATIONS.get(activation, activation)
    if "fc_norm.weight" in checkpoint.tensors:
        source.fields["norm_after_pooling"] = True
    if data := config.get("pretrained_cfg"):
        source.fields["image_size"] = tuple(data["input_size"][1:])
        source.image_processor = read_timm_data_config(data, source.notes)
    return source


def _check_architecture(architecture: str):
    """Raises a `ConversionError` for an architecture that cannot be converted."""
    if not re.match(TIMM_VITS, architecture):
        raise ConversionError(
            f"`architecture={architecture!r}` is not a ViT of timm: pass a name such as 'vit_base_patch16_224'."
        )
    if refusal := timm_kind(architecture).refusal:
        raise ConversionError(f"`architecture={architecture!r}` cannot be converted: {refusal}.")


def _check_pooled_tokens(source: Source, pools_prefix: bool):
    """Raises a `ConversionError` where the readout takes other tokens than ours does."""
    has_prefix = source.has_class_token or source.checkpoint.num_registers > 0
    if has_prefix and (source.readout, pools_prefix) in (("attention", False), ("mean", True)):
        tokens = "only patches" if source.readout == "attention" else "registers and class token too"
        raise ConversionError(
            f"The pooling of the source reads {tokens}, which no `readout` does: `{source.readout}` cannot be "
            "converted."
        )


def _ask_for_architecture(checkpoint: Checkpoint):
    """Raises a `ConversionError` for tensors that more than one architecture has, with the same names and shapes."""
    patterns = dict(TIMM_NEEDS_ARCHITECTURE)
    if "pos_embed" not in checkpoint.tensors:
        patterns[r"^reg_token$"] = "models with rotary positions alone"
    for name in checkpoint.tensors:
        for pattern, owners in patterns.items():
            if re.search(pattern, name):
                raise ConversionError(
                    f"The tensor `{name}` belongs to {owners}, which differ in more than their tensors: pass the name "
                    "that timm gives the model as `architecture`, such as 'vit_base_patch16_clip_224'."
                )


def _timm_readout(checkpoint: Checkpoint, config: dict[str, Any], kind: TimmKind) -> str:
    if pooling := config.get("global_pool"):
        if pooling not in TIMM_POOLS:
            raise ConversionError(
                f"The source has `global_pool={pooling!r}`. Only {', '.join(TIMM_POOLS)} can be converted."
            )
        return TIMM_POOLS[pooling]
    if any(name.startswith("attn_pool.") for name in checkpoint.tensors):
        return "attention"
    if "fc_norm.weight" in checkpoint.tensors or "cls_token" not in checkpoint.tensors:
        return "mean"
    return kind.readout or "class_token"
