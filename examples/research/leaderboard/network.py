"""A trained Vision Transformer, opened up: every method of the leaderboard is a way through its blocks."""

from typing import NamedTuple

import torch
from torch import nn

from hpool_vit import HPoolViTForImageClassification


class Attended(NamedTuple):
    """What attention computed: its branch (batch, tokens, width), and queries, keys and values of each head."""

    branch: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Method(nn.Module):
    """
    The unpooled model, a ViT with a class token and pre-norm blocks. Rules that make it faster are subclasses, which
    change `run_block` or `before_block`.

    Args:
        model: a converted model without pooling.

    Attributes:
        first_block: the first block that the method treats differently. The hidden states before are the model's own.
    """

    first_block = 0

    def __init__(self, model: HPoolViTForImageClassification):
        super().__init__()
        self.model = model
        self.layers = model.hpool_vit.layers

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.finish(self.embed(pixel_values))

    def embed(self, pixel_values: torch.Tensor, num_blocks: int = 0) -> torch.Tensor:
        """The hidden states that the block `num_blocks` of the unpooled model takes: (batch, 1 + patches, width)."""
        hidden_states = self.model.hpool_vit.embeddings(pixel_values)
        for index in range(num_blocks):
            hidden_states, _ = Method.run_block(self, index, hidden_states, None)
        return hidden_states

    def finish(self, hidden_states: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The logits, from the hidden states that the block `start` takes."""
        sizes = None
        for index in range(start, len(self.layers)):
            hidden_states, sizes = self.before_block(index, hidden_states, sizes)
            hidden_states, sizes = self.run_block(index, hidden_states, sizes)
        return self.model.classifier(self.model.hpool_vit.layernorm(hidden_states[:, 0]))

    def before_block(self, index, hidden_states, sizes):
        """Hidden states and sizes, (batch, tokens), at the input of a block; sizes are None as long as all are 1."""
        return hidden_states, sizes

    def run_block(self, index, hidden_states, sizes):
        layer = self.layers[index]
        hidden_states = hidden_states + self.attend(index, hidden_states, sizes).branch
        return hidden_states + self.feed_forward(layer, hidden_states), sizes

    def attend(
        self, index: int, hidden_states: torch.Tensor, sizes: torch.Tensor | None, num_queries: int | None = None
    ) -> Attended:
        """Attention of a block, proportional to `sizes` (batch, tokens), for the first `num_queries` tokens or all."""
        layer = self.layers[index]
        attention, normed = layer.attention, layer.layernorm_before(hidden_states)
        # (batch, heads, tokens, head_dim)
        query, key, value = (
            projection(states).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection, states in (
                (attention.q_proj, normed[:, :num_queries]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        mask = None if sizes is None else sizes.log()[:, None, None]
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        branch = layer.layer_scale1(attention.o_proj(output.transpose(1, 2).flatten(2)))
        return Attended(branch, query, key, value)

    @staticmethod
    def feed_forward(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return layer.layer_scale2(layer.mlp(layer.layernorm_after(hidden_states)))


def class_attention(query: torch.Tensor, key: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
    """The attention of the class token, (batch, heads, tokens), from queries and keys of all tokens."""
    scores = (query[:, :, :1] @ key.transpose(2, 3))[:, :, 0] * query.shape[-1] ** -0.5
    if sizes is not None:
        scores = scores + sizes.log()[:, None]
    return scores.softmax(-1)
