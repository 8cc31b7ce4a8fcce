"""
Merging in few stages, as the leaderboard's winner does it: the reference implementation of the rule.

A stage stands at the input of a block. In each round, the tokens at odd positions that are best matched by one at
an even position join it. All shapes are static, everything works on whole batches, equal
input gives equal output on every device, and no floating-point number is scattered.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from network import Method
from torch import nn


class Rule(NamedTuple):
    """
    The ingredients of the rule. `VERSION_01` has none of them.

    Attributes:
        ward: pairs are matched and ranked by what their merge loses, w_a w_b / (w_a + w_b) |a - b|², not by |a - b|².
        num_rounds: the tokens merge in so many rounds; each round sees the means of the ones before.
        distance_power: the weight of a token in the distance is its patches times its importance to this power.
        mean_power: its weight in the mean is its patches times its importance to this power.
        keeps_norm: a merged token is as long as its members are on average.
        class_token_only: the last block computes the class token alone, which is all that the classifier reads. This
            changes no answer.
    """

    ward: bool = True
    num_rounds: int = 4
    distance_power: float = 0.5
    mean_power: float = 1.0
    keeps_norm: bool = True
    class_token_only: bool = False

    @property
    def needs_importance(self) -> bool:
        return self.distance_power != 0 or self.mean_power != 0


VERSION_01 = Rule(ward=False, num_rounds=1, distance_power=0.0, mean_power=0.0, keeps_norm=False)
RULE = Rule()


def log_importance(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    The logarithm of what the class token's attention in `layer` gives to one patch of each patch token, up to a
    constant per image: (batch, patch tokens). It is the geometric mean over the heads, so it needs no softmax, only
    the product of the class token's query with each key, summed over the heads. And since q · (W x) = (Wᵀ q) · x, it
    needs no keys: one product of width `hidden_size` per token.

    Args:
        layer: the block at whose input the tokens merge.
        hidden_states: (batch, 1 + patch tokens, width), the class token first.
    """
    attention = layer.attention
    normed = layer.layernorm_before(hidden_states)
    query = attention.q_proj(normed[:, :1])  # (batch, 1, width)
    num_heads = query.shape[-1] // attention.head_dim
    query = query @ attention.k_proj.weight * (attention.head_dim**-0.5 / num_heads)
    return (normed[:, 1:] @ query.transpose(1, 2)).squeeze(-1)


