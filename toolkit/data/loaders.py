"""
Batches of images for training and validation, from any source of `sources`.

What an image looks like in an epoch depends only on the seed, the epoch and the image. It does not depend on the
number of workers and processes, on the images read before, or on PyTorch's global random numbers, which do not change.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..shared.console import needs
from ..shared.images import BadImageError, BadImages, DataError, TooManyBadImagesError, decode_image, read_image
from .sources import DataArguments, ImageData, ImageSource


with needs("train"):
    from datasets import IterableDataset as HubStream
    from datasets.distributed import split_dataset_by_node

# The label that Transformers and PyTorch leave out of loss and metrics.
IGNORED_LABEL = -100


def make_train_loader(
    data: ImageData,
    args: DataArguments,
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    batch_size: int,
    seed: int,
    repeats: int = 1,
    mix: Callable | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """
    The training loader of one process. Every epoch has `num_images // (batch_size * world_size)` batches in every
    process; call `set_epoch` before each epoch. Process r of W gets batch r of every W, so two processes see the same
    images per step as one process with twice the batch.

    A batch is a dict: `pixel_values` (batch_size, channels, height, width), `labels` (batch_size,) or whatever `mix`
    makes of them, `names` of the files, and `bad_images`, the records found while the batch was made; `BatchRecords`
    removes the last two. The next image of the table or stream replaces a bad one.

    A stream is shuffled over its shards and a buffer, and split between processes by shards if there are enough of
    them. Each worker yields the same number of batches and starts its shards again if they run out. With several
    workers or processes and shards of unequal size, an epoch therefore repeats some images and skips others.

    Args:
        transform: from an RGB image to a float tensor; may use PyTorch's random numbers.
        repeats: repeated augmentation: an epoch has `1 / repeats` of the images, each `repeats` times.
        mix: from `pixel_values` and `labels` of a batch to both, such as torchvision's `MixUp`.

    Raises:
        DataError: if there are fewer images than one batch of all processes.
    """
    source = data.train
    num_batches = source.num_images // (batch_size * world_size)
    if num_batches == 0:
        raise DataError(
            f"The {source.num_images} training images do not fill one batch of {batch_size} on {world_size} "
            "process(es): lower the batch size."
        )
    reader = ImageReader(source, args, transform, seed)
    options = {"collate_fn": Collate(mix, seed), "pin_memory": pin_memory}
    if source.is_stream:
        stream = TrainStream(reader, batch_size, num_batches, repeats, rank, world_size)
        num_workers = min(num_workers, num_shards(source, rank, world_size))
        # No persistent workers: a worker learns the epoch when it starts.
        return make_loader(stream, num_workers, batch_size=batch_size, drop_last=True, **options)
    batches = EpochBatches(source.num_images, batch_size, seed, repeats, rank, world_size)
    options["persistent_workers"] = num_workers > 0
    return make_loader(TrainImages(reader), num_workers, batch_sampler=batches, **options)


def make_validation_loader(
    data: ImageData,
    args: DataArguments,
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """
    The validation loader of one process, with batches as in training. All processes together see each image exactly
    once. A black image with the label -100 replaces a bad one. The same images fill up the last batches of a table, so
    that every process has the same number; processes that read a stream may have different numbers of batches.
    """
    source = data.validation
    reader = ImageReader(source, args, transform)
    options = {"batch_size": batch_size, "collate_fn": Collate(), "pin_memory": pin_memory}
    if source.is_stream:
        num_workers = min(num_workers, num_shards(source, rank, world_size))
        return make_loader(ValidationStream(reader, rank, world_size), num_workers, **options)
    num_padded = -(-source.num_images // world_size) * world_size
    return make_loader(ValidationImages(reader), num_workers, sampler=range(rank, num_padded, world_size), **options)


def num_shards(source: ImageSource, rank: int, world_size: int) -> int:
    return split_dataset_by_node(source.dataset, rank, world_size).num_shards


def make_loader(dataset, num_workers: int, **options) -> DataLoader:
    # Without a generator of its own, a loader draws from PyTorch's global one at the start of every epoch.
    return DataLoader(dataset, num_workers=num_workers, generator=torch.Generator(), **options)


def set_epoch(loader: DataLoader, epoch: int):
    """
    Sets the epoch, counted from 0, of the next iteration over the training loader, and over the loaders that
    `accelerate.skip_first_batches` makes of it, before or after this call.
    """
    target = loader.dataset
    if not isinstance(target, IterableDataset):
        target = loader.batch_sampler
        while not isinstance(target, EpochBatches):
            target = target.batch_sampler
    target.epoch = epoch


def random_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*numbers: int):
    """Random numbers that depend only on `numbers`, from PyTorch's CPU generator, which is restored afterwards."""
    state = torch.get_rng_state()
    # Not `torch.manual_seed`, which seeds the accelerators too.
    torch.default_generator.manual_seed(random_seed(*numbers))
    try:
        yield
    finally:
        torch.set_rng_state(state)


