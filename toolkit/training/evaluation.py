"""How good a model is: predictions on the validation images of all processes, and metrics."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hpool_vit import HPoolViTConfig

from ..data.loaders import IGNORED_LABEL
from ..shared.console import needs
from ..shared.images import DataError
from .schedules import ScheduleSampler


with needs("train"):
    import evaluate
    from accelerate import Accelerator
    from accelerate.utils import gather_object


METRICS = Path(__file__).resolve().parent / "metrics"


class Evaluator:
    """
    Evaluates a model on the validation images, on any number of processes.

    Args:
        loader: the validation images of this process.
        config: the configuration of the model.
        take_names: called with each batch; removes everything that is not a tensor from it.
        is_quiet: whether to hide the progress bar.
    """

    def __init__(
        self,
        loader: DataLoader,
        config: HPoolViTConfig,
        take_names: Callable[[dict[str, Any]], list[str]],
        is_quiet: bool = False,
    ):
        self.loader, self.take_names, self.is_quiet = loader, take_names, is_quiet
        self.image_shape = (1, config.num_channels, *config.image_shape)

    @torch.no_grad()
    def predict(self, model: nn.Module, accelerator: Accelerator) -> tuple[np.ndarray, np.ndarray]:
        """
        Scores of shape (num_images, num_labels) and labels of shape (num_images,). Every process returns those of all
        validation images, each image once.

        Raises:
            DataError: if no validation image can be read.
        """
        model = accelerator.unwrap_model(model)
        model.eval()
        scores, labels = [], []
        for batch in self._batches(accelerator):
            self.take_names(batch)
            logits = model(pixel_values=batch["pixel_values"].to(accelerator.device)).logits
            kept = batch["labels"] != IGNORED_LABEL
            scores.append(logits.float().cpu()[kept].numpy())
            labels.append(batch["labels"][kept].numpy())
        parts = gather_object([(np.concatenate(scores), np.concatenate(labels))])
        scores, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not len(labels):
            raise DataError("No validation image can be read: see the bad images above.")
        return scores, labels

    def _batches(self, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
        """
        The batches of this process, followed by empty ones until every process is done: the weights of a sharded model
        are gathered in every forward pass, by all processes or by none.
        """
        batches = iter(self.loader)
        progress = tqdm(desc="evaluating", unit="batch", leave=False, disable=self.is_quiet)
        while True:
            batch = next(batches, None)
            missing = torch.tensor(float(batch is None), device=accelerator.device)
            if accelerator.reduce(missing, "mean").item() == 1.0:
                break
            progress.update()
            yield batch or self._empty_batch()
        progress.close()

    def _empty_batch(self) -> dict[str, Any]:
        pixel_values, labels = torch.zeros(self.image_shape), torch.tensor([IGNORED_LABEL])
        return {"pixel_values": pixel_values, "labels": labels, "names": [], "bad_images": []}

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Top-1, top-5 and mean cross-entropy (in nats) on the validation images, and their number."""
        scores, labels = self.predict(model, accelerator)
        loss = nn.functional.cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels)).item()
        return {"loss": loss, **compute_metrics(scores, labels), "images": len(labels)}

    def evaluate_schedules(
        self, model: nn.Module, accelerator: Accelerator, schedules: ScheduleSampler
    ) -> dict[str, float]:
        """Top-1 of each schedule that the training draws from, by its name."""
        return {name: compute_metrics(*self.predict(model, accelerator))["top1"] for name in schedules.each()}


def compute_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Top-1 and top-5 accuracy.

    Args:
        scores (`np.ndarray` of shape `(num_images, num_labels)`): logits or probabilities of all images.
        labels (`np.ndarray` of shape `(num_images,)`): their labels, integers.

    Returns:
        `{"top1": …, "top5": …}`, each in [0, 1]. A tie with the label's score counts as wrong.

    Raises:
        ValueError: for shapes that do not match, no images, scores that are NaN, or labels outside the columns of
            `scores`.
    """
    scores, labels = check_scores(scores, labels)
    if scores.shape[1] > 6:
        scores, labels = _keep_rivals(scores, labels)
    return load_metric("topk_accuracy").compute(predictions=scores, references=labels)


def load_metric(name: str) -> evaluate.Metric:
    # Files in the cache would be shared with every other process that computes the metric.
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, or the `ValueError` of `compute_metrics`."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.size:
        raise ValueError(
            f"scores has the shape {scores.shape} and labels {labels.shape}: give (num_images, num_labels) and "
            "(num_images,), with at least one image."
        )
    num_labels = scores.shape[1]
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels has the type {labels.dtype}: give integers from 0 to {num_labels - 1}.")
    bad = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(bad):
        raise ValueError(f"labels[{bad[0]}] is {labels[bad[0]]}: give integers from 0 to {num_labels - 1}.")
    bad = np.flatnonzero(np.isnan(scores).any(axis=1))
    if len(bad):
        raise ValueError(
            f"scores is NaN for {len(bad)} of {len(scores)} images, first for image {bad[0]}: the model has diverged. "
            "Start from an earlier checkpoint and lower the learning rate."
        )
    return scores, labels.astype(np.int64)


def _keep_rivals(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Only the label's score, now label 0, and the five highest others, which gives the same ranks up to the fifth.
    `evaluate` makes an object of each number: 50,000 images and 1,000 labels would take 25 seconds and 2.5 GB.
    """
    rivals = scores.astype(np.float32)
    right = np.take_along_axis(rivals, labels[:, None], axis=1)
    np.put_along_axis(rivals, labels[:, None], -np.inf, axis=1)
    rivals.partition(rivals.shape[1] - 5, axis=1)
    return np.concatenate([right, rivals[:, -5:]], axis=1), np.zeros_like(labels)
