"""The models of the demo page: saved folders, each of which serves several visitors at once."""

import copy
import io
import json
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from ..inspection.stats import model_stats
from ..inspection.visualize import draw, save_figure, trace_images
from ..shared.measuring import time_in_turns, timer
from ..shared.saved_model import SavedModelError, load_saved_classifier


NUM_TIMED_FORWARDS = 5
# Matplotlib draws for one thread at a time.
DRAWING = threading.Lock()


@dataclass(frozen=True)
class Schedule:
    """Blocks at whose input the tokens are pooled, patch tokens per stage, and multiply-accumulates of one image."""

    hvt_pool: tuple[int, ...]
    tokens: tuple[int, ...]
    macs: int


@dataclass
class Answer:
    """
    Class probabilities of shape (num_images, num_labels); the median time of a forward of one image in milliseconds;
    and the images per second when all of them went through the model in one batch.
    """

    probabilities: torch.Tensor
    milliseconds: float
    images_per_second: float


class ServedModel:
    """
    A saved folder that several threads use at once, each with a schedule of its own.

    Args:
        folder: as `save_pretrained` of an `HPoolViTForImageClassification` and of its image processor leaves it.

    Raises:
        SavedModelError: for a folder that holds no such model, or a damaged one.
    """

    def __init__(self, folder: Path):
        if read_model_type(folder) != HPoolViTConfig.model_type:
            raise SavedModelError(f"--model_name_or_path {folder} is no folder of a saved HPool-ViT.")
        model, self.image_processor, _ = load_saved_classifier(str(folder))
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.labels = distinct_labels(model.config)
        schedules = [describe_schedule(model.config.with_schedule(hvt_pool)) for hvt_pool in usable_schedules(model)]
        # The cheapest first.
        self.schedules = sorted(schedules, key=lambda schedule: schedule.macs)
        hvt_pools = [schedule.hvt_pool for schedule in self.schedules]
        self.saved_position = hvt_pools.index(tuple(model.config.hvt_pool or ()))
        self.macs_without_pooling = model_stats(model.config.with_schedule(None))["macs"]
        # A schedule belongs to the whole model: nobody may change it while another visitor's images pass.
        self.lock = threading.Lock()

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """The model's input for an image, of shape (1, 3, height, width)."""
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values
        return pixel_values.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def classify(self, pixel_values: torch.Tensor, position: float) -> Answer:
        """Classifies inputs of shape (num_images, 3, height, width) under `schedules[position]`, and times it."""

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            return self.model(inputs).logits.float().softmax(-1).cpu()  # the copy waits for an accelerator

        with self.lock:
            self.set_schedule(position)
            [rate] = [rate_of_one] = time_in_turns([partial(forward, pixel_values[:1])], 1, NUM_TIMED_FORWARDS)
            start = timer(self.model.device)
            probabilities = forward(pixel_values)
            if len(pixel_values) > 1:
                rate = len(pixel_values) / (timer(self.model.device) - start)
        return Answer(probabilities, 1000 / rate_of_one, rate)

    def explain(self, image: Image.Image, position: float) -> tuple[torch.Tensor, Image.Image]:
        """The class probabilities of an image, of shape (num_labels,), and a picture of its pooling."""
        with self.lock:
            self.set_schedule(position)
            config = copy.deepcopy(self.model.config)
            trace, seen = trace_images(self.model, self.image_processor, [image])
        file = io.BytesIO()
        with DRAWING:
            save_figure(draw(seen, trace, config), file, dpi=130)
        return trace.logits[0].softmax(-1), Image.open(file)

    def top(self, probabilities: torch.Tensor, number: int) -> dict[str, float]:
        """The likeliest classes by name, the likeliest first."""
        values, indices = probabilities.topk(min(number, len(self.labels)))
        return {self.labels[index]: value for index, value in zip(indices.tolist(), values.tolist(), strict=True)}

    def schedule(self, position: float) -> Schedule:
        """The schedule at a position of the slider, which may still be that of another model with more of them."""
        return self.schedules[min(int(position), len(self.schedules) - 1)]

    def set_schedule(self, position: float):
        """Pools as the schedule at `position` says; to be called with the lock held."""
        hvt_pool = list(self.schedule(position).hvt_pool)
        if (self.model.config.hvt_pool or []) != hvt_pool:
            self.model.set_hvt_pool(hvt_pool)


def read_model_type(folder: Path) -> str | None:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def usable_schedules(model: HPoolViTForImageClassification) -> list[list[int]]:
    """
    The schedules that a model answers well with: those it has stages for. Merging has no weights, and works with any;
    here with its own, without its first merges, and without all of them.
    """
    config, blocks = model.config, list(model.config.hvt_pool or [])
    if config.pool_mode != "merge" or config.hvt_pool_choices:
        return config.schedules
    if isinstance(config.merge_ratio, list):  # a ratio per block, which fits no other number of blocks
        return [blocks, []] if blocks else [[]]
    return [blocks[first:] for first in range(len(blocks) + 1)]


def describe_schedule(config: HPoolViTConfig) -> Schedule:
    return Schedule(tuple(config.hvt_pool or ()), tuple(config.tokens_per_stage()), model_stats(config)["macs"])


def distinct_labels(config: HPoolViTConfig) -> list[str]:
    """The names of the classes, with their number where two share a name, as `crane` of ImageNet does."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def find_models(models_dir: Path) -> list[Path]:
    """
    The folders of HPool-ViTs in `models_dir` or up to two levels below, without the checkpoints of a training.

    Raises:
        SavedModelError: if there are none.
    """
    files = {file for level in ("", "*/", "*/*/") for file in models_dir.glob(f"{level}config.json")}
    folders = sorted(file.parent for file in files if not file.parent.name.startswith("checkpoint-"))
    folders = [folder for folder in folders if read_model_type(folder) == HPoolViTConfig.model_type]
    if not folders:
        raise SavedModelError(
            f"`{models_dir}` holds no saved model: make one with `make quickstart`, or name one with "
            "--model_name_or_path DIR."
        )
    return folders


def load_models(folders: list[Path], skip_bad: bool = False) -> dict[str, ServedModel]:
    """
    The models by their names, all loaded at once: Transformers changes global settings meanwhile, which a forward pass
    in another thread would see.

    Raises:
        SavedModelError: for a folder that cannot be shown; with `skip_bad`, which reports it on stderr, for the last
            one if all are such.
    """
    models = {}
    for name, folder in zip(name_folders(folders), folders, strict=True):
        try:
            models[name] = ServedModel(folder)
        except SavedModelError as error:
            if not skip_bad or (folder == folders[-1] and not models):
                raise
            print(f"skipped: {error}", file=sys.stderr)
    return models


def name_folders(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, or its path where two are named alike."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else folder.as_posix() for name, folder in zip(names, folders, strict=True)]
