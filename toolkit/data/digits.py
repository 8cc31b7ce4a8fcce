"""
The handwritten digits that scikit-learn includes, 1,797 scans of 8 × 8 pixels, as a `datasets.DatasetDict` or as image
files. `python -m hpool_vit.toolkit.data.digits --output_dir DIR` writes DIR/SPLIT/DIGIT/NUMBER.png.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage

from ..shared.console import needs, run
from ..shared.files import check_output_dir


if TYPE_CHECKING:
    from datasets import DatasetDict


def load_digits_dataset() -> "DatasetDict":
    """
    The digits with the columns `image` and `label`, split into 1,437 for training and 360 for testing. The split is
    stratified and always the same.
    """
    with needs("train"):
        from datasets import ClassLabel, Dataset, Features, Image
        from sklearn.datasets import load_digits

    digits = load_digits()
    # Gray levels from 0 to 16, white on black.
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    dataset = Dataset.from_dict(
        {"image": [PILImage.fromarray(image) for image in pixels], "label": digits.target.tolist()}, features=features
    )
    return dataset.train_test_split(test_size=360, stratify_by_column="label", seed=0)


def write_digits(output_dir: str | Path):
    """
    Writes each digit as an image file, `output_dir/SPLIT/DIGIT/NUMBER.png`.

    Raises:
        ValueError: if the folder is not empty.
    """
    check_output_dir(output_dir)
    for split, dataset in load_digits_dataset().items():
        names = dataset.features["label"].names
        for number, example in enumerate(dataset):
            file = Path(output_dir) / split / names[example["label"]] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            example["image"].save(file)


def main():
    parser = argparse.ArgumentParser(description="Write the handwritten digits of scikit-learn as image files.")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or empty folder")
    write_digits(parser.parse_args().output_dir)


if __name__ == "__main__":
    run(main)
