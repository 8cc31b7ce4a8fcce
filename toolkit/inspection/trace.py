"""What an HPool-ViT makes of the patches of an image: the numbers that `hpool-vit visualize` draws."""

import copy
import itertools
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from hpool_vit import HPoolViTConfig
from hpool_vit.modeling_hpool_vit import LAYERS
from hpool_vit.pooling_hpool_vit import POOLINGS, Tokens


@dataclass
class StageTrace:
    """
    The tokens of one stage and where they come from: P patches in raster order and T patch tokens, without the class
    token.

    Attributes:
        block (`int`, *optional*):
            The block at whose input the stage pools; None for the first stage, which is the patches themselves.
        receptive_field (`torch.BoolTensor` of shape `(batch_size, T, P)`):
            Which patches a token stands for, through all stages so far: those in its windows (max, avg) or in its
            group (merge).
        share (`torch.FloatTensor` of shape `(batch_size, T, P)`):
            How much of a token each patch supplied. Rows sum to 1. Max: the share of the token's channels in which the
            patch won at this stage and every earlier one. Each channel is followed by itself, the first of equal
            values wins, and the two streams of `ln_order="residual"` count alike. Avg and merge: the weights of the
            mean, multiplied through the stages.
        groups (`torch.LongTensor` of shape `(batch_size, P)`, *optional*):
            The token that each patch is in. Merge only.
    """

    block: int | None
    receptive_field: torch.Tensor
    share: torch.Tensor
    groups: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.share.shape[1]

    @property
    def sizes(self) -> torch.Tensor:
        """The number of patches that each token stands for, a `torch.LongTensor` of shape `(batch_size, T)`."""
        return self.receptive_field.sum(-1)

    @property
    def weights(self) -> torch.Tensor:
        """The weight of each token in the mean over the tokens, of shape `(batch_size, T)`; rows sum to 1."""
        weights = self.sizes.float() if self.groups is not None else self.sizes.float().fill_(1)
        return weights / weights.sum(-1, keepdim=True)

    @property
    def patch_share(self) -> torch.Tensor:
        """How much of all the stage's tokens each patch supplied, of shape `(batch_size, P)`; rows sum to 1."""
        return _mean(self.share, self.weights)


@dataclass
class PoolingTrace:
    """
    How the patches of a batch of images pass through a model. All tensors are on the CPU.

    Attributes:
        grid (`tuple[int, int]`): rows and columns of patches. P is their product.
        stages (`list[StageTrace]`): the patches themselves, then one stage for each block in `config.hvt_pool`.
        tokens_per_block (`list[int]`): the number of patch tokens in each block.
        rollout (`torch.FloatTensor` of shape `(batch_size, P)`):
            Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928, Section 3) of the pooled output. A block is
            the mean of the identity and of its attention averaged over the heads. A pooling stage is the share of a
            token that each token before it supplied. The rollout is read at the class token, without its attention to
            itself, or as the mean over the tokens. Rows sum to 1.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`, *optional*):
            The logits; None if the model has no classifier.
    """

    grid: tuple[int, int]
    stages: list[StageTrace]
    tokens_per_block: list[int]
    rollout: torch.Tensor
    logits: torch.Tensor | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, for `safetensors`: `rollout`, `logits`, `stages.0.share`, `stages.1.groups`, …"""
        named = {
            "grid": torch.tensor(self.grid),
            "tokens_per_block": torch.tensor(self.tokens_per_block),
            "rollout": self.rollout,
            "logits": self.logits,
        }
        for number, stage in enumerate(self.stages):
            for name in ("receptive_field", "share", "patch_share", "groups", "sizes"):
                named[f"stages.{number}.{name}"] = getattr(stage, name)
            if stage.block is not None:
                named[f"stages.{number}.block"] = torch.tensor(stage.block)
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


@torch.no_grad()
def trace_pooling(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> PoolingTrace:
    """
    Runs a model in evaluation mode and follows every patch through its blocks and stages. The model itself does not
    change, not even for a moment, so several threads can trace the same model.

    Args:
        model (`PreTrainedModel`): an HPool-ViT with or without a classifier, on any device.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): normalised images.
        interpolate_pos_encoding (`bool`, defaults to `False`):
            As in the model: whether the images may have a size other than that of the model.

    Returns:
        [`PoolingTrace`]: where the tokens of each stage come from.

    Raises:
        ValueError:
            If the model is not an HPool-ViT, if it refuses the `pixel_values`, or if it computes values that are not
            finite.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != HPoolViTConfig.model_type:
        raise ValueError(f"`model` is a {type(model).__name__}, not an HPool-ViT.")
    # A copy of the modules that shares the weights. Hooks, evaluation mode and eager attention, which alone returns
    # its probabilities, stay in the copy.
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    replica = copy.deepcopy(model, shared).eval()
    config = replica.config
    config._attn_implementation = "eager"
    recorder = _Recorder(config)
    recorder.watch(replica.base_model)
    # The model refuses what are no images. All attentions of one image are enough to hold at a time.
    are_images = isinstance(pixel_values, torch.Tensor) and pixel_values.ndim > 0 and len(pixel_values) > 0
    traces = []
    for image in pixel_values.split(1) if are_images else [pixel_values]:
        with torch.device("cpu"):  # the recorder's tensors are made here
            # With attentions, every block computes all tokens.
            output = replica(
                image.to(model.device) if are_images else image,
                interpolate_pos_encoding=interpolate_pos_encoding,
                output_attentions=True,
                return_dict=True,
            )
        logits = output.logits.float().cpu() if "logits" in output and config.num_labels else None
        traces.append(recorder.read(config.patch_grid(*image.shape[2:]), logits))
    return _joined(traces)


