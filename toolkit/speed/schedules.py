"""Ways to merge tokens: how many at which blocks. How to fit them to a cost, where to begin, and what to try next."""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any


# Pairs of a block and the number of tokens that merge at its input, from the first block to the last.
Schedule = tuple[tuple[int, int], ...]
# For each block that merges, its part of all tokens that merge. Only their proportions count.
Parts = dict[int, float]


def schedule_fields(schedule: Schedule, num_patches: int) -> dict[str, Any]:
    """The fields of the configuration that merge as `schedule` says in images of `num_patches` patches."""
    if not schedule:
        return {"hvt_pool": None}
    ratios, num_tokens = [], num_patches
    for _, merged in schedule:
        ratios.append(merged / num_tokens)
        num_tokens -= merged
    return {"hvt_pool": [block for block, _ in schedule], "merge_ratio": ratios}


def clamped(counts: dict[int, int], num_patches: int) -> Schedule:
    """The schedule that comes closest to `counts`: a block merges at most half of the tokens that it gets."""
    schedule, num_tokens = [], num_patches
    for block, wanted in sorted(counts.items()):
        merged = min(wanted, num_tokens // 2)
        if merged > 0:
            schedule.append((block, merged))
            num_tokens -= merged
    return tuple(schedule)


class Fitter:
    """
    Fits schedules to a limit of the cost.

    Args:
        cost: what an image costs under a schedule.
        num_patches: the patches of an image.
        num_blocks: the blocks of the model.
    """

    def __init__(self, cost: Callable[[Schedule], float], num_patches: int, num_blocks: int):
        self.cost, self.num_patches, self.num_blocks = cost, num_patches, num_blocks

    @cached_property
    def cheapest(self) -> Schedule:
        """
        Half of the tokens at every block, or at some of them if that costs less, because each stage takes time itself.
        """
        halved = (self.scaled(parts, self.num_patches) for parts in seeds(self.num_blocks, self.num_blocks))
        return min(halved, key=self.cost)

    def scaled(self, parts: Parts, factor: float) -> Schedule:
        counts = {block: max(round(part * factor), 1) for block, part in parts.items()}
        return clamped(counts, self.num_patches)

    def fit(self, parts: Parts, limit: float) -> Schedule | None:
        """The schedule in these proportions that merges the fewest tokens within the limit; None if none can."""
        low, high = 0.0, self.num_patches / min(parts.values())
        if self.cost(self.scaled(parts, high)) > limit:
            return None
        while round(low * max(parts.values())) != round(high * max(parts.values())) and high - low > 1e-3 * high:
            middle = (low + high) / 2
            if self.cost(self.scaled(parts, middle)) > limit:
                low = middle
            else:
                high = middle
        return self.loosened(self.scaled(parts, high), limit)

    def loosened(self, schedule: Schedule, limit: float) -> Schedule:
        """Merges one token less at a block after the other, from the last on, as long as the limit allows it."""
        before = None
        while schedule != before:
            before = schedule
            for block, merged in reversed(before):
                candidate = clamped({**dict(schedule), block: merged - 1}, self.num_patches)
                if self.cost(candidate) <= limit:
                    schedule = candidate
        return schedule


def seeds(num_blocks: int, max_stages: int) -> Iterator[Parts]:
    """
    Where a search begins: equal numbers of tokens at every block, every other one or every third, from different
    blocks on. A model of another depth than 12 gets the same places in proportion.
    """
    seen = set()
    for first, step, num_stages in itertools.product((3, 2, 4, 1, 0, 5), (2, 1, 3), (4, 3, 5, 2, 6, 1)):
        blocks = {round((first + step * stage) * num_blocks / 12) for stage in range(num_stages)}
        blocks = tuple(sorted(block for block in blocks if block < num_blocks))
        if blocks and len(blocks) <= max_stages and blocks not in seen:
            seen.add(blocks)
            yield dict.fromkeys(blocks, 1.0)
    # Where nothing else is fast enough.
    yield dict.fromkeys(range(num_blocks), 1.0)


def moves(schedule: Schedule, num_blocks: int, share: float, max_stages: int) -> Iterator[Parts]:
    """
    The neighbours of a schedule.

    Args:
        schedule: the schedule.
        num_blocks: the blocks of the model.
        share: which share of all merged tokens moves from one block to another.
        max_stages: a new block begins to merge only where fewer do.
    """
    parts = {block: float(merged) for block, merged in schedule}
    amount = share * sum(parts.values())
    free = [block for block in range(num_blocks) if block not in parts]
    for block in parts:
        rest = {other: part for other, part in parts.items() if other != block}
        # Shift a block, and take half of its tokens to a new one.
        for other in free:
            if abs(other - block) <= 2:
                yield {**rest, other: parts[block]}
                if len(parts) < max_stages:
                    yield {**rest, block: parts[block] / 2, other: parts[block] / 2}
        for other in rest:
            # Move some tokens, or all of them: then the blocks join.
            if parts[block] > amount:
                yield {**rest, block: parts[block] - amount, other: parts[other] + amount}
            if abs(other - block) <= 4:
                yield {**rest, other: parts[other] + parts[block]}
        if rest:
            yield rest
    if len(parts) < max_stages:
        yield from ({**parts, other: amount} for other in free)
