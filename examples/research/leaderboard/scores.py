"""What is measured of a method, and how sure it is."""

from itertools import pairwise
from typing import NamedTuple

import torch
from network import Method
from photos import Photos, normalize


class Answers(NamedTuple):
    """
    What the methods are judged by, one number per photo.

    Attributes:
        divergence: the KL divergence from the unpooled model's answer, in nats.
        correct: 1 if the most likely class is the label.
        agrees: 1 if it is the unpooled model's.
    """

    divergence: torch.Tensor
    correct: torch.Tensor
    agrees: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> "Answers":
        log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        predicted = logits.argmax(-1)
        return cls(divergence, (predicted == labels).double(), (predicted == reference.argmax(-1)).double())

    def summary(self) -> dict[str, float]:
        return {
            "divergence": round(self.divergence.mean().item(), 5),
            "top1": round(100 * self.correct.mean().item(), 2),
            "agreement": round(100 * self.agrees.mean().item(), 2),
        }


class Judge:
    """
    Runs methods on photos. What the unpooled model computes is computed once: its answers, and the hidden states
    before the first block that a method treats differently.
    """

    def __init__(self, model: torch.nn.Module, photos: Photos, batch_size: int = 26):
        self.photos, self.batch_size = photos, batch_size
        self.unpooled = Method(model)
        self.prefixes: dict[int, torch.Tensor] = {}
        self.reference = self.logits(self.unpooled)

    @torch.inference_mode()
    def prefix(self, num_blocks: int) -> torch.Tensor:
        if num_blocks not in self.prefixes:
            batches = self.photos.pixels.split(self.batch_size)
            states = [self.unpooled.embed(normalize(batch), num_blocks) for batch in batches]
            self.prefixes[num_blocks] = torch.cat(states)
        return self.prefixes[num_blocks]

    @torch.inference_mode()
    def logits(self, method: Method) -> torch.Tensor:
        start = method.first_block
        return torch.cat([method.finish(batch, start) for batch in self.prefix(start).split(self.batch_size)])

    def answers(self, method: Method) -> Answers:
        return Answers.of(self.logits(method), self.reference, self.photos.labels)


def interpolate(macs: float, curve: list[tuple[float, Answers]]) -> Answers | None:
    """
    What a method with several settings would answer at `macs`: each photo's numbers, linearly between the settings
    with the next fewer and the next more MACs. The divergence falls ever more slowly with MACs, so this is a little
    more than a setting in between would have. None outside the settings.
    """
    curve = sorted(curve, key=lambda point: point[0])
    for (fewer, low), (more, high) in pairwise(curve):
        if fewer <= macs <= more:
            share = (macs - fewer) / (more - fewer)
            return Answers(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))
    return None


def bootstrap(differences: torch.Tensor, num_samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `differences`, one per photo, over photos drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (num_samples, len(differences)), generator=generator)
    low, high = differences[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=differences.dtype)).tolist()
    return low, high
