"""Merging of similar tokens: rules that say which tokens join which, and what a merged token becomes."""

from typing import NamedTuple

import torch


LARGEST = torch.finfo(torch.float32).max


class Groups(NamedTuple):
    """
    Which tokens stay, and which join them.

    Attributes:
        staying (`torch.LongTensor` of shape `(batch_size, num_groups)`): positions of tokens that stay, rising.
        moving (`torch.LongTensor` of shape `(batch_size, num_merged)`): positions of tokens that join another.
        joins (`torch.BoolTensor` of shape `(batch_size, num_groups, num_merged)`): whether a token joins a group.
        numbers (`torch.LongTensor` of shape `(batch_size, num_tokens)`): the group that each token belongs to.
    """

    staying: torch.Tensor
    moving: torch.Tensor
    joins: torch.Tensor
    numbers: torch.Tensor

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over each group, of `values` of shape `(batch_size, num_tokens)`."""
        moved = self.joins * values.gather(1, self.moving).unsqueeze(1)
        return values.gather(1, self.staying) + moved.sum(-1)

    def mean(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        The weighted mean over each group: `(batch_size, num_groups, width)`.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size or 1, num_tokens, width)`): what is averaged.
            weights (`torch.FloatTensor` of shape `(batch_size, num_tokens)`): above 0.
        """
        tokens = tokens.expand(weights.shape[0], -1, -1)
        shares = self.joins * weights.gather(1, self.moving).unsqueeze(1)
        kept = weights.gather(1, self.staying)
        total = kept + shares.sum(-1)
        # Products with these are deterministic on every device, a scatter is not.
        shares, kept = ((part / total.unsqueeze(-1)).to(tokens.dtype) for part in (shares, kept.unsqueeze(-1)))
        return kept * rows(tokens, self.staying) + shares @ rows(tokens, self.moving)


