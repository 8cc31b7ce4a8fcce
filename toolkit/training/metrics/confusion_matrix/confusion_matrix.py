"""Confusion matrix and accuracy per class, a metric for `evaluate` that is loaded from this folder."""

import datasets
import evaluate
import numpy as np
import sklearn.metrics


class ConfusionMatrix(evaluate.Metric):
    """
    How often each label was predicted for the images of each class.

    `predictions`: the predicted labels, shape (num_images,). `references`: the labels, shape (num_images,). A label
    outside 0 … `num_labels` - 1 is a `ValueError`. Returns

    - `"confusion_matrix"`: counts as `num_labels` lists of `num_labels` integers, one row per class, one column per
      predicted label;
    - `"per_class_accuracy"`: the share of each class's images that is predicted right; None for a class without
      images.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Confusion matrix and accuracy per class.",
            citation="",
            inputs_description="Predicted labels, and labels.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def _compute(self, predictions, references, num_labels):
        for name, labels in (("predictions", predictions), ("references", references)):
            outside = labels[(labels < 0) | (labels >= num_labels)]
            if len(outside):
                raise ValueError(
                    f"{name} holds {outside[0]}: with num_labels={num_labels} give 0 to {num_labels - 1}."
                )
        matrix = sklearn.metrics.confusion_matrix(references, predictions, labels=np.arange(num_labels))
        images = matrix.sum(axis=1).tolist()
        right = matrix.diagonal().tolist()
        return {
            "confusion_matrix": matrix.tolist(),
            "per_class_accuracy": [r / n if n else None for r, n in zip(right, images, strict=True)],
        }
