"""HPool-ViT: a Vision Transformer that pools its token sequence between blocks (arXiv 2103.10619)."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from os import PathLike
from typing import Any, Unpack, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hpool_vit import PYRAMID, HPoolViTConfig
from .pooling_hpool_vit import (
    POOLINGS,
    HPoolViTPooling,
    HPoolViTStages,
    Streams,
    Tokens,
    log_sizes,
    mean_over_patches,
    proportional_attention_mask,
    resize_positions,
)


def layer_norm(config: HPoolViTConfig, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.layer_norm_eps)


class HPoolViTPatchEmbeddings(nn.Module):
    """
    Turns `pixel_values` of shape `(batch_size, num_channels, height, width)` into patch embeddings of shape
    `(batch_size, rows * columns, hidden_size)`. Pixels at the right and bottom that fill no patch are left out.
    """

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.patch_shape = config.patch_shape
        num_pixels = config.num_channels * math.prod(self.patch_shape)
        self.projection = nn.Linear(num_pixels, config.hidden_size, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(pixel_values, self.patch_shape, stride=self.patch_shape)
        return self.projection(patches.transpose(1, 2))


class HPoolViTConvPatchEmbeddings(nn.Module):
    """The same function as [`HPoolViTPatchEmbeddings`], as a convolution with stride `patch_size`."""

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        patch = config.patch_shape
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, patch, patch, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


PATCH_EMBEDDINGS = {"linear": HPoolViTPatchEmbeddings, "convolutional": HPoolViTConvPatchEmbeddings}


class HPoolViTEmbeddings(nn.Module):
    """
    What the first block takes: an optional class token, optional register tokens and the patches, of shape
    `(batch_size, num_tokens, hidden_size)`. Class token and patches have position embeddings, if the model has any.
    """

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = PATCH_EMBEDDINGS[config.patchify_technique](config)
        self.cls_token = self.learned(int(config.use_class_token))
        self.register_tokens = self.learned(config.num_register_tokens)
        num_positions = int(config.use_class_token) + math.prod(config.patch_grid())
        self.position_embeddings = self.learned(num_positions if config.use_position_embeddings else 0)
        self.layernorm = layer_norm(config, config.hidden_size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def learned(self, num_tokens: int) -> nn.Parameter | None:
        return nn.Parameter(torch.zeros(1, num_tokens, self.config.hidden_size)) if num_tokens else None

    @property
    def like(self) -> torch.Tensor:
        """A parameter with the model's type and device; if possible, not of a projection, which may be quantised."""
        weight: torch.Tensor = self.patch_embeddings.get_parameter("projection.weight")
        return next((token for token in (self.position_embeddings, self.cls_token) if token is not None), weight)

    def check_input(self, pixel_values: torch.Tensor | None, interpolate_pos_encoding: bool) -> None:
        """Raises a `ValueError` that names the problem with `pixel_values` and the remedy."""
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"`pixel_values` is missing or not a tensor ({type(pixel_values).__name__}): pass images of shape "
                "(batch_size, num_channels, height, width)."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` has the type {pixel_values.dtype}: pass normalised floating-point images, as the "
                "image processor returns them."
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}: expected (batch_size, "
                f"{self.config.num_channels}, height, width), as `num_channels={self.config.num_channels}`."
            )
        size = tuple(pixel_values.shape[2:])
        if interpolate_pos_encoding or self.position_embeddings is None:
            self.config.tokens_per_stage(self.config.patch_grid(*size))
        elif size != self.config.image_shape:
            raise ValueError(
                f"`pixel_values` are images of {size[0]} × {size[1]} pixels, and the model is made for "
                f"{self.config.image_shape[0]} × {self.config.image_shape[1]}: resize them, or pass "
                "`interpolate_pos_encoding=True`."
            )

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        self.check_input(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values.to(self.like.dtype))
        class_token: torch.Tensor | None = self.cls_token
        if self.position_embeddings is not None:
            # (1, 1 or 0, hidden_size), (1, num_patches, hidden_size)
            first, positions = self.position_embeddings.tensor_split([int(self.config.use_class_token)], dim=1)
            if interpolate_pos_encoding:
                grid = self.config.patch_grid(*pixel_values.shape[2:])
                positions = resize_positions(positions, self.config.patch_grid(), grid)
            patches = patches + positions
            class_token = None if class_token is None else class_token + first
        prefix = [token for token in (class_token, self.register_tokens) if token is not None]
        tokens = [*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches]
        return self.dropout(self.layernorm(torch.cat(tokens, dim=1) if prefix else patches))


def centered(index: torch.Tensor, size: int, reference: int) -> torch.Tensor:
    """The centres of `size` patches from -1 to 1, times 2 pi (DINOv3)."""
    return 2 * math.pi * ((2 * index + 1) / size - 1)


def from_zero(index: torch.Tensor, size: int, reference: int) -> torch.Tensor:
    """The numbers of `size` patches from 0, stretched to `reference` patches (EVA-02)."""
    return index / size * reference


def from_one(index: torch.Tensor, size: int, reference: int) -> torch.Tensor:
    """The numbers of `size` patches from 1, stretched to `reference` patches (Perception Encoder)."""
    return (index + 1) / size * reference


COORDINATES = {"centered": centered, "index": from_zero, "index_from_one": from_one}


class HPoolViTRotaryEmbedding(nn.Module):
    """
    Rotary positions in two dimensions: the angles by which queries and keys are turned grow with row and column of a
    token. The first half of the angles of a head comes from the row, the other half from the column.
    """

    def __init__(self, config: HPoolViTConfig, theta: float):
        super().__init__()
        self.config, self.theta = config, theta
        self.coordinates_along = COORDINATES[config.rope_coordinates]
        self.num_periods = config.hidden_size // config.num_attention_heads // 4

    def coordinates(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Row and column of each patch of the images: `(1, num_patches, 2)`."""
        grid = self.config.patch_grid(*pixel_values.shape[2:])
        axes = [
            self.coordinates_along(
                torch.arange(size, device=pixel_values.device, dtype=torch.float32), size, reference
            )
            for size, reference in zip(grid, self.config.rope_shape or grid, strict=True)
        ]
        return torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).flatten(0, 1)[None]

    def forward(
        self, coordinates: torch.Tensor, num_prefix_tokens: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cosine and sine of the angles, each of shape `(batch_size or 1, 1, num_tokens, head_dim)`.

        Args:
            coordinates (`torch.FloatTensor` of shape `(batch_size or 1, num_patch_tokens, 2)`): row and column.
            num_prefix_tokens (`int`): the number of tokens before the patch tokens, which are not turned.
            dtype (`torch.dtype`): the type of the result.
        """
        with maybe_autocast(coordinates.device.type, enabled=False):
            exponents = torch.arange(self.num_periods, device=coordinates.device, dtype=torch.float32)
            periods = self.theta ** (exponents / self.num_periods)
            # (batch_size or 1, num_patch_tokens, head_dim / 2)
            angles = (coordinates.unsqueeze(-1) / periods).flatten(2)
            angles = nn.functional.pad(angles, (0, 0, num_prefix_tokens, 0))
            angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
            return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair of channels, which are half a head apart, by its angle (RoFormer, arXiv 2104.09864)."""
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain products, the one implementation that returns its probabilities."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def leading(states: torch.Tensor, num_tokens: int | None, dim: int = 1) -> torch.Tensor:
    """The first tokens along an axis; None: all."""
    return states if num_tokens is None else states.narrow(dim, 0, num_tokens)


class HPoolViTAttention(nn.Module):
    """
    Multi-head self-attention over hidden states of shape `(batch_size, num_tokens, hidden_size)`. With `num_outputs`,
    only the first tokens look at all the others, and only they are returned.
    """

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = layer_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.k_norm = layer_norm(config, self.head_dim) if config.use_qk_norm else nn.Identity()
        self.dropout = nn.Dropout(config.projection_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_outputs: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # (batch_size, num_heads, num_outputs or num_tokens, head_dim)
        query, key, value = (
            projection(states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, leading(hidden_states, num_outputs)),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        # Autocast leaves the norms in float32.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if position_embeddings is not None:
            key = rotate(key, *position_embeddings)
            query = rotate(query, *(leading(part, num_outputs, dim=2) for part in position_embeddings))
        if attention_mask is not None:
            attention_mask = leading(attention_mask, num_outputs, dim=2)
        attention_fn = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        hidden_states, attentions = attention_fn(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dropout(self.o_proj(hidden_states.flatten(2))), attentions

    def log_importance(
        self,
        hidden_states: torch.Tensor,
        num_prefix_tokens: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The mean over heads of the scores that the class token gives to the tokens after the first `num_prefix_tokens`:
        `(batch_size, num_patch_tokens)`.
        """
        patches, query = hidden_states[:, num_prefix_tokens:], self.q_proj(hidden_states[:, :1])
        scaling = self.scaling * self.head_dim / query.shape[-1]
        if not self.config.importance_needs_keys and self.has_key_weight_on(patches.device):
            # q · (W x) = (Wᵀ q) · x: the sum over all heads needs no keys.
            return (patches @ (query @ self.k_proj.weight).transpose(1, 2)).squeeze(2).float() * scaling
        query, key = (
            norm(states.unflatten(2, (-1, self.head_dim)).transpose(1, 2))
            for norm, states in ((self.q_norm, query), (self.k_norm, self.k_proj(patches)))
        )
        if position_embeddings is not None:
            key = rotate(key, *(part[:, :, num_prefix_tokens:].to(key.device) for part in position_embeddings))
        return (query * key).sum((1, 3)).float() * scaling

    def has_key_weight_on(self, device: torch.device) -> bool:
        """Whether the weight can be read, as it is. Adapters, offloading and sharding let only the projection run."""
        is_plain = type(self.k_proj) is nn.Linear and self.k_proj.weight.device == device
        return is_plain and self.k_proj.weight.shape == self.q_proj.weight.shape


class HPoolViTMLP(nn.Module):
    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.layernorm = layer_norm(config, config.intermediate_size) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layernorm(self.dropout(self.activation_fn(self.fc1(hidden_states))))
        return self.dropout(self.fc2(hidden_states))


class HPoolViTGatedMLP(nn.Module):
    """An MLP whose hidden features are the product of two projections, one of them activated (arXiv 2002.05202)."""

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.layernorm = layer_norm(config, config.intermediate_size) if config.mlp_norm else nn.Identity()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = self.activation_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.dropout(self.down_proj(self.layernorm(self.dropout(gated))))


class HPoolViTLayerScale(nn.Module):
    """A learned scale per channel (arXiv 2103.17239)."""

    def __init__(self, width: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.scale = nn.Parameter(torch.full((width,), float(init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


class HPoolViTDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops the branch of a whole sample with probability `drop_prob`."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        # A comparison, because `bernoulli_` would be compiled anew for every probability.
        kept = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) < keep_prob
        return hidden_states * kept / keep_prob

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class HPoolViTLayer(GradientCheckpointingLayer):
    """
    What the blocks of every `ln_order` have in common: attention A and MLP M, each branch through layer scale and drop
    path. A block takes and returns its streams of hidden states; attention reads the first. With `num_outputs`, it
    returns only the first tokens.

    Attributes:
        num_streams (`int`): the number of streams, 1 or 2.
        has_final_norm (`bool`): whether a LayerNorm follows the last block.
    """

    num_streams = 1
    has_final_norm = True

    def __init__(self, config: HPoolViTConfig, index: int):
        super().__init__()
        self.attention = HPoolViTAttention(config)
        self.layernorm_before = layer_norm(config, config.hidden_size)
        self.layernorm_after = layer_norm(config, config.hidden_size)
        self.mlp = HPoolViTGatedMLP(config) if config.use_gated_mlp else HPoolViTMLP(config)
        scale = config.layer_scale_init_value
        self.layer_scale1 = nn.Identity() if scale is None else HPoolViTLayerScale(config.hidden_size, scale)
        self.layer_scale2 = nn.Identity() if scale is None else HPoolViTLayerScale(config.hidden_size, scale)
        # Its share of `drop_path_rate`: 0 at the first block, 1 at the last.
        self.depth = index / max(config.num_hidden_layers - 1, 1)
        self.drop_path = HPoolViTDropPath((config.drop_path_rate or 0.0) * self.depth)

    @classmethod
    def start(cls, hidden_states: torch.Tensor) -> Tokens:
        """The tokens that the first block takes, from the embeddings."""
        return Tokens(hidden_states, residual=hidden_states if cls.num_streams == 2 else None)

    @staticmethod
    def finish(tokens: Tokens, layernorm: nn.Module) -> torch.Tensor:
        """The model's hidden states, from the tokens that the last block returns and the final LayerNorm."""
        return layernorm(tokens.hidden_states)

    def attention_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What attention sees of the first stream."""
        return hidden_states

    @torch.no_grad()
    def log_importance(self, tokens: Tokens, position_embeddings: Any = None) -> torch.Tensor:
        """
        The logarithm of the attention that the class token gives to one patch of each patch token in this block: the
        geometric mean over the heads, up to a constant for each image, of shape `(batch_size, num_patch_tokens)`.
        """
        # FSDP2 gathers the weights of a block only for its forward pass.
        if callable(unshard := getattr(self, "unshard", None)):
            unshard()
        states = tokens.hidden_states.detach().to(self.layernorm_before.weight.dtype)
        states = self.attention_input(states)
        importance = self.attention.log_importance(states, tokens.num_prefix_tokens, position_embeddings)
        return importance.to(tokens.hidden_states.device)  # the block may lie on another one

    def attention_branch(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.drop_path(self.layer_scale1(self.attention(hidden_states, **kwargs)[0]))

    def mlp_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(hidden_states)))


class HPoolViTPreNormLayer(HPoolViTLayer):
    """x += A(LN1(x)); x += M(LN2(x))."""

    def attention_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.layernorm_before(hidden_states)
        return normed

    def forward(self, hidden_states: torch.Tensor, num_outputs: int | None = None, **kwargs: Any) -> Streams:
        branch = self.attention_branch(self.layernorm_before(hidden_states), num_outputs=num_outputs, **kwargs)
        hidden_states = leading(hidden_states, num_outputs) + branch
        return (hidden_states + self.mlp_branch(self.layernorm_after(hidden_states)),)


class HPoolViTPostNormLayer(HPoolViTLayer):
    """x = LN1(x + A(x)); x = LN2(x + M(x))."""

    has_final_norm = False

    def forward(self, hidden_states: torch.Tensor, num_outputs: int | None = None, **kwargs: Any) -> Streams:
        branch = self.attention_branch(hidden_states, num_outputs=num_outputs, **kwargs)
        hidden_states = self.layernorm_before(leading(hidden_states, num_outputs) + branch)
        return (self.layernorm_after(hidden_states + self.mlp_branch(hidden_states)),)

    @staticmethod
    def finish(tokens: Tokens, layernorm: nn.Module) -> torch.Tensor:
        return tokens.hidden_states


class HPoolViTResidualLayer(HPoolViTLayer):
    """ResiDual (arXiv 2304.14802): a post-norm stream x, and a stream r that sums the branches without norm."""

    num_streams = 2

    @staticmethod
    def finish(tokens: Tokens, layernorm: nn.Module) -> torch.Tensor:
        return tokens.hidden_states + layernorm(tokens.residual)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, num_outputs: int | None = None, **kwargs: Any
    ) -> Streams:
        branch = self.attention_branch(hidden_states, num_outputs=num_outputs, **kwargs)
        residual = leading(residual, num_outputs) + branch
        hidden_states = self.layernorm_before(leading(hidden_states, num_outputs) + branch)
        branch = self.mlp_branch(hidden_states)
        return self.layernorm_after(hidden_states + branch), residual + branch


LAYERS = {"pre": HPoolViTPreNormLayer, "post": HPoolViTPostNormLayer, "residual": HPoolViTResidualLayer}


class HPoolViTMeanReadout(nn.Module):
    """The pooled output is the mean over the patch tokens, each weighted by its number of patches."""

    def __init__(self, config: HPoolViTConfig):
        super().__init__()

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return mean_over_patches(tokens)


class HPoolViTClassTokenReadout(HPoolViTMeanReadout):
    """The pooled output is the class token."""

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return tokens.hidden_states[:, 0]


class HPoolViTClassTokenAndMeanReadout(HPoolViTMeanReadout):
    """The pooled output is the class token and, beside it, the mean over the patch tokens."""

    def forward(self, tokens: Tokens) -> torch.Tensor:
        return torch.cat((tokens.hidden_states[:, 0], mean_over_patches(tokens)), dim=-1)


class HPoolViTAttentionReadout(nn.Module):
    """
    The pooled output is what a learned query reads from all tokens, then an MLP (SigLIP, arXiv 2303.15343). A merged
    token weighs as much as its patches.
    """

    def __init__(self, config: HPoolViTConfig):
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // (config.readout_num_heads or config.num_attention_heads)
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)
        self.layernorm = layer_norm(config, width)
        self.mlp = HPoolViTMLP(config)

    def forward(self, tokens: Tokens) -> torch.Tensor:
        hidden_states = tokens.hidden_states
        query = self.q_proj(self.probe.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1))
        # (batch_size, num_heads, 1 or num_tokens, head_dim)
        query, key, value = (
            states.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for states in (query, self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        mask = log_sizes(tokens)
        read = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None if mask is None else mask.to(query.dtype)
        )
        pooled = self.o_proj(read.transpose(1, 2).flatten(2))[:, 0]
        return pooled + self.mlp(self.layernorm(pooled))


READOUTS: dict[str, Callable[[HPoolViTConfig], nn.Module]] = {
    "mean": HPoolViTMeanReadout,
    "class_token": HPoolViTClassTokenReadout,
    "class_token_and_mean": HPoolViTClassTokenAndMeanReadout,
    "attention": HPoolViTAttentionReadout,
}


# Names of modules in version 0.1, and their names now.
EARLIER_NAMES = {"pooled_layernorm": "layernorm"}


class HPoolViTPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and everything else that Transformers' models share."""

    config: HPoolViTConfig
    base_model: Any  # `HPoolViTModel`, a name that Transformers cannot resolve here
    base_model_prefix = "hpool_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # Transformers says a list, and wants a tuple
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False  # every token attends to every other, and pooling needs them in order
    _can_compile_fullgraph = True
    _can_record_outputs = {
        # The embeddings themselves, because the first block may already see pooled ones.
        "hidden_states": [
            OutputRecorder(HPoolViTEmbeddings, capture_initial_hidden_state=False),
            OutputRecorder(HPoolViTLayer, capture_initial_hidden_state=False),
        ],
        "attentions": HPoolViTAttention,
    }
    _input_embed_layer = "embeddings"  # with the positions: FSDP makes it a unit, and units cannot be nested

    def __init__(self, config: HPoolViTConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # Accelerate's FSDP makes units of these, and fails at a class of which the model has no module.
        self._no_split_modules = ["HPoolViTEmbeddings", LAYERS[config.ln_order].__name__]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, HPoolViTPooling) and module.block in self.config.new_stages():
            init.copy_(
                module.get_parameter("position_embeddings"), self.base_model.pooling.initial_positions(module.block)
            )
        elif isinstance(module, (HPoolViTEmbeddings, HPoolViTPooling, HPoolViTAttentionReadout)):
            # Class token, registers, position embeddings and probe.
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, HPoolViTLayerScale):
            init.constant_(module.scale, module.init_value)
        else:
            super()._init_weights(module)

    def records(self, kwargs: Any) -> bool:
        """Whether a call with `kwargs` returns hidden states or attentions: those of all blocks and tokens."""
        flags = ("output_hidden_states", "output_attentions")
        return any(kwargs.get(name, getattr(self.config, name, False)) for name in flags)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that recipes for ViTs exempt from weight decay beside biases and norms."""
        exempt = ("position_embeddings", "cls_token", "register_tokens", "probe", ".scale")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    def update_stochastic_depth_rate(self, k: float = 0.05) -> None:
        """
        Raises the drop probability of block i by `i * k / (num_blocks - 1)`, which is `config.drop_path_rate + k`.

        Raises:
            ValueError: if the new rate lies outside [0, 1); nothing is changed then.
        """
        rate = round((self.config.drop_path_rate or 0.0) + k, 12)  # or sums such as 0.3 - 0.1 - 0.2 would fall below 0
        if not 0 <= rate < 1:
            raise ValueError(f"`k={k}` takes `drop_path_rate={self.config.drop_path_rate}` to {rate}, outside [0, 1).")
        self.config.drop_path_rate = rate
        for layer in self.base_model.layers:
            layer.drop_path.drop_prob = rate * layer.depth

    updateStochasticDepthRate = update_stochastic_depth_rate

    def set_hvt_pool(self, hvt_pool: list[int] | None, merge_ratio: float | list[float] | None = None) -> None:
        """
        Pools at other blocks from now on. All weights stay, including those of unused stages, and are saved: if you
        change back, you get the same logits. A new stage starts from the nearest one's position embeddings. It is
        frozen if the model's first ones are, because an adapter would not save it. Call this before you create the
        optimizer or wrap the model in `DistributedDataParallel`.

        Args:
            hvt_pool (`list[int]`, *optional*): as in [`HPoolViTConfig`]; None: never.
            merge_ratio (`float` or `list[float]`, *optional*):
                As in [`HPoolViTConfig`]; None: as it is. A list that has another number of blocks needs a new one.

        Raises:
            ValueError: for a schedule that no model can be built with; nothing is changed then.
        """
        self.change_schedule(hvt_pool=hvt_pool, merge_ratio=merge_ratio)

    def set_speed(self, speed: float) -> None:
        """
        Pools from now on as one of `config.speeds` says, which a search has found. 1 means no pooling. The rest is as
        for [`set_hvt_pool`].

        Args:
            speed (`float`): a key of `config.speeds`, or 1.

        Raises:
            ValueError: for a speed that the model does not offer; it lists those that it does.
        """
        self.change_schedule(**self.config.fields_of_speed(speed))

    def change_schedule(self, **fields: Any) -> None:
        """Gives the configuration these fields, as [`HPoolViTConfig.change_schedule`], and builds new stages."""
        if self.base_model.embeddings.like.is_meta:
            self.check_not_offloaded(self.config.with_schedule(**fields))
        self.config.change_schedule(**fields)
        self.add_stages()

    def check_not_offloaded(self, config: HPoolViTConfig) -> None:
        """Raises a `ValueError` if the configuration needs a new stage that Accelerate would not know of."""
        new = [block for block in config.hvt_pool or [] if str(block) not in self.base_model.pooling]
        if new and config.has_stage_positions and any(hasattr(module, "_hf_hook") for module in self.modules()):
            raise ValueError(
                f"`hvt_pool={config.hvt_pool}` needs a new stage, which has no place while weights are offloaded: "
                "give the schedule to `from_pretrained`, as `hvt_pool`, or change it before you dispatch the model."
            )

    def add_stages(self) -> None:
        """Builds the stages that a changed schedule needs."""
        like = self.base_model.embeddings.like
        # Ordinary parameters, whatever the mode in which this is called; frozen where an adapter has frozen the model.
        with torch.inference_mode(False):
            for stage in self.base_model.pooling.add_missing():
                stage.to(like).train(self.training).requires_grad_(like.requires_grad)
                self._init_weights(stage)

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, key_mapping=EARLIER_NAMES | (key_mapping or {}), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Transformers would save the weights under the earlier names again.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if EARLIER_NAMES.keys().isdisjoint(conversion.source_patterns)
        ]
        return loaded

    @classmethod
    def is_remote_code(cls) -> bool:
        # FSDP2 gives a model a class in a module of torch, which is not code to save.
        return super().is_remote_code() and not cls.__module__.startswith("torch.")

    def save_pretrained(
        self, save_directory: str | PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        self.config.record_stages()
        # Transformers lists only the class that is saved, but every Auto class must load the folder.
        self.config.auto_map = {
            cls._auto_class: f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
            for cls in (
                HPoolViTModel,
                HPoolViTForImageClassification,
                HPoolViTBackbone,
                HPoolViTForSemanticSegmentation,
            )
        }
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        # Transformers copies the code of the model's own class, which may be a user's subclass.
        if is_main_process:
            custom_object_save(HPoolViTForImageClassification, save_directory)


def rename_earlier_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` take weights that an earlier version saved, as `from_pretrained` does."""
    for earlier, name in EARLIER_NAMES.items():
        for key in [key for key in state_dict if key.startswith(f"{prefix}{earlier}.")]:
            state_dict[prefix + name + key.removeprefix(prefix + earlier)] = state_dict.pop(key)


@auto_docstring(
    custom_intro="""
    HPool-ViT without a head. Its pooled output is the mean over the remaining tokens (paper Section 3.3), unless
    `config.readout` or a class token says otherwise.
    """
)
class HPoolViTModel(HPoolViTPreTrainedModel):
    def __init__(self, config: HPoolViTConfig, add_pooling_layer: bool = True):
        r"""
        add_pooling_layer (`bool`, defaults to `True`):
            Whether to build the readout. Without it `pooler_output` is None.
        """
        super().__init__(config)
        # Once more, for fields assigned since the configuration was made.
        config.validate()
        self.embeddings = HPoolViTEmbeddings(config)
        self.rotary = HPoolViTRotaryEmbedding(config, config.rope_theta) if config.rope_theta else None
        self.pooling = HPoolViTStages(config)
        self._keys_to_ignore_on_load_missing = [rf"pooling\.{block}\." for block in config.new_stages()]
        self.layer_class = LAYERS[config.ln_order]
        self.layers = nn.ModuleList([self.layer_class(config, index) for index in range(config.num_hidden_layers)])
        has_norm = self.layer_class.has_final_norm and config.use_final_norm
        self.layernorm = layer_norm(config, config.hidden_size) if has_norm else nn.Identity()
        self.readout = READOUTS[config.resolved_readout](config) if add_pooling_layer else None
        self.register_load_state_dict_pre_hook(rename_earlier_weights)
        self.post_init()

    def start(self, pixel_values: Any, interpolate_pos_encoding: bool) -> Tokens:
        """The tokens that the first stage or block takes."""
        tokens = self.layer_class.start(self.embeddings(pixel_values, interpolate_pos_encoding))
        return tokens._replace(
            num_prefix_tokens=self.config.num_prefix_tokens,
            coordinates=None if self.rotary is None else self.rotary.coordinates(pixel_values),
            grid=self.config.patch_grid(*pixel_values.shape[2:]),
        )

    def attention_inputs(self, tokens: Tokens) -> dict[str, Any]:
        """What attention needs to know of the tokens; it stays the same from one stage to the next."""
        rotation = None
        if self.rotary is not None:
            rotation = self.rotary(tokens.coordinates, tokens.num_prefix_tokens, tokens.hidden_states.dtype)
        mask = proportional_attention_mask(self.config, tokens)
        return {"attention_mask": mask, "position_embeddings": rotation}

    def encode(
        self,
        pixel_values: Any,
        interpolate_pos_encoding: bool,
        keep: Collection[int] = (),
        stop: int | None = None,
        pooled_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Tokens, dict[int, Tokens]]:
        """
        The tokens that the last block returns, and those after n blocks for each n in `keep`. With `stop`, only so
        many blocks run. With `pooled_only`, the last block returns only tokens that the readout reads.
        """
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError("HPool-ViT takes no `attention_mask`: every token is attended to. Leave it out.")
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "`torch.onnx.export` with `dynamo=False` fixes the batch size, and writes invalid graphs of merging: "
                "pass `dynamo=True`, or use `hpool-vit export`."
            )
        tokens = self.start(pixel_values, interpolate_pos_encoding)
        tokens = self.pooling.touch_idle(tokens) if self.training else tokens
        kept = {0: tokens} if 0 in keep else {}
        attention_inputs = self.attention_inputs(tokens)
        stages, blocks = self.pooling.in_use(), cast(list[Any], self.layers)
        for index, layer in enumerate(blocks[:stop]):
            if index in stages:
                if stages[index].needs_importance:
                    rotation = attention_inputs["position_embeddings"]
                    tokens = tokens._replace(log_importance=layer.log_importance(tokens, rotation))
                tokens = stages[index](tokens, interpolate_pos_encoding)
                attention_inputs = self.attention_inputs(tokens)
            if pooled_only and index + 1 == len(blocks):
                attention_inputs["num_outputs"] = self.config.num_tokens_read
            tokens = tokens.with_streams(layer(*tokens.streams, **attention_inputs, **kwargs))
            if index + 1 in keep:
                kept[index + 1] = tokens
        return tokens, kept

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised images, as the image processor returns them.
        interpolate_pos_encoding (`bool`, *optional*):
            Whether to resize the position embeddings to the images, which may then have any size that leaves at least
            one token. Otherwise, any size but `config.image_size` raises a `ValueError`.
        pooled_only (`bool`, *optional*, defaults to `False`):
            Whether only the `pooler_output` is wanted. If that is the class token, the last block computes no other
            one, and `last_hidden_state` has only this.
        """
        tokens, _ = self.encode(pixel_values, bool(interpolate_pos_encoding), pooled_only=pooled_only, **kwargs)
        if self.config.norm_after_pooling:
            last_hidden_state = tokens.hidden_states
            pooler_output = None if self.readout is None else self.layernorm(self.readout(tokens))
        else:
            tokens = self.finish(tokens)
            last_hidden_state = tokens.hidden_states
            pooler_output = None if self.readout is None else self.readout(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooler_output)

    def finish(self, tokens: Tokens) -> Tokens:
        """The tokens of any block in one stream, after the final norm."""
        return tokens.with_streams((self.layer_class.finish(tokens, self.layernorm),))


