"""What the two converters share: reading foreign checkpoints safely, timm's names, and writing a complete folder."""

import argparse
import pickle
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from ..shared.files import folder_written_whole


# Under which keys training scripts keep the weights in a checkpoint, and their moving average.
WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")

# Published widths whose heads are not 64 wide (ViT-So400m, -H, -g and -G).
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}

# Our names, as patterns, and timm's; the fused projection of query, key and value is in `timm_name`.
TIMM_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^layers\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.scale$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^pooled_layernorm\.", "fc_norm."),
    (r"^classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file or tensor, the reason and the remedy."""


def timm_name(name: str) -> tuple[str, int | None]:
    """
    timm's name of one of our parameters, and which third of that tensor it is (None: all of it). The paper's code uses
    the same names.
    """
    if fused := re.fullmatch(r"layers\.(\d+)\.attention\.([qkv])_proj\.(\w+)", name):
        block, projection, parameter = fused.groups()
        return f"blocks.{block}.attn.qkv.{parameter}", "qkv".index(projection)
    for pattern, replacement in TIMM_NAMES:
        name = re.sub(pattern, replacement, name)
    return name, None


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]):
    """Raises a `ConversionError` if the tensor `name` has another shape, in which None stands for any length."""
    if tensor.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
        return
    fitting = ", ".join("any" if length is None else str(length) for length in shape)
    raise ConversionError(
        f"The tensor `{name}` has the shape {tuple(tensor.shape)}, and ({fitting}) would fit: the checkpoint is "
        "damaged, or of another model."
    )


@dataclass
class Checkpoint:
    """
    The tensors of a file, asked for by our names, and a record of which were read.

    Args:
        tensors (`dict[str, torch.Tensor]`): under the file's own names.
        name_of (`Callable`, *optional*): the file's name of our parameter, like [`timm_name`]; default: the same name.
        args (`dict`, *optional*): the arguments of the training script, where the file holds them.
    """

    tensors: dict[str, torch.Tensor]
    name_of: Callable[[str], tuple[str, int | None]] = lambda name: (name, None)
    args: dict = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return self.name_of(name)[0] in self.tensors

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> torch.Tensor:
        """
        The tensor for our parameter `name`, which then counts as read.

        Args:
            name: our name, without the model's prefix.
            shape: what it must be, in which None stands for any length; by default any shape.

        Raises:
            ConversionError: if it is missing or has another shape; the message uses the file's own name.
        """
        source, part = self.name_of(name)
        if source not in self.tensors:
            raise ConversionError(
                f"The tensor `{source}` is missing: the checkpoint is incomplete, or of another model."
            )
        self.read.add(source)
        tensor = self.tensors[source]
        if shape is not None:
            check_shape(source, tensor, shape if part is None else (3 * shape[0], *shape[1:]))
        return tensor if part is None else tensor.chunk(3)[part].clone()

    def shape_of(self, name: str) -> torch.Size | None:
        """The shape of the tensor for our parameter `name`; None if there is none. It does not count as read."""
        tensor = self.tensors.get(self.name_of(name)[0])
        return None if tensor is None else tensor.shape

    def drop(self, pattern: str) -> list[str]:
        """Counts the tensors that match as read, and returns their names."""
        dropped = [name for name in self.tensors if re.search(pattern, name)]
        self.read.update(dropped)
        return dropped

    @property
    def num_blocks(self) -> int:
        """How many blocks there are; a `ConversionError` if one in between is missing."""
        found = (re.match(r"(?:blocks|layers)\.(\d+)\.", name) for name in self.tensors)
        blocks = {int(block[1]) for block in found if block}
        gap = next(block for block in range(len(blocks) + 1) if block not in blocks)
        if gap < len(blocks) or not blocks:
            self.take(f"layers.{gap}.layernorm_before.weight")
        return len(blocks)

    @property
    def num_labels(self) -> int:
        """How many classes the head has; 0 if there is no head."""
        return len(self.take("classifier.weight", (None, None))) if "classifier.weight" in self else 0

    @property
    def patch_weight(self) -> torch.Tensor:
        """The convolution that embeds the patches, of shape `(width, channels, height, width)`."""
        return self.take("embeddings.patch_embeddings.projection.weight", (None,) * 4)

    @property
    def positions(self) -> torch.Tensor:
        """The first position embeddings, of shape `(1, tokens, width)`."""
        return self.take("embeddings.position_embeddings", (1, None, len(self.patch_weight)))

    @property
    def shape_fields(self) -> dict[str, Any]:
        """The fields of the configuration that the tensors tell, with no doubt left."""
        width, num_channels, *patch = self.patch_weight.shape
        blocks = range(self.num_blocks)
        return {
            "hidden_size": width,
            "num_channels": num_channels,
            "patch_size": square_or_pair(patch),
            "num_hidden_layers": self.num_blocks,
            "intermediate_size": len(self.take("layers.0.mlp.fc1.weight", (None, width))),
            "qkv_bias": any(f"layers.{block}.attention.q_proj.bias" in self for block in blocks),
            # Any number will do: the learned scales follow.
            "layer_scale_init_value": 1.0
            if any(f"layers.{block}.layer_scale1.scale" in self for block in blocks)
            else None,
            "ln_order": "pre",
        }

    def unread(self) -> list[str]:
        return [name for name in self.tensors if name not in self.read]