@dataclass
class Collate:
    """Makes a batch of samples, and mixes it with a seed that depends on the key of its first sample."""

    mix: Callable | None = None
    seed: int = 0

    def __call__(self, samples: list[dict]) -> dict:
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.tensor([sample["label"] for sample in samples])
        if self.mix is not None:
            with seeded(self.seed, *samples[0]["key"], len(samples)):
                pixel_values, labels = self.mix(pixel_values, labels)
        return {
            "pixel_values": pixel_values,
            "labels": labels,
            "names": [sample["name"] for sample in samples],
            "bad_images": [record for sample in samples for record in sample["bad_images"]],
        }


@dataclass
class ImageReader:
    """Turns encoded images into samples."""

    source: ImageSource
    args: DataArguments
    transform: Callable[[Image.Image], torch.Tensor]
    seed: int = 0

    def decode(self, example: dict, row: int | None = None) -> tuple[str, Image.Image | None, list[dict]]:
        """The name of the image, the image or None if it is bad, and the records to report."""
        name = self.source.name(example, row)
        try:
            image, note = decode_image(read_image(self.source.image(example)))
        except BadImageError as error:
            if self.args.on_bad_image == "fail":
                raise BadImageError(f"{name} is {error} (`on_bad_image='fail'`)") from error
            return name, None, [{"name": name, "kind": "skipped", "reason": str(error)}]
        return name, image, [{"name": name, "kind": "converted", "reason": note}] if note else []

    def augmented(self, key: tuple[int, int, int], image: Image.Image) -> torch.Tensor:
        with seeded(self.seed, *key):
            return self.transform(image)

    def validation_sample(self, example: dict, label: int, row: int | None = None) -> dict:
        name, image, records = self.decode(example, row)
        if image is None:
            return self.placeholder(name, records)
        return {"pixel_values": self.transform(image), "label": label, "name": name, "bad_images": records}

    def placeholder(self, name: str, records: list[dict]) -> dict:
        pixel_values = self.transform(Image.new("RGB", (256, 256)))
        return {"pixel_values": pixel_values, "label": IGNORED_LABEL, "name": name, "bad_images": records}


class BatchRecords:
    """
    Removes everything that is not a tensor from the batches, and collects the records of bad images.

    Args:
        max_bad_images: how many images may be skipped.
    """

    def __init__(self, max_bad_images: int):
        self.max_bad_images, self.bad_images = max_bad_images, BadImages()

    def take_names(self, batch: dict[str, Any]) -> list[str]:
        """
        Removes `names`, which it returns, and `bad_images` from a batch.

        Raises:
            TooManyBadImagesError: if more than `max_bad_images` files were skipped.
        """
        self.bad_images.add(batch.pop("bad_images"))
        self.bad_images.check(self.max_bad_images)
        return batch.pop("names")

    def read(self, path: Path):
        """Adds the records of an earlier run."""
        self.bad_images.add(BadImages.read(path).records.values())

    def write(self, path: Path, is_main_process: bool):
        """Writes the records of all processes into one file; every process calls this."""
        from accelerate.utils import gather_object  # the loaders do without it

        records = gather_object(list(self.bad_images.records.values()))
        if is_main_process:
            self.bad_images.add(records)
            self.bad_images.write(path)