@auto_docstring(
    custom_intro="""
    HPool-ViT with an image classification head on its pooled output: one Linear layer, or an MLP if
    `config.classifier_hidden_size` is set.
    """
)
class HPoolViTForImageClassification(HPoolViTPreTrainedModel):
    def __init__(self, config: HPoolViTConfig):
        super().__init__(config)
        self.loss_type = "ForImageClassification"  # Transformers reads it off the name of the class, also a subclass's
        self.num_labels = config.num_labels
        self.hpool_vit = HPoolViTModel(config)
        if not config.num_labels:
            self.classifier: nn.Module = nn.Identity()
        elif config.classifier_hidden_size is None:
            self.classifier = nn.Linear(config.pooled_size, config.num_labels)
        else:
            self.classifier = nn.Sequential(
                OrderedDict(
                    dense=nn.Linear(config.pooled_size, config.classifier_hidden_size),
                    activation=nn.Tanh(),
                    dropout=nn.Dropout(config.dropout),
                    out_proj=nn.Linear(config.classifier_hidden_size, config.num_labels),
                )
            )
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised images, as the image processor returns them.
        interpolate_pos_encoding (`bool`, *optional*):
            Whether to resize the position embeddings to the images, which may then have any size that leaves at least
            one token. Otherwise, any size but `config.image_size` raises a `ValueError`.
        """
        if labels is not None and not self.num_labels:
            raise ValueError("`labels` need a classifier, and the model has none (`num_labels=0`): give it classes.")
        outputs: BaseModelOutputWithPooling = self.hpool_vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=not self.records(kwargs),
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# Pixels with this label count neither in the loss nor in a metric, as everywhere in Transformers.
IGNORED_LABEL = 255


def resize_map(feature_map: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """A map of shape `(batch_size, channels, rows, columns)` at another resolution, bilinearly."""
    if feature_map.shape[2:] == size:
        return feature_map
    return nn.functional.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)


class HPoolViTChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of feature maps of shape `(batch_size, channels, rows, columns)`."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.movedim(1, -1)).movedim(-1, 1)


class HPoolViTFeaturePyramid(nn.Module):
    """
    Feature maps of 4, 2, 1 and 1/2 times the resolution of one (ViTDet, arXiv 2203.16527, Section 3), as many of them
    as `config.out_features` names.
    """

    def __init__(self, config: HPoolViTConfig, channels: int):
        super().__init__()
        width, half, quarter = config.hidden_size, config.hidden_size // 2, config.hidden_size // 4
        double: list[nn.Module] = [nn.ConvTranspose2d(width, half, 2, 2)]
        quadruple = [nn.ConvTranspose2d(width, half, 2, 2), HPoolViTChannelNorm(half, eps=config.layer_norm_eps)]
        quadruple += [nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)]
        resizers: list[tuple[list[nn.Module], int]] = [
            (quadruple, quarter),
            (double, half),
            ([], width),
            ([nn.MaxPool2d(2)], width),
        ]
        self.levels = nn.ModuleDict(
            {
                name: nn.Sequential(
                    *resizer,
                    nn.Conv2d(resized, channels, 1, bias=False),
                    HPoolViTChannelNorm(channels, eps=config.layer_norm_eps),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    HPoolViTChannelNorm(channels, eps=config.layer_norm_eps),
                )
                for name, (resizer, resized) in zip(PYRAMID, resizers, strict=True)
                if name in (config.out_features or ())
            }
        )

    def forward(self, feature_map: torch.Tensor) -> list[torch.Tensor]:
        return [level(feature_map) for level in self.levels.values()]


@auto_docstring(
    custom_intro="""
    HPool-ViT as a backbone for segmentation and detection. Its feature maps have the shape `(batch_size, channels,
    rows, columns)`. Pooling on the grid gives them falling resolutions; with merging or without pooling every patch
    has a cell, which gets the token that the patch went into.
    """
)
class HPoolViTBackbone(BackboneMixin, HPoolViTPreTrainedModel):
    def __init__(self, config: HPoolViTConfig):
        self.check_maps(config)
        if config.out_indices is None:
            self.choose_outputs(config)
        super().__init__(config)
        self.hpool_vit = HPoolViTModel(config, add_pooling_layer=False)
        channels = config.feature_pyramid_size
        self.num_features = [channels or config.hidden_size] * len(config.stage_names)
        self.pyramid = HPoolViTFeaturePyramid(config, channels) if channels else None
        self.first_unread = config.num_hidden_layers
        self.post_init()
        self.freeze_unread_blocks()

    @property
    def map_indices(self) -> list[int]:
        """After how many blocks a map is taken."""
        last = self.config.num_hidden_layers
        return [last] if self.pyramid is not None else [index % (last + 1) for index in self.out_indices]

    def train(self, mode: bool = True) -> "HPoolViTBackbone":
        super().train(mode)
        self.freeze_unread_blocks()  # loading replaces parameters, and ends here in evaluation mode
        return self

    def freeze_unread_blocks(self) -> None:
        """
        What comes after the last map does not run: DistributedDataParallel would wait for its gradients, and weight
        decay would wear it out.
        """
        stop = max(self.map_indices)
        for block, layer in enumerate(self.hpool_vit.layers):
            stages = [self.hpool_vit.pooling[str(block)]] if str(block) in self.hpool_vit.pooling else []
            for module in (layer, *stages):
                if block >= stop:
                    module.requires_grad_(False)
                elif block >= self.first_unread:  # it was frozen here, and other maps are read now
                    module.requires_grad_(True)
        self.first_unread = stop

    def add_stages(self) -> None:
        super().add_stages()
        self.freeze_unread_blocks()

    def change_schedule(self, **fields: Any) -> None:
        self.check_maps(self.config.with_schedule(**fields))
        super().change_schedule(**fields)

    @staticmethod
    def check_maps(config: HPoolViTConfig) -> None:
        """Raises a `ValueError` if pooling leaves no map, or one that is too small for the pyramid."""
        if config.hvt_pool and not (config.pools_on_grid or POOLINGS[config.pool_mode].partitions):
            raise ValueError(
                f"`pool_mode={config.pool_mode!r}` with `pool_kernel_size={config.pool_kernel_size}` pools along the "
                "row of tokens, which leaves no grid: use pairs such as `pool_kernel_size=(2, 2)` and "
                "`pool_stride=(2, 2)`, `pool_mode='merge'`, or `hvt_pool=None`."
            )
        if config.feature_pyramid_size and config.hvt_pool and config.pools_on_grid:
            raise ValueError("`feature_pyramid_size` needs a map of every patch: merge, or do not pool.")

    @staticmethod
    def choose_outputs(config: HPoolViTConfig) -> None:
        """The last map of each resolution."""
        if config.feature_pyramid_size:
            config.out_features = config.stage_names
        else:
            blocks = (config.hvt_pool or []) if config.pools_on_grid else []
            config.out_indices = [*blocks, config.num_hidden_layers]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised images of any size.
        interpolate_pos_encoding (`bool`, *optional*):
            Whether to resize the position embeddings to the images; None: if they have another size than
            `config.image_size`.
        """
        if interpolate_pos_encoding is None:
            interpolate_pos_encoding = tuple(pixel_values.shape[2:]) != self.config.image_shape
        indices = self.map_indices
        stop = None if self.records(kwargs) else max(indices)
        _, kept = self.hpool_vit.encode(pixel_values, interpolate_pos_encoding, keep=indices, stop=stop, **kwargs)
        feature_maps = [self.hpool_vit.finish(kept[index]).feature_map for index in indices]
        if self.pyramid is not None:
            feature_maps = self.pyramid(feature_maps[0])
        # Transformers says a tuple of one map.
        return BackboneOutput(feature_maps=tuple(feature_maps))  # type: ignore[arg-type]


