"""The ways from image files to classes that pipeline.py measures, with a clock around each step."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import pipeline
from transformers.pipelines import image_classification

from hpool_vit import HPoolViTConfig, HPoolViTImageProcessor, HPoolViTImageProcessorPil
from hpool_vit.toolkit.shared.measuring import timer


WAYS = ("pipeline", "pipeline-workers", "dataloader", "dataloader-pil", "device", "device-draft")
STEPS = ("decode", "resize", "normalise", "other", "forward", "answer")
# The step that each method of the image processors belongs to, by backend; the rest of their work is "other".
METHODS = {
    "torchvision": {"resize": "resize", "center_crop": "normalise", "rescale_and_normalize": "normalise"},
    "pil": {"resize": "resize", "center_crop": "normalise", "rescale": "normalise", "normalize": "normalise"},
}


class Clock:
    """The seconds spent in each step while `running`."""

    def __init__(self, device: str):
        self.device = device
        self.running = False
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, step: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            if not self.running:
                return function(*args, **kwargs)
            start = timer(self.device)
            result = function(*args, **kwargs)
            self.seconds[step] += timer(self.device) - start
            return result

        return timed

    @contextmanager
    def measure(self) -> Iterator[dict[str, float]]:
        """Fills a dictionary with the seconds of each step of what runs inside; "other" is the rest."""
        self.seconds.clear()
        shares: dict[str, float] = {}
        self.running = True
        start = timer(self.device)
        try:
            yield shares
        finally:
            self.running = False
        total = timer(self.device) - start
        shares |= {step: self.seconds[step] for step in STEPS}
        shares["other"] = total - sum(self.seconds.values())


def timed_processor(processor: Any, clock: Clock) -> Any:
    """The same image processor, with its steps on the clock."""
    for method, step in METHODS[processor.backend].items():
        setattr(processor, method, clock.wrap(step, getattr(processor, method)))
    return processor


def open_pillow(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def open_tensor(file: Path, size: int | None = None) -> torch.Tensor:
    """The image, (3, height, width) in uint8. With `size`, a JPEG is decoded at a reduced size of at least that."""
    with Image.open(file) as image:
        if size is not None:
            image.draft("RGB", (size, size))
        return pil_to_tensor(image.convert("RGB"))


class Images(Dataset):
    def __init__(self, files: list[Path], decode: Callable[[Path], Any]):
        self.files = files
        self.decode = decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.decode(self.files[index])


class Way:
    """One way from files to classes, for any model."""

    def __init__(self, name: str, files: list[Path], processors: dict[str, Any], clock: Clock, args):
        self.name = name
        self.files = files
        self.clock = clock
        self.args = args
        self.on_device = name.startswith("device")
        self.processor = processors["pil" if name.endswith("-pil") else "torchvision"]
        if not name.startswith("pipeline"):
            self.serial, self.parallel = self.loader(0), self.loader(args.num_workers)

    def loader(self, num_workers: int) -> DataLoader:
        decode = open_pillow
        if self.on_device:
            size = self.processor.size.shortest_edge if self.name == "device-draft" else None
            decode = partial(open_tensor, size=size)
        return DataLoader(
            Images(self.files, self.clock.wrap("decode", decode)),
            batch_size=self.args.batch_size,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=list if self.on_device else self.prepare,
            # The local functions of a clock cannot be pickled.
            multiprocessing_context="fork" if num_workers else None,
        )

    def prepare(self, images: list, device: str | None = None) -> torch.Tensor:
        return self.processor(images, return_tensors="pt", device=device).pixel_values

    def run(self, model: nn.Module, parallel: bool) -> list[int]:
        """Classifies all files once and returns the class of each."""
        if self.name.startswith("pipeline"):
            return self.run_pipeline(model, self.args.num_workers if parallel and self.name != "pipeline" else 0)
        classes = []
        forward = self.clock.wrap("forward", torch.inference_mode()(model))
        for batch in self.parallel if parallel else self.serial:
            if self.on_device:
                batch = self.prepare(batch, self.args.device)
            logits = forward(batch.to(self.args.device, model.dtype)).logits
            classes += logits.argmax(-1).tolist()
        return classes

    def run_pipeline(self, model: nn.Module, num_workers: int) -> list[int]:
        classifier = pipeline(
            "image-classification", model=model, image_processor=self.processor, device=self.args.device
        )
        classifier._forward = self.clock.wrap("forward", classifier._forward)
        classifier.postprocess = self.clock.wrap("answer", classifier.postprocess)
        load_image = image_classification.load_image
        image_classification.load_image = self.clock.wrap("decode", load_image)
        try:
            files = list(map(str, self.files))
            answers = classifier(files, batch_size=self.args.batch_size, num_workers=num_workers, top_k=1)
        finally:
            image_classification.load_image = load_image
        return [model.config.label2id[answer[0]["label"]] for answer in answers]


def processors_for(model: nn.Module, clock: Clock) -> dict[str, Any]:
    config = HPoolViTConfig(image_size=model.config.image_size, patch_size=model.config.patch_size)
    classes = {"torchvision": HPoolViTImageProcessor, "pil": HPoolViTImageProcessorPil}
    return {backend: timed_processor(cls.for_config(config), clock) for backend, cls in classes.items()}
