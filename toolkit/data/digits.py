"""
The handwritten digits that scikit-learn ships (1,797 real scans of 8 × 8 pixels), as a `datasets.DatasetDict` or, for
programs that read folders of images, as files `OUTPUT_DIR/SPLIT/DIGIT/NUMBER.png`:

    python digits.py --output_dir outputs/digits-images
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from ..shared.console import run
from ..shared.files import check_output_dir


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


def write_digits(folder: Path):
    """Writes an image file of each digit to `folder`. Raises a `ValueError` if something is in there."""
    check_output_dir(folder)
    for split, dataset in load_digits_dataset().items():
        names = dataset.features["label"].names
        for number, example in enumerate(dataset):
            file = folder / split / names[example["label"]] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            example["image"].save(file)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet, or is empty")
    args = parser.parse_args(argv)
    run(lambda: write_digits(args.output_dir))


if __name__ == "__main__":
    main()
