"""The features that a frozen trunk computes of the training images: once, in memory, instead of the images."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from .loaders import TrainImages, make_loader


class FeatureImages(Dataset):
    """
    The samples of `TrainImages`, whose `pixel_values` are features of shape (num_features,). `compute` comes first.

    Args:
        images: training images that look alike in every epoch.
        collate: makes batches of them.
    """

    def __init__(self, images: TrainImages, collate: Callable):
        self.images, self.collate = images, collate
        self.features: list[torch.Tensor] = []
        self.labels: list[int] = []
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.images)

    def compute(
        self,
        features_of: Callable[[torch.Tensor], torch.Tensor],
        take_names: Callable[[dict[str, Any]], list[str]],
        training: TrainingArguments,
        is_quiet: bool = False,
    ):
        """
        Computes the features of all images. Every process computes a share of them and gets those of all.

        Args:
            features_of: from images of shape (batch_size, channels, height, width) to features on the CPU.
            take_names: called with each batch; removes everything that is not a tensor from it.
            training: its batch size, workers and processes.
            is_quiet: whether to hide the progress bar.
        """
        from accelerate.utils import gather_object  # the loaders do without it

        rank, world_size = training.process_index, training.world_size
        keys = [(0, position, 0) for position in range(rank, len(self), world_size)]
        loader = make_loader(
            self.images,
            training.dataloader_num_workers,
            sampler=keys,
            batch_size=training.per_device_train_batch_size,
            collate_fn=self.collate,
        )
        share: list[tuple[int, torch.Tensor, int, str]] = []
        for batch in tqdm(loader, desc="computing features", leave=False, disable=is_quiet):
            names = take_names(batch)
            rows = zip(features_of(batch["pixel_values"]), batch["labels"].tolist(), names, strict=True)
            share += [(keys[len(share) + number][1], *row) for number, row in enumerate(rows)]
        everything = sorted(gather_object(share), key=lambda row: row[0])
        _, self.features, self.labels, self.names = map(list, zip(*everything, strict=True))

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        position = key[1]
        features, label, name = self.features[position], self.labels[position], self.names[position]
        return {"key": key, "pixel_values": features, "label": label, "name": name, "bad_images": []}


def make_feature_loader(loader: DataLoader) -> DataLoader:
    """The same batches as those of a training loader over a table, of features instead of images."""
    images = FeatureImages(loader.dataset, loader.collate_fn)
    # Without workers: nothing is read or decoded.
    return make_loader(images, 0, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
