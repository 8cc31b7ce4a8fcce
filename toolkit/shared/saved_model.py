"""Load a saved classifier or segmenter with its image processor, or say in one line what is wrong with it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)
from transformers.utils import logging

# Importing the package also lets its classes load without `trust_remote_code`.
from hpool_vit.configuration_hpool_vit import POOL_MODES
from hpool_vit.pooling_hpool_vit import POOLINGS

from .console import hub_id, one_line, schedule_name


class SavedModelError(ValueError):
    """A folder without a usable classifier. The message is one line that names the folder and what to do."""


def segments(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a saved folder, or an id on the Hub, holds a model for semantic segmentation."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError):
        return False  # whoever loads the model says what is wrong
    return is_segmenter(config)


def is_segmenter(config: PreTrainedConfig) -> bool:
    """Whether the configuration is that of a saved model for semantic segmentation."""
    return any("SemanticSegmentation" in architecture for architecture in config.architectures or [])


def load_saved_model(
    name: str, *, trust_remote_code: bool = False, auto_class: Any = AutoModelForImageClassification, **overrides: Any
) -> tuple[nn.Module, Any, list[str], list[str]]:
    """
    Loads an image classifier, or another model, and its image processor.

    Args:
        name: a saved folder, or an id on the Hub.
        trust_remote_code: whether code in the folder may run. HPool-ViTs do not need it.
        auto_class: the Auto class that loads the model.
        overrides: arguments of `from_pretrained`, such as `speed`, and fields of the configuration to change, such as
            `hvt_pool`.

    Returns:
        The model in evaluation mode and in the dtype that it was saved in, its image processor, notes for the user,
        and the names of the weights that are missing in the folder and therefore random.

    Raises:
        SavedModelError: if anything other than weights is missing or damaged.
    """
    if not Path(name).exists() and hub_id(name) is None:
        raise SavedModelError(f"{name} is neither a folder here nor an id on the Hub.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise SavedModelError(f"{name} has no config.json: give the folder of a saved model.")
    trust = {"trust_remote_code": trust_remote_code}
    # Transformers would warn of missing weights, which this function returns.
    verbosity, with_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, **trust)
        notes = _check_schedule(name, config, overrides)
        model, loading = auto_class.from_pretrained(name, output_loading_info=True, **trust, **overrides)
        processor = AutoImageProcessor.from_pretrained(name, **trust)
    except SavedModelError:
        raise
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SavedModelError(f"{name} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if with_bars:
            logging.enable_progress_bar()
    return model.eval(), processor, notes, sorted(loading["missing_keys"])


def load_saved_classifier(
    name: str, *, trust_remote_code: bool = False, **overrides: Any
) -> tuple[nn.Module, Any, list[str]]:
    """
    Loads a model of RGB images that is ready to classify, and its image processor.

    Args:
        name: a saved folder, or an id on the Hub.
        trust_remote_code: whether code in the folder may run. HPool-ViTs do not need it.
        overrides: fields of the configuration to change, such as `hvt_pool`, or one of the model's speeds: `speed`.

    Returns:
        The model in evaluation mode, its image processor, and notes for the user.

    Raises:
        SavedModelError: if anything is missing, damaged or not finite, or if the image processor does not fit the
            model.
    """
    model, processor, notes, new = load_saved_model(name, trust_remote_code=trust_remote_code, **overrides)
    check_weights(name, model, new)
    _check_processor(name, model, processor)
    return model, processor, notes


def load_saved_segmenter(
    name: str, *, trust_remote_code: bool = False, **overrides: Any
) -> tuple[nn.Module, Any, list[str]]:
    """As `load_saved_classifier`, for a model that gives each pixel a class."""
    model, processor, notes, new = load_saved_model(
        name, trust_remote_code=trust_remote_code, auto_class=AutoModelForSemanticSegmentation, **overrides
    )
    check_weights(name, model, new)
    _check_processor(name, model, processor)
    return model, processor, notes


def _check_schedule(name: str, config: Any, overrides: dict[str, Any]) -> list[str]:
    """Notes on a schedule that the model was not trained for; refuses fields that the model does not have."""
    for flag, field in {"hvt_pool": "hvt_pool", "merge_ratio": "merge_ratio", "speed": "speeds"}.items():
        if flag in overrides and not hasattr(config, field):
            raise SavedModelError(
                f"`{flag}` is for HPool-ViTs, and {name} is a model of the type {config.model_type}."
            )
    if "merge_ratio" in overrides and "merge_ratio" not in POOLINGS[config.pool_mode].fields:
        raise SavedModelError(
            f"`merge_ratio` is for models that merge tokens, and {name} has the pool_mode {config.pool_mode!r}: "
            "leave it out."
        )
    if "hvt_pool" not in overrides:
        return []
    # Without weights of its own, a stage works at any block.
    if not POOL_MODES[config.pool_mode].has_positions or (overrides["hvt_pool"] or []) in config.schedules:
        return []
    return [
        f"note: {name} was not trained for hvt_pool={schedule_name(overrides['hvt_pool'])}, only for "
        f"{'; '.join(map(schedule_name, config.schedules))}: expect worse answers."
    ]


def check_weights(name: str, model: nn.Module, new: list[str]) -> None:
    """
    Args:
        name: what the user called the model.
        model: the loaded model.
        new: the names of its missing weights.

    Raises:
        SavedModelError: if the model has no classes, or if weights are missing or not finite.
    """
    if not model.config.num_labels:
        raise SavedModelError(f"{name} has no classes (num_labels is 0): it only extracts features.")
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        raise SavedModelError(
            f"{name} has no weights for {new[0]}{more}: it is incomplete, or not yet trained as a classifier."
        )
    check_finite(name, model)


def check_complete(name: str, model: nn.Module, new: list[str]) -> None:
    """As [`check_weights`], of a model with or without classes."""
    if new:
        raise SavedModelError(f"{name} has no weights for {new[0]}: it is incomplete.")
    check_finite(name, model)


def check_finite(name: str, model: nn.Module) -> None:
    """Raises a `SavedModelError` for weights that are not finite."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SavedModelError(
                f"{name} is damaged: the weights {key} are not finite, so every answer would be NaN. Use a checkpoint "
                "from before the training diverged."
            )


@torch.no_grad()
def _check_processor(name: str, model: nn.Module, processor: Any) -> None:
    """Passes an image through both, because they may come from different models."""
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise SavedModelError(f"{name} takes images of {channels} channels, not RGB.")
    try:
        pixels = processor(torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")
        model(**pixels.to(model.dtype))
    except (ValueError, RuntimeError) as error:
        raise SavedModelError(
            f"The images that the image processor of {name} prepares do not fit the model: {one_line(error)}"
        ) from error
