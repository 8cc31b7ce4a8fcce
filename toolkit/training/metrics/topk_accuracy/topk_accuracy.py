"""Top-1 and top-5 accuracy, a metric for `evaluate` that is loaded from this folder."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    Share of the images whose label has the highest score, or one of the five highest.

    `predictions`: one list of scores per image, shape (num_images, num_labels). `references`: the labels, shape
    (num_images,). Returns `{"top1": …, "top5": …}`, each in [0, 1]; with fewer than five labels top-5 is 1.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy.",
            citation="",
            inputs_description="Scores of each image, and labels.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        scores, labels = np.asarray(predictions), np.asarray(references)
        # The number of scores above that of the label. Ties count too, so constant scores earn nothing.
        right = np.take_along_axis(scores, labels[:, None], axis=1)
        rank = (scores >= right).sum(axis=1) - 1
        return {f"top{k}": float((rank < min(k, scores.shape[1])).mean()) for k in (1, 5)}
