"""The loop in which a model learns its teacher's answers, at one speed or several."""

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hpool_vit.pooling_hpool_vit import POOLINGS

from ..shared.console import needs, one_line
from ..shared.devices import has_bfloat16, mixed_precision
from ..shared.files import written_whole
from ..speed.evaluation import losses_of, rounded
from .effort import Effort
from .lessons import VIEWS, Answers, Lessons, answer


with needs("train"):
    from ..training.optimization import WeightAverage, parameter_groups


# Of the head. Windows take a trained model further from its answers than merging does.
MERGING_RATE, WINDOWS_RATE = 5e-5, 3e-4
LAYER_DECAY = 0.85
BATCH_SIZE = 32
WARMUP = 0.05
MAX_GRAD_NORM = 1.0
# Of the moving average of the weights. It is what is judged and kept.
EMA_DECAY = 0.98
# 1 − cosine of the pooled outputs counts as much as this many nats.
FEATURE_WEIGHT = 2.0
# How often the images that are held back are looked at, at most. So many times in a row without a gain are the end.
NUM_CHECKS, PATIENCE = 20, 10
# The share of the images that is held back.
HELD_BACK, MOST_HELD_BACK = 1 / 6, 256


@dataclass
class Result:
    """
    What a recovery did on the images that it did not learn from.

    Attributes:
        before, after: the loss at each speed; `after` is that of the kept weights.
        checks: what was measured on the way: `share` of the effort, `epochs` and `losses`.
        is_kept: whether the model has learned weights now. Otherwise it has those that it began with.
        ended: why it ended.
    """

    before: list[float]
    after: list[float]
    is_kept: bool
    ended: str
    epochs: float
    seconds: float
    checks: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RecoveryState:
    """What a killed recovery needs to go on, besides weights."""

    step: int = 0
    seconds: float = 0.0
    bad_checks: int = 0
    best: float = 1.0
    checks: list[dict[str, Any]] = field(default_factory=list)