@dataclass
class ConversionReport:
    """What a conversion left out of the source, what it initialised anew, and what it had to assume."""

    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"Dropped: {', '.join(self.dropped) or 'nothing'}."]
        lines += [f"Newly initialised: {', '.join(self.initialised) or 'nothing'}."]
        return "\n".join([*lines, *self.notes])


def read_checkpoint(path: str | Path, use_ema: bool = False, name_of: Callable = timm_name) -> Checkpoint:
    """
    Reads `.safetensors`, a bare state dict or a training checkpoint. Of a pickle, nothing but tensors, plain
    containers and `argparse.Namespace` is built: any other object is refused without being executed.

    Args:
        path: the file.
        use_ema: take the moving average of the weights that some training scripts keep.
        name_of: as for [`Checkpoint`].

    Raises:
        ConversionError: if the file is missing, damaged, holds other objects or no weights.
    """
    content = _read_file(Path(path))
    keys = EMA_KEYS if use_ema else WEIGHT_KEYS
    tensors = next((content[key] for key in keys if isinstance(content.get(key), dict)), None)
    if tensors is None and use_ema:
        raise ConversionError(f"`{path}` holds no moving average of weights: none of the keys {', '.join(keys)}.")
    args = content.get("args", {}) if tensors is not None else {}
    tensors = content if tensors is None else tensors
    if not tensors or not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
        raise ConversionError(
            f"`{path}` holds no state dict: it has the keys {', '.join(map(str, list(content)[:8]))}. Pass a "
            f"dictionary of tensors, bare or under {' or '.join(WEIGHT_KEYS)}."
        )
    if all(name.startswith("module.") for name in tensors):  # saved from DataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(tensors, name_of, args if isinstance(args, dict) else {})


