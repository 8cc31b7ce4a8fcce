"""
How a model is trained: named recipes, augmentation, parameter groups, the loss with distillation, and the moving
average of the weights. Shared by the programs that train with the Trainer and with a loop of their own.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2

from hpool_vit import HPoolViTForImageClassification, HPoolViTImageProcessor


# Values of flags, of whichever group they are. What a recipe leaves out has the default of its flag.
RECIPES: dict[str, dict[str, Any]] = {
    # DeiT's (arXiv 2012.12877, Table 9), which the paper uses, with the paper's weight decay (its Section 4.1).
    "deit": {
        "num_train_epochs": 300,
        "per_device_train_batch_size": 128,
        "base_learning_rate": 5e-4,
        "warmup_steps": 5 / 300,
        "weight_decay": 0.025,
        "drop_path_rate": 0.1,
        "train_crop": "random_resized",
        "rand_augment_ops": 2,
        "random_erasing": 0.25,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "label_smoothing_factor": 0.1,
        "repeated_augmentation": 3,
        "ema_decay": 0.99996,
        "max_grad_norm": 0.0,
    },
    # From trained weights, on hundreds to thousands of images.
    "finetune": {
        "num_train_epochs": 10,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-4,
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "train_crop": "random_resized",
        "crop_min_scale": 0.35,
        "label_smoothing_factor": 0.1,
    },
    # From scratch on small images, with a model of a million weights and a CPU.
    "tiny": {
        "num_train_epochs": 20,
        "per_device_train_batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "drop_path_rate": 0.1,
        "train_crop": "padded",
        "eval_crop_ratio": 1.0,
    },
}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass that becomes a flag with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """What a recipe sets beside the optimiser, the schedule and the batch, which are fields of `TrainingArguments`."""

    recipe: str | None = option(
        None, f"named recipe ({', '.join(RECIPES)}); by default finetune with --model_name_or_path, else deit"
    )
    base_learning_rate: float | None = option(None, "the learning rate is this × images per step / 512")
    layer_decay: float = option(1.0, "factor on the learning rate per block below the head")
    train_crop: str = option("random_resized", "random_resized, padded (shift by an eighth), or none (resize only)")
    crop_min_scale: float = option(0.08, "smallest share of the image that random_resized keeps")
    horizontal_flip: float = option(0.5, "probability of a flip")
    affine_degrees: float = option(0.0, "largest random rotation in degrees")
    affine_translate: float = option(0.0, "largest random shift as a share of the image")
    affine_scale: float = option(0.0, "largest random change of the scale, 0.1 for ± 10 %")
    rand_augment_ops: int = option(0, "operations of RandAugment per image")
    rand_augment_magnitude: int = option(9, "strength of RandAugment, of 31")
    random_erasing: float = option(0.0, "probability of random erasing")
    mixup_alpha: float = option(0.0, "Mixup's alpha, 0: none")
    cutmix_alpha: float = option(0.0, "CutMix's alpha, 0: none")
    repeated_augmentation: int = option(
        1, "how often an epoch repeats each of its images, in so many times fewer images"
    )
    drop_path_growth: float = option(0.0, "growth of the stochastic depth rate per epoch")
    ema_decay: float = option(0.0, "decay of the moving average of the weights per step, 0: none")
    eval_crop_ratio: float = option(0.875, "share of the resized image that the evaluation sees")
    teacher: str | None = option(
        None, "distil from this image classification model: a folder, a Hub id, or 'source': the unpooled warm start"
    )
    distillation: str = option("soft", "soft (KL divergence) or hard (the teacher's answer as a label)")
    distillation_temperature: float = option(1.0, "temperature of soft distillation")
    distillation_weight: float = option(0.5, "share of the distillation in the loss")

    def __post_init__(self):
        self._check_choice("train_crop", ("random_resized", "padded", "none"))
        self._check_choice("distillation", ("soft", "hard"))
        for name in ("horizontal_flip", "random_erasing", "distillation_weight"):
            self._check(name, 0 <= getattr(self, name) <= 1, "must lie between 0 and 1")
        for name in ("layer_decay", "crop_min_scale", "eval_crop_ratio"):
            self._check(name, 0 < getattr(self, name) <= 1, "must lie above 0 and be at most 1")
        for name in ("mixup_alpha", "cutmix_alpha", "rand_augment_ops", "rand_augment_magnitude"):
            self._check(name, getattr(self, name) >= 0, "must be at least 0")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "must be at least 0 and below 1")
        self._check("repeated_augmentation", self.repeated_augmentation >= 1, "must be at least 1")
        self._check("distillation_temperature", self.distillation_temperature > 0, "must be above 0")

    def _check(self, name: str, is_right: bool, remedy: str):
        if not is_right:
            raise ValueError(f"--{name} {getattr(self, name)} {remedy}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]):
        self._check(name, getattr(self, name) in choices, f"is unknown: choose {', '.join(choices)}")


def prepared_size(image_processor: HPoolViTImageProcessor) -> tuple[int | None, int | None]:
    """Height and width in pixels of what an image processor makes of every image; None where the image decides."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return (size["height"], size["width"])