class EpochBatches:
    """
    The batches of one process: lists of keys (epoch, position, repeat). The epoch is part of the key because workers
    outlive an epoch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, repeats: int, rank: int, world_size: int):
        self.num_images, self.batch_size, self.seed, self.repeats = num_images, batch_size, seed, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, total = self.epoch, self.batch_size * self.world_size
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images).tolist()
        # The repeats of an image lie far apart in a batch, because `MixUp` mixes neighbors.
        width = -(-total // self.repeats)
        chunks = (order[start : start + width] for start in range(0, self.num_images, width))
        keys = ((epoch, position, repeat) for chunk in chunks for repeat in range(self.repeats) for position in chunk)
        for _ in range(len(self)):
            batch = list(islice(keys, total))
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


class TrainImages(Dataset):
    """The images of a table, by the keys of `EpochBatches`."""

    def __init__(self, reader: ImageReader):
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.source.num_images

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        reader, source, bad_images = self.reader, self.reader.source, BadImages()
        for position in range(key[1], key[1] + source.num_images):
            position %= source.num_images
            row = int(source.rows[position])
            name, image, records = reader.decode(source.dataset[row], row)
            bad_images.add(records)
            bad_images.check(reader.args.max_bad_images)
            if image is not None:
                pixel_values, label = reader.augmented(key, image), int(source.labels[position])
                records = list(bad_images.records.values())
                return {"key": key, "pixel_values": pixel_values, "label": label, "name": name, "bad_images": records}
        raise TooManyBadImagesError(f"None of the {source.num_images} images in {source.description} can be read.")


class ValidationImages(Dataset):
    """The images of a table by their position; placeholders follow the last one."""

    def __init__(self, reader: ImageReader):
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.source.num_images

    def __getitem__(self, position: int) -> dict:
        source = self.reader.source
        if position >= source.num_images:
            return self.reader.placeholder("", [])
        row = int(source.rows[position])
        return self.reader.validation_sample(source.dataset[row], int(source.labels[position]), row)


class TrainStream(IterableDataset):
    """One process's share of a stream; every worker yields a fixed number of full batches."""

    def __init__(
        self, reader: ImageReader, batch_size: int, num_batches: int, repeats: int, rank: int, world_size: int
    ):
        self.reader, self.batch_size, self.num_batches, self.repeats = reader, batch_size, num_batches, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader takes a batch from each worker in turn, starting with the first.
        share = self.batch_size * len(range(index, self.num_batches, num_workers))
        return islice(self.samples(share), share)

    def samples(self, share: int) -> Iterator[dict]:
        """Endless samples from the shards of this worker, read again and again; an epoch takes `share` of them."""
        reader, source, bad_images, records = self.reader, self.reader.source, BadImages(), []
        for lap, examples in enumerate(self.laps(share)):
            found = lap == 0
            for example, repeat in self.repeated(examples):
                name, image, new_records = reader.decode(example)
                records += new_records
                bad_images.add(new_records)
                bad_images.check(reader.args.max_bad_images)
                if image is None:
                    continue
                found = True
                key = (self.epoch, zlib.crc32(name.encode()), repeat)
                label = source.label(example[source.label_column], name)
                pixel_values = reader.augmented(key, image)
                yield {"key": key, "pixel_values": pixel_values, "label": label, "name": name, "bad_images": records}
                records = []
            if not found:
                raise TooManyBadImagesError(f"No image in a shard of {source.description} can be read.")

    def laps(self, share: int) -> Iterator[Iterator[dict]]:
        """One iterator after another over this worker's shards, each shuffled anew."""
        # With repeats, an epoch uses one part of the stream, and the next epoch the following part.
        first_epoch, part = self.epoch // self.repeats, self.epoch % self.repeats
        start = part * -(-share // self.repeats)
        for lap in count():
            seed = random_seed(self.reader.seed, first_epoch, lap)
            stream = shuffled(self.reader.source.dataset, seed, self.reader.args.shuffle_buffer_size)
            examples = read_share(replace(self.reader.source, dataset=stream), self.rank, self.world_size)
            yield islice(examples, start, None)
            start = 0

    def repeated(self, examples: Iterator[dict]) -> Iterator[tuple[dict, int]]:
        # As in `EpochBatches`, repeats are not neighbors.
        width = -(-self.batch_size // self.repeats)
        while chunk := list(islice(examples, width)):
            yield from ((example, repeat) for repeat in range(self.repeats) for example in chunk)


class ValidationStream(IterableDataset):
    """One process's share of a stream, once."""

    def __init__(self, reader: ImageReader, rank: int, world_size: int):
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __iter__(self) -> Iterator[dict]:
        source = self.reader.source
        for example in read_share(source, self.rank, self.world_size):
            label = source.label(example[source.label_column], source.name(example))
            yield self.reader.validation_sample(example, label)


def shuffled(stream: HubStream, seed: int, buffer_size: int) -> HubStream:
    """The stream with its shards in another order, and its examples through a buffer."""
    mixed = stream.shuffle(seed, buffer_size=buffer_size)
    if mixed.num_shards == stream.num_shards:
        return mixed
    # `datasets` 5.0 makes one shard of all of them, which leaves nothing to share out among the workers.
    return stream.shuffle(seed, buffer_size=buffer_size, max_buffer_input_shards=1)


def read_share(source: ImageSource, rank: int, world_size: int) -> Iterator[dict]:
    """The encoded images of one process, or of one of its workers if it runs in a worker."""
    try:
        yield from split_dataset_by_node(source.dataset, rank, world_size)
    # Archives, Parquet files and servers: their errors have no common class.
    except Exception as error:
        raise DataError(f"{source.description} cannot be read to the end: {type(error).__name__}: {error}") from error