def _joined(traces: list[PoolingTrace]) -> PoolingTrace:
    """The traces of a batch, from those of its images."""
    first = traces[0]
    stages = [
        StageTrace(
            parts[0].block,
            torch.cat([part.receptive_field for part in parts]),
            torch.cat([part.share for part in parts]),
            None if parts[0].groups is None else torch.cat([part.groups for part in parts]),
        )
        for parts in zip(*(trace.stages for trace in traces), strict=True)
    ]
    rollout = torch.cat([trace.rollout for trace in traces])
    logits = None if first.logits is None else torch.cat([trace.logits for trace in traces])
    return PoolingTrace(first.grid, stages, first.tokens_per_block, rollout, logits)


def block_macs(
    config: HPoolViTConfig, num_patches: int | tuple[int, int] | None = None, pooled_only: bool = True
) -> list[int]:
    """
    The multiply-accumulates of each block for one image: matrix products, as [`model_stats`] counts them. Merging
    counts towards the block at whose input it happens.

    Args:
        config (`HPoolViTConfig`): the configuration.
        num_patches (`int` or `tuple[int, int]`, *optional*):
            The number of patches of the image, or their rows and columns, which pooling on the grid needs. Default:
            those of `config.image_size`.
        pooled_only (`bool`, defaults to `True`):
            Whether the last block computes only what the pooled output comes from, as it does in a classifier.

    Returns:
        `list[int]`: one number for each block.
    """
    tokens = config.tokens_per_stage(num_patches)
    stage_of = {block: stage for stage, block in enumerate(config.hvt_pool or [], start=1)}
    width, stage, macs = config.hidden_size, 0, []
    for block in range(config.num_hidden_layers):
        pooling = 0
        if block in stage_of:
            stage = stage_of[block]
            num_streams = LAYERS[config.ln_order].num_streams
            pooling = POOLINGS[config.pool_mode].macs(config, *tokens[stage - 1 : stage + 1], num_streams)
        num_tokens = tokens[stage] + config.num_prefix_tokens
        is_last = block == config.num_hidden_layers - 1
        num_outputs = (config.num_tokens_read if is_last and pooled_only else None) or num_tokens
        # Keys and values of all tokens; queries, output projection and MLP of those that come out.
        weights = 2 * width * width + (3 if config.use_gated_mlp else 2) * width * config.intermediate_size
        products = num_tokens * 2 * width * width + num_outputs * (weights + 2 * num_tokens * width)
        macs.append(products + pooling)
    return macs


