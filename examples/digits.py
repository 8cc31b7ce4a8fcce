"""The handwritten digits that scikit-learn ships (1,797 real scans of 8 × 8 pixels) as a `datasets.DatasetDict`."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits


def load_digits_dataset() -> DatasetDict:
    """
    The digits with the columns `image` and `label`, split into 1,437 for training and 360 for testing: stratified, and
    the same in every call.
    """
    digits = load_digits()
    # Grey levels from 0 to 16; white on black.
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    dataset = Dataset.from_dict(
        {"image": [PILImage.fromarray(image) for image in pixels], "label": digits.target.tolist()}, features=features
    )
    return dataset.train_test_split(test_size=360, stratify_by_column="label", seed=0)