def rows(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tokens at (batch, number) positions."""
    batch_size, num_tokens, width = tokens.shape
    first = torch.arange(batch_size, device=tokens.device).unsqueeze(1) * num_tokens
    # Whole rows of one matrix: much faster on a CPU than `gather`.
    picked = tokens.reshape(-1, width).index_select(0, (positions + first).flatten())
    return picked.unflatten(0, positions.shape)


class Products(NamedTuple):
    """
    What the distances of sources, the tokens at odd positions, and targets, those at even ones, are computed from. A
    target stands for the weighted mean of all that have joined it.

    Attributes:
        source_squares: (batch, sources), of the sources with themselves.
        target_squares: (batch, targets), of the targets with themselves.
        products: (batch, sources, targets), of sources and targets.
        target_weights: (batch, targets).
    """

    source_squares: torch.Tensor
    target_squares: torch.Tensor
    products: torch.Tensor
    target_weights: torch.Tensor


@torch.no_grad()
def find_roots(tokens: torch.Tensor, weights: torch.Tensor, num_merged: int, rule: Rule) -> torch.Tensor:
    """
    The position of the token that each token joins, its own if it stays: (batch, tokens).

    Args:
        tokens: (batch, tokens, width), what is compared.
        weights: (batch, tokens), how much a token counts when a merge moves it.
        num_merged: how many tokens at odd positions join one at an even position, at most `tokens // 2`.
    """
    tokens = tokens.float()
    # Distances do not change when the mean is subtracted, and small numbers keep them precise.
    mean = tokens.mean(1, keepdim=True)
    targets, sources = tokens[:, ::2] - mean, tokens[:, 1::2] - mean
    source_weights = weights[:, 1::2]
    numbers = split_evenly(num_merged, rule.num_rounds)
    among_sources = sources @ sources.transpose(1, 2) if len(numbers) > 1 else None
    squares = [torch.linalg.vector_norm(half, dim=-1).square() for half in (sources, targets)]
    known = Products(*squares, sources @ targets.transpose(1, 2), weights[:, ::2])
    stays = torch.ones_like(source_weights, dtype=torch.bool)
    roots = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    for turn, number in enumerate(numbers):
        losses = known.source_squares.unsqueeze(2) + known.target_squares.unsqueeze(1) - 2 * known.products
        if rule.ward:
            losses = losses / (1 / source_weights.unsqueeze(2) + 1 / known.target_weights.unsqueeze(1))
        loss, nearest = losses.min(-1)
        joining = loss.masked_fill(~stays, torch.inf).topk(number, largest=False).indices
        joined = nearest.gather(1, joining)
        stays = stays.scatter(1, joining, False)
        roots = roots.scatter(1, 2 * joining + 1, 2 * joined)
        if turn + 1 < len(numbers):
            known = after_joining(
                known, rows(among_sources, joining), source_weights.gather(1, joining), joining, joined
            )
    return roots


def after_joining(
    known: Products, with_sources: torch.Tensor, weights: torch.Tensor, joining: torch.Tensor, joined: torch.Tensor
) -> Products:
    """
    The products after a round. A target becomes the mean of itself and the sources that join it. Products are linear,
    so those of the mean follow from those of its members.

    Args:
        known: before the round.
        with_sources: (batch, number, sources), the products of the joining sources with all sources.
        weights: (batch, number), of the joining sources.
        joining: (batch, number), their numbers.
        joined: (batch, number), the number of the target that each joins.
    """
    targets = torch.arange(known.target_weights.shape[1], device=joined.device)
    shares = (joined.unsqueeze(2) == targets) * weights.unsqueeze(2)  # (batch, number, targets)
    total = known.target_weights + shares.sum(1)
    shares, kept = shares / total.unsqueeze(1), known.target_weights / total
    products = kept.unsqueeze(1) * known.products + with_sources.transpose(1, 2) @ shares
    # The new target with the old one, then with itself.
    crosses = kept * known.target_squares + (shares * rows(known.products, joining)).sum(1)
    squares = kept * crosses + (shares * rows(products, joining)).sum(1)
    return Products(known.source_squares, squares, products, total)


def split_evenly(number: int, num_parts: int) -> list[int]:
    """`number` in at most `num_parts` parts that differ by at most 1, without empty ones."""
    cuts = [number * part // num_parts for part in range(num_parts + 1)]
    return [after - before for before, after in pairwise(cuts) if after > before]


class Groups(NamedTuple):
    """
    Which tokens stay and which join them.

    Attributes:
        staying: (batch, groups), the positions of the tokens that stay, rising.
        moving: (batch, number of merged tokens), the positions of those that join another.
        joins: (batch, groups, number of merged tokens), whether a token joins a group.
    """

    staying: torch.Tensor
    moving: torch.Tensor
    joins: torch.Tensor


def group(roots: torch.Tensor, num_merged: int) -> Groups:
    """The groups of the tokens that `find_roots` sends to `roots`."""
    num_tokens = roots.shape[1]
    positions = torch.arange(num_tokens, device=roots.device)
    # Those that stay first, each in order. ONNX knows no stable sort, so no two keys are equal.
    keys = torch.where(roots == positions, positions, positions + num_tokens)
    order = keys.topk(num_tokens, largest=False).indices
    staying, moving = order.split([num_tokens - num_merged, num_merged], dim=1)
    return Groups(staying, moving, roots.gather(1, moving).unsqueeze(1) == staying.unsqueeze(-1))


def merge(tokens: torch.Tensor, weights: torch.Tensor, groups: Groups, keeps_norm: bool = False) -> torch.Tensor:
    """
    The mean of each group, (batch, groups, width), in the order of the tokens that stay.

    Args:
        tokens: (batch, tokens, width).
        weights: (batch, tokens), of the mean.
        groups: as `group` returns them.
        keeps_norm: whether a mean is stretched to the mean length of its members.
    """
    shares = groups.joins * weights.gather(1, groups.moving).unsqueeze(1)
    kept = weights.gather(1, groups.staying)
    total = kept + shares.sum(-1)
    shares, kept = shares / total.unsqueeze(-1), (kept / total).unsqueeze(-1)

    def mean(tokens: torch.Tensor) -> torch.Tensor:
        return kept * rows(tokens, groups.staying) + shares @ rows(tokens, groups.moving)

    merged = mean(tokens)
    if keeps_norm:
        lengths = mean(tokens.norm(dim=-1, keepdim=True))
        merged = merged * (lengths / merged.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return merged


def merge_sizes(sizes: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The patches of each group."""
    joining = groups.joins * sizes.gather(1, groups.moving).unsqueeze(1)
    return sizes.gather(1, groups.staying) + joining.sum(-1)


class Merging(Method):
    """
    A model that merges in few stages.

    Args:
        model: the unpooled model.
        num_merged: how many tokens merge at the input of each block that has a stage.
        rule: how.
    """

    def __init__(self, model: nn.Module, num_merged: dict[int, int], rule: Rule = RULE):
        super().__init__(model)
        self.num_merged, self.rule = num_merged, rule
        self.first_block = min(num_merged)

    def before_block(self, index, hidden_states, sizes):
        # Every token that joins needs one that it joins.
        num_merged = min(self.num_merged.get(index, 0), (hidden_states.shape[1] - 1) // 2)
        if not num_merged:
            return hidden_states, sizes
        rule, class_token, tokens = self.rule, hidden_states[:, :1], hidden_states[:, 1:]
        sizes = torch.ones_like(tokens[..., 0]) if sizes is None else sizes[:, 1:]
        score = torch.zeros_like(sizes)
        if rule.needs_importance:
            score = log_importance(self.layers[index], hidden_states)
            # No weight is 0, however little a token counts.
            score = (score - score.amax(1, keepdim=True)).clamp_min(-30)
        roots = find_roots(tokens, sizes * (rule.distance_power * score).exp(), num_merged, rule)
        groups = group(roots, num_merged)
        tokens = merge(tokens, sizes * (rule.mean_power * score).exp(), groups, rule.keeps_norm)
        sizes = nn.functional.pad(merge_sizes(sizes, groups), (1, 0), value=1.0)
        return torch.cat((class_token, tokens), dim=1), sizes

    def run_block(self, index, hidden_states, sizes):
        if not self.rule.class_token_only or index + 1 < len(self.layers):
            return super().run_block(index, hidden_states, sizes)
        class_token = hidden_states[:, :1] + self.attend(index, hidden_states, sizes, num_queries=1).branch
        return class_token + self.feed_forward(self.layers[index], class_token), None
