"""
Find the images for training and validation: the built-in digits, a dataset on the Hub, folders, Parquet files or
WebDataset archives, as a table or as a stream. `loaders` decodes them, batch by batch.
"""

import glob
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..shared.console import needs
from ..shared.folders import FolderListing, as_utf8, counted, escaped, list_images, some, were
from ..shared.images import DataError
from .digits import load_digits_dataset


with needs("train"):
    import pyarrow.parquet
    from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset
    from sklearn.model_selection import train_test_split


VALIDATION_SPLITS = ("validation", "valid", "val", "test")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
FILE_FORMATS = {".parquet": "parquet", ".tar": "webdataset"}
# A table becomes a stream of at most this many pieces, which are split between processes and workers.
SHARDS_OF_A_TABLE = 64


@dataclass
class DataArguments:
    """Where the images are and how to read them. One of `dataset_name`, `train_dir` and `train_files` is required."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset on the Hub, folder that `datasets.load_dataset` reads, or digits (built in)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images, with one sub-folder per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation images."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Parquet files or WebDataset tar files of training images. Globs are allowed."}
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "The same for validation images."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": f"Split to validate on. Default: the first that exists of {', '.join(VALIDATION_SPLITS)}."},
    )
    validation_share: float = field(
        default=0.1,
        metadata={"help": "Share of the training images of each class to validate on if there are no others."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the only column that holds images."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: the only column that holds named classes."}
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the labels 0, 1, … Required for a stream whose labels have no names."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data during training, without a copy on the disk."}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Number of images of a stream from which each worker draws the next one."}
    )
    num_train_images: int | None = field(
        default=None,
        metadata={"help": "Number of images in an epoch of a stream. Required if it is unknown, as for tar files."},
    )
    max_train_images: int | None = field(
        default=None, metadata={"help": "Train on this number of random images only; of a stream, on the first ones."}
    )
    max_validation_images: int | None = field(default=None, metadata={"help": "The same for validation."})
    on_bad_image: Literal["skip", "fail"] = field(
        default="skip",
        metadata={"help": "What to do with an unreadable, truncated, animated, enormous or 1-pixel image."},
    )
    max_bad_images: int = field(default=100, metadata={"help": "Stop if more images than this are skipped."})

    _argument_group_name = "data (one of --dataset_name, --train_dir and --train_files is required)"


@dataclass
class ImageSource:
    """
    Encoded images with labels. A table has the `rows` that are used and their `labels`; a stream has neither, and its
    `num_images` may be unknown.
    """

    dataset: Dataset | IterableDataset
    split: str
    description: str
    num_images: int | None = None
    image_column: str = ""
    label_column: str = ""
    label_ids: dict[Any, int] = field(default_factory=dict)
    rows: np.ndarray | None = None
    labels: np.ndarray | None = None
    # What was left out, for people; and the files whose names in the table are escaped, by these names.
    notes: list[str] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def is_stream(self) -> bool:
        return isinstance(self.dataset, IterableDataset)

    def name(self, example: dict, row: int | None = None) -> str:
        """The file of an image. Without a file: its row in a table, or the CRC-32 of its bytes in a stream."""
        image = example[self.image_column] or {}
        if image.get("path"):
            return "/".join(filter(None, [os.path.basename(example.get("__url__") or ""), image["path"]]))
        if row is None:
            return f"{self.split}[CRC-32 {zlib.crc32(image.get('bytes') or b''):08x}]"
        return f"{self.split}[{row}]"

    def image(self, example: dict) -> dict | None:
        """The encoded image of an example, as `read_image` takes it."""
        image = example[self.image_column]
        path = self.paths.get(image["path"]) if image else None
        return {**image, "path": path} if path else image

    def label(self, value: Any, name: str) -> int:
        """The class that `value` stands for in the label column; `name` is the image."""
        if value not in self.label_ids:
            raise DataError(
                f"{name} has the label {value!r} in the column {self.label_column!r}, which is not one of "
                f"{some(self.label_ids)}: correct the label, or choose another column or split."
            )
        return self.label_ids[value]

    def select(self, positions: np.ndarray) -> "ImageSource":
        """The table with only the rows at these positions."""
        return replace(self, num_images=len(positions), rows=self.rows[positions], labels=self.labels[positions])


@dataclass
class ImageData:
    """Training images, validation images, and the names of the classes."""

    train: ImageSource
    validation: ImageSource
    class_names: list[str]

    @property
    def notes(self) -> list[str]:
        """What the folders hold that is not used."""
        return list(dict.fromkeys(self.train.notes + self.validation.notes))

    def describe(self) -> dict:
        """For a model card: the sources, their numbers of images (None if unknown), and the names of the classes."""
        return {
            "train": self.train.description,
            "validation": self.validation.description,
            "num_train_images": self.train.num_images,
            "num_validation_images": self.validation.num_images,
            "class_names": self.class_names,
        }


def load_image_data(args: DataArguments, seed: int) -> ImageData:
    """
    Finds the images, their columns and their classes.

    Args:
        args: where the images are.
        seed: decides which training images become validation images if there are no others, and which images
            `max_train_images` and `max_validation_images` keep.

    Raises:
        DataError: in one line, for anything that is missing, empty or contradictory.
    """
    check_arguments(args)
    splits = load_splits(args)
    train, validation = open_source(args, "train", splits), open_source(args, "validation", splits)
    class_names = label_sources(train, validation, args.class_names)
    if validation is None:
        train, validation = split_source(train, args.validation_share, seed)
    train, validation = limit(train, args.max_train_images, seed), limit(validation, args.max_validation_images, seed)
    if args.streaming:
        train, validation = as_stream(train), as_stream(validation)
        if args.num_train_images:
            train.num_images = min(args.num_train_images, args.max_train_images or args.num_train_images)
        if train.num_images is None:
            raise DataError("`num_train_images` is required: the number of images in this stream is unknown.")
    return ImageData(train, validation, class_names)


def check_arguments(args: DataArguments):
    for split, third in (("train", "dataset_name"), ("validation", "validation_split")):
        names = [name for name in (f"{split}_dir", f"{split}_files", third) if getattr(args, name)]
        if len(names) > 1:
            raise DataError(f"{' and '.join(f'`{name}={getattr(args, name)!r}`' for name in names)}: give only one.")
        if split == "train" and not names:
            raise DataError("No data is given: set `dataset_name`, `train_dir` or `train_files`.")
    if args.validation_split and not args.dataset_name:
        raise DataError(f"`validation_split={args.validation_split!r}` is a split of `dataset_name`: set that too.")
    if not 0 < args.validation_share < 1:
        raise DataError(f"`validation_share={args.validation_share}` must be between 0 and 1.")
    if args.on_bad_image not in ("skip", "fail"):
        raise DataError(f"`on_bad_image={args.on_bad_image!r}` must be skip or fail.")
    if args.num_train_images and not args.streaming:
        raise DataError(f"`num_train_images={args.num_train_images}` is for `streaming`: use `max_train_images`.")
    lowest = {"shuffle_buffer_size": 1, "num_train_images": 1, "max_train_images": 1, "max_validation_images": 1}
    for name, least in {**lowest, "max_bad_images": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise DataError(f"`{name}={getattr(args, name)}` must be at least {least}.")


def load_splits(args: DataArguments) -> dict[str, Dataset | IterableDataset]:
    if args.dataset_name is None:
        return {}
    if args.dataset_name == "digits":
        return load_digits_dataset()
    argument = f"`dataset_name={args.dataset_name!r}`"
    return load(argument, args.dataset_name, args.dataset_config_name, streaming=args.streaming)


def open_source(args: DataArguments, split: str, splits: dict) -> ImageSource | None:
    """The training or the validation images, with their columns. None if there are no validation images."""
    directory, files, name = (getattr(args, f"{split}_{kind}") for kind in ("dir", "files", "split"))
    if directory:
        source = open_folder(directory, split)
    elif files:
        source = open_files(files, split, args.streaming)
    else:
        if split == "validation" and name is None:
            name = next((name for name in VALIDATION_SPLITS if name in splits and name != args.train_split), None)
            if name is None:
                return None
        if name not in splits:
            raise DataError(
                f"`{split}_split={name!r}` does not exist: {args.dataset_name} has the splits {some(splits)}."
            )
        source = ImageSource(splits[name], split, f"{args.dataset_name}, split {name}")
        # The publisher of the dataset may have recorded it.
        source.num_images = getattr((splits[name].info.splits or {}).get(name), "num_examples", None) or None
    if not source.is_stream:
        source.num_images = len(source.dataset)
    if source.num_images == 0:
        raise DataError(f"{source.description} holds no images.")
    source.image_column = find_column(source, "image_column", args.image_column, Image, IMAGE_COLUMNS)
    source.label_column = find_column(source, "label_column", args.label_column, ClassLabel, LABEL_COLUMNS)
    label_feature = source.dataset.features[source.label_column]
    if not isinstance(label_feature, ClassLabel | Value):
        kind = type(label_feature).__name__
        raise DataError(f"`label_column={source.label_column!r}` of {source.description} holds {kind}, not classes.")
    columns = {source.image_column, source.label_column, "__url__"}
    source.dataset = source.dataset.select_columns([name for name in source.dataset.features if name in columns])
    source.dataset = source.dataset.cast_column(source.image_column, Image(decode=False))
    return source


def open_folder(directory: str, split: str) -> ImageSource:
    """A table of paths; the images stay where they are."""
    listing = list_images(os.path.expanduser(directory))
    classes = {as_utf8(name): files for name, files in listing.by_subfolder().items()}
    check_classes(classes, listing, f"`{split}_dir={as_utf8(directory)!r}`", split)
    files = [file for files in classes.values() for file in files]
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    # A table holds only UTF-8, and the name of a file may be anything.
    names = [as_utf8(file) for file in files]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(classes))})
    dataset = Dataset.from_dict({"image": names, "label": labels}, features=features)
    source = ImageSource(dataset, split, as_utf8(directory), notes=listing.notes())
    source.paths = {name: file for name, file in zip(names, files, strict=True) if name != file}
    if number := len(listing.files) - len(files):
        note = f"{counted(number, 'image')} outside the folders of the classes {were(number)} left out"
        source.notes.append(f"{escaped(directory)}: {note}")
    return source


def check_classes(classes: dict[str, list[str]], listing: FolderListing, argument: str, split: str):
    """Raises a `DataError` for a folder without classes, and for training classes without images."""
    if not any(classes.values()):
        reasons = listing.notes() or [f"there are no images in {some(classes)}" if classes else "there is none"]
        raise DataError(f"{argument} needs one sub-folder of images per class: {'; '.join(reasons)}.")
    # Validation does without images of a class.
    if split == "train" and (empty := [name for name, files in classes.items() if not files]):
        raise DataError(f"{argument} has no images of the classes {some(empty)}: add some, or remove these folders.")


def open_files(patterns: list[str], split: str, streaming: bool) -> ImageSource:
    paths = []
    for pattern in patterns:
        is_plain = "://" in pattern or os.path.isfile(pattern)
        found = [pattern] if is_plain else sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not found:
            raise DataError(f"`{split}_files={pattern!r}` matches no file.")
        paths += found
    formats = {FILE_FORMATS.get(Path(path).suffix.lower()) for path in paths}
    if len(formats) > 1 or None in formats:
        raise DataError(f"`{split}_files` must all end in .parquet, or all in .tar: {some(paths)}.")
    [file_format] = formats
    # `datasets` reads a path as a pattern, and finds names of splits in it unless the split is given.
    data_files = {split: [path if "://" in path else glob.escape(path) for path in paths]}
    argument = f"`{split}_files={some(patterns)}`"
    dataset = load(argument, file_format, data_files=data_files, split=split, streaming=streaming)
    source = ImageSource(dataset, split, some(patterns))
    if source.is_stream and file_format == "parquet" and not any("://" in path for path in paths):
        source.num_images = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
        # One shard per row group instead of one per file, if the version of `datasets` can do that.
        source.dataset = dataset.reshard() if hasattr(dataset, "reshard") else dataset
    return source


def load(argument: str, *args, **kwargs):
    """`datasets.load_dataset` with one line for everything that can go wrong: its errors have no common class."""
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise DataError(f"{argument} cannot be loaded: {reason or type(error).__name__}") from error


def find_column(source: ImageSource, field_name: str, given: str | None, feature_class: type, usual: tuple) -> str:
    """The given column, otherwise the only one of the class, otherwise the only one with a usual name."""
    features = source.dataset.features or {}
    if given in features:
        return given
    candidates = [name for name, feature in features.items() if isinstance(feature, feature_class)]
    candidates = candidates or [name for name in features if name in usual]
    # Validation images from another source may have other columns.
    if len(candidates) == 1 and (given is None or source.split == "validation"):
        return candidates[0]
    problem = f"`{field_name}={given!r}` is not one of them" if given else f"`{field_name}` must name one of them"
    columns = some(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise DataError(f"The columns of {source.description} are {columns}: {problem}.")


def label_sources(train: ImageSource, validation: ImageSource | None, class_names: list[str] | None) -> list[str]:
    """Numbers the classes of both in the same way, reads the labels of tables, and returns the class names."""
    train.label_ids, own_names = number_classes(train, class_names)
    if class_names and len(class_names) != len(own_names):
        raise DataError(f"`class_names` has {len(class_names)} names, but the data has {len(own_names)} classes.")
    if validation is not None:
        feature = validation.dataset.features[validation.label_column]
        if not isinstance(feature, ClassLabel):
            validation.label_ids = {name: label for label, name in enumerate(own_names)} | train.label_ids
        elif unknown := [name for name in feature.names if name not in own_names]:
            raise DataError(
                f"{validation.description} has classes that {train.description} does not have: {some(unknown)}. "
                "Remove them, or train on them too."
            )
        else:
            validation.label_ids = {value: own_names.index(name) for value, name in enumerate(feature.names)}
    for source in filter(None, (train, validation)):
        if not source.is_stream:
            labels = enumerate(source.dataset[source.label_column][:])
            source.labels = np.array([source.label(value, f"{source.split}[{row}]") for row, value in labels])
            source.rows = np.arange(len(source.labels))
    return class_names or own_names


def number_classes(source: ImageSource, class_names: list[str] | None) -> tuple[dict[Any, int], list[str]]:
    """The number of each value in the label column, and the names of the classes in the data."""
    feature = source.dataset.features[source.label_column]
    if isinstance(feature, ClassLabel):
        return {label: label for label in range(feature.num_classes)}, feature.names
    if class_names:
        values = class_names if feature.dtype in ("string", "large_string") else range(len(class_names))
        return {value: label for label, value in enumerate(values)}, class_names
    if source.is_stream:
        raise DataError(f"`class_names` is required: the column {source.label_column!r} of this stream has no names.")
    values = sorted(set(source.dataset[source.label_column][:]) - {None})
    return {value: label for label, value in enumerate(values)}, [str(value) for value in values]


def split_source(train: ImageSource, share: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Takes a share of each class for validation."""
    if train.is_stream:
        raise DataError(
            "A stream cannot be split for validation: set `validation_dir`, `validation_files` or `validation_split`."
        )
    # At least one image of each class.
    size = max(round(share * train.num_images), len(set(train.labels)))
    try:
        kept, taken = train_test_split(
            np.arange(train.num_images), test_size=size, stratify=train.labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"`validation_share={share}` cannot be taken from each class of {train.description}: {error}"
        ) from error
    description = f"{size} images of {train.description}, stratified, seed {seed}"
    return train.select(np.sort(kept)), replace(train.select(np.sort(taken)), description=description)


def limit(source: ImageSource, number: int | None, seed: int) -> ImageSource:
    if number is None:
        return source
    if source.is_stream:
        num_images = number if source.num_images is None else min(number, source.num_images)
        return replace(source, dataset=source.dataset.take(number), num_images=num_images)
    return source.select(np.random.default_rng(seed).permutation(source.num_images)[:number])


def as_stream(source: ImageSource) -> ImageSource:
    if source.is_stream:
        return source
    num_shards = min(source.num_images, SHARDS_OF_A_TABLE)
    stream = source.dataset.select(source.rows).to_iterable_dataset(num_shards=num_shards)
    return replace(source, dataset=stream, rows=None, labels=None)
