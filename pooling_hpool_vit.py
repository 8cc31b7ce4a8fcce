"""The stages of HPool-ViT at which the token sequence gets shorter: pooling along it, or merging by similarity."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_hpool_vit import HPoolViTConfig, Shape, windows_shape
from .merging_hpool_vit import MERGE_RULES, DistanceRule, Groups, group


# The hidden states that a block takes and returns: one stream, or two for `ln_order="residual"`. Each has the shape
# (batch_size, num_tokens, hidden_size); attention reads the first.
Streams = tuple[torch.Tensor, ...]


class Tokens(NamedTuple):
    """
    The tokens on their way through the model. Class token and registers stand first in the hidden states; `sizes` and
    `coordinates` describe only the patch tokens.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): what attention reads.
        residual (`torch.Tensor` of the same shape, *optional*): the second stream of `ln_order="residual"`.
        num_prefix_tokens (`int`): the number of tokens before the patch tokens.
        sizes (`torch.FloatTensor` of shape `(batch_size, num_patch_tokens)`, *optional*): the number of patches that
            each token stands for; None as long as no tokens have merged.
        coordinates (`torch.FloatTensor` of shape `(batch_size or 1, num_patch_tokens, 2)`, *optional*): row and column
            of each token, for rotary positions; None without them.
        grid (`tuple[int, int]`, *optional*): rows and columns of cells that the tokens stand for; None where windows
            along the row of tokens have mixed the rows of the image.
        assignment (`torch.LongTensor` of shape `(batch_size, rows * columns)`, *optional*): the patch token of each
            cell, after tokens have merged; None: the patch tokens are the cells.
        log_importance (`torch.FloatTensor` of shape `(batch_size, num_patch_tokens)`, *optional*): the logarithm of
            the attention that one patch of each token gets in the next block, up to a constant for each image; only
            on the way into a stage that needs it.
    """

    hidden_states: torch.Tensor
    residual: torch.Tensor | None = None
    num_prefix_tokens: int = 0
    sizes: torch.Tensor | None = None
    coordinates: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    assignment: torch.Tensor | None = None
    log_importance: torch.Tensor | None = None

    @property
    def patch_tokens(self) -> torch.Tensor:
        """The hidden states of the patch tokens: `(batch_size, num_patch_tokens, hidden_size)`."""
        return self.hidden_states[:, self.num_prefix_tokens :]

    @property
    def feature_map(self) -> torch.Tensor:
        """
        The patch tokens in their places, each in all cells that merged into it: `(batch_size, hidden_size, rows,
        columns)`.
        """
        tokens = self.patch_tokens
        if self.assignment is not None:
            tokens = tokens.gather(1, self.assignment.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    @property
    def streams(self) -> Streams:
        return (self.hidden_states,) if self.residual is None else (self.hidden_states, self.residual)

    def with_streams(self, streams: Streams) -> "Tokens":
        """The same tokens with the hidden states that a block returns."""
        return self._replace(hidden_states=streams[0], residual=streams[1] if len(streams) > 1 else None)

    def on_patch_tokens(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """Applies `function` to the patch tokens of each stream; the tokens before them stay as they are."""
        streams = []
        for stream in self.streams:
            prefix, patch_tokens = stream.tensor_split([self.num_prefix_tokens], dim=1)
            patch_tokens = function(patch_tokens)
            streams.append(torch.cat((prefix, patch_tokens), dim=1) if self.num_prefix_tokens else patch_tokens)
        return self.with_streams(tuple(streams))

    def on_coordinates(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """Applies `function` to the coordinates, if there are any."""
        return self if self.coordinates is None else self._replace(coordinates=function(self.coordinates))


def resize_positions(positions: torch.Tensor, old: Shape, new: Shape) -> torch.Tensor:
    """Position embeddings of a row (linear) or a grid (bicubic) of tokens for one of another size."""
    grid = positions.float().transpose(1, 2).unflatten(2, old)
    grid = nn.functional.interpolate(grid, size=new, mode="bicubic" if len(new) == 2 else "linear")
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


class HPoolViTStage(nn.Module):
    """
    What all stages have in common. A pooling mode is a subclass in [`POOLINGS`] and a row in
    `configuration_hpool_vit.POOL_MODES`.

    Args:
        config (`HPoolViTConfig`): the configuration of the model.
        block (`int`): the block at whose input the stage stands.

    Attributes:
        fields (`tuple[str, ...]`): the fields of the configuration that only this mode reads.
        partitions (`bool`): whether each token goes into exactly one token of the next stage.
        needs_importance (`bool`): whether the tokens must come with `log_importance`.
    """

    fields: tuple[str, ...] = ()
    partitions = False
    needs_importance = False

    def __init__(self, config: HPoolViTConfig, block: int):
        super().__init__()
        self.config, self.block = config, block

    def forward(self, tokens: Tokens, interpolate_pos_encoding: bool = False) -> Tokens:
        raise NotImplementedError

    @staticmethod
    def macs(config: HPoolViTConfig, before: int, after: int, num_streams: int) -> int:
        """Multiply-accumulates of the products that turn `before` patch tokens of one image into `after`."""
        return 0


class HPoolViTPooling(HPoolViTStage):
    """
    Pools windows along the row of tokens (paper Section 3.2) or on their grid, then adds the stage's own position
    embeddings, if the model has position embeddings at all.
    """

    fields = ("pool_kernel_size", "pool_stride")

    def __init__(self, config: HPoolViTConfig, block: int):
        super().__init__(config, block)
        self.kernel_size, self.stride = config.pool_window
        # Window and step for each axis: one axis for a row of tokens, two for a grid.
        self.window_axes = tuple(range(-len(self.kernel_size), 0))
        self.positions_shape = config.stage_shapes().get(block, ())
        num_positions = math.prod(self.positions_shape)
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, num_positions, config.hidden_size)) if self.positions_shape else None
        )

    def reduce(self, windows: torch.Tensor) -> torch.Tensor:
        """From `(batch_size, *shape, hidden_size, *kernel_size)` to `(batch_size, *shape, hidden_size)`."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, interpolate_pos_encoding: bool = False) -> Tokens:
        grid = tokens.grid
        pooled = tokens.on_patch_tokens(lambda patch_tokens: self.pool(patch_tokens, grid, interpolate_pos_encoding))
        pooled = pooled.on_coordinates(
            lambda coordinates: self.windows(coordinates, grid).mean(self.window_axes).flatten(1, -2)
        )
        return pooled._replace(grid=grid and self.grid_after(grid))

    def windows(self, tokens: torch.Tensor, grid: Shape | None) -> torch.Tensor:
        """From `(batch_size, num_tokens, width)` to `(batch_size, *shape, width, *kernel_size)`."""
        # A view with the axes of the tokens in place, so nothing is transposed and copied.
        if len(self.kernel_size) == 2:
            tokens = tokens.unflatten(1, grid)
        for axis, (kernel_size, stride) in enumerate(zip(self.kernel_size, self.stride, strict=True), start=1):
            tokens = tokens.unfold(axis, kernel_size, stride)
        return tokens

    def grid_after(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the windows; None if they lie in a row."""
        if len(self.kernel_size) == 1:
            return None
        rows, columns = windows_shape(self.config, grid, 0)
        return rows, columns

    def pool(self, patch_tokens: torch.Tensor, grid: Shape | None, interpolate_pos_encoding: bool) -> torch.Tensor:
        # (batch_size, *shape, hidden_size)
        pooled = self.reduce(self.windows(patch_tokens, grid))
        shape, pooled = tuple(pooled.shape[1:-1]), pooled.flatten(1, -2)
        positions: torch.Tensor | None = self.position_embeddings
        if positions is None:
            return pooled
        if interpolate_pos_encoding or self.positions_shape != shape:
            positions = resize_positions(positions, self.positions_shape, shape)
        return pooled + positions


class HPoolViTMaxPooling(HPoolViTPooling):
    """The maximum of each channel in each window."""

    def reduce(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.amax(self.window_axes)


class HPoolViTAvgPooling(HPoolViTPooling):
    """The mean of each window."""

    def reduce(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.mean(self.window_axes)


class HPoolViTMerging(HPoolViTStage):
    """Pooling by similarity: tokens join others as a rule in [`merging_hpool_vit.MERGE_RULES`] says."""

    fields = ("merge_ratio", "merge_rule", "proportional_attention")
    partitions = True

    def __init__(self, config: HPoolViTConfig, block: int):
        super().__init__(config, block)
        self.rule = MERGE_RULES[config.merge_rule]()
        self.needs_importance = config.needs_importance

    @staticmethod
    def macs(config: HPoolViTConfig, before: int, after: int, num_streams: int) -> int:
        if after == before:
            return 0
        rule, width = MERGE_RULES[config.merge_rule], config.hidden_size
        macs = rule.macs(before, after, width) + num_streams * rule.mean_macs(before, after, width)
        if config.rope_theta:
            macs += DistanceRule.mean_macs(before, after, width=2)
        return macs + importance_macs(config, before)

    def forward(self, tokens: Tokens, interpolate_pos_encoding: bool = False) -> Tokens:
        groups = self.groups(tokens)
        if groups is None:
            return tokens
        sizes = self.sizes(tokens)
        weights = self.rule.mean_weights(sizes, tokens.log_importance)
        # Under autocast the products below would round what they only pass on.
        with maybe_autocast(sizes.device.type, enabled=False):
            merged = tokens.on_patch_tokens(lambda patch_tokens: self.rule.mean(groups, patch_tokens, weights))
            merged = merged.on_coordinates(lambda coordinates: groups.mean(coordinates, sizes))
        assignment = groups.numbers if tokens.assignment is None else groups.numbers.gather(1, tokens.assignment)
        return merged._replace(sizes=groups.sum(sizes), assignment=assignment, log_importance=None)

    @torch.no_grad()
    def groups(self, tokens: Tokens) -> Groups | None:
        """The groups that the patch tokens form; None if there are too few tokens to merge any."""
        patch_tokens = tokens.patch_tokens
        num_merged = self.num_merged(patch_tokens.shape[1])
        if num_merged == 0:
            return None
        # Autocast would misjudge the distances.
        with maybe_autocast(patch_tokens.device.type, enabled=False):
            weights = self.rule.weigh(self.sizes(tokens), tokens.log_importance)
            return group(self.rule.find_roots(patch_tokens, weights, num_merged), num_merged)

    def sizes(self, tokens: Tokens) -> torch.Tensor:
        """The patches of each token: `(batch_size, num_patch_tokens)`."""
        if tokens.sizes is not None:
            return tokens.sizes
        return torch.ones(tokens.patch_tokens.shape[:2], device=tokens.hidden_states.device)

    def num_merged(self, num_tokens: int) -> int:
        """How many of `num_tokens` patch tokens join another here, by this block's place in `config.hvt_pool`."""
        return self.config.num_merged(num_tokens, (self.config.hvt_pool or []).index(self.block))


def importance_macs(config: HPoolViTConfig, num_tokens: int) -> int:
    """Multiply-accumulates of the products in `HPoolViTAttention.log_importance`."""
    width = config.hidden_size
    if not config.needs_importance:
        return 0
    if config.importance_needs_keys:
        return (1 + num_tokens) * width * width
    return 2 * width * width + num_tokens * width


POOLINGS: dict[str, type[HPoolViTStage]] = {
    "max": HPoolViTMaxPooling,
    "avg": HPoolViTAvgPooling,
    "merge": HPoolViTMerging,
}


def mean_over_patches(tokens: Tokens) -> torch.Tensor:
    """The mean over the patch tokens, each weighted by its number of patches: `(batch_size, hidden_size)`."""
    if tokens.sizes is None:
        return tokens.patch_tokens.mean(1)
    weights = (tokens.sizes / tokens.sizes.sum(1, keepdim=True)).to(tokens.hidden_states.dtype)
    return (weights.unsqueeze(-1) * tokens.patch_tokens).sum(1)


def log_sizes(tokens: Tokens) -> torch.Tensor | None:
    """
    log(number of patches) of each token, 0 for those before the patches: `(batch_size, 1, 1, num_tokens)`. Added to
    the attention scores of the keys, it lets a token weigh as much as its patches (ToMe, Equation 1). None as long as
    no tokens have merged.
    """
    if tokens.sizes is None:
        return None
    sizes = tokens.sizes.log().to(tokens.hidden_states.dtype)
    return nn.functional.pad(sizes, (tokens.num_prefix_tokens, 0))[:, None, None]


def proportional_attention_mask(config: HPoolViTConfig, tokens: Tokens) -> torch.Tensor | None:
    """
    [`log_sizes`] for every query: `(batch_size, 1, num_tokens, num_tokens)`, or None if attention treats all tokens
    alike.

    Raises:
        ValueError: for an attention implementation that cannot add it.
    """
    mask = log_sizes(tokens) if config.proportional_attention else None
    if mask is None:
        return None
    device = tokens.hidden_states.device
    attention = config._attn_implementation
    # PyTorch's flex attention crashes the process where a score modification reads a tensor on the CPU.
    if "flash" in attention or ("flex" in attention and device.type == "cpu"):
        raise ValueError(
            f"`proportional_attention=True` does not work with `attn_implementation={attention!r}`"
            f" on {device.type}: use 'sdpa'."
        )
    return mask.expand(-1, -1, mask.shape[-1], -1)


class HPoolViTStages(nn.ModuleDict):
    """
    The stages of a model, keyed by the block at whose input they stand: those that the configuration says have
    weights, and those of the schedule in use. A stage keeps its weights while the schedule changes around it.
    """

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.config = config
        self.add_missing()

    def add_missing(self) -> list[nn.Module]:
        """Builds the stages of the configuration that are not there yet, and returns them."""
        blocks = self.config.stage_positions().keys() | set(self.config.hvt_pool or [])
        missing = [block for block in sorted(blocks) if str(block) not in self]
        self.update({str(block): POOLINGS[self.config.pool_mode](self.config, block) for block in missing})
        return [self[str(block)] for block in missing]

    def in_use(self) -> dict[int, nn.Module]:
        """The stages of the schedule `config.hvt_pool`, by block."""
        blocks = self.config.hvt_pool or []
        for block in blocks:
            if str(block) not in self:
                raise ValueError(f"The model has no stage for `hvt_pool={blocks}`: call `set_hvt_pool({blocks})`.")
        return {block: self[str(block)] for block in blocks}

    def touch_idle(self, tokens: Tokens) -> Tokens:
        """
        The same tokens, but with a gradient of 0 for the stages not in use: DistributedDataParallel wants a gradient
        of every parameter in every step.
        """
        idle = [stage for block, stage in self.items() if int(block) not in (self.config.hvt_pool or [])]
        # Sums over nothing, so that not even an infinite weight reaches the result.
        zeros = [parameter.flatten()[:0].sum() for stage in idle for parameter in stage.parameters()]
        return tokens._replace(hidden_states=tokens.hidden_states + sum(zeros)) if zeros else tokens

    def initial_positions(self, block: int) -> torch.Tensor:
        """
        What the position embeddings of a new stage start from: those of the nearest recorded stage, which may be
        trained, resized to the new stage's number; 0 if there is none.
        """
        positions = self.get_parameter(f"{block}.position_embeddings")
        recorded = sorted(int(other) for other in self.config.stages or {})
        if not recorded:
            return torch.zeros_like(positions)
        nearest = min(recorded, key=lambda other: abs(other - block))
        trained, shapes = self.get_parameter(f"{nearest}.position_embeddings"), self.config.stage_shapes()
        return resize_positions(trained, shapes[nearest], shapes[block])
