"""The model that is trained, and the teacher that it learns from."""

import inspect
import re
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.pooling_hpool_vit import resize_positions

from ..conversion.building import ConversionReport
from ..conversion.checkpoint import ConversionError
from ..conversion.convert import check_pooling
from ..conversion.image_processor import image_processor_for
from ..conversion.positions import Positions
from ..conversion.sources import is_hpool_vit, read_source
from ..conversion.vit import POSITIONS, convert_source
from ..shared.console import parse_value
from .recipes import RecipeArguments, option, prepared_size


# The value of `teacher` that stands for the unpooled model of `model_name_or_path`.
SOURCE = "source"
# Fields of the configuration that are flags. `stages` is not: it records what a trained model has.
CONFIG_FIELDS = [name for name in HPoolViTConfig.__annotations__ if not name.startswith("_") and name != "stages"]
# Those that the weights of a trained model decide.
KEPT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "num_register_tokens",
    "patch_size",
)
PATCHES = "hpool_vit.embeddings.patch_embeddings.projection.weight"
HELP = {
    "hvt_pool": "Blocks, counted from 0, at whose input the tokens are pooled: 1,5,9 or none.",
    "hvt_pool_choices": "Train one model for several schedules, 'none;6;1,5,9': each step draws one. The model is "
    "evaluated and saved with --hvt_pool, by default the first of them.",
}


def field_help(name: str) -> str:
    """The help text of a field of the configuration, from the docstring of `HPoolViTConfig`."""
    text = inspect.getdoc(HPoolViTConfig) or ""
    entry = re.search(rf"(?m)^    (?:\w+, )*{name}(?:, \w+)* \(.*\):\n((?: {{8}}.*\n)+)", text)
    if entry is None:
        return f"`{name}` of HPoolViTConfig."
    # argparse reads a percent sign as the start of a placeholder.
    return " ".join(entry[1].split()).replace("%", "%%")


@dataclass
class BaseModelArguments:
    preset: str | None = option(None, "One of the paper's models with new weights, such as hvt-s-1.")
    model_name_or_path: str | None = option(
        None, "Start from these weights: a folder or Hub id of an HPool-ViT, or of a ViT, which is converted."
    )
    config_name: str | None = option(None, "Folder or JSON file of an HPoolViTConfig, for a model with new weights.")
    trust_remote_code: bool = option(False, "Whether code in the teacher's folder may run.")

    _argument_group_name = "model (--preset, --model_name_or_path or --config_name, and any field of HPoolViTConfig)"


ModelArguments = make_dataclass(
    "ModelArguments",
    [(name, str | None, option(None, HELP.get(name) or field_help(name))) for name in CONFIG_FIELDS],
    bases=(BaseModelArguments,),
)
ModelArguments.__doc__ = "The model: a preset, a trained model or a configuration, and fields that replace its own."


def config_overrides(args: ModelArguments) -> dict[str, Any]:
    """
    The fields of the configuration that are set.

    Raises:
        ValueError: for a text that is not a value.
    """
    overrides = {}
    for name in CONFIG_FIELDS:
        value = getattr(args, name)
        if value is not None:
            overrides[name] = parse_value(name, value) if isinstance(value, str) else value
    choices = overrides.get("hvt_pool_choices")
    if choices and "hvt_pool" not in overrides:
        overrides["hvt_pool"] = choices[0]
    if choices and (overrides["hvt_pool"] or None) not in [choice or None for choice in choices]:
        raise ValueError(
            f"`hvt_pool={overrides['hvt_pool']}` is not one of `hvt_pool_choices={choices}`, so no step would train "
            "it: choose one of them, or add it."
        )
    return overrides


def build_model(
    args: ModelArguments, recipe: RecipeArguments, label_names: list[str]
) -> tuple[HPoolViTForImageClassification, HPoolViTImageProcessor, list[str]]:
    """
    The model to train, its image processor, and notes on what is converted or newly initialised.

    Raises:
        ValueError: if no model or more than one is named, or the model cannot be built.
        OSError: for a folder that cannot be read.
    """
    given = [name for name in ("preset", "model_name_or_path", "config_name") if getattr(args, name) is not None]
    overrides = config_overrides(args)
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'`{name}`' for name in given)} each name a model: give only one.")
    if not given and not overrides:
        raise ValueError(
            "No model is given: set `preset`, `model_name_or_path`, `config_name`, or fields such as `hidden_size`."
        )
    check_pooling(overrides, own_config(args))
    overrides |= labels_of(label_names)
    if given == ["model_name_or_path"]:
        model, image_processor, notes = start_from(args.model_name_or_path, recipe, overrides)
        check_channels(model.config)
        return model, image_processor, notes
    if given == ["preset"]:
        config = HPoolViTConfig.from_preset(args.preset, **overrides)
    elif given == ["config_name"]:
        config = HPoolViTConfig.from_pretrained(args.config_name, **overrides)
    else:
        config = HPoolViTConfig(**overrides)
    check_channels(config)
    return (*new_model(config, recipe), [])


