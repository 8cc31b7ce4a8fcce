"""How a model is trained: named recipes, their flags, and the augmentation that they choose."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import TrainingArguments

from hpool_vit import HPoolViTImageProcessor

from ..shared.console import needs


with needs("train"):
    from torchvision.transforms import InterpolationMode, v2

# Values of flags from any group. A flag that a recipe does not set keeps its default.
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
    # A classifier on trained features. Without augmentation, the features of each image are computed once.
    "linear-probe": {
        "num_train_epochs": 10,
        "per_device_train_batch_size": 128,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "freeze_trunk": True,
        "train_crop": "center",
        "horizontal_flip": 0.0,
    },
}


# Augmentations that change one image, and those that mix the images of a batch.
IMAGE_CHANGES = (
    "horizontal_flip", "affine_degrees", "affine_translate", "affine_scale", "rand_augment_ops", "random_erasing",
)  # fmt: skip
BATCH_CHANGES = ("mixup_alpha", "cutmix_alpha")


def option(default: Any, text: str) -> Any:
    """A field of a dataclass that becomes a flag with a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class RecipeArguments:
    """What a recipe sets in addition to the optimizer, schedule and batch, which are in `TrainingArguments`."""

    recipe: str | None = option(
        None, f"Named recipe: {', '.join(RECIPES)}. Default: finetune with --model_name_or_path, otherwise deit."
    )
    base_learning_rate: float | None = option(
        None, "Sets the learning rate to this value × images per step / 512. Replaces --learning_rate."
    )
    layer_decay: float = option(1.0, "Factor on the learning rate for each block below the head.")
    freeze_trunk: bool = option(False, "Train only the classifier of --model_name_or_path: linear probing.")
    cache_features: bool = option(
        True, "With --freeze_trunk, compute the features of each image once, if no augmentation changes the images."
    )
    train_crop: str = option(
        "random_resized",
        "Crop of training images: random_resized, padded (shift by up to an eighth), none (resize), center (as "
        "in evaluation, without augmentation).",
    )
    crop_min_scale: float = option(0.08, "Smallest share of the image that random_resized keeps.")
    horizontal_flip: float = option(0.5, "Probability of a horizontal flip.")
    affine_degrees: float = option(0.0, "Largest random rotation in degrees.")
    affine_translate: float = option(0.0, "Largest random shift as a share of the image.")
    affine_scale: float = option(0.0, "Largest random change of scale: 0.1 means up to 10 percent either way.")
    rand_augment_ops: int = option(0, "Number of RandAugment operations per image.")
    rand_augment_magnitude: int = option(9, "Strength of RandAugment, from 0 to 30.")
    random_erasing: float = option(0.0, "Probability of random erasing.")
    mixup_alpha: float = option(0.0, "Alpha of Mixup. 0 switches it off.")
    cutmix_alpha: float = option(0.0, "Alpha of CutMix. 0 switches it off.")
    repeated_augmentation: int = option(
        1, "Show each image this many times per epoch, and in return this many times fewer images."
    )
    drop_path_growth: float = option(0.0, "Increase of the stochastic depth rate per epoch.")
    ema_decay: float = option(0.0, "Decay per step of the moving average of the weights. 0 switches it off.")
    eval_crop_ratio: float = option(0.875, "Share of the resized image that is evaluated.")
    teacher: str | None = option(
        None,
        "Distill from this image classifier: a folder, a Hub id, or 'source': --model_name_or_path without pooling.",
    )
    distillation: str = option("soft", "soft (KL divergence) or hard (the teacher's prediction as a label).")
    distillation_temperature: float = option(1.0, "Temperature of soft distillation.")
    distillation_weight: float = option(0.5, "Share of distillation in the loss.")

    _argument_group_name = "recipe (augmentation, loss and averaging)"

    def __post_init__(self):
        self._check_choice("train_crop", ("random_resized", "padded", "none", "center"))
        self._check_choice("distillation", ("soft", "hard"))
        for name in ("horizontal_flip", "random_erasing", "distillation_weight"):
            self._check(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        for name in ("layer_decay", "crop_min_scale", "eval_crop_ratio"):
            self._check(name, 0 < getattr(self, name) <= 1, "must be above 0 and at most 1")
        for name in ("mixup_alpha", "cutmix_alpha", "rand_augment_ops", "rand_augment_magnitude"):
            self._check(name, getattr(self, name) >= 0, "must be at least 0")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "must be at least 0 and below 1")
        self._check("repeated_augmentation", self.repeated_augmentation >= 1, "must be at least 1")
        self._check("distillation_temperature", self.distillation_temperature > 0, "must be above 0")
        if self.train_crop == "center" and (names := set_of(self, IMAGE_CHANGES)):
            raise ValueError(
                f"`train_crop='center'` shows the images as in evaluation, which `{names[0]}` would change: set "
                "it to 0, or choose `train_crop='none'`."
            )

    def _check(self, name: str, is_right: bool, remedy: str):
        if not is_right:
            raise ValueError(f"`{name}={getattr(self, name)!r}` {remedy}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]):
        self._check(name, getattr(self, name) in choices, f"is unknown: choose {', '.join(choices)}")


def set_of(recipe: RecipeArguments, names: tuple[str, ...]) -> list[str]:
    """Those of the fields `names` that are not 0."""
    return [name for name in names if getattr(recipe, name)]


def augmentations(recipe: RecipeArguments) -> list[str]:
    """The fields that make an image look different from one epoch to the next."""
    crop = ["train_crop"] if recipe.train_crop in ("random_resized", "padded") else []
    return crop + set_of(recipe, IMAGE_CHANGES + BATCH_CHANGES)


def recipe_arguments(name: str) -> RecipeArguments:
    """
    The augmentation, loss and averaging of a named recipe.

    Raises:
        ValueError: for an unknown name.
    """
    check_recipe(name)
    fields = RecipeArguments.__dataclass_fields__
    return RecipeArguments(recipe=name, **{key: value for key, value in RECIPES[name].items() if key in fields})


def training_settings(name: str) -> dict[str, Any]:
    """
    What a named recipe sets in `TrainingArguments`: learning rate, epochs, batch size, and more.

    Raises:
        ValueError: for an unknown name.
    """
    check_recipe(name)
    fields = TrainingArguments.__dataclass_fields__
    return {key: value for key, value in RECIPES[name].items() if key in fields}


def check_recipe(name: str):
    if name not in RECIPES:
        raise ValueError(f"`recipe={name!r}` is unknown: choose {', '.join(RECIPES)}.")


def prepared_size(image_processor: HPoolViTImageProcessor) -> tuple[int | None, int | None]:
    """Height and width in pixels of every image after the image processor; None where they depend on the image."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return (size["height"], size["width"])


def train_transform(recipe: RecipeArguments, image_processor: HPoolViTImageProcessor) -> Callable:
    """
    Augmentation of one image: from a Pillow image in RGB to a normalized tensor of shape (3, height, width).

    Raises:
        ValueError: if the image processor returns images of different sizes, which cannot be batched.
    """
    size = prepared_size(image_processor)
    if None in size:
        raise ValueError(
            f"preprocessor_config.json has `size={dict(image_processor.size)}` without a center crop, so images have "
            'different sizes: set `do_center_crop` to true, or `size` to {"height": …, "width": …}.'
        )
    if recipe.train_crop == "center":
        return validation_transform(image_processor)
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
        # Uncovered corners get the mean color, as in DeiT.
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
    """The image processor itself, on one image: you evaluate exactly what users of the saved folder get."""
    return partial(prepared, image_processor)


def prepared(image_processor: HPoolViTImageProcessor, image: Image.Image) -> torch.Tensor:
    """One image as its image processor prepares it, of shape (3, height, width)."""
    return image_processor(image, return_tensors="pt").pixel_values[0]


def batch_mixing(recipe: RecipeArguments, num_labels: int) -> Callable | None:
    """
    Mixup or CutMix, one of them per batch, from (pixel_values, labels) to both. Labels of shape (batch_size,) become
    shares of the classes, of shape (batch_size, num_labels). None if the recipe uses neither.
    """
    mixes = []
    if recipe.mixup_alpha:
        mixes.append(v2.MixUp(alpha=recipe.mixup_alpha, num_classes=num_labels))
    if recipe.cutmix_alpha:
        mixes.append(v2.CutMix(alpha=recipe.cutmix_alpha, num_classes=num_labels))
    return v2.RandomChoice(mixes) if mixes else None
