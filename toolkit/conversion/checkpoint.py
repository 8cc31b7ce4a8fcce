"""A file of tensors from another library or the paper's code: read safely, and asked for by our names."""

import argparse
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .kinds import Place, timm_places


# Under which keys training scripts keep the weights in a checkpoint, and their moving average.
WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("model_ema", "state_dict_ema")


class ConversionError(ValueError):
    """A source that cannot be converted. The message names the file or tensor, the reason and the remedy."""


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]):
    """Raises a `ConversionError` unless the tensor has this shape, in which None stands for any length."""
    if tensor.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
        return
    fitting = ", ".join("any" if length is None else str(length) for length in shape)
    raise ConversionError(
        f"The tensor `{name}` has the shape {tuple(tensor.shape)} instead of ({fitting}): the checkpoint is damaged "
        "or holds another model."
    )


@dataclass
class Checkpoint:
    """
    The tensors of a file, which you ask for by our names, and a record of which ones have been read.

    Args:
        tensors (`dict[str, torch.Tensor]`): the tensors under the file's own names.
        places_of (`Callable`, *optional*):
            Lists where the file may hold one of our parameters, like [`timm_places`]. By default the names are the
            same.
        args (`dict`, *optional*): the arguments of the training script, if the file holds them.
        read (`set[str]`, *optional*): the names of the tensors that have been read.
    """

    tensors: dict[str, torch.Tensor]
    places_of: Callable[[str], Sequence[Place]] = lambda name: [Place(name)]
    args: dict = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return self.place(name).tensor in self.tensors

    def has_any(self, *names: str) -> bool:
        """Whether the file has one of our parameters with these names."""
        return any(name in self for name in names)

    def place(self, name: str) -> Place:
        """Where the file holds our parameter `name`, or where it should if it does not."""
        places = self.places_of(name)
        return next((place for place in places if place.tensor in self.tensors), places[0])

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> torch.Tensor:
        """
        The tensor for our parameter `name`. From then on it counts as read.

        Args:
            name: our name, without the prefix of the model.
            shape: the required shape, in which None stands for any length. By default any shape will do.

        Raises:
            ConversionError: if the tensor is missing or has another shape. The message uses the file's own name.
        """
        source, part, parts = self.place(name)
        if source not in self.tensors:
            raise ConversionError(
                f"The tensor `{source}` is missing: the checkpoint is incomplete or holds another model."
            )
        self.read.add(source)
        tensor = self.tensors[source]
        if shape is not None:
            check_shape(source, tensor, (shape[0] and parts * shape[0], *shape[1:]))
        return tensor if part is None else tensor.chunk(parts)[part].clone()

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of our parameter `name`, or None if there is none. Does not count as reading."""
        source, _, parts = self.place(name)
        if source not in self.tensors:
            return None
        shape = tuple(self.tensors[source].shape)
        return (shape[0] // parts, *shape[1:]) if shape else shape

    def drop(self, pattern: str) -> list[str]:
        """Counts the tensors whose names match as read, and returns their names."""
        dropped = [name for name in self.tensors if re.search(pattern, name)]
        self.read.update(dropped)
        return dropped

    @property
    def num_blocks(self) -> int:
        """The number of blocks. Raises a `ConversionError` if one in between is missing."""
        found = (re.match(r"(?:blocks|layers)\.(\d+)\.", name) for name in self.tensors)
        blocks = {int(block[1]) for block in found if block}
        gap = next(block for block in range(len(blocks) + 1) if block not in blocks)
        if gap < len(blocks) or not blocks:
            self.take(f"layers.{gap}.layernorm_before.weight")
        return len(blocks)

    @property
    def num_labels(self) -> int:
        """The number of classes of the head, or 0 if there is no head."""
        return len(self.take("classifier.weight", (None, None))) if "classifier.weight" in self else 0

    @property
    def patch_weight(self) -> torch.Tensor:
        """The convolution that embeds the patches, of shape `(hidden_size, channels, height, width)`."""
        return self.take("embeddings.patch_embeddings.projection.weight", (None,) * 4)

    @property
    def positions(self) -> torch.Tensor:
        """The first position embeddings, of shape `(1, tokens, hidden_size)`."""
        return self.take("embeddings.position_embeddings", (1, None, len(self.patch_weight)))

    @property
    def num_registers(self) -> int:
        """The number of register tokens."""
        name = "embeddings.register_tokens"
        return self.take(name, (1, None, None)).shape[1] if name in self else 0

    @property
    def is_gated(self) -> bool:
        """Whether the MLPs are gated. Packed projections have the name of a plain MLP and twice its width."""
        gate, down = (self.shape_of(f"layers.0.mlp.{name}_proj.weight") for name in ("gate", "down"))
        return bool(gate and down) and gate[:1] == down[1:]

    def in_any_block(self, name: str) -> bool:
        """Whether any block has our parameter `name`."""
        return self.has_any(*(f"layers.{block}.{name}" for block in range(self.num_blocks)))

    @property
    def shape_fields(self) -> dict[str, Any]:
        """The fields of the configuration that follow from the tensors without any doubt."""
        width, num_channels, *patch = self.patch_weight.shape
        hidden = "layers.0.mlp.gate_proj.weight" if self.is_gated else "layers.0.mlp.fc1.weight"
        self.take(hidden, (None, width))
        has_bias = self.in_any_block("attention.q_proj.bias")
        return {
            "hidden_size": width,
            "num_channels": num_channels,
            "patch_size": square_or_pair(patch),
            "num_hidden_layers": self.num_blocks,
            "intermediate_size": self.shape_of(hidden)[0],
            "qkv_bias": has_bias,
            "key_bias": self.in_any_block("attention.k_proj.bias") or not has_bias,
            # Any number will do, because the learned scales replace it.
            "layer_scale_init_value": 1.0 if self.in_any_block("layer_scale1.scale") else None,
            "ln_order": "pre",
            **self.trunk_fields,
        }

    @property
    def trunk_fields(self) -> dict[str, Any]:
        """Those of the fields that say what a model has beside what every ViT has."""
        embedding_norm = self.has_any("embeddings.layernorm.weight", "embeddings.layernorm.bias")
        return {
            "num_register_tokens": self.num_registers,
            "embedding_norm": embedding_norm,
            # In every library, this norm takes the place of the bias.
            "patch_bias": not embedding_norm,
            "use_gated_mlp": self.is_gated,
            "mlp_norm": self.in_any_block("mlp.layernorm.weight"),
            "use_qk_norm": self.in_any_block("attention.q_norm.weight"),
        }

    def unread(self) -> list[str]:
        """The names of the tensors that have not been read."""
        return [name for name in self.tensors if name not in self.read]


def read_checkpoint(
    path: str | Path, use_ema: bool = False, places_of: Callable[[str], Sequence[Place]] = timm_places
) -> Checkpoint:
    """
    Reads a `.safetensors` file, a bare state dict or a training checkpoint. From a pickle, only tensors, plain
    containers and `argparse.Namespace` are built. Any other object is refused without being executed.

    Args:
        path: the file.
        use_ema: whether to take the moving average of the weights, which some training scripts keep.
        places_of: as for [`Checkpoint`].

    Raises:
        ConversionError: if the file is missing or damaged, or if it holds other objects or no weights.
    """
    content = _read_file(Path(path))
    keys = EMA_KEYS if use_ema else WEIGHT_KEYS
    tensors = next((content[key] for key in keys if isinstance(content.get(key), dict)), None)
    if tensors is None and use_ema:
        raise ConversionError(
            f"`{path}` holds no moving average of the weights: it has neither of the keys {' and '.join(keys)}."
        )
    args = content.get("args", {}) if tensors is not None else {}
    tensors = content if tensors is None else tensors
    if not tensors or not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
        raise ConversionError(
            f"`{path}` holds no state dict: its keys are {', '.join(map(str, list(content)[:8])) or 'none'}. Pass a "
            f"dictionary of tensors, bare or under the key {' or '.join(WEIGHT_KEYS)}."
        )
    if all(name.startswith("module.") for name in tensors):  # saved from DataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(tensors, places_of, args if isinstance(args, dict) else {})


def _read_file(path: Path) -> dict:
    if not path.is_file():
        raise ConversionError(f"`{path}` is not a file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        found = f"the pickled object `{stranger[1]}`" if stranger else "something other than tensors"
        raise ConversionError(
            f"`{path}` is damaged or unsafe: it holds {found}, which was not executed. Only tensors, plain containers "
            "and `argparse.Namespace` are read: save the state dict alone, preferably as safetensors."
        ) from error
    except Exception as error:  # damaged bytes make the readers fail in any way
        raise ConversionError(f"`{path}` cannot be read. It seems to be truncated or damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"`{path}` holds a {type(content).__name__}, not a dictionary of tensors.")
    return content


def refuse(checkpoint: Checkpoint, strangers: dict[str, str]):
    """
    Raises a `ConversionError` for a tensor of something that HPool-ViT does not have.

    Args:
        checkpoint: the source.
        strangers: patterns of the file's names, and what a tensor with such a name belongs to.
    """
    for name in checkpoint.tensors:
        for pattern, reason in strangers.items():
            if re.search(pattern, name):
                raise ConversionError(f"The tensor `{name}` cannot be converted: it belongs to {reason}.")


def square_or_pair(shape: tuple[int, int]) -> int | tuple[int, int]:
    """A size as a configuration holds it: one number for a square, otherwise (height, width)."""
    height, width = shape
    return height if height == width else (height, width)
