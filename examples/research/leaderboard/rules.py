"""
Merging in few stages, as the leaderboard's winner does it: the reference implementation of the rule.

A stage stands at the input of a block. The tokens at even positions are targets, those at odd positions are sources, and
`num_merged` of the sources join a target each. All shapes are static, everything works on whole batches, equal input
gives equal output on every device, and no floating-point number is scattered.
"""

from typing import NamedTuple

import torch
from network import Method
from torch import nn


class Rule(NamedTuple):
    """
    The ingredients of the rule. `VERSION_01` has none of them.

    Attributes:
        ward: pairs are matched and ranked by what their merge loses, w_a w_b / (w_a + w_b) · |a - b|², not by |a - b|².
        num_rounds: the tokens merge in so many rounds; the next round sees the means of the last.
        distance_power: the weight of a token in the distance is its patches times its importance to this power.
        mean_power: its weight in the mean is its patches times its importance to this power.
        keeps_norm: a merged token is as long as its members are on average.
    """

    ward: bool = True
    num_rounds: int = 4
    distance_power: float = 0.5
    mean_power: float = 1.0
    keeps_norm: bool = True

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


class Joins(NamedTuple):
    """
    Who joins whom among the patch tokens of a stage.

    Attributes:
        joined: (batch, targets, sources), whether a source joins a target.
        staying: (batch, staying sources, sources), whether a source is the first, second, … that stays.
    """

    joined: torch.Tensor
    staying: torch.Tensor


@torch.no_grad()
def find_joins(tokens: torch.Tensor, weights: torch.Tensor, num_merged: int, rule: Rule) -> Joins:
    """
    Args:
        tokens: (batch, tokens, width), what is compared.
        weights: (batch, tokens), how much a token counts when a merge moves it.
        num_merged: how many sources join a target, at most half of the tokens.
    """
    # Distances do not change when the mean is subtracted, and small numbers keep them precise.
    tokens = tokens.float()
    tokens = tokens - tokens.mean(1, keepdim=True)
    targets, sources = tokens[:, ::2], tokens[:, 1::2]
    target_weights, source_weights = weights[:, ::2], weights[:, 1::2]
    source_squares = sources.square().sum(-1, keepdim=True)
    products = sources @ targets.transpose(1, 2)
    number_of_target = torch.arange(targets.shape[1], device=tokens.device)
    match = torch.zeros(sources.shape[:2], dtype=torch.long, device=tokens.device)
    stays = torch.ones_like(match, dtype=torch.bool)
    for number in split_evenly(num_merged, rule.num_rounds):
        # (batch, sources, targets)
        losses = source_squares + targets.square().sum(-1).unsqueeze(1) - 2 * products
        if rule.ward:
            losses = losses / (1 / source_weights.unsqueeze(2) + 1 / target_weights.unsqueeze(1))
        loss, nearest = losses.min(-1)
        joining = loss.masked_fill(~stays, torch.inf).topk(number, largest=False).indices
        stays = stays.scatter(1, joining, False)
        joined_target = nearest.gather(1, joining)
        match = match.scatter(1, joining, joined_target)
        # The targets become the means of their groups. Products are linear, so theirs with the sources follow.
        moved = sources.gather(1, joining.unsqueeze(-1).expand(-1, -1, sources.shape[-1]))
        shares = (joined_target.unsqueeze(1) == number_of_target.unsqueeze(-1)) * source_weights.gather(
            1, joining
        ).unsqueeze(1)
        total = target_weights + shares.sum(-1)
        shares, kept = shares / total.unsqueeze(-1), (target_weights / total).unsqueeze(-1)
        targets = kept * targets + shares @ moved
        products = kept.transpose(1, 2) * products + (sources @ moved.transpose(1, 2)) @ shares.transpose(1, 2)
        target_weights = total
    joined = (match.unsqueeze(1) == number_of_target.unsqueeze(-1)) & ~stays.unsqueeze(1)
    order = torch.arange(sources.shape[1] - num_merged, device=tokens.device)
    staying = (stays.cumsum(1).unsqueeze(1) - 1 == order.unsqueeze(-1)) & stays.unsqueeze(1)
    return Joins(joined, staying)


def split_evenly(number: int, num_parts: int) -> list[int]:
    """`number` in at most `num_parts` parts that differ by at most 1, without empty ones."""
    cuts = [number * part // num_parts for part in range(num_parts + 1)]
    return [after - before for before, after in zip(cuts, cuts[1:], strict=False) if after > before]


def merge(tokens: torch.Tensor, weights: torch.Tensor, joins: Joins, keeps_norm: bool) -> torch.Tensor:
    """
    The tokens after merging: (batch, targets + staying sources, width), the targets first.

    Args:
        tokens: (batch, tokens, width).
        weights: (batch, tokens), of the means.
        keeps_norm: whether a mean is stretched to the mean length of its members.
    """
    targets, sources = tokens[:, ::2], tokens[:, 1::2]
    shares = joins.joined * weights[:, None, 1::2]
    total = weights[:, ::2] + shares.sum(-1)
    shares, kept = shares / total.unsqueeze(-1), (weights[:, ::2] / total).unsqueeze(-1)

    def mean(of_targets: torch.Tensor, of_sources: torch.Tensor) -> torch.Tensor:
        return kept * of_targets + shares @ of_sources

    merged = mean(targets, sources)
    if keeps_norm:
        lengths = mean(targets.norm(dim=-1, keepdim=True), sources.norm(dim=-1, keepdim=True))
        merged = merged * (lengths / merged.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return torch.cat((merged, joins.staying.to(tokens.dtype) @ sources), dim=1)


def merge_sizes(sizes: torch.Tensor, joins: Joins) -> torch.Tensor:
    """The patches of each token after merging, in the order of `merge`."""
    targets, sources = sizes[:, ::2], sizes[:, 1::2].unsqueeze(1)
    return torch.cat((targets + (joins.joined * sources).sum(-1), (joins.staying * sources).sum(-1)), dim=1)


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
        num_merged = self.num_merged.get(index, 0)
        if not num_merged:
            return hidden_states, sizes
        rule, class_token, tokens = self.rule, hidden_states[:, :1], hidden_states[:, 1:]
        sizes = torch.ones_like(tokens[..., 0]) if sizes is None else sizes[:, 1:]
        score = torch.zeros_like(sizes)
        if rule.needs_importance:
            score = log_importance(self.layers[index], hidden_states)
            score = score - score.amax(1, keepdim=True)
        joins = find_joins(tokens, sizes * (rule.distance_power * score).exp(), num_merged, rule)
        tokens = merge(tokens, sizes * (rule.mean_power * score).exp(), joins, rule.keeps_norm)
        sizes = nn.functional.pad(merge_sizes(sizes, joins), (1, 0), value=1.0)
        return torch.cat((class_token, tokens), dim=1), sizes
