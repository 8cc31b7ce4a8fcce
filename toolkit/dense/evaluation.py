"""How good a segmentation model is: pixels of each class that are taken for each class, and the mean IoU of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL, resize_map

from ..shared.console import needs


with needs("train"):
    import evaluate


METRIC = Path(__file__).resolve().parent / "metrics" / "mean_iou"


def resize_scores(logits: torch.Tensor, size: Iterable[int]) -> torch.Tensor:
    """Scores of shape `(batch_size, num_labels, rows, columns)` at (height, width), bilinearly."""
    return resize_map(logits.float(), tuple(size))


def count_pixels(answers: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """
    For each image, how many pixels of each class (row) the answer gives to each class (column).

    Args:
        answers (`torch.LongTensor` of shape `(batch_size, height, width)`): the class of each pixel in the answer.
        labels (`torch.LongTensor` of the same shape): the truth. Pixels labelled 255 do not count.
        num_labels (`int`): the number of classes.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_labels, num_labels)`.
    """
    cells = torch.where(labels == IGNORED_LABEL, num_labels**2, labels * num_labels + answers)
    counts = torch.zeros(len(labels), num_labels**2 + 1, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, cells.flatten(1), torch.ones_like(cells).flatten(1))
    return counts[:, :-1].unflatten(1, (num_labels, num_labels))


def count_batch(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """`count_pixels` of a model's logits at the resolution of the labels, as `preprocess_logits_for_metrics`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return count_pixels(resize_scores(logits, labels.shape[1:]).argmax(1), labels, logits.shape[1])


def mean_iou(counts: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """
    Mean intersection over union.

    Args:
        counts (array of shape `(num_images, num_labels, num_labels)`): as `count_pixels` returns them.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy`, each in [0, 1], and `per_class_iou`, a list with None for
        classes that do not occur.
    """
    # Files in the cache would be shared with every other process that computes the metric.
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    return metric.compute(counts=np.asarray(counts).sum(axis=0, keepdims=True).tolist())
