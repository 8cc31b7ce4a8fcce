"""The models of the demo page: saved folders that serve several visitors at once."""

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
from hpool_vit.configuration_hpool_vit import POOL_MODES

from ..inspection.figure import draw
from ..inspection.stats import model_stats
from ..inspection.visualize import trace_images
from ..shared.devices import choose_device
from ..shared.figures import save_figure
from ..shared.measuring import time_in_turns, timer
from ..shared.saved_model import SavedModelError, load_saved_classifier, segments


NUM_TIMED_FORWARDS = 5
# What a training calls the folders of its checkpoints.
CHECKPOINT_PREFIX = "checkpoint-"
# Matplotlib draws for one thread at a time.
DRAWING = threading.Lock()


@dataclass(frozen=True)
class Schedule:
    """
    The blocks that pool their input, the patch tokens per stage, the multiply-accumulates for one image, the shares of
    the tokens that merge, and which of the model's speeds it is, if it is one.
    """

    hvt_pool: tuple[int, ...]
    tokens: tuple[int, ...]
    macs: int
    merge_ratio: float | tuple[float, ...]
    speed: float | None = None


@dataclass
class Answer:
    """
    Class probabilities of shape (num_images, num_labels), the median time of a forward pass for one image in
    milliseconds, and the images per second with all images in one batch.
    """

    probabilities: torch.Tensor
    milliseconds: float
    images_per_second: float


class ServedModel:
    """
    A saved model that several threads use at once, each with its own schedule.

    Args:
        folder: where an `HPoolViTForImageClassification` and its image processor were saved.
        device: where it computes. Default: an accelerator if there is one.

    Raises:
        SavedModelError: if the folder holds no such model, or a damaged one.
        ValueError: if the device cannot be used.
    """

    def __init__(self, folder: Path, device: str | None = None):
        torch_device = choose_device(device)
        if read_model_type(folder) != HPoolViTConfig.model_type:
            raise SavedModelError(f"{folder} is not the folder of a saved HPool-ViT.")
        if segments(str(folder)):
            raise SavedModelError(f"{folder} segments images, and the page shows only classifiers.")
        self.folder = folder
        model, self.image_processor, _ = load_saved_classifier(str(folder))
        self.model = model.to(torch_device)
        self.labels = distinct_labels(model.config)
        # From the cheapest to the most expensive.
        self.schedules = sorted(offered_schedules(model), key=lambda schedule: schedule.macs)
        saved = describe_schedule(model.config)
        [self.saved_position] = [
            position
            for position, schedule in enumerate(self.schedules)
            if (schedule.hvt_pool, schedule.tokens) == (saved.hvt_pool, saved.tokens)
        ][:1]
        self.macs_without_pooling = model_stats(model.config.with_schedule(None))["macs"]
        # The whole model has one schedule, which must not change while it works for another visitor.
        self.lock = threading.Lock()

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """The model's input for an image, of shape (1, 3, height, width)."""
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values
        return pixel_values.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def classify(self, pixel_values: torch.Tensor, position: float) -> Answer:
        """Classifies inputs of shape (num_images, 3, height, width) under `schedules[position]`, and times it."""

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            return self.model(inputs).logits.float().softmax(-1).cpu()  # copying waits for an accelerator

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
        """The most likely classes by name, in descending order."""
        values, indices = probabilities.topk(min(number, len(self.labels)))
        return {self.labels[index]: value for index, value in zip(indices.tolist(), values.tolist(), strict=True)}

    def schedule(self, position: float) -> Schedule:
        """The schedule at a position of the slider, which may come from another model with more schedules."""
        return self.schedules[min(int(position), len(self.schedules) - 1)]

    def set_schedule(self, position: float):
        """Switches the model to the schedule at `position`. The caller holds the lock."""
        schedule, config = self.schedule(position), self.model.config
        merge_ratio = schedule.merge_ratio if isinstance(schedule.merge_ratio, float) else list(schedule.merge_ratio)
        if (config.hvt_pool or [], config.merge_ratio) != (list(schedule.hvt_pool), merge_ratio):
            self.model.change_schedule(hvt_pool=list(schedule.hvt_pool), merge_ratio=merge_ratio)


def read_model_type(folder: Path) -> str | None:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def offered_schedules(model: HPoolViTForImageClassification) -> list[Schedule]:
    """What the page's slider chooses among: the model's speeds if it has any, otherwise its [`usable_schedules`]."""
    config = model.config
    if not config.speeds:
        return [describe_schedule(config.with_schedule(hvt_pool)) for hvt_pool in usable_schedules(model)]
    schedules = [
        describe_schedule(config.with_schedule(**config.fields_of_speed(speed)), float(speed))
        for speed in [1, *config.speeds]
    ]
    saved = describe_schedule(config)
    known = {(schedule.hvt_pool, schedule.tokens) for schedule in schedules}
    return schedules if (saved.hvt_pool, saved.tokens) in known else [*schedules, saved]


def usable_schedules(model: HPoolViTForImageClassification) -> list[list[int]]:
    """
    The schedules that the page offers: those for which the model has stages. Merging has no weights and works with any
    schedule; the page offers the model's own one, and that without its first merge, its first two, and so on.
    """
    config, blocks = model.config, list(model.config.hvt_pool or [])
    if POOL_MODES[config.pool_mode].has_positions or config.hvt_pool_choices:
        return config.schedules
    if isinstance(config.merge_ratio, list):  # one ratio per block fits no other number of blocks
        return [blocks, []] if blocks else [[]]
    return [blocks[first:] for first in range(len(blocks) + 1)]


def describe_schedule(config: HPoolViTConfig, speed: float | None = None) -> Schedule:
    ratio = config.merge_ratio
    return Schedule(
        tuple(config.hvt_pool or ()),
        tuple(config.tokens_per_stage()),
        model_stats(config)["macs"],
        tuple(ratio) if isinstance(ratio, list) else float(ratio),
        speed,
    )


def distinct_labels(config: HPoolViTConfig) -> list[str]:
    """The names of the classes. Classes that share a name get their number, such as the two cranes of ImageNet."""
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
    folders = sorted(file.parent for file in files if not file.parent.name.startswith(CHECKPOINT_PREFIX))
    folders = [folder for folder in folders if read_model_type(folder) == HPoolViTConfig.model_type]
    if not folders:
        raise SavedModelError(
            f"`models_dir={models_dir}` holds no saved model: make one with `hpool-vit convert` or `hpool-vit train`, "
            "or name the folder of a model."
        )
    return folders


def load_models(folders: list[Path], skip_bad: bool = False, device: str | None = None) -> dict[str, ServedModel]:
    """
    Loads all models, by their names. They are loaded before the page opens, because Transformers changes global
    settings while it loads, which a forward pass in another thread would see.

    Args:
        folders: the folders of the models.
        skip_bad: report a folder that cannot be loaded on standard error, and leave it out.
        device: where the models compute. Default: an accelerator if there is one.

    Raises:
        SavedModelError: if a folder cannot be loaded. With `skip_bad`, if none can.
        ValueError: if the device cannot be used.
    """
    models = {}
    for name, folder in zip(name_folders(folders), folders, strict=True):
        try:
            models[name] = ServedModel(folder, device)
        except SavedModelError as error:
            if not skip_bad or (folder == folders[-1] and not models):
                raise
            print(f"skipped: {error}", file=sys.stderr)
    return models


def name_folders(folders: list[Path]) -> list[str]:
    """A name for each folder: its own, or its path if another folder has the same name."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else folder.as_posix() for name, folder in zip(names, folders, strict=True)]