def own_config(args: ModelArguments) -> HPoolViTConfig | None:
    """The configuration that the fields in `args` change; None: a new one, or that of a ViT."""
    if args.preset is not None:
        return HPoolViTConfig.from_preset(args.preset)
    folder = args.config_name
    if args.model_name_or_path is not None and is_hpool_vit(args.model_name_or_path):
        folder = args.model_name_or_path
    return None if folder is None else HPoolViTConfig.from_pretrained(folder)


def check_channels(config: HPoolViTConfig):
    """Raises a `ValueError` for a model that takes no RGB images, which is what the data loaders read."""
    if config.num_channels != 3:
        raise ValueError(
            f"`num_channels={config.num_channels}` cannot be trained here, because images are read in RGB: write a "
            "program that reads yours."
        )


def labels_of(label_names: list[str]) -> dict[str, Any]:
    """The fields of the configuration that hold the names of the classes."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }


def new_model(
    config: HPoolViTConfig, recipe: RecipeArguments
) -> tuple[HPoolViTForImageClassification, HPoolViTImageProcessor]:
    """A model with new weights, and the image processor that the recipe evaluates it with."""
    model = HPoolViTForImageClassification(config)
    return model, HPoolViTImageProcessor.for_config(config, **resize_for(config, recipe))


def resize_for(config: HPoolViTConfig, recipe: RecipeArguments) -> dict[str, Any]:
    """The resize of which a crop of the model's size keeps the share `eval_crop_ratio`."""
    return {"size": {"shortest_edge": round(max(config.image_shape) / recipe.eval_crop_ratio)}}


def start_from(
    model_name_or_path: str, recipe: RecipeArguments, overrides: dict[str, Any]
) -> tuple[HPoolViTForImageClassification, HPoolViTImageProcessor, list[str]]:
    """
    A trained HPool-ViT with its weights, or a converted ViT. Another number of labels makes a new head.

    Args:
        model_name_or_path: a saved folder, a checkpoint or a Hub id.
        recipe: its `eval_crop_ratio` sets the resize of a new image processor.
        overrides: fields of the configuration that replace the model's own.

    Returns:
        The model, its image processor, and notes on what is converted, resized or newly initialised.

    Raises:
        ConversionError: for a source that cannot be converted, or fields that do not fit the trained weights.
    """
    if not is_hpool_vit(model_name_or_path):
        source = read_source(model_name_or_path)
        model, report = convert_source(source, **overrides)
        processor = image_processor_for(source, model.config, resize_for(model.config, recipe)["size"])
        return model, processor, [line.strip() for line in str(report).splitlines() if line.strip()]
    saved = HPoolViTConfig.from_pretrained(model_name_or_path)
    check_kept(saved, HPoolViTConfig.from_pretrained(model_name_or_path, **overrides))
    model, loading = HPoolViTForImageClassification.from_pretrained(
        model_name_or_path, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32, **overrides
    )
    notes = [f"newly initialised: {name}" for name in sorted(loading["missing_keys"])]
    mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    head = {name for name in mismatched if name.startswith("classifier.")}
    notes += [f"newly initialised: {name}" for name in sorted(head)]
    notes += fit_trunk(model, saved, model_name_or_path, mismatched - head)
    notes += [f"dropped: {name}" for name in sorted(loading["unexpected_keys"])]
    config = model.config
    processor = AutoImageProcessor.from_pretrained(model_name_or_path)
    if prepared_size(processor) != config.image_shape:
        processor = HPoolViTImageProcessor.for_config(
            config, image_mean=processor.image_mean, image_std=processor.image_std, **resize_for(config, recipe)
        )
    return model, processor, notes


def check_kept(saved: HPoolViTConfig, config: HPoolViTConfig):
    """Raises a `ConversionError` for a field of a trained model that its weights do not leave free."""
    for name in KEPT_FIELDS:
        old, new = getattr(saved, name), getattr(config, name)
        is_kept = saved.patch_shape == config.patch_shape if name == "patch_size" else old == new
        if not is_kept:
            raise ConversionError(f"`{name}={new!r}` cannot be chosen: the trained model has {old!r}.")


