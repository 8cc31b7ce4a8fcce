"""The stages of HPool-ViT at which the token sequence gets shorter: pooling along it, or merging by similarity."""

import itertools
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_hpool_vit import HPoolViTConfig


# The hidden states that flow through the blocks: one stream, or two for `ln_order="residual"`. Each has the shape
# (batch_size, num_tokens, hidden_size); attention reads the first.
Streams = tuple[torch.Tensor, ...]


def resize_positions(positions: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> torch.Tensor:
    """Position embeddings of a row (linear) or a grid (bicubic) of tokens for one of another size."""
    grid = positions.float().transpose(1, 2).unflatten(2, old)
    grid = nn.functional.interpolate(grid, size=new, mode="bicubic" if len(new) == 2 else "linear")
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


class HPoolViTPooling(nn.Module):
    """
    Max or average pooling along the token axis, then the stage's own position embeddings (paper Section 3.2).

    Args:
        config (`HPoolViTConfig`): the configuration of the model.
        stage (`int`): which entry of `config.hvt_pool` this is.
    """

    def __init__(self, config: HPoolViTConfig, stage: int):
        super().__init__()
        self.kernel_size, self.stride = config.pool_kernel_size, config.pool_stride
        reductions: dict[str, Callable[..., torch.Tensor]] = {"max": torch.amax, "avg": torch.mean}
        self.reduce = reductions[config.pool_mode]
        self.num_prefix_tokens = int(config.use_class_token)
        self.block = (config.hvt_pool or [])[stage]
        num_tokens = config.tokens_per_stage()[stage + 1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))

    def forward(
        self, streams: Streams, sizes: torch.Tensor | None, interpolate_pos_encoding: bool = False
    ) -> tuple[Streams, torch.Tensor | None]:
        return tuple(self.pool(stream, interpolate_pos_encoding) for stream in streams), sizes

    def pool(self, hidden_states: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        prefix, tokens = hidden_states.tensor_split([self.num_prefix_tokens], dim=1)
        # Windows are a view with the token axis in place: no transposed copies around the pooling.
        tokens = self.reduce(tokens.unfold(1, self.kernel_size, self.stride), dim=-1)
        positions: torch.Tensor = self.position_embeddings
        # As many as tokens under the first schedule that has this stage.
        if interpolate_pos_encoding or positions.shape[1] != tokens.shape[1]:
            positions = resize_positions(positions, (positions.shape[1],), (tokens.shape[1],))
        tokens = tokens + positions
        return torch.cat((prefix, tokens), dim=1) if self.num_prefix_tokens else tokens


class HPoolViTMerging(nn.Module):
    """
    Pooling by similarity (after ToMe, arXiv 2210.09461, Section 3): the tokens at odd positions that are nearest to a
    token at an even position join it. ToMe merges in every block by the cosine of keys; for a few stages the distance
    of hidden states, which is what a merge loses, keeps more of a trained model (docs/results/warm_start.md).

    Args:
        config (`HPoolViTConfig`): the configuration of the model.
        stage (`int`): which entry of `config.hvt_pool` this is.
    """

    def __init__(self, config: HPoolViTConfig, stage: int):
        super().__init__()
        self.config, self.stage = config, stage
        self.num_prefix_tokens = int(config.use_class_token)

    def forward(
        self, streams: Streams, sizes: torch.Tensor | None, interpolate_pos_encoding: bool = False
    ) -> tuple[Streams, torch.Tensor | None]:
        tokens = streams[0][:, self.num_prefix_tokens :]
        num_merged = self.config.num_merged(tokens.shape[1], self.stage)
        if num_merged == 0:
            return streams, sizes
        if sizes is None:
            sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        # Under autocast the products below would round what they only pass on, and misjudge distances.
        with maybe_autocast(tokens.device.type, enabled=False):
            groups = find_groups(tokens, num_merged)
            numbers = torch.arange(tokens.shape[1] - num_merged, device=groups.device)
            # (batch_size, groups, tokens): a product with this is deterministic on every device, a scatter is not.
            weights = (groups.unsqueeze(1) == numbers.unsqueeze(1)) * sizes.unsqueeze(1)
            sizes = weights.sum(-1)
            weights = weights / sizes.unsqueeze(-1)
            return tuple(self.merge(stream, weights) for stream in streams), sizes

    def merge(self, hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        prefix, tokens = hidden_states.tensor_split([self.num_prefix_tokens], dim=1)
        return torch.cat((prefix, weights.to(tokens.dtype) @ tokens), dim=1)


@torch.no_grad()
def find_groups(tokens: torch.Tensor, num_merged: int) -> torch.Tensor:
    """
    Which group each token belongs to after bipartite matching.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): what is compared, by Euclidean distance.
        num_merged (`int`): how many tokens at odd positions join their nearest one at an even position, those at the
            smallest distance; at most `num_tokens // 2`.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_tokens)`: numbers from 0 to `num_tokens - num_merged - 1`, in the
        order in which the groups' first even or staying token stands.
    """
    # Distances do not change when the mean goes, and small numbers keep them precise in half precision.
    tokens = tokens.float()
    tokens = tokens - tokens.mean(1, keepdim=True)
    squares = tokens.square().sum(-1)
    targets, sources = tokens[:, ::2], tokens[:, 1::2]
    # What of the negative squared distance depends on the target chooses it; the rest only ranks the sources.
    nearness, match = (2 * sources @ targets.transpose(1, 2) - squares[:, None, ::2]).max(-1)
    nearness = nearness - squares[:, 1::2]
    stays = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if num_merged == sources.shape[1]:
        stays[:, 1::2] = False
    else:
        stays[:, 1::2] = stays[:, 1::2].scatter(1, nearness.topk(num_merged).indices, 0)
    groups = stays.cumsum(1) - 1
    groups[:, 1::2] = torch.where(stays[:, 1::2], groups[:, 1::2], groups[:, ::2].gather(1, match))
    return groups


def mean_over_patches(hidden_states: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
    """The mean over the tokens, each weighted by the number of patches it stands for (None: each counts alike)."""
    if sizes is None:
        return hidden_states.mean(1)
    weights = (sizes / sizes.sum(1, keepdim=True)).to(hidden_states.dtype)
    return (weights.unsqueeze(-1) * hidden_states).sum(1)


def proportional_attention_mask(
    config: HPoolViTConfig, hidden_states: torch.Tensor, sizes: torch.Tensor | None
) -> torch.Tensor | None:
    """
    log(size) of each key, added to its attention scores: a token weighs as much as its patches (ToMe, Equation 1).

    Raises:
        ValueError: for an attention implementation that cannot add it.
    """
    if sizes is None or not config.proportional_attention:
        return None
    attention = config._attn_implementation
    # PyTorch's flex attention crashes the process where a score modification reads a tensor on the CPU.
    if "flash" in attention or ("flex" in attention and hidden_states.device.type == "cpu"):
        raise ValueError(
            f"`proportional_attention=True` does not work with `attn_implementation={attention!r}`"
            f" on {hidden_states.device.type}: use 'sdpa'."
        )
    num_tokens = hidden_states.shape[1]
    mask = nn.functional.pad(sizes.log().to(hidden_states.dtype), (num_tokens - sizes.shape[1], 0))
    return mask[:, None, None].expand(-1, -1, num_tokens, -1)


class HPoolViTStages(nn.ModuleDict):
    """
    The stages of every schedule in `config.schedules`, keyed by the block at whose input they stand: a stage keeps its
    weights while the schedule changes around it, and while it is idle.
    """

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.config = config
        self.add_missing()

    def add_missing(self) -> list[nn.Module]:
        """Makes those stages of the configuration that are not there yet, and returns the ones with weights."""
        added: list[nn.Module] = []
        if self.config.pool_mode == "merge":
            for stage, block in enumerate(self.config.hvt_pool or []):
                if str(block) not in self:
                    self[str(block)] = HPoolViTMerging(self.config, stage)
                cast(HPoolViTMerging, self[str(block)]).stage = stage  # it decides which entry of `merge_ratio` counts
            return added
        for schedule in self.config.schedules:
            config = self.config.with_schedule(schedule)
            for stage, block in enumerate(schedule):
                if str(block) not in self:
                    self[str(block)] = HPoolViTPooling(config, stage)
                    added.append(self[str(block)])
        return added

    def in_use(self) -> dict[int, nn.Module]:
        """The stages of the schedule `config.hvt_pool`, by block."""
        blocks = self.config.hvt_pool or []
        for block in blocks:
            if str(block) not in self:
                raise ValueError(f"The model has no stage for `hvt_pool={blocks}`: call `set_hvt_pool({blocks})`.")
        return {block: self[str(block)] for block in blocks}

    def touch_idle(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        `hidden_states` unchanged, but with a gradient of 0 for the stages not in use: DistributedDataParallel wants a
        gradient of every parameter in every step.
        """
        for block, stage in self.items():
            if int(block) not in (self.config.hvt_pool or []):
                for parameter in stage.parameters():
                    hidden_states = hidden_states + 0 * parameter.sum()
        return hidden_states

    def later_blocks(self) -> list[int]:
        """The blocks of the stages that the first schedule does not have."""
        return [int(block) for block in self if int(block) not in self.config.schedules[0]]

    def positions_for(self, block: int) -> torch.Tensor:
        """
        What the position embeddings of one of the `later_blocks` start from: those of the nearest stage of the
        schedules before, which may be trained, resized; or 0.
        """
        positions = self.get_parameter(f"{block}.position_embeddings")
        before = itertools.takewhile(lambda schedule: block not in schedule, self.config.schedules)
        blocks = sorted(set(itertools.chain.from_iterable(before)))
        if not blocks:
            return torch.zeros_like(positions)
        block = min(blocks, key=lambda other: abs(other - block))
        nearest = self.get_parameter(f"{block}.position_embeddings")
        return resize_positions(nearest, (nearest.shape[1],), (positions.shape[1],))
