"""How far a model with merging is from the same model without: losses image by image, computed as little as needed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


# What the hidden states before the first merging block may take in memory.
MAX_CACHE_BYTES = 1 << 30


@dataclass
class Differences:
    """
    How far answers are from those of the model without pooling.

    Attributes:
        losses: for each image KL(unpooled ‖ pooled) of the class probabilities in nats, or without a head 1 − cosine
            of the pooled outputs.
        agrees: whether the most likely class is the same; None without a head.
        answers: the most likely class of each image; None without a head.
    """

    losses: torch.Tensor
    agrees: torch.Tensor | None
    answers: torch.Tensor | None

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def agreement(self) -> float | None:
        return None if self.agrees is None else self.agrees.float().mean().item()


def rounded(value: float) -> float:
    """Five significant digits: more would suggest a precision that nothing here has."""
    return float(f"{value:.5g}")


def losses_of(reference: torch.Tensor, outputs: torch.Tensor, has_head: bool) -> torch.Tensor:
    """The loss of each image, from logits or pooled outputs of shape (images, values)."""
    reference, outputs = reference.float(), outputs.float()
    if not has_head:
        return 1 - nn.functional.cosine_similarity(reference, outputs, dim=-1)
    expected, given = reference.log_softmax(-1), outputs.log_softmax(-1)
    return nn.functional.kl_div(given, expected, reduction="none", log_target=True).sum(-1)


def compare(reference: torch.Tensor, outputs: torch.Tensor, has_head: bool) -> Differences:
    losses = losses_of(reference, outputs, has_head).double()
    if not has_head:
        return Differences(losses, None, None)
    answers = outputs.argmax(-1)
    return Differences(losses, answers == reference.argmax(-1), answers)


class PassThrough(nn.Module):
    """Stands in for a block whose output is not needed."""

    def forward(self, *streams: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return streams


class Recall(nn.Module):
    """Stands in for a block whose output is known."""

    def __init__(self, streams: tuple[torch.Tensor, ...]):
        super().__init__()
        self.streams = streams

    def forward(self, *streams: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return self.streams


class Evaluator:
    """
    Compares schedules with no pooling on the same images. Blocks before the first that merges always compute the same,
    so as many of them as `max_cache_bytes` allow are computed once. Everything else is the model's own forward pass,
    whatever rule it merges by.

    Args:
        model: an `HPoolViTForImageClassification` in evaluation mode. Its schedule changes.
        pixel_values: images of shape (images, channels, height, width), on the CPU.
        batch_size: images per forward pass.
        max_cache_bytes: the memory for what is computed once; 0 to compute everything each time.

    Raises:
        ValueError: if the model's answers are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        batch_size: int = 16,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ):
        self.model, self.batch_size = model, batch_size
        self.pixel_values = pixel_values
        self.has_head = model.config.num_labels > 0
        self.num_known = self.count_known_blocks(max_cache_bytes)
        # The output of each known block for the images from a start to an end: what `Recall` returns.
        self.known: dict[tuple[int, int], list[tuple[torch.Tensor, ...]]] = {}
        self.references: dict[tuple[int, int], torch.Tensor] = {}

    def count_known_blocks(self, max_cache_bytes: int) -> int:
        config = self.model.config
        num_tokens = config.tokens_per_stage()[0] + config.num_prefix_tokens
        num_streams = self.model.base_model.layer_class.num_streams
        size = len(self.pixel_values) * num_tokens * config.hidden_size * num_streams * 4
        return min(max_cache_bytes // size, config.num_hidden_layers - 1)

    def forget(self) -> None:
        """Gives back the memory of what is known; it would be computed again."""
        self.known.clear()
        self.references.clear()

    def batches(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Bounds of batches. Those of any two calls are the same or apart if their starts and ends are."""
        for first in range(start, end, self.batch_size):
            yield first, min(first + self.batch_size, end)

    def reference(self, start: int, end: int) -> torch.Tensor:
        """What the model answers without pooling for the images from `start` to `end`."""
        outputs = torch.cat([self.reference_of(*bounds) for bounds in self.batches(start, end)])
        if not outputs.isfinite().all():
            raise ValueError("The model's answers without pooling are not finite: check its weights.")
        return outputs

    def compare_with(self, original: "Evaluator") -> None:
        """From now on, the differences are those from the answers of another model, in the same batches."""
        original.reference(0, len(self.pixel_values))
        # Nothing is known of this model's blocks, because it did not answer.
        self.references, self.num_known = original.references, 0
        self.known = {bounds: [] for bounds in self.references}

    @torch.inference_mode()
    def reference_of(self, start: int, end: int) -> torch.Tensor:
        if (start, end) not in self.references:
            self.model.change_schedule(hvt_pool=None)
            outputs: list[tuple[torch.Tensor, ...]] = []
            layers = self.model.base_model.layers[: self.num_known]
            handles = [
                layer.register_forward_hook(lambda layer, args, output: outputs.append(output)) for layer in layers
            ]
            try:
                self.references[start, end] = self.run(start, end)
            finally:
                for handle in handles:
                    handle.remove()
            self.known[start, end] = outputs
        return self.references[start, end]

    def run(self, start: int, end: int) -> torch.Tensor:
        pixel_values = self.pixel_values[start:end].to(self.model.device, self.model.dtype)
        return self.model(pixel_values).logits.float().cpu()

    @torch.inference_mode()
    def evaluate(self, fields: dict[str, Any], start: int = 0, end: int | None = None) -> Differences:
        """The differences under `fields` of the configuration for the images from `start` to `end`."""
        end = len(self.pixel_values) if end is None else end
        reference = self.reference(start, end)
        self.model.change_schedule(**fields)
        num_blocks = self.model.config.num_hidden_layers
        skipped = min(self.num_known, min(fields["hvt_pool"] or [num_blocks - 1]))
        outputs = []
        for bounds in self.batches(start, end):
            with self.blocks_replaced(self.known[bounds], skipped):
                outputs.append(self.run(*bounds))
        return compare(reference, torch.cat(outputs), self.has_head)

    @contextlib.contextmanager
    def blocks_replaced(self, known: list[tuple[torch.Tensor, ...]], number: int) -> Iterator[None]:
        """Inside the block, the first `number` blocks of the model are not computed."""
        layers = self.model.base_model.layers
        own = list(layers[:number])
        for index in range(number):
            layers[index] = Recall(known[index]) if index == number - 1 else PassThrough()
        try:
            yield
        finally:
            for index, layer in enumerate(own):
                layers[index] = layer
