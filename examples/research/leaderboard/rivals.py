"""
The published ways to make a trained Vision Transformer faster without training it, each written from its paper.

All of them work between attention and MLP, with attention proportional to the sizes of the tokens, and never merge the
class token. Which tokens join is said by `groups`, a number for each token; tokens with the same number become one.
"""

import numpy as np
import scipy.cluster.hierarchy
import torch
from network import Attended, Method, class_attention
from torch import nn


def unit(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of length 1: their products are cosines."""
    return nn.functional.normalize(tokens, dim=-1)


def merge_groups(
    tokens: torch.Tensor, groups: torch.Tensor, num_groups: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted mean of each group, and the sum of its weights.

    Args:
        tokens: (batch, tokens, width).
        groups: (batch, tokens), numbers below `num_groups`.
        num_groups: how many tokens are left.
        weights: (batch, tokens).
    """
    sums = tokens.new_zeros(len(tokens), num_groups, tokens.shape[-1])
    sums = sums.scatter_add(1, groups.unsqueeze(-1).expand_as(tokens), tokens * weights.unsqueeze(-1))
    totals = add_up(weights, groups, num_groups)
    return sums / totals.unsqueeze(-1), totals


def add_up(values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The sum of (batch, tokens) values over each group."""
    return values.new_zeros(len(values), num_groups).scatter_add(1, groups, values)


def join_best(
    similarity: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, others: torch.Tensor, num_merged: int
) -> torch.Tensor:
    """
    Bipartite soft matching: each source looks for the most similar target, and the best matched sources join theirs.

    Args:
        similarity: (batch, sources, targets).
        sources, targets, others: (batch, number), the positions of the tokens that may join, that may be joined and
            that stay as they are. Together they are all tokens.
        num_merged: how many sources join a target.

    Returns:
        (batch, tokens), the group of each token. The groups are numbered in the order of `others`, the sources that
        are left, `targets`.
    """
    best, match = similarity.max(-1)
    joining = best.topk(num_merged).indices
    joins = torch.zeros_like(sources, dtype=torch.bool).scatter(1, joining, True)
    left = torch.cat(
        (torch.ones_like(others, dtype=torch.bool), ~joins, torch.ones_like(targets, dtype=torch.bool)), 1
    )
    numbers = left.cumsum(1) - 1
    of_others, of_sources, of_targets = numbers.split([others.shape[1], sources.shape[1], targets.shape[1]], dim=1)
    of_sources = torch.where(joins, of_targets.gather(1, match), of_sources)
    positions = torch.cat((others, sources, targets), dim=1)
    return torch.empty_like(positions).scatter(1, positions, torch.cat((of_others, of_sources, of_targets), dim=1))


class Rival(Method):
    """A method that merges tokens between attention and MLP. `num_merged` is how many, by block."""

    def __init__(self, model: nn.Module, num_merged: dict[int, int]):
        super().__init__(model)
        self.num_merged = num_merged
        self.first_block = min(num_merged)

    def run_block(self, index, hidden_states, sizes):
        attended = self.attend(index, hidden_states, sizes)
        hidden_states = hidden_states + attended.branch
        # Half of the patch tokens at most: a source needs a target.
        num_merged = min(self.num_merged.get(index, 0), (hidden_states.shape[1] - 1) // 2)
        if num_merged:
            sizes = torch.ones_like(hidden_states[..., 0]) if sizes is None else sizes
            hidden_states, sizes = self.merge(index, hidden_states, sizes, attended, num_merged)
        return hidden_states + self.feed_forward(self.layers[index], hidden_states), sizes

    def merge(self, index, hidden_states, sizes, attended: Attended, num_merged: int):
        """Hidden states and sizes with `num_merged` tokens less."""
        groups = self.groups(index, attended, sizes, num_merged)
        return merge_groups(hidden_states, groups, hidden_states.shape[1] - num_merged, sizes)

    def groups(self, index, attended: Attended, sizes, num_merged: int) -> torch.Tensor:
        raise NotImplementedError


class ToMe(Rival):
    """Token merging (Bolya et al. 2023, arXiv 2210.09461): even positions join odd ones by the cosine of keys."""

    def groups(self, index, attended, sizes, num_merged):
        keys = unit(attended.key.mean(1))
        similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        similarity[:, 0] = -torch.inf  # the class token
        positions = torch.arange(keys.shape[1]).expand(len(keys), -1)
        return join_best(similarity, positions[:, ::2], positions[:, 1::2], positions[:, :0], num_merged)


class ImportanceToMe(ToMe):
    """ToMe with means weighted by importance, the class token's attention times the length of the value."""

    def merge(self, index, hidden_states, sizes, attended, num_merged):
        groups = self.groups(index, attended, sizes, num_merged)
        attention = class_attention(attended.query, attended.key, sizes).mean(1)
        importance = attention * attended.value.transpose(1, 2).flatten(2).norm(dim=-1)
        num_groups = hidden_states.shape[1] - num_merged
        hidden_states, _ = merge_groups(hidden_states, groups, num_groups, importance)
        return hidden_states, add_up(sizes, groups, num_groups)


class PiToMe(Rival):
    """
    PiToMe (Tran et al. 2024, arXiv 2405.16148): tokens with the most energy, those in the largest crowds, join each
    other. In the first half of the blocks all patch tokens may join, after it only the `2 * num_merged` with the most
    energy; every other one of them in the order of energy is a source.

    Args:
        margins: the cosine from which neighbours count, at the first block and beyond the last one.
    """

    def __init__(self, model: nn.Module, num_merged: dict[int, int], margins: tuple[float, float] = (0.9, 0.1)):
        super().__init__(model, num_merged)
        self.margins = margins

    def groups(self, index, attended, sizes, num_merged):
        keys = unit(attended.key.mean(1)[:, 1:])
        similarity = keys @ keys.transpose(1, 2)
        depth = index / len(self.layers)
        order = energies(similarity, self.margins[0] + depth * (self.margins[1] - self.margins[0])).argsort(
            dim=-1, descending=True
        )
        num_candidates = order.shape[1] if depth < 0.5 else 2 * num_merged
        candidates, kept = order.split([num_candidates, order.shape[1] - num_candidates], dim=1)
        sources, targets = candidates[:, ::2], candidates[:, 1::2]
        similarity = similarity.gather(1, sources.unsqueeze(-1).expand(-1, -1, similarity.shape[-1]))
        similarity = similarity.gather(2, targets.unsqueeze(1).expand(-1, sources.shape[1], -1))
        class_token = torch.zeros_like(order[:, :1])
        return join_best(similarity, sources + 1, targets + 1, torch.cat((class_token, kept + 1), 1), num_merged)


def energies(similarity: torch.Tensor, margin: float) -> torch.Tensor:
    """How crowded each token's surroundings are (PiToMe, Equation 4), from all cosines: (batch, tokens)."""
    return nn.functional.elu(similarity - margin).mean(-1)


class SizeRanked(ToMe):
    """
    ToMe with the matching of ATM (Lee and Choi 2025, arXiv 2505.15160): in the later blocks, the smaller half of the
    tokens joins the larger half, so that two large tokens never merge. The number of tokens per block is fixed here,
    where ATM lets a threshold decide.

    Args:
        first_ranked: the first block that ranks by size.
    """

    def __init__(self, model: nn.Module, num_merged: dict[int, int], first_ranked: int = 6):
        super().__init__(model, num_merged)
        self.first_ranked = first_ranked

    def groups(self, index, attended, sizes, num_merged):
        if index < self.first_ranked:
            return super().groups(index, attended, sizes, num_merged)
        keys = unit(attended.key.mean(1)[:, 1:])
        order = sizes[:, 1:].argsort(dim=-1, stable=True)
        sources, targets = order.tensor_split([order.shape[1] // 2], dim=1)
        picked = [keys.gather(1, half.unsqueeze(-1).expand(-1, -1, keys.shape[-1])) for half in (sources, targets)]
        similarity = picked[0] @ picked[1].transpose(1, 2)
        return join_best(similarity, sources + 1, targets + 1, torch.zeros_like(order[:, :1]), num_merged)


class ATC(Rival):
    """
    Agglomerative token clustering (Haurum et al. 2024, arXiv 2409.11923): at few blocks, the patch tokens become as
    many clusters as shall be left, by average linkage of the cosine distances of their keys. `num_merged` may exceed
    half of the tokens.
    """

    def run_block(self, index, hidden_states, sizes):
        attended = self.attend(index, hidden_states, sizes)
        hidden_states = hidden_states + attended.branch
        if num_merged := self.num_merged.get(index, 0):
            sizes = torch.ones_like(hidden_states[..., 0]) if sizes is None else sizes
            hidden_states, sizes = self.merge(index, hidden_states, sizes, attended, num_merged)
        return hidden_states + self.feed_forward(self.layers[index], hidden_states), sizes

    def groups(self, index, attended, sizes, num_merged):
        keys = unit(attended.key.mean(1)[:, 1:])
        distances = (1 - keys @ keys.transpose(1, 2)).detach().clamp_min(0).double().numpy()
        num_clusters = keys.shape[1] - num_merged
        clusters = np.stack([average_linkage(matrix, num_clusters) for matrix in distances])
        return nn.functional.pad(torch.from_numpy(clusters) + 1, (1, 0))


def average_linkage(distances: np.ndarray, num_clusters: int) -> np.ndarray:
    """The cluster of each token, from 0, for a symmetric matrix of distances."""
    above = distances[np.triu_indices(len(distances), 1)]
    tree = scipy.cluster.hierarchy.linkage(above, "average")
    return scipy.cluster.hierarchy.cut_tree(tree, num_clusters)[:, 0].astype(np.int64)


class DiffRate(Method):
    """
    DiffRate (Chen et al. 2023, arXiv 2305.17997): after attention, the tokens are sorted by the class token's
    attention, all but the first `pruned` are dropped, and of those left all but the first `merged` join the most
    similar of these, by the cosine of hidden states. The mean does not weigh sizes, and what joins adds its size times
    the cosine.

    Args:
        pruned, merged: how many tokens, with the class token, are left in each block.
    """

    def __init__(self, model: nn.Module, pruned: list[int], merged: list[int]):
        super().__init__(model)
        self.pruned, self.merged = pruned, merged

    def run_block(self, index, hidden_states, sizes):
        attended = self.attend(index, hidden_states, sizes)
        hidden_states = hidden_states + attended.branch
        sizes = torch.ones_like(hidden_states[..., 0]) if sizes is None else sizes
        attention = class_attention(attended.query, attended.key, sizes).mean(1)
        order = attention[:, 1:].argsort(dim=-1, descending=True, stable=True) + 1
        order = nn.functional.pad(order, (1, 0))[:, : self.pruned[index]]
        hidden_states = hidden_states.gather(1, order.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
        hidden_states, sizes = join_first(hidden_states, sizes.gather(1, order), self.merged[index])
        return hidden_states + self.feed_forward(self.layers[index], hidden_states), sizes


def join_first(hidden_states: torch.Tensor, sizes: torch.Tensor, num_left: int) -> tuple[torch.Tensor, torch.Tensor]:
    """DiffRate's merge: the tokens after the first `num_left` join the most similar of these but the class token."""
    if hidden_states.shape[1] <= num_left:
        return hidden_states, sizes
    metric = unit(hidden_states)
    similarity = metric[:, num_left:] @ metric[:, :num_left].transpose(1, 2)
    similarity[..., 0] = -torch.inf
    best, match = similarity.max(-1)
    stays = torch.arange(num_left).expand(len(match), -1)
    groups = torch.cat((stays, match), dim=1)
    sizes = torch.cat((sizes[:, :num_left], sizes[:, num_left:] * best), dim=1)
    hidden_states, _ = merge_groups(hidden_states, groups, num_left, torch.ones_like(sizes))
    return hidden_states, add_up(sizes, groups, num_left)