@dataclass
class _Recorder:
    """Follows forward passes through hooks, one after the other, in float32 on the CPU and outside autocast."""

    config: HPoolViTConfig
    stages: list[StageTrace] = field(default_factory=list)
    tokens_per_block: list[int] = field(default_factory=list)
    # (batch_size, tokens, patches). Class token and registers come first among both.
    rollout: torch.Tensor | None = None
    # Max only: the patch that each channel of each token comes from, (batch_size, tokens, channels of all streams).
    suppliers: torch.Tensor | None = None

    def __post_init__(self):
        self.num_prefix_tokens = self.config.num_prefix_tokens

    def watch(self, model: nn.Module):
        model.embeddings.register_forward_hook(self.start)
        for block, stage in model.pooling.in_use().items():
            stage.register_forward_hook(lambda stage, args, output, block=block: self.pool(block, stage, *args))
        for layer in model.layers:
            layer.attention.register_forward_hook(self.attend)

    def start(self, module: nn.Module, args: tuple, embeddings: torch.Tensor):
        self.stages, self.tokens_per_block, self.suppliers = [], [], None
        batch_size, num_tokens, _ = embeddings.shape
        self.rollout = torch.eye(num_tokens, dtype=torch.float32).repeat(batch_size, 1, 1)
        patches = self.rollout[:, self.num_prefix_tokens :, self.num_prefix_tokens :]
        partitions = POOLINGS[self.config.pool_mode].partitions
        groups = torch.arange(patches.shape[1]).repeat(batch_size, 1) if partitions else None
        self.stages.append(StageTrace(None, patches.bool(), patches, groups))

    def attend(self, module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]):
        attention = output[1].float().mean(1).cpu()
        self.tokens_per_block.append(attention.shape[1] - self.num_prefix_tokens)
        with torch.autocast("cpu", enabled=False):
            rollout = attention @ self.rollout + self.rollout
        # Rows of half-precision probabilities do not sum to 1.
        self.rollout = rollout / rollout.sum(-1, keepdim=True)

    def pool(self, block: int, stage: nn.Module, before: Tokens, *_):
        trace = {"max": self.pool_max, "avg": self.pool_avg, "merge": self.merge}[self.config.pool_mode]
        with torch.autocast("cpu", enabled=False):
            reached, pooling, share, groups = trace(stage, before)
            reached = reached.float() @ self.stages[-1].receptive_field.float() > 0
            prefix, tokens = self.rollout.tensor_split([self.num_prefix_tokens], dim=1)
            self.rollout = torch.cat((prefix, pooling @ tokens), dim=1)
        self.stages.append(StageTrace(block, reached, share, groups))

    # Each of the next three returns which tokens a token reaches and what each of them supplied to it, both of shape
    # (batch_size, tokens, tokens before), and `share` and `groups` of the stage.

    def pool_max(self, stage: nn.Module, before: Tokens) -> tuple:
        tokens = torch.cat(before.streams, dim=-1)[:, self.num_prefix_tokens :].float().cpu()
        # (tokens after, window), (batch_size, tokens after, channels of all streams)
        members, winners = self.members(stage, before), _in_windows(stage, tokens, before).argmax(-1)
        winners = members[torch.arange(len(members))[:, None], winners]
        if self.suppliers is None:
            self.suppliers = torch.arange(tokens.shape[1])[:, None].expand_as(tokens)
        self.suppliers = self.suppliers.gather(1, winners)
        pooling = _shares(winners, tokens.shape[1])
        share = _shares(self.suppliers, self.stages[0].num_tokens)
        return self.windows(stage, before), pooling, share, None

    def pool_avg(self, stage: nn.Module, before: Tokens) -> tuple:
        windows = self.windows(stage, before)
        pooling = windows.float() / windows.sum(-1, keepdim=True)
        return windows, pooling, pooling @ self.stages[-1].share, None

    def merge(self, stage: nn.Module, before: Tokens) -> tuple:
        last = self.stages[-1]
        groups = stage.groups(before)
        weights = last.sizes.float()
        if groups is None:
            groups = torch.arange(last.num_tokens).expand(len(last.share), -1)
        else:
            groups, weights = groups.numbers.cpu(), stage.rule.mean_weights(weights, before.log_importance)
        num_tokens = self.config.tokens_per_stage(self.stages[0].num_tokens)[len(self.stages)]
        joined = groups.unsqueeze(1) == torch.arange(num_tokens)[:, None]
        pooling = joined * weights.unsqueeze(1)
        pooling = pooling / pooling.sum(-1, keepdim=True)
        return joined, pooling, pooling @ last.share, groups.gather(1, last.groups)

    def members(self, stage: nn.Module, before: Tokens) -> torch.Tensor:
        """The tokens in each window: `(tokens after, window)`."""
        num_tokens = self.stages[-1].num_tokens
        return _in_windows(stage, torch.arange(num_tokens)[None, :, None], before)[0, :, 0]

    def windows(self, stage: nn.Module, before: Tokens) -> torch.Tensor:
        batch_size, num_tokens, _ = self.stages[-1].share.shape
        joined = nn.functional.one_hot(self.members(stage, before), num_tokens).sum(1).bool()
        return joined.expand(batch_size, -1, -1)

    def read(self, grid: tuple[int, int], logits: torch.Tensor | None) -> PoolingTrace:
        """
        What the last pass left.

        Raises:
            ValueError: if the model computes values that are not finite.
        """
        rollout = self.read_rollout()
        if not all(tensor.isfinite().all() for tensor in (rollout, logits) if tensor is not None):
            raise ValueError("The model computes values that are not finite: check `pixel_values` and the weights.")
        return PoolingTrace(grid, self.stages, self.tokens_per_block, rollout, logits)

    def read_rollout(self) -> torch.Tensor:
        rollout = self.rollout[:, :, self.num_prefix_tokens :]
        if self.config.reads_class_token:
            rollout = rollout[:, 0]
        else:
            rollout = _mean(rollout[:, self.num_prefix_tokens :], self.stages[-1].weights)
        return rollout / rollout.sum(-1, keepdim=True)


def _in_windows(stage: nn.Module, tokens: torch.Tensor, before: Tokens) -> torch.Tensor:
    """From (batch_size, tokens, width) to (batch_size, tokens after, width, window)."""
    return stage.windows(tokens, before.grid).flatten(-len(stage.kernel_size)).flatten(1, -3)


def _mean(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean over the tokens. Autocast would round a matrix product."""
    return (rows * weights.unsqueeze(-1)).sum(1)


def _shares(sources: torch.Tensor, num_sources: int) -> torch.Tensor:
    """The share of each token's channels that comes from each source; `sources` is (batch_size, tokens, channels)."""
    counts = torch.zeros(*sources.shape[:2], num_sources, dtype=torch.float32)
    return counts.scatter_add_(2, sources, torch.ones_like(sources, dtype=torch.float32)) / sources.shape[2]