class Recovery:
    """
    Teaches a model the answers of its teacher. Each step draws a schedule, a view and some images.

    Args:
        model: an `HPoolViTForImageClassification` in evaluation mode and float32. Its weights change.
        lessons: the images to learn from.
        held_back: the images to judge by. Nothing is learned from them.
        schedules: for each speed, the fields of the configuration that give it.
        effort: how long.
        seed: decides the order of images, and which schedules and views are drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        lessons: Lessons,
        held_back: Lessons,
        schedules: list[dict[str, Any]],
        effort: Effort,
        seed: int = 0,
    ):
        self.model, self.lessons, self.held_back = model, lessons, held_back
        self.schedules, self.effort, self.seed = schedules, effort, seed
        self.has_head = model.config.num_labels > 0
        for fields in schedules:  # builds all stages, whose position embeddings learn too
            model.change_schedule(**fields)
        rate = MERGING_RATE if POOLINGS[model.config.pool_mode].partitions else WINDOWS_RATE
        groups = parameter_groups(model, rate, 0.0, LAYER_DECAY)
        self.optimizer = torch.optim.AdamW(groups)
        self.rates = [group["lr"] for group in groups]
        self.average = WeightAverage(model, EMA_DECAY)
        self.steps_per_epoch = math.ceil(len(lessons) / BATCH_SIZE)
        self.progress, self.clock = RecoveryState(), time.monotonic()
        self.kept: dict[str, torch.Tensor] = {}

    @property
    def epochs(self) -> float:
        return self.progress.step / self.steps_per_epoch

    @property
    def share(self) -> float:
        """The share of the effort that is used up."""
        return min(self.effort.share(self.progress.seconds, self.epochs), 1.0)

    def run(
        self, file: Path, made_with: dict[str, Any], on_progress: Callable[[float], None] = lambda share: None
    ) -> Result:
        """
        Learns until the effort is used up or the images held back show no gain any more, and gives the model the best
        weights that it had.

        Args:
            file: keeps what a killed run needs. If it exists and was made with the same, the run goes on there.
            made_with: what decides the result: model, images, settings.
            on_progress: is called with the used share of the effort.

        Raises:
            OSError: if `file` cannot be written.
        """
        self.clock = time.monotonic()
        start = {name: weight.detach().clone() for name, weight in self.average.parameters.items()}
        made = json.dumps(made_with, default=str)
        if not self.resume(file, made):
            self.progress.checks.append(self.describe(self.losses()))
        ended = "the time was up" if self.effort.seconds else "all epochs were done"
        while self.share < 1:
            loss = self.learn()
            self.progress.step += 1
            self.count_time()
            on_progress(self.share)
            if not math.isfinite(loss):
                ended = "the loss was not finite"
                break
            if not self.is_check_due():
                continue
            self.check()
            self.count_time()
            if self.progress.bad_checks == PATIENCE:
                ended = "the images held back showed no gain any more"
                break
            self.save(file, made)
        on_progress(1.0)
        is_kept = bool(self.kept)
        self.load(self.kept or start)
        checks = self.progress.checks
        best = min(checks[1:], key=self.score, default=checks[0]) if is_kept else checks[0]
        seconds = rounded(self.progress.seconds)
        return Result(checks[0]["losses"], best["losses"], is_kept, ended, rounded(self.epochs), seconds, checks)

    def count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds, self.clock = self.progress.seconds + now - self.clock, now

    def is_check_due(self) -> bool:
        """Whether enough has passed, but an epoch at least, since the images held back were looked at."""
        last = self.progress.checks[-1]
        passed = int(self.share * NUM_CHECKS) > int(last["share"] * NUM_CHECKS) and self.epochs - last["epochs"] >= 1
        return passed or self.share >= 1

    def learn(self) -> float:
        """One step; returns its loss, which is not finite if the weights stay because of that."""
        step, draw = self.progress.step, random.Random(f"{self.seed} {self.progress.step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.lessons), generator=torch.Generator().manual_seed(self.seed + epoch))
        indices = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        drawn = draw.randrange(len(self.schedules))
        self.model.change_schedule(**self.schedules[drawn])
        pixel_values, taught = self.lessons.batch(indices, draw.randrange(len(VIEWS)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.rate_factor()
        self.optimizer.zero_grad()
        with mixed_precision(pixel_values.device):
            said = answer(self.model, pixel_values)
        loss = self.loss(said, taught)
        (self.weight(drawn) * loss).backward()
        norm = nn.utils.clip_grad_norm_(self.average.parameters.values(), MAX_GRAD_NORM)
        if not norm.isfinite():
            return math.nan
        self.optimizer.step()
        # Shorter at first, so that little is left of the weights that it began with.
        self.average.update_averages = get_ema_multi_avg_fn(min(EMA_DECAY, (1 + step) / (10 + step)))
        self.average.update()
        return loss.item()

    def weight(self, drawn: int) -> float:
        """Makes what each schedule lost at first count alike, so that the fastest one does not decide alone."""
        losses = self.progress.checks[0]["losses"]
        # What is far below the others is mostly rounding.
        first = [max(loss, 1e-3 * max(losses), 1e-9) for loss in losses]
        return sum(first) / len(first) / first[drawn]

    def rate_factor(self) -> float:
        """Rises over the warm-up, and falls as a cosine to 0."""
        share = self.share
        return min((share + 1e-3) / WARMUP, 1.0) * (1 + math.cos(math.pi * share)) / 2

    def loss(self, said: Answers, taught: Answers) -> torch.Tensor:
        loss = losses_of(taught.logits, said.logits, self.has_head).mean()
        if self.has_head and taught.pooled.shape == said.pooled.shape:
            loss = loss + FEATURE_WEIGHT * losses_of(taught.pooled, said.pooled, False).mean()
        return loss

    @torch.no_grad()
    def losses(self) -> list[float]:
        """For each schedule, the mean loss on the images held back, as the evaluation prepares them."""
        means = []
        for fields in self.schedules:
            self.model.change_schedule(**fields)
            total = 0.0
            for indices in torch.arange(len(self.held_back)).split(BATCH_SIZE):
                pixel_values, taught = self.held_back.batch(indices, 0)
                said = answer(self.model, pixel_values)
                total += losses_of(taught.logits, said.logits, self.has_head).sum().item()
            means.append(total / len(self.held_back))
        return means

    def describe(self, losses: list[float]) -> dict[str, Any]:
        return {"share": rounded(self.share), "epochs": rounded(self.epochs), "losses": list(map(rounded, losses))}

    def score(self, check: dict[str, Any]) -> float:
        """What is left of the loss, on average over the speeds, so that a high speed does not decide alone."""
        before = self.progress.checks[0]["losses"]
        shares = [after / max(first, 1e-9) for after, first in zip(check["losses"], before, strict=True)]
        score = sum(shares) / len(shares)
        return score if math.isfinite(score) else math.inf

    def check(self) -> None:
        """Judges the averaged weights, and keeps them if they are the best so far."""
        progress = self.progress
        with self.average.applied():
            progress.checks.append(self.describe(self.losses()))
        score = self.score(progress.checks[-1])
        progress.bad_checks = 0 if score < progress.best else progress.bad_checks + 1
        if score < progress.best:
            progress.best = score
            self.kept = {name: weight.clone() for name, weight in self.average.averages.items()}

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.average.parameters.items():
            parameter.copy_(weights[name])

    def save(self, file: Path, made: str) -> None:
        state = {
            "made_with": made,
            "progress": vars(self.progress),
            "weights": {name: weight.detach() for name, weight in self.average.parameters.items()},
            "averages": self.average.averages,
            "kept": self.kept,
            "optimizer": self.optimizer.state_dict(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(file) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of PyTorch
            raise OSError(
                f"{file} cannot be written: {one_line(error)}. Run the same command again when it can: the recovery "
                "goes on where it stopped."
            ) from error

    def resume(self, file: Path, made: str) -> bool:
        """Goes on where a killed run stopped, if it was made with the same."""
        try:
            # AdamW would wait for the device in each step if it counted them there.
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises whatever a damaged file leads it to
            return False
        if state["made_with"] != made:
            return False
        self.progress = RecoveryState(**state["progress"])
        self.load(state["weights"])
        self.average.load_state_dict(state["averages"])
        self.kept = {name: weight.to(self.model.device) for name, weight in state["kept"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        return True


def teach(
    model: nn.Module,
    teacher: nn.Module,
    pixel_values: torch.Tensor,
    schedules: list[dict[str, Any]],
    effort: Effort,
    file: Path,
    settings: dict[str, Any],
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """
    Teaches a model what its teacher says to images, of which a part is held back to judge by.

    Args:
        model: as for [`Recovery`]. It has the best weights in the end.
        teacher: the model that is right.
        pixel_values: the images, at least two.
        schedules: for each speed, the fields of the configuration that give it.
        effort: how long.
        file: keeps what a killed run needs.
        settings: what decides the result, with the `seed`.
        on_progress: is called with the used share of the effort.

    Returns:
        What was done, for the record.
    """
    num_held_back = min(math.ceil(len(pixel_values) * HELD_BACK), MOST_HELD_BACK)
    held_back, lessons = (Lessons(teacher, part) for part in pixel_values.tensor_split([num_held_back]))
    recovery = Recovery(model, lessons, held_back, schedules, effort, settings["seed"])
    about = {"effort": vars(effort), "learned_in": "bfloat16" if has_bfloat16(model.device) else "float32"}
    made_with = settings | about | {"schedules": schedules, "pool": len(pixel_values)}
    result = recovery.run(file, made_with, on_progress)
    return {"images": len(lessons), "held_back": num_held_back} | about | vars(result)