def _read_file(path: Path) -> dict:
    if not path.is_file():
        raise ConversionError(f"`{path}` is no file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        found = f"the pickled object `{stranger[1]}`" if stranger else "something other than tensors"
        raise ConversionError(
            f"`{path}` is damaged or not safe: it holds {found}, which was not executed. Only tensors, plain "
            "containers and `argparse.Namespace` are read: save the state dict alone, best as safetensors."
        ) from error
    except Exception as error:  # damaged bytes make the readers fail in any way
        raise ConversionError(f"`{path}` cannot be read, it seems truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"`{path}` holds a {type(content).__name__}, not a dictionary of tensors.")
    return content


def refuse(checkpoint: Checkpoint, strangers: dict[str, str]):
    """
    Raises a `ConversionError` for a tensor of something that HPool-ViT does not have.

    Args:
        checkpoint: the source.
        strangers: patterns of the file's names, and what such a tensor is.
    """
    for name in checkpoint.tensors:
        for pattern, reason in strangers.items():
            if re.search(pattern, name):
                raise ConversionError(f"The tensor `{name}` cannot be converted: it is {reason}.")


def build_model(
    config: HPoolViTConfig,
    checkpoint: Checkpoint,
    given: dict[str, torch.Tensor] | None = None,
    new: Collection[str] = (),
) -> HPoolViTForImageClassification:
    """
    A model in float32 and evaluation mode, each parameter of which is in `given`, is `new`, or is the checkpoint's.

    Args:
        config: its configuration.
        checkpoint: the source, in which no tensor may be left unread.
        given: tensors under the model's own names.
        new: names of parameters that start as in a new model.

    Raises:
        ConversionError: for a missing, surplus or misshapen tensor, by name.
    """
    tensors = dict(given or {})
    for name, shape in parameter_shapes(config).items():
        if name not in tensors and name not in new:
            tensors[name] = checkpoint.take(name.removeprefix("hpool_vit."), shape)
    if surplus := checkpoint.unread():
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise ConversionError(f"The tensor `{surplus[0]}`{more} has no place in an HPool-ViT of this configuration.")
    return HPoolViTForImageClassification.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)


def parameter_shapes(config: HPoolViTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, without initialising any."""
    with torch.device("meta"):
        model = HPoolViTForImageClassification(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def resolve_overrides(config_overrides: dict[str, Any]) -> dict[str, Any]:
    """
    Fields of the configuration under their own names.

    Raises:
        ConversionError: for a name that the configuration does not have.
    """
    known = {field.name for field in fields(HPoolViTConfig)} | {"num_labels"}
    overrides = {HPoolViTConfig.attribute_map.get(name, name): value for name, value in config_overrides.items()}
    if unknown := overrides.keys() - known:
        raise ConversionError(f"`{min(unknown)}` is no field of the configuration: see `HPoolViTConfig`.")
    return overrides


def infer_heads(width: int) -> int:
    """The number of attention heads that published ViTs of this width have."""
    if width not in HEADS_OF_WIDTH and width % 64:
        raise ConversionError(
            f"The width {width} is not divisible by heads of width 64, and the file does not tell the number of "
            "heads: pass `--num_attention_heads`."
        )
    return HEADS_OF_WIDTH.get(width, width // 64)


def square_or_pair(shape: tuple[int, int]) -> int | tuple[int, int]:
    """A size as configurations hold it: one number for a square."""
    height, width = shape
    return height if height == width else (height, width)


def image_size_of(checkpoint: Checkpoint, grid: tuple[int, int]) -> int | tuple[int, int]:
    """The image size in pixels that has `grid` (rows, columns) of the checkpoint's patches."""
    patch = checkpoint.patch_weight.shape[2:]
    return square_or_pair(tuple(side * pixels for side, pixels in zip(grid, patch, strict=True)))


def read_labels(path: str | Path) -> dict[str, dict]:
    """`id2label` and `label2id` from a text file with one class name per line."""
    labels = Path(path).read_text(encoding="utf-8").splitlines()
    if not labels or not all(label.strip() for label in labels):
        raise ConversionError(f"`{path}` must hold one class name per line, and no empty line.")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConversionError(f"`{path}` names the class {twice!r} more than once: make the names distinct.")
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def check_labels(num_labels: int, overrides: dict):
    """Raises a `ConversionError` for less than no classes, or class names in `overrides` that are not as many."""
    if num_labels < 0:
        raise ConversionError(f"`num_labels={num_labels}` must be at least 0.")
    num_names = len(overrides.get("id2label") or range(num_labels))
    if num_names != num_labels:
        raise ConversionError(
            f"There are {num_labels} classes and {num_names} class names: they must be equally many."
        )


def write_folder(output_dir: str | Path, *parts):
    """
    Saves model and image processor into a folder that appears complete or not at all.

    Args:
        output_dir: a folder that does not exist yet, or is empty.
        parts: objects with `save_pretrained`.
    """
    with folder_written_whole(output_dir) as folder:
        for part in parts:
            part.save_pretrained(folder)