@auto_docstring(
    custom_intro="""
    HPool-ViT with a linear head for semantic segmentation: the backbone's feature maps side by side at the resolution
    of the first, and a 1 × 1 convolution to the scores of the classes. The weights of a classifier's trunk load as
    they are.
    """
)
class HPoolViTForSemanticSegmentation(HPoolViTBackbone):
    accepts_loss_kwargs = False  # the Trainer would count pixels that do not count

    def __init__(self, config: HPoolViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        if not config.num_labels:
            raise ValueError("`num_labels=0`: a segmentation model needs classes.")
        self.dropout = nn.Dropout(config.dropout)
        self.decode_head = nn.Conv2d(sum(self.channels), config.num_labels, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised images of any size.
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
            The class of each pixel, or 255 where a pixel does not count. Of any resolution: the scores are resized to
            it.
        interpolate_pos_encoding (`bool`, *optional*):
            Whether to resize the position embeddings to the images; None: if they have another size than
            `config.image_size`.
        """
        outputs = super().forward(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        size = outputs.feature_maps[0].shape[2:]
        feature_maps = torch.cat([resize_map(feature_map, size) for feature_map in outputs.feature_maps], dim=1)
        # (batch_size, num_labels, rows, columns)
        logits = self.decode_head(self.dropout(feature_maps))
        loss = None
        if labels is not None:
            scores = resize_map(logits.float(), labels.shape[1:])
            total = nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED_LABEL, reduction="sum")
            # Of a batch in which no pixel counts, the mean would be NaN.
            loss = total / (labels != IGNORED_LABEL).sum().clamp(min=1)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


HPoolViTModel.register_for_auto_class("AutoModel")
HPoolViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
HPoolViTBackbone.register_for_auto_class("AutoBackbone")
HPoolViTForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "HPoolViTBackbone",
    "HPoolViTForImageClassification",
    "HPoolViTForSemanticSegmentation",
    "HPoolViTModel",
    "HPoolViTPreTrainedModel",
]