def train_transform(recipe: RecipeArguments, image_processor: HPoolViTImageProcessor) -> Callable:
    """
    Augmentation of one image: from a Pillow image in RGB to a normalised tensor of shape (3, height, width).

    Raises:
        ValueError: if the image processor gives images of different sizes, which make no batch.
    """
    size = prepared_size(image_processor)
    if None in size:
        raise ValueError(
            f"preprocessor_config.json has `size={dict(image_processor.size)}` without a centre crop, so that images "
            'come in different sizes: set `do_center_crop` to true, or `size` to {"height": …, "width": …}.'
        )
    interpolation = resampling_of(image_processor)
    if recipe.train_crop == "random_resized":
        steps = [v2.RandomResizedCrop(size, scale=(recipe.crop_min_scale, 1.0), interpolation=interpolation)]
    else:
        steps = [v2.Resize(size, interpolation=interpolation)]
    if recipe.train_crop == "padded":
        steps.append(v2.RandomCrop(size, padding=[size[1] // 8, size[0] // 8]))
    if recipe.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(recipe.horizontal_flip))
    if recipe.affine_degrees or recipe.affine_translate or recipe.affine_scale:
        shift, scale = (recipe.affine_translate,) * 2, (1 - recipe.affine_scale, 1 + recipe.affine_scale)
        steps.append(v2.RandomAffine(recipe.affine_degrees, shift, scale, interpolation=InterpolationMode.BILINEAR))
    if recipe.rand_augment_ops:
        # Uncovered corners get the mean colour, as in DeiT.
        fill = [round(255 * mean) for mean in image_processor.image_mean]
        steps.append(v2.RandAugment(recipe.rand_augment_ops, recipe.rand_augment_magnitude, fill=fill))
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(image_processor.image_mean, image_processor.image_std),
    ]
    if recipe.random_erasing:
        steps.append(v2.RandomErasing(recipe.random_erasing, value="random"))
    return v2.Compose(steps)


def resampling_of(image_processor: HPoolViTImageProcessor) -> InterpolationMode:
    """The interpolation of an image processor under torchvision's name."""
    name = Image.Resampling(int(image_processor.resample)).name
    return InterpolationMode[name] if name in InterpolationMode.__members__ else InterpolationMode.BICUBIC


def validation_transform(image_processor: HPoolViTImageProcessor) -> Callable:
    """The image processor itself, on one image: what is evaluated is what users of the saved folder get."""
    return lambda image: image_processor(image, return_tensors="pt").pixel_values[0]


def batch_mixing(recipe: RecipeArguments, num_labels: int) -> Callable | None:
    """Mixup or CutMix, one of them per batch, on (pixel_values, labels); the labels become shares of the classes."""
    mixes = []
    if recipe.mixup_alpha:
        mixes.append(v2.MixUp(alpha=recipe.mixup_alpha, num_classes=num_labels))
    if recipe.cutmix_alpha:
        mixes.append(v2.CutMix(alpha=recipe.cutmix_alpha, num_classes=num_labels))
    return v2.RandomChoice(mixes) if mixes else None


def learning_rate_of(recipe: RecipeArguments, learning_rate: float, images_per_step: int) -> float:
    """The peak learning rate: `--base_learning_rate` × images per step / 512 (DeiT), or `--learning_rate`."""
    if recipe.base_learning_rate is None:
        return learning_rate
    return recipe.base_learning_rate * images_per_step / 512


def parameter_groups(
    model: HPoolViTForImageClassification, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """
    Groups for an optimiser: no weight decay on biases, norms, position embeddings and class token, and a learning rate
    that falls by `layer_decay` per block from the head down to the embeddings.
    """
    exempt = model.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    depth = model.config.num_hidden_layers + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level, decays = level_of(name, depth), parameter.ndim > 1 and name not in exempt
        group = groups.setdefault(
            (level, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (depth - level),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if layer_decay == 1.0:
        merged = [[g for (_, decays), g in groups.items() if decays is kind] for kind in (True, False)]
        return [{**part[0], "params": [p for g in part for p in g["params"]]} for part in merged if part]
    # The head first: its rate is the one that is logged.
    return [groups[key] for key in sorted(groups, reverse=True)]


def level_of(name: str, depth: int) -> int:
    """How far up a parameter lies: 0 the embeddings, 1 … the blocks with their pooling, `depth` the rest."""
    if match := re.search(r"\.(?:layers|pooling)\.(\d+)\.", name):
        return int(match.group(1)) + 1
    return 0 if ".embeddings." in name else depth


class RecipeLoss:
    """
    Cross-entropy with label smoothing and, with a teacher, distillation (DeiT, arXiv 2012.12877, Equations 2 and 3).

    Called with logits of shape (batch_size, num_labels), labels of shape (batch_size,) or, after mixing, shares of
    shape (batch_size, num_labels), and the teacher's logits or None. Returns the mean over the batch.
    """

    def __init__(self, recipe: RecipeArguments, label_smoothing: float):
        self.recipe, self.label_smoothing = recipe, label_smoothing

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = logits.float()
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if teacher_logits is None:
            return loss
        weight = self.recipe.distillation_weight
        return (1 - weight) * loss + weight * self.distillation(logits, teacher_logits.float())

    def distillation(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        if self.recipe.distillation == "hard":
            return nn.functional.cross_entropy(logits, teacher_logits.argmax(-1))
        temperature = self.recipe.distillation_temperature
        student, teacher = (
            nn.functional.log_softmax(scores / temperature, dim=-1) for scores in (logits, teacher_logits)
        )
        # × T² keeps the size of the gradient (Hinton et al., arXiv 1503.02531).
        return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class WeightAverage:
    """
    Exponential moving average of a model's weights, sharded as they are.

    Args:
        model: whose parameters are averaged; they are the first average.
        decay: what is kept of the average per step.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.update_averages = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self):
        """To be called after every step of the optimiser."""
        self.update_averages(list(self.averages.values()), list(self.parameters.values()), None)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages as weights in the block, and its own again behind it."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: dict[str, torch.Tensor]):
        for module in self.model.modules():
            # Weights that FSDP2 still holds gathered would hide what is copied into the sharded ones.
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self.parameters.items():
            parameter.copy_(source[name])

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Takes averages from whole tensors under the model's names, as a saved folder has them."""
        for name, average in self.averages.items():
            value = state[name].to(average.device, average.dtype)
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)
