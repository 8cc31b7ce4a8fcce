"""Which model is trained, and which one teaches it. Shared by the training programs."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import cached_file

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor

from ..conversion.vit import convert_source, image_processor_for, read_source
from ..shared.console import parse_value
from .recipes import RecipeArguments, option, prepared_size


SOURCE = "source"
# Every field of the configuration is a flag; a text is read as YAML, so that lists and "none" can be given.
CONFIG_FIELDS = [name for name in HPoolViTConfig.__annotations__ if not name.startswith("_")]
HELP = {
    "hvt_pool_choices": "train for several schedules, 'none;6;1,5,9': each step draws one. The model is evaluated and "
    "saved with --hvt_pool, by default the first"
}


@dataclass
class BaseModelArguments:
    preset: str | None = option(None, "one of the paper's models, with new weights, such as hvt-s-1")
    model_name_or_path: str | None = option(
        None, "start from these weights: a folder or Hub id of an HPool-ViT, or of a ViT, which is converted"
    )
    config_name: str | None = option(None, "a folder or JSON file with an HPoolViTConfig, with new weights")
    trust_remote_code: bool = option(False, "whether the code in a teacher's folder may be run")


ModelArguments = make_dataclass(
    "ModelArguments",
    [
        (name, str | None, option(None, HELP.get(name, f"HPoolViTConfig.{name}, instead of the model's own")))
        for name in CONFIG_FIELDS
    ],
    bases=(BaseModelArguments,),
)
ModelArguments.__doc__ = "The model: a preset, a trained one or a configuration, and fields that shall differ."


def config_overrides(args: ModelArguments) -> dict[str, Any]:
    """
    The fields of the configuration that were given.

    Raises:
        ValueError: for a text that is no value.
    """
    overrides = {}
    for name in CONFIG_FIELDS:
        value = getattr(args, name)
        if value is not None:
            overrides[name] = parse_value(name, value) if isinstance(value, str) else value
    choices = overrides.get("hvt_pool_choices")
    if choices and "hvt_pool" not in overrides:
        overrides["hvt_pool"] = choices[0]
    return overrides


def build_model(
    args: ModelArguments, recipe: RecipeArguments, label_names: list[str]
) -> tuple[HPoolViTForImageClassification, HPoolViTImageProcessor, list[str]]:
    """
    The model to be trained, its image processor, and notes on what was converted or newly initialised.

    Raises:
        ValueError: if no model or more than one is named, or none can be built as asked.
        OSError: for a folder that cannot be read.
    """
    given = [name for name in ("preset", "model_name_or_path", "config_name") if getattr(args, name) is not None]
    overrides = config_overrides(args)
    if len(given) > 1:
        raise ValueError(f"--{' and --'.join(given)} name a model each: give only one.")
    overrides["id2label"] = dict(enumerate(label_names))
    overrides["label2id"] = {name: index for index, name in enumerate(label_names)}
    if given == ["model_name_or_path"]:
        return start_from(args.model_name_or_path, recipe, overrides)
    if given == ["preset"]:
        config = HPoolViTConfig.from_preset(args.preset, **overrides)
    elif given == ["config_name"]:
        config = HPoolViTConfig.from_pretrained(args.config_name, **overrides)
    elif len(overrides) > 2:
        config = HPoolViTConfig(**overrides)
    else:
        raise ValueError(
            "No model: give --preset, --model_name_or_path, --config_name, or fields such as --hidden_size."
        )
    model = HPoolViTForImageClassification(config)
    return model, HPoolViTImageProcessor.for_config(config, **resize_for(config, recipe)), []


def resize_for(config: HPoolViTConfig, recipe: RecipeArguments) -> dict[str, Any]:
    """The resize that makes the crop of the model's size the recipe's share of the image."""
    return {"size": {"shortest_edge": round(max(config.image_shape) / recipe.eval_crop_ratio)}}


def start_from(
    model_name_or_path: str, recipe: RecipeArguments, overrides: dict[str, Any]
) -> tuple[HPoolViTForImageClassification, HPoolViTImageProcessor, list[str]]:
    """A trained HPool-ViT with its weights, or a ViT converted; another number of labels makes a new head."""
    if not is_hpool_vit(model_name_or_path):
        source = read_source(model_name_or_path)
        model, report = convert_source(source, **overrides)
        processor = image_processor_for(source, model.config)
        return model, processor, [line.strip() for line in str(report).splitlines() if line.strip()]
    model, loading = HPoolViTForImageClassification.from_pretrained(
        model_name_or_path, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32, **overrides
    )
    notes = [f"newly initialised: {name}" for name in sorted(loading["missing_keys"])]
    notes += [f"newly initialised: {key[0] if isinstance(key, tuple) else key}" for key in loading["mismatched_keys"]]
    notes += [f"dropped: {name}" for name in sorted(loading["unexpected_keys"])]
    config = model.config
    processor = AutoImageProcessor.from_pretrained(model_name_or_path)
    if prepared_size(processor) != config.image_shape:
        processor = HPoolViTImageProcessor.for_config(
            config, image_mean=processor.image_mean, image_std=processor.image_std, **resize_for(config, recipe)
        )
    return model, processor, notes


def is_hpool_vit(model_name_or_path: str) -> bool:
    path = Path(model_name_or_path)
    if path.is_file():
        return False
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model_name_or_path {path} has no config.json: give the folder of a saved model.")
    config = yaml.safe_load(Path(cached_file(model_name_or_path, "config.json")).read_text())
    return config.get("model_type") == HPoolViTConfig.model_type


class Teacher(nn.Module):
    """
    A trained image classifier that answers for the student's batches.

    Its labels are put into the student's order by name, and pixel values are normalised again if the teacher was
    trained with another mean or standard deviation.

    Raises:
        ValueError: if its labels are not the student's, or it takes images of another size.
    """

    def __init__(self, args: ModelArguments, recipe: RecipeArguments, student: nn.Module, processor: Any):
        super().__init__()
        name = args.model_name_or_path if recipe.teacher == SOURCE else recipe.teacher
        if name is None:
            raise ValueError("--teacher source is the model that --model_name_or_path names: give one.")
        self.model, teacher_processor = self._load(name, recipe.teacher == SOURCE, args.trust_remote_code)
        self.model.requires_grad_(False).eval()
        self._match_labels(student.config, name)
        self._match_images(student.config, processor, teacher_processor, name)

    @staticmethod
    def _load(name: str, is_source: bool, trust_remote_code: bool) -> tuple[nn.Module, Any]:
        if Path(name).is_file():
            source = read_source(name)
            processor = source.image_processor
            model, _ = convert_source(source, hvt_pool=None)
            return model, HPoolViTImageProcessor(**processor) if processor else None
        options = {"hvt_pool": None} if is_source and is_hpool_vit(name) else {}
        # The stages' position embeddings are what is left over of an unpooled model.
        model = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
        )
        return model, AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)

    def _match_labels(self, student: Any, name: str):
        theirs = [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
        ours = [student.id2label[index] for index in range(student.num_labels)]
        if sorted(theirs) != sorted(ours):
            raise ValueError(
                f"--teacher {name} knows {len(theirs)} labels ({', '.join(map(str, theirs[:3]))}, …), "
                f"and the data has {len(ours)} ({', '.join(map(str, ours[:3]))}, …): take one trained on these."
            )
        self.register_buffer("order", torch.tensor([theirs.index(label) for label in ours]), persistent=False)

    def _match_images(self, student: Any, ours: Any, theirs: Any, name: str):
        size = getattr(self.model.config, "image_size", None)
        size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        if size not in (None, student.image_shape):
            raise ValueError(
                f"--teacher {name} takes images of {size[0]} × {size[1]} pixels, and the model "
                f"{student.image_shape[0]} × {student.image_shape[1]}: give --image_size, or another teacher."
            )
        # (x · std + mean - teacher's mean) / teacher's std
        mean, std = torch.tensor(ours.image_mean), torch.tensor(ours.image_std)
        their_mean = torch.tensor(getattr(theirs, "image_mean", None) or ours.image_mean)
        their_std = torch.tensor(getattr(theirs, "image_std", None) or ours.image_std)
        self.register_buffer("scale", (std / their_std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((mean - their_mean) / their_std)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch_size, num_labels) for the student's `pixel_values`."""
        self.model.eval()
        return self.model(pixel_values * self.scale + self.shift).logits[:, self.order]