def rows(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tokens at positions of shape `(batch_size, number)`."""
    batch_size, num_tokens, width = tokens.shape
    first = torch.arange(batch_size, device=tokens.device).unsqueeze(1) * num_tokens
    # Whole rows of one matrix, which is much faster on a CPU than `gather`.
    picked = tokens.reshape(batch_size * num_tokens, width).index_select(0, (positions + first).flatten())
    return picked.unflatten(0, positions.shape)


def group(roots: torch.Tensor, num_merged: int) -> Groups:
    """
    The groups of tokens that have the same root.

    Args:
        roots (`torch.LongTensor` of shape `(batch_size, num_tokens)`): the position of the token that each token
            joins, its own if it stays.
        num_merged (`int`): the number of tokens that join another.
    """
    num_tokens = roots.shape[1]
    positions = torch.arange(num_tokens, device=roots.device)
    moves = roots != positions
    # Those that stay first; all numbers differ, so that every device sorts them alike.
    order = torch.where(moves, positions + num_tokens, positions).sort(dim=1).values
    staying, moving = order[:, : num_tokens - num_merged], order[:, num_tokens - num_merged :] - num_tokens
    numbers = ((~moves).cumsum(1) - 1).gather(1, roots)
    return Groups(staying, moving, roots.gather(1, moving).unsqueeze(1) == staying.unsqueeze(-1), numbers)


class DistanceRule:
    """
    The rule of version 0.1 (after ToMe, arXiv 2210.09461, Section 3): the tokens at odd positions that are nearest to
    a token at an even position join it, all in one round. ToMe merges in every block by the cosine of keys. With few
    stages, the distance of hidden states, which is what a merge loses, keeps more of a trained model.
    """

    def find_roots(self, tokens: torch.Tensor, weights: torch.Tensor, num_merged: int) -> torch.Tensor:
        """
        The position of the token that each token joins, its own if it stays: `(batch_size, num_tokens)`.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, width)`): what is compared.
            weights (`torch.FloatTensor` of shape `(batch_size, num_tokens)`): how much each token counts.
            num_merged (`int`): how many tokens at odd positions join one at an even position; at most
                `num_tokens // 2`.
        """
        tokens = centred(tokens)
        sources, targets = tokens[:, 1::2], tokens[:, ::2]
        # Only the part of the negative squared distance that depends on the target decides the match. The rest is
        # needed to rank the sources.
        nearness, match = (2 * sources @ targets.transpose(1, 2) - squares(targets).unsqueeze(1)).max(-1)
        joining = (nearness - squares(sources)).topk(num_merged).indices
        return redirect(own_roots(tokens), joining, match.gather(1, joining))

    def weigh(self, sizes: torch.Tensor, log_importance: torch.Tensor | None) -> torch.Tensor:
        """How much each token counts where tokens are compared: `(batch_size, num_tokens)`."""
        return sizes

    def mean_weights(self, sizes: torch.Tensor, log_importance: torch.Tensor | None) -> torch.Tensor:
        """How much each token counts in the mean that its group becomes: `(batch_size, num_tokens)`."""
        return sizes

    def mean(self, groups: Groups, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the groups become, from tokens and their weights: `(batch_size, num_groups, width)`."""
        return groups.mean(tokens, weights)

    @classmethod
    def macs(cls, before: int, after: int, width: int) -> int:
        """Multiply-accumulates of the products that find the roots of `before` tokens of one image."""
        return width * (before // 2) * (before - before // 2)

    @classmethod
    def mean_macs(cls, before: int, after: int, width: int) -> int:
        """Multiply-accumulates of the products in [`mean`]."""
        return width * after * (before - after)


class ImportanceRule(DistanceRule):
    """
    Tokens that the model looks at merge late and count more (docs/results/merging.md). If a joins b, that loses
    w_a w_b / (w_a + w_b) |a - b|² (Ward, 1963), where w is a token's patches times its importance to a power. The
    cheapest tokens at odd positions join one at an even position, in rounds. A merged token is the mean of its
    members, weighted by patches times importance, and as long as they are on average. Without a class token to look
    at them, all patches are equally important: the attention from all patches measured worse.

    Attributes:
        num_rounds (`int`): each sees the means of the ones before.
        distance_power, mean_power (`float`): the power of the importance in the loss and in the mean.
    """

    num_rounds = 4
    distance_power = 0.5
    mean_power = 1.0

    def find_roots(self, tokens: torch.Tensor, weights: torch.Tensor, num_merged: int) -> torch.Tensor:
        tokens, roots = centred(tokens), own_roots(tokens)
        sources, targets, source_weights = tokens[:, 1::2], tokens[:, ::2], weights[:, 1::2]
        joined_before = torch.zeros_like(source_weights, dtype=torch.bool)
        distances = Distances(
            squared_distances(sources, targets), squared_distances(sources, sources), weights[:, ::2]
        )
        numbers = split_evenly(num_merged, self.num_rounds)
        for turn, number in enumerate(numbers, start=1):
            # (batch_size, num_sources, num_targets)
            losses = distances.to_targets / (
                1 / source_weights.unsqueeze(2) + 1 / distances.target_weights.unsqueeze(1)
            )
            loss, match = losses.min(-1)
            # Not a number would rank behind infinity, and tokens would join twice.
            loss = loss.nan_to_num(nan=LARGEST, posinf=LARGEST).masked_fill(joined_before, torch.inf)
            joining = loss.topk(number, largest=False).indices
            joined = match.gather(1, joining)
            roots = redirect(roots, joining, joined)
            if turn < len(numbers):
                joined_before = joined_before.scatter(1, joining, True)
                distances = distances.after(source_weights.gather(1, joining), joining, joined)
        return roots

    def weigh(self, sizes: torch.Tensor, log_importance: torch.Tensor | None) -> torch.Tensor:
        return sizes * powers(log_importance, self.distance_power)

    def mean_weights(self, sizes: torch.Tensor, log_importance: torch.Tensor | None) -> torch.Tensor:
        return sizes * powers(log_importance, self.mean_power)

    def mean(self, groups: Groups, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        merged, lengths = groups.mean(tokens, weights), groups.mean(length(tokens), weights)
        return merged * (lengths / length(merged).clamp_min(1e-30)).to(merged.dtype)

    @classmethod
    def macs(cls, before: int, after: int, width: int) -> int:
        sources, targets = before // 2, before - before // 2
        # Products of sources with each other, and before each further round with the new means.
        moved = sum(split_evenly(before - after, cls.num_rounds)[:-1])
        rounds = width * sources * sources + moved * sources * targets
        return super().macs(before, after, width) + rounds

    @classmethod
    def mean_macs(cls, before: int, after: int, width: int) -> int:
        # And of the lengths.
        return super().mean_macs(before, after, width + 1)


MERGE_RULES = {"distance": DistanceRule, "importance": ImportanceRule}


class Distances(NamedTuple):
    """
    Squared distances of sources (the tokens at odd positions) from targets (those at even ones). A target stands for
    the weighted mean of all that have joined it.

    Attributes:
        to_targets (`torch.FloatTensor` of shape `(batch_size, num_sources, num_targets)`): from each target.
        to_sources (`torch.FloatTensor` of shape `(batch_size, num_sources, num_sources)`): from each source.
        target_weights (`torch.FloatTensor` of shape `(batch_size, num_targets)`): of the means.
    """

    to_targets: torch.Tensor
    to_sources: torch.Tensor
    target_weights: torch.Tensor

    def after(self, weights: torch.Tensor, joining: torch.Tensor, joined: torch.Tensor) -> "Distances":
        """
        The distances after a round. Those from a mean follow from those from its members: their weighted mean, less
        what the members are away from it on average (Steiner's theorem).

        Args:
            weights (`torch.FloatTensor` of shape `(batch_size, number)`): of the sources that join.
            joining, joined (`torch.LongTensor` of shape `(batch_size, number)`): the numbers of the sources that join,
                and of the target that each joins.
        """
        targets = torch.arange(self.target_weights.shape[1], device=joined.device)
        # (batch_size, number, num_targets)
        shares = (joined.unsqueeze(2) == targets) * weights.unsqueeze(2)
        total = self.target_weights + shares.sum(1)
        shares, kept = shares / total.unsqueeze(1), self.target_weights / total
        of_targets = kept.unsqueeze(1) * self.to_targets
        of_members = torch.baddbmm(of_targets, picked(self.to_sources, joining).transpose(1, 2), shares)
        # Half of the mean distance between two members. The target is one of them.
        spread = (shares * (picked(of_targets, joining) + picked(of_members, joining))).sum(1, keepdim=True) / 2
        return Distances(of_members - spread, self.to_sources, total)


def squared_distances(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    lengths = squares(tokens).unsqueeze(2) + squares(others).unsqueeze(1)
    return torch.baddbmm(lengths, tokens, others.transpose(1, 2), alpha=-2)


def picked(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows at positions of shape `(batch_size, number)`, if they are short."""
    return table.gather(1, positions.unsqueeze(2).expand(-1, -1, table.shape[2]))


def centred(tokens: torch.Tensor) -> torch.Tensor:
    """
    The tokens less their mean, in float32. Distances do not change, and small numbers keep them precise in half
    precision.
    """
    tokens = tokens.float()
    return tokens - tokens.mean(1, keepdim=True)


def squares(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.square().sum(-1)


def length(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.float().norm(dim=-1, keepdim=True)


def powers(log_importance: torch.Tensor | None, power: float) -> torch.Tensor | float:
    """
    Importance to a power, up to a constant factor for each image: 1 for the most important token, never 0. If it is
    unknown, 1 for all.
    """
    if log_importance is None:
        return 1.0
    relative = log_importance - log_importance.amax(1, keepdim=True)
    return (power * relative.clamp_min(-30.0)).exp()


def own_roots(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])


def redirect(roots: torch.Tensor, joining: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
    """The roots after the tokens at the odd positions number `joining` have joined the even positions `joined`."""
    return roots.scatter(1, 2 * joining + 1, 2 * joined)


def split_evenly(number: int, num_parts: int) -> list[int]:
    """`number` in at most `num_parts` parts that differ by at most 1."""
    cuts = [number * part // num_parts for part in range(num_parts + 1)]
    parts = [cuts[part + 1] - cuts[part] for part in range(num_parts)]
    # ONNX cannot reshape tensors without elements. With a free image size the parts are not numbers yet.
    return [part for part in parts if not isinstance(part, int) or part > 0]
