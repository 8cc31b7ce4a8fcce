"""The search for the schedule that loses least within a limit of the cost, from coarse to fine."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from .evaluation import Evaluator, rounded
from .schedules import Fitter, Parts, Schedule, moves, schedule_fields, seeds
from .trials import Trial, TrialLog


# Candidates that compete on few images before the best of them get more.
GROUP = 12
# Which share of all merged tokens a move shifts, from coarse to fine.
SHARES = (0.3, 0.15, 0.07, 0.03)
# A candidate gets more images if it is not worse than this times the best on the same images.
TOLERANCE = 1.03
# The gain on all images must be this many of its standard errors. Of many neighbours that are as good, some always
# look better on these images, and a search that followed them would fit the images and not the model.
SURE = 2.0


class BudgetSpent(Exception):
    """Raised in the middle of a search when its time or its trials are used up."""


@dataclass
class Budget:
    """
    What a search may use. What an earlier, killed search used counts as well, so that both together do what one would
    have done.

    Args:
        seconds: the time; None: no limit.
        trials: how many schedules to try; None: no limit.
        on_progress: is called with the used share of the budget after each trial.
    """

    seconds: float | None = None
    trials: int | None = None
    on_progress: Callable[[float], None] = lambda share: None
    used_seconds: float = 0.0
    used_trials: int = 0
    # The share that the search that is going on may use.
    share: float = 1.0

    @property
    def used(self) -> float:
        """The used share, which exceeds 1 by the last trial."""
        shares = [self.used_seconds / self.seconds] if self.seconds is not None else []
        shares += [self.used_trials / self.trials] if self.trials is not None else []
        return max(shares, default=0.0)

    def charge(self, trial: Trial) -> None:
        self.used_seconds += trial.seconds
        self.used_trials += trial.piece == 0
        self.on_progress(min(self.used, 1.0))

    def check(self) -> None:
        if self.used >= self.share:
            raise BudgetSpent


@dataclass(frozen=True)
class Tried:
    """The losses of a schedule on the first images, and the share of answers that are the same."""

    schedule: Schedule
    losses: tuple[float, ...]
    agreement: float | None

    @property
    def num_images(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    def is_surely_better(self, other: "Tried") -> bool:
        """Whether it loses less than `other` on the same images by more than chance explains."""
        gains = [theirs - own for own, theirs in zip(self.losses, other.losses, strict=True)]
        return statistics.fmean(gains) > SURE * statistics.stdev(gains) / math.sqrt(len(gains))


@dataclass
class Search:
    """
    Tries schedules and keeps what it learned.

    Args:
        evaluator: compares schedules with no pooling, on the images for the search.
        log: what was tried, also earlier.
        budget: what may be used.
        max_stages: at how many blocks a schedule merges, at most, where the limit allows it.
        seed: decides the order in which neighbours are tried.
    """

    evaluator: Evaluator
    log: TrialLog
    budget: Budget
    max_stages: int
    seed: int = 0
    used: set[tuple[Schedule, int]] = field(default_factory=set)

    def __post_init__(self):
        total = len(self.evaluator.pixel_values)
        # A few images decide which candidates get more.
        self.ends = sorted({min(max(total // 8, 8), total), min(max(total // 2, 8), total), total})
        self.num_patches = self.evaluator.model.config.tokens_per_stage()[0]
        self.num_blocks = self.evaluator.model.config.num_hidden_layers
        self.clock = time.monotonic()

    def find(self, fitter: Fitter, limit: float, starts: Iterable[Schedule] = ()) -> Schedule | None:
        """
        The schedule within `limit` that loses least on all images for the search.

        Args:
            fitter: fits schedules to the limit.
            limit: the highest cost.
            starts: schedules for another limit, which are fitted to this one.

        Returns:
            The schedule, or None if the limit cannot be reached.
        """
        if fitter.cost(fitter.cheapest) > limit:
            return None
        order = random.Random(self.seed)
        started = [dict(schedule) for schedule in starts]
        # The cheapest may have more stages than the others, and be alone in reaching the limit.
        started.append(dict(fitter.cheapest))
        candidates = self.fitted(fitter, limit, [*started, *seeds(self.num_blocks, self.max_stages)])
        best = None
        try:
            best = self.choose_start(candidates)
            for share in SHARES:
                for better in self.descend(fitter, limit, best, share, order):
                    best = better  # at once, because the next step may find the budget spent
        except BudgetSpent:
            best = best or self.most_tried(candidates)
            # It may not have met all images yet.
            self.budget.share, share_before = math.inf, self.budget.share
            self.try_out(best, len(self.ends) - 1)
            self.budget.share = share_before
        return best

    def descend(
        self, fitter: Fitter, limit: float, best: Schedule, share: float, order: random.Random
    ) -> Iterator[Schedule]:
        """The better neighbours that it moves to, one after the other, until there are none."""
        improved = True
        while improved:
            improved = False
            neighbours = self.fitted(fitter, limit, moves(best, self.num_blocks, share, self.max_stages))
            order.shuffle(neighbours)
            for start in range(0, len(neighbours), GROUP):
                chosen = self.choose(neighbours[start : start + GROUP], best)
                if chosen is not None:
                    best, improved = chosen, True
                    yield best
                    break

    def fitted(self, fitter: Fitter, limit: float, candidates: Iterable[Parts]) -> list[Schedule]:
        """The candidates that can reach the limit, each once."""
        schedules = (fitter.fit(parts, limit) for parts in candidates)
        return list(dict.fromkeys(schedule for schedule in schedules if schedule is not None))

    def choose_start(self, candidates: list[Schedule]) -> Schedule:
        """The best of the candidates. Few images tell which of them get more, a third each time, but four at least."""
        for level in range(len(self.ends)):
            ranked = self.ranked(candidates, level)
            candidates = [tried.schedule for tried in ranked[: max(len(ranked) // 3, 4)]]
        return ranked[0].schedule

    def most_tried(self, candidates: list[Schedule]) -> Schedule:
        """The candidate that met the most images. Of several, the best; without any, the first."""

        def rank(schedule: Schedule) -> tuple[int, float]:
            levels = [level for level in range(len(self.ends)) if (schedule, level) in self.used]
            return (-len(levels), self.try_out(schedule, levels[-1]).loss) if levels else (0, 0.0)

        return min(candidates, key=rank)

    def choose(self, candidates: list[Schedule], best: Schedule) -> Schedule | None:
        """The best of the candidates if it is surely better than `best`."""
        for level in range(len(self.ends) - 1):
            bar = TOLERANCE * self.try_out(best, level).loss
            ranked = self.ranked(candidates, level)[: max(len(candidates) // 3, 1)]
            candidates = [tried.schedule for tried in ranked if tried.loss < bar]
        known = self.try_out(best, len(self.ends) - 1)
        better = (tried for tried in self.ranked(candidates, len(self.ends) - 1) if tried.is_surely_better(known))
        return next((tried.schedule for tried in better), None)

    def ranked(self, candidates: list[Schedule], level: int) -> list[Tried]:
        """The candidates on as many images as the level has, from the best to the worst."""
        return sorted((self.try_out(schedule, level) for schedule in candidates), key=lambda tried: tried.loss)

    def try_out(self, schedule: Schedule, level: int) -> Tried:
        """The schedule on as many images as the level has."""
        trials = [self.trial(schedule, piece) for piece in range(level + 1)]
        return self.summed(schedule, trials)

    def summed(self, schedule: Schedule, trials: list[Trial]) -> Tried:
        losses = tuple(loss for trial in trials for loss in trial.losses)
        agrees = None if trials[0].agrees is None else sum(trial.agrees for trial in trials) / len(losses)
        return Tried(schedule, losses, agrees)

    def trial(self, schedule: Schedule, piece: int) -> Trial:
        """The trial of a piece of the images: those that one level has more than the level before."""
        key = (schedule, piece)
        if key in self.used:
            return self.log.trials[key]
        self.budget.check()
        if key not in self.log.trials:
            start, end = (0, *self.ends)[piece : piece + 2]
            differences = self.evaluator.evaluate(schedule_fields(schedule, self.num_patches), start, end)
            agrees = None if differences.agrees is None else int(differences.agrees.sum())
            now = time.monotonic()
            losses = tuple(map(rounded, differences.losses.tolist()))
            self.log.add(Trial(schedule, piece, losses, agrees, now - self.clock))
        self.clock = time.monotonic()
        self.used.add(key)
        self.budget.charge(self.log.trials[key])
        return self.log.trials[key]

    def tried(self) -> list[Tried]:
        """All that this search tried, with the images that it got."""
        pieces: dict[Schedule, list[Trial]] = {}
        for schedule, piece in sorted(self.used):
            pieces.setdefault(schedule, []).append(self.log.trials[schedule, piece])
        return [self.summed(schedule, trials) for schedule, trials in pieces.items()]
