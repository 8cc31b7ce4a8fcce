"""What a segmentation training with the Trainer needs besides it: learning rates, its last checkpoint, its report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.optim import AdamW
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalPrediction

from ..training.checkpoints import list_checkpoints
from .card import write_segmentation_card
from .data import MaskedImages
from .evaluation import mean_iou, resize_scores
from .model import trunk_of
from .pictures import side_by_side


PICTURE = "examples.png"
RESULTS = "all_results.json"
NUM_PICTURES = 4
HEAD_FACTOR = 10.0


def make_segmenter_optimizer(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, head_factor: float = HEAD_FACTOR
) -> AdamW:
    """
    AdamW with a learning rate that is `head_factor` times as high in the head, which is new, and without weight decay
    on biases, norms, position embeddings and special tokens.
    """
    trunk, exempt = trunk_of(model), trunk_of(model).no_weight_decay()
    trunk_decays = {id(parameter): name not in exempt for name, parameter in trunk.named_parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        decays = parameter.ndim > 1 and trunk_decays.get(id(parameter), True)
        groups.setdefault((id(parameter) in trunk_decays, decays), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": learning_rate * (1 if is_trunk else head_factor),
                "weight_decay": weight_decay * decays,
            }
            for (is_trunk, decays), parameters in groups.items()
        ],
        lr=learning_rate,
    )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint that the Trainer has written whole, or None: a killed run leaves parts of one."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def segmentation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`mean_iou`, `mean_accuracy` and `overall_accuracy` from what `count_batch` keeps of each batch."""
    return {name: value for name, value in mean_iou(prediction.predictions).items() if name != "per_class_iou"}


def write_segmentation_report(
    trainer: Trainer, images: MaskedImages, class_names: list[str], settings: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """
    Evaluates the final weights, and writes results, pictures and a model card into the output folder. Every process
    calls this.

    Args:
        trainer (`Trainer`): whose `eval_dataset` shows `images` and whose `preprocess_logits_for_metrics` is
            `count_batch`.
        images (`MaskedImages`): the validation images, of which the first ones are in the picture.
        class_names (`list[str]`): the names of the classes.
        settings: the flags of the run, for the card.
        data: what the card says of the data.

    Returns:
        As `mean_iou`.
    """
    prediction = trainer.predict(trainer.eval_dataset)
    results = mean_iou(prediction.predictions)
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        (output_dir / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        draw_examples(trainer.model, trainer.processing_class, images).save(output_dir / PICTURE)
        write_segmentation_card(output_dir, trainer.model, class_names, results, settings, data, PICTURE)
    return results


@torch.no_grad()
def draw_examples(model: PreTrainedModel, image_processor: Any, images: MaskedImages) -> Image.Image:
    """The first images, their truth and the model's answer, side by side."""
    model.eval()
    pictures, truths, answers = [], [], []
    for index in range(min(NUM_PICTURES, len(images))):
        image, mask = images[index]
        pixel_values = image_processor(image, return_tensors="pt").pixel_values.to(model.device)
        scores = resize_scores(model(pixel_values=pixel_values).logits, (image.height, image.width))
        pictures.append(image)
        truths.append(np.array(mask))
        answers.append(scores[0].argmax(0).cpu().numpy())
    return side_by_side(pictures, truths, answers)
