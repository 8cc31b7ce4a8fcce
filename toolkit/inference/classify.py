"""Classify many files: threads read them ahead, the model takes them in batches, and processes share them."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers import Pipeline

from ..shared.console import needs
from ..shared.images import BadImageError
from .contact_sheet import make_thumbnail
from .inputs import read_image
from .outputs import Prediction


with needs("predict"):
    from accelerate import PartialState
    from accelerate.utils import gather_object


# After this many batches each, the processes exchange their answers.
BATCHES_PER_ROUND = 8


@dataclass
class Predictions:
    """
    The predictions for `files`, in their order. They are computed while you iterate: only the few images that are read
    ahead, and one batch at the model's size, are in memory. With several processes, each must iterate, and each gets
    all predictions, but every file is classified by only one of them.

    Args:
        classifier: the pipeline for image classification.
        files: paths and web addresses.
        state: the processes.
        top_k: answers per file.
        batch_size: images per forward pass, in each process.
        num_workers: threads that read files ahead, in each process.
        timeout: seconds until a web address must have sent everything.
        num_thumbnails: how many of the first files keep a small picture; the exact number may be somewhat larger.
        show_progress: whether to show a progress bar on standard error.
        notes: what the user should know about the files and the model.
    """

    classifier: Pipeline
    files: list[str]
    state: PartialState
    top_k: int = 5
    batch_size: int = 16
    num_workers: int = 4
    timeout: float = 20
    num_thumbnails: int = 0
    show_progress: bool = False
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_answers(self) -> int:
        """Answers per file: `top_k`, or all classes if there are fewer."""
        return min(self.top_k, self.classifier.model.config.num_labels)

    def __iter__(self) -> Iterator[Prediction]:
        size = self.batch_size * BATCHES_PER_ROUND * self.state.num_processes
        hidden = not self.show_progress or not self.state.is_main_process
        with tqdm(total=len(self.files), desc="classifying", unit="file", disable=hidden) as progress:
            for start in range(0, len(self.files), size):
                with_thumbnails = start < self.num_thumbnails
                with self.state.split_between_processes(self.files[start : start + size]) as own:
                    done = []
                    for prediction in self._classify(own, with_thumbnails):
                        done.append(prediction)
                        progress.update()
                everyones = gather_object(done)
                progress.update(len(everyones) - len(done))
                yield from everyones

    def _classify(self, files: list[str], with_thumbnails: bool) -> Iterator[Prediction]:
        """The predictions for the files of this process."""
        waiting: deque[Prediction] = deque()
        load = partial(load_file, timeout=self.timeout, with_thumbnail=with_thumbnails)

        def images() -> Iterator[Image.Image]:
            for prediction, image in load_ahead(files, load, self.num_workers):
                waiting.append(prediction)
                if image is not None:
                    yield image

        # The answers come in the order of the images; the bad files among them already have their reason.
        for answers in self.classifier(images(), batch_size=self.batch_size, top_k=self.top_k):
            while waiting[0].reason:
                yield waiting.popleft()
            self._take(waiting[0], answers)
            yield waiting.popleft()
        yield from waiting

    def _take(self, prediction: Prediction, answers: list[dict[str, Any]]) -> None:
        """Puts what the model says about a file into its prediction."""
        if all(math.isfinite(answer["score"]) for answer in answers):
            prediction.answers = answers
        else:
            prediction.reason = "the model's answer is not a number"


def load_file(file: str, timeout: float, with_thumbnail: bool) -> tuple[Prediction, Image.Image | None]:
    """The image of a file, or None and a prediction with the reason."""
    prediction = Prediction(file)
    try:
        image, prediction.note = read_image(file, timeout)
    except BadImageError as error:
        prediction.reason = str(error)
        return prediction, None
    if with_thumbnail:
        prediction.thumbnail = make_thumbnail(image)
    return prediction, image


def load_ahead(files: list[str], load: Callable[[str], Any], num_workers: int) -> Iterator[Any]:
    """What `load` returns for each file, in order. Threads run it for the next `num_workers` files, not for more."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for file in files:
                waiting.append(pool.submit(load, file))
                if len(waiting) > num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
