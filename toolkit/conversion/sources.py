"""Reads a trained ViT from a file, a folder or the Hub. A kind of model that can be read is one row of a table."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig
from transformers.utils import cached_file

from ..shared.console import hub_id
from ..shared.files import read_json
from .checkpoint import Checkpoint, ConversionError, read_checkpoint
from .image_processor import read_image_processor, read_timm_data_config
from .names import DEIT_III_NAMES, DEIT_NAMES, DINOV2_NAMES, VIT_NAMES, Patterns, fc_norm_name, rename


FILE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")

# Our fields of the configuration, and which of the source's fields they come from.
VIT_FIELDS = {
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    # Transformers' ViT applies one rate in all three places.
    "dropout": "hidden_dropout_prob",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "projection_dropout_prob": "hidden_dropout_prob",
}


class TransformersKind(NamedTuple):
    """
    How one `model_type` of Transformers is read.

    Args:
        names: patterns of its tensor names and their replacements, which turn them into our names.
        fields: our fields of the configuration, and the names of the fields that tell them.
        reads_class_token: whether its head, or what it is known for, reads the class token.
        unneeded: the start of the names of tensors that a folder may lack.
    """

    names: Patterns = VIT_NAMES
    fields: dict[str, str] = VIT_FIELDS
    reads_class_token: bool = True
    unneeded: tuple[str, ...] = ("pooler.",)


# By `model_type`.
TRANSFORMERS_KINDS = {
    "vit": TransformersKind(),
    "deit": TransformersKind(names=DEIT_NAMES),
    "vit_msn": TransformersKind(),
    "dinov2": TransformersKind(names=DINOV2_NAMES),
}

# timm's `global_pool`, and whether the head then reads the class token.
TIMM_POOLS = {"token": True, "avg": False}


@dataclass
class Source:
    """
    A trained ViT.

    Args:
        checkpoint: its tensors, which you ask for by our names.
        reads_class_token: whether its head, or what it is known for, reads the class token.
        fields: what else is known about it, as fields of our configuration.
        image_processor: the attributes of its image processor; None if they are unknown.
        notes: what the user should know about it.
    """

    checkpoint: Checkpoint
    reads_class_token: bool
    fields: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def is_checkpoint_file(name_or_path: str | Path) -> bool:
    """Whether this names a file of tensors, be it there or not, rather than a folder or a repository on the Hub."""
    path = Path(name_or_path)
    return path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir())


def read_source(model_name_or_path: str | Path, use_ema: bool = False) -> Source:
    """
    Reads a trained ViT.

    Args:
        model_name_or_path (`str`): a file, a folder or a Hub id, as for [`convert_vit`].
        use_ema (`bool`, defaults to `False`):
            Whether to take the moving average of the weights, if the source is a training checkpoint that has one.

    Raises:
        ConversionError: for a source that cannot be read, or is not a ViT of a known kind.
    """
    if is_checkpoint_file(model_name_or_path):
        return timm_source(read_checkpoint(model_name_or_path, use_ema))
    name = str(model_name_or_path)
    if use_ema:
        raise ConversionError(f"`use_ema` is for a training checkpoint, and `{name}` is not a file.")
    config = _read_config(name)
    if kind := TRANSFORMERS_KINDS.get(config.get("model_type")):
        return _read_transformers(name, kind)
    if "architecture" in config:
        weights = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        return timm_source(read_checkpoint(weights or cached_file(name, "pytorch_model.bin")), config)
    raise ConversionError(
        f"`{name}` has the `model_type` {config.get('model_type')!r}. These can be converted: "
        f"{', '.join(TRANSFORMERS_KINDS)}, and ViT and DeiT of timm."
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
    fields = {ours: getattr(config, theirs) for ours, theirs in kind.fields.items()}
    if has_head:
        fields |= {"id2label": config.id2label, "label2id": config.label2id}
    tensors = _load_tensors(name, config, AutoModelForImageClassification if has_head else AutoModel, kind)
    checkpoint = Checkpoint({rename(tensor, kind.names): value for tensor, value in tensors.items()})
    return Source(checkpoint, kind.reads_class_token, fields, read_image_processor(name))


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


def timm_source(checkpoint: Checkpoint, config: dict[str, Any] | None = None) -> Source:
    """
    A ViT in timm's naming.

    Args:
        checkpoint: its tensors.
        config: the `config.json` of a timm folder, if there is one.
    """
    config = config or {}
    tensors = {rename(name, DEIT_III_NAMES): tensor for name, tensor in checkpoint.tensors.items()}
    checkpoint.tensors = tensors
    inferred = "avg" if "fc_norm.weight" in tensors or "cls_token" not in tensors else "token"
    pooling = config.get("global_pool") or inferred
    if pooling not in TIMM_POOLS:
        raise ConversionError(f"The source has `global_pool={pooling!r}`. Only {' and '.join(TIMM_POOLS)} convert.")
    source = Source(checkpoint, TIMM_POOLS[pooling])
    if "fc_norm.weight" in tensors:
        checkpoint.name_of = fc_norm_name
        source.fields["norm_after_pooling"] = True
    if heads := config.get("model_args", {}).get("num_heads"):
        source.fields["num_attention_heads"] = heads
    if data := config.get("pretrained_cfg"):
        source.fields["image_size"] = tuple(data["input_size"][1:])
        source.image_processor = read_timm_data_config(data)
    return source
