"""What a model learns from: images in two fixed views, and what its teacher says to each."""

from typing import Any, NamedTuple

import torch
from torch import nn


# Which share of height and width the second view keeps.
KEPT = 7 / 8


class Answers(NamedTuple):
    """
    Attributes:
        pooled: the pooled output, of shape (images, pooled_size).
        logits: of shape (images, num_labels), or the pooled output of a model without a head.
    """

    pooled: torch.Tensor
    logits: torch.Tensor


def answer(model: nn.Module, pixel_values: torch.Tensor, **kwargs: Any) -> Answers:
    """What an `HPoolViTForImageClassification` says to images."""
    pooled = model.base_model(pixel_values, pooled_only=True, **kwargs).pooler_output
    return Answers(pooled, model.classifier(pooled))


def as_prepared(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values


def mirrored_and_closer(pixel_values: torch.Tensor) -> torch.Tensor:
    height, width = pixel_values.shape[2:]
    top, left = (round(size * (1 - KEPT) / 2) for size in (height, width))
    middle = pixel_values[:, :, top : height - top, left : width - left].flip(-1)
    return nn.functional.interpolate(middle, (height, width), mode="bicubic", antialias=True)


# Fixed, so that the teacher answers each once. More views teach more, but each takes a pass of the slow teacher.
VIEWS = (as_prepared, mirrored_and_closer)


class Lessons:
    """
    Images and their teacher's answers, each computed when it is first needed.

    Args:
        teacher: an `HPoolViTForImageClassification` in evaluation mode, whose pooling stays as it is.
        pixel_values: images of shape (images, channels, height, width), on the CPU.
    """

    def __init__(self, teacher: nn.Module, pixel_values: torch.Tensor):
        # In 16 bits: finer than the 8 of a file, and half the memory.
        self.teacher, self.pixel_values = teacher, pixel_values.to(torch.float16)
        self.known = [torch.zeros(len(pixel_values), dtype=torch.bool) for _ in VIEWS]
        self.answers: list[Answers | None] = [None] * len(VIEWS)

    def __len__(self) -> int:
        return len(self.pixel_values)

    def batch(self, indices: torch.Tensor, view: int) -> tuple[torch.Tensor, Answers]:
        """The images in one of the `VIEWS`, and what the teacher says, both on the teacher's device."""
        device = self.teacher.device
        pixel_values = VIEWS[view](self.pixel_values[indices].to(device, torch.float32))
        new = ~self.known[view][indices]
        if new.any():
            self.learn(indices[new], view, pixel_values[new.to(device)])
        return pixel_values, Answers(*(part[indices].to(device) for part in self.answers[view]))

    @torch.no_grad()
    def learn(self, indices: torch.Tensor, view: int, pixel_values: torch.Tensor) -> None:
        said = answer(self.teacher, pixel_values.to(self.teacher.dtype))
        if self.answers[view] is None:
            self.answers[view] = Answers(*(torch.zeros(len(self), part.shape[1]) for part in said))
        for known, part in zip(self.answers[view], said, strict=True):
            known[indices] = part.float().cpu()
        self.known[view][indices] = True
