"""Top-1 and top-5 accuracy as a metric for `evaluate`, loaded from this folder and so without the Hub."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    Share of the images whose label is the highest, or among the five highest, of the scores.

    `predictions`: one list of scores per image, shape (num_images, num_labels). `references`: the labels, shape
    (num_images,). Returns `{"top1": …, "top5": …}`, each in [0, 1]; with fewer than five labels top-5 is 1.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy.",
            citation="",
            inputs_description="Scores per image, and the labels.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        scores, labels = np.asarray(predictions), np.asarray(references)
        # How many scores beat that of the right label; a tie counts against it, so that constant scores earn nothing.
        right = np.take_along_axis(scores, labels[:, None], axis=1)
        rank = (scores >= right).sum(axis=1) - 1
        return {f"top{k}": float((rank < min(k, scores.shape[1])).mean()) for k in (1, 5)}
