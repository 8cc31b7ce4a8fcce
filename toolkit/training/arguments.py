"""
The flags of the training programs: one parser, in which a recipe sets defaults, a configuration file overrides the
recipe, and flags override both.
"""

import difflib
import sys
from argparse import SUPPRESS, ArgumentError
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..data.sources import DataArguments
from .model import ModelArguments
from .recipes import RECIPES, RecipeArguments


# What the training programs do unless they are told otherwise; the other defaults are those of `TrainingArguments`.
DEFAULTS = {
    "output_dir": "outputs/training",
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "per_device_eval_batch_size": 64,
    "report_to": ["tensorboard"],
    # Unequal processes would see images a second time.
    "dataloader_drop_last": True,
    # The transforms and the loss need what the model's `forward` does not take.
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
}
# Fields of `TrainingArguments` for which the programs have a way of their own.
WITHOUT_EFFECT = {
    "optim": "the recipes use AdamW",
    "optim_args": "the recipes use AdamW",
    "optim_target_modules": "the recipes use AdamW",
    "resume_from_checkpoint": "the last complete checkpoint in --output_dir is found",
    "save_only_model": "a run could not go on from such checkpoints",
    "ignore_data_skip": "a run that goes on would see other images",
    "auto_find_batch_size": "the images per step are a part of the recipe",
    **dict.fromkeys(("dataloader_drop_last", "train_sampling_strategy"), "an epoch has only full batches, shuffled"),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
         "dataloader_in_order", "remove_unused_columns", "label_names", "accelerator_config"),
        "the loaders are those of image_data.py",
    ),
    **dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics", "prediction_loss_only", "eval_do_concat_batches",
         "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval"),
        "the evaluation is that of training_run.py",
    ),
}  # fmt: skip
# May differ between the run that wrote a checkpoint and the run that goes on from it.
FREE_TO_CHANGE = {
    "output_dir", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "disable_tqdm", "run_name",
    "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "log_level", "per_device_eval_batch_size",
    "push_to_hub", "hub_model_id", "max_bad_images", "local_rank", "project", "ddp_timeout",
}  # fmt: skip
RECORD = "training.yaml"


@dataclass
class Arguments:
    """All flags of a run by group; `given`: those of the file and the command line; `record`: the recipe's too."""

    data: DataArguments
    model: ModelArguments
    recipe: RecipeArguments
    training: TrainingArguments
    given: dict[str, Any]
    record: dict[str, Any]


class Parser(HfArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> Arguments:
    """
    Reads `[FILE.yaml | FILE.json] --flag value …`. What is wrong ends the program with one line.

    Args:
        argv: by default the command line.
        description: for `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = (DataArguments, ModelArguments, RecipeArguments, TrainingArguments)
    parser = Parser(
        groups, description=description, allow_abbrev=False, usage="%(prog)s [FILE.yaml|FILE.json] [--flag value …]"
    )
    is_file = bool(argv) and argv[0].endswith((".yaml", ".yml", ".json"))
    if "--help" not in argv and "-h" not in argv:
        for action in parser._actions:
            action.default = SUPPRESS
    try:
        from_file = read_file(parser, Path(argv[0])) if is_file else {}
        namespace, rest = parser.parse_known_args(argv[is_file:])
        if rest:
            raise ValueError(f"{rest[0]} is no flag{suggest(parser, rest[0])}.")
        given = from_file | vars(namespace)
        record = {**DEFAULTS, **choose_recipe(given), **given}
        check_given(given)
        data, model, recipe, training = parser.parse_dict(record)
    except (ValueError, OSError, ArgumentError) as error:
        parser.error(str(error))
    return Arguments(data, model, recipe, training, given, record)


def read_file(parser: Parser, path: Path) -> dict[str, Any]:
    """The flags in a configuration file, each with the type of its flag."""
    try:
        # JSON is YAML too.
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no `flag: value` lines.")
    actions = {action.dest: action for action in parser._actions}
    values = {}
    for name, value in content.items():
        if name not in actions:
            raise ValueError(f"{path} sets {name!r}, which is no flag{suggest(parser, name)}.")
        # YAML reads 1e-3 as a text.
        is_typed_text = isinstance(value, str) and actions[name].type is not None
        values[name] = parser._get_value(actions[name], value) if is_typed_text else value
    return values


def suggest(parser: Parser, name: str) -> str:
    names = [action.dest for action in parser._actions]
    close = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), names, n=1)
    return f": is --{close[0]} meant?" if close else ", see --help"


def choose_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The named recipe, or the one that suits the model."""
    name = given.get("recipe") or ("finetune" if given.get("model_name_or_path") else "deit")
    if name not in RECIPES:
        raise ValueError(f"--recipe {name} is unknown: choose {', '.join(RECIPES)}.")
    # A rate that is given replaces the recipe's, of whichever kind that is.
    rates = {"learning_rate", "base_learning_rate"}
    skipped = rates if rates & given.keys() else set()
    return {"recipe": name, **{key: value for key, value in RECIPES[name].items() if key not in skipped}}


def check_given(given: dict[str, Any]):
    """Raises a `ValueError` for flags that contradict each other, or would be ignored."""
    if {"learning_rate", "base_learning_rate"} <= given.keys():
        raise ValueError("--learning_rate and --base_learning_rate both set the learning rate: give only one.")
    for name in sorted(WITHOUT_EFFECT.keys() & given.keys()):
        if given[name] != DEFAULTS.get(name):
            raise ValueError(f"--{name} {given[name]} has no effect, as {WITHOUT_EFFECT[name]}: leave it out.")


def full_record(args: Arguments) -> dict[str, Any]:
    """Everything that a run depends on: the whole recipe, and what else was set; for printing and saving."""
    return {
        "recipe": asdict(args.recipe),
        "training": {name: value for name, value in args.record.items() if hasattr(args.training, name)},
        "model": {k: v for k, v in asdict(args.model).items() if v is not None},
        "data": {k: v for k, v in asdict(args.data).items() if v is not None},
    }


def check_same_run(args: Arguments, output_dir: Path):
    """
    Raises:
        ValueError: if the output folder holds a run with other settings, which this run must not go on with.
    """
    path = output_dir / RECORD
    if not path.is_file():
        return
    earlier, now = yaml.safe_load(path.read_text()), yaml.safe_load(yaml.safe_dump(full_record(args)))
    for group, values in now.items():
        before = earlier.get(group, {})
        for name in sorted(values.keys() | before.keys()):
            if name not in FREE_TO_CHANGE and values.get(name) != before.get(name):
                raise ValueError(
                    f"--output_dir {output_dir} holds a run with {name}={before.get(name)!r}, and this one has "
                    f"{name}={values.get(name)!r}: choose another --output_dir, or the same settings to go on."
                )