def fit_trunk(
    model: HPoolViTForImageClassification, saved: HPoolViTConfig, model_name_or_path: str, mismatched: set[str]
) -> list[str]:
    """
    Resizes the saved position embeddings where the model has another grid of patches or tokens, and reshapes the saved
    projection of the patches where it is computed in another way.

    Args:
        model: the model, loaded with a configuration of its own.
        saved: the configuration of the saved model.
        model_name_or_path: the saved model.
        mismatched: the names of its weights of another shape.

    Returns:
        Notes on what was resized or starts anew.

    Raises:
        ConversionError: for any other weights of another shape.
    """
    config, stages = model.config, changed_stages(saved, model.config)
    # Other grids can have as many patches or tokens, so that the shapes alone do not tell.
    changed = set(stages)
    if saved.use_position_embeddings and config.use_position_embeddings:
        is_same = saved.patch_grid() == config.patch_grid() and saved.use_class_token == config.use_class_token
        changed |= set() if is_same else {POSITIONS}
    if saved.patchify_technique != config.patchify_technique:
        changed.add(PATCHES)
    if damaged := mismatched - changed:
        raise ConversionError(
            f"The tensor `{min(damaged)}` of {model_name_or_path} has another shape than its config.json says: the "
            "folder is damaged or holds another model."
        )
    if not changed:
        return []
    source = HPoolViTForImageClassification.from_pretrained(model_name_or_path, dtype=torch.float32).state_dict()
    report, fitted = ConversionReport(), {}
    for name in sorted(changed):
        if name == PATCHES:
            fitted[name] = source[name].reshape(model.get_parameter(name).shape)
        elif name == POSITIONS:
            first, patches = source[name].tensor_split([int(saved.use_class_token)], dim=1)
            positions = Positions(first if saved.use_class_token else None, None, patches, saved.patch_grid())
            fitted[name] = positions.fitted(config, report)
        else:
            old, new = stages[name]
            # Windows on the grid have other tokens than those along the row.
            is_new = len(old) != len(new)
            zeros = torch.zeros_like(model.get_parameter(name))
            fitted[name] = zeros if is_new else resize_positions(source[name], old, new)
            report.notes.append(f"{'newly initialised' if is_new else 'resized'}: {name}")
    model.load_state_dict(fitted, strict=False)
    return report.notes


def changed_stages(saved: HPoolViTConfig, config: HPoolViTConfig) -> dict[str, tuple[Any, Any]]:
    """The position embeddings of the stages that have another shape than the saved ones: both shapes, by name."""
    before, after = saved.stage_shapes(), config.stage_shapes()
    return {
        f"hpool_vit.pooling.{block}.position_embeddings": (before[block], shape)
        for block, shape in after.items()
        if before.get(block, shape) != shape
    }


def freeze_trunk(model: HPoolViTForImageClassification):
    """
    Leaves only the classifier to train. The trunk stays in evaluation mode and takes, instead of images, also its own
    features, of shape (batch_size, pooled_size), which it returns as its pooled output.

    Raises:
        ValueError: if the model has no classifier.
    """
    if not model.num_labels:
        raise ValueError("`freeze_trunk=True` trains the classifier, and the model has none (`num_labels=0`).")
    trunk = model.hpool_vit.requires_grad_(False).eval()
    compute = trunk.forward

    def forward(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        if pixel_values.ndim == 2:
            return BaseModelOutputWithPooling(pooler_output=pixel_values)
        return compute(pixel_values, **kwargs)

    trunk.forward = forward
    # `model.train()` calls this for each of its modules.
    trunk.train = lambda mode=True: trunk


class Teacher(nn.Module):
    """
    A trained image classifier that predicts the labels of the student's batches.

    It puts its labels into the student's order by their names, and normalizes the pixel values again if it was trained
    with another mean or standard deviation.

    Raises:
        ValueError: if its labels are not the student's, or it takes images of another size.
    """

    def __init__(self, args: ModelArguments, recipe: RecipeArguments, student: nn.Module, processor: Any):
        super().__init__()
        name = args.model_name_or_path if recipe.teacher == SOURCE else recipe.teacher
        if name is None:
            raise ValueError("`teacher='source'` is the model that `model_name_or_path` names: give one.")
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
        # Without pooling, the position embeddings of the stages are left over.
        model = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
        )
        return model, AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)

    def _match_labels(self, student: Any, name: str):
        theirs = [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
        ours = [student.id2label[index] for index in range(student.num_labels)]
        if sorted(theirs) != sorted(ours):
            raise ValueError(
                f"`teacher={name!r}` has {len(theirs)} labels ({', '.join(map(str, theirs[:3]))}, …), and the data "
                f"{len(ours)} ({', '.join(map(str, ours[:3]))}, …): give a teacher that was trained on these labels."
            )
        self.register_buffer("order", torch.tensor([theirs.index(label) for label in ours]), persistent=False)

    def _match_images(self, student: Any, ours: Any, theirs: Any, name: str):
        size = getattr(self.model.config, "image_size", None)
        size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        if size not in (None, student.image_shape):
            raise ValueError(
                f"`teacher={name!r}` takes images of {size[0]} × {size[1]} pixels, and the model "
                f"{student.image_shape[0]} × {student.image_shape[1]}: set `image_size`, or give another teacher."
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
