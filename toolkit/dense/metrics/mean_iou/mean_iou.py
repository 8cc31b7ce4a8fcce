"""Mean intersection over union of segmentation masks, a metric for `evaluate` that is loaded from this folder."""

import datasets
import evaluate
import numpy as np


class MeanIoU(evaluate.Metric):
    """
    How well the areas of the classes overlap with the truth, from counts of pixels: images may have any size.

    `counts`: for each image `num_labels` lists of `num_labels` integers, the pixels of a class (row) that were taken
    for a class (column). Pixels that do not count are left out of them. Returns

    - `"mean_iou"`: the mean over the classes that occur, in the truth or in an answer, of the pixels that both have in
      common, as a share of the pixels that either has; over all images together;
    - `"mean_accuracy"`: the mean over the classes in the truth of the share of their pixels that is right;
    - `"overall_accuracy"`: the share of all pixels that is right;
    - `"per_class_iou"`: one number for each class, None for a class that does not occur.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean intersection over union.",
            citation="",
            inputs_description="Pixels of each class that were taken for each class.",
            features=datasets.Features({"counts": datasets.Sequence(datasets.Sequence(datasets.Value("int64")))}),
        )

    def _compute(self, counts):
        matrix = np.asarray(counts, dtype=np.int64).sum(axis=0)
        right, truth = matrix.diagonal(), matrix.sum(axis=1)
        either = truth + matrix.sum(axis=0) - right
        iou = [int(both) / int(area) if area else None for both, area in zip(right, either, strict=True)]
        accuracy = [int(both) / int(area) for both, area in zip(right, truth, strict=True) if area]
        occurring = [value for value in iou if value is not None]
        return {
            "mean_iou": float(np.mean(occurring)) if occurring else 0.0,
            "mean_accuracy": float(np.mean(accuracy)) if accuracy else 0.0,
            "overall_accuracy": int(right.sum()) / max(int(matrix.sum()), 1),
            "per_class_iou": iou,
        }
