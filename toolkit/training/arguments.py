"""
The flags of the training programs. A recipe sets defaults, a configuration file overrides the recipe, and flags
override both.
"""

import argparse
import difflib
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import is_tensorboard_available

from ..data.sources import DataArguments
from ..shared.console import NotStartedError
from .model import CONFIG_FIELDS, ModelArguments
from .recipes import RECIPES, RecipeArguments, check_recipe


# Defaults of the training programs; all others are those of `TrainingArguments`.
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
    "report_to": ["tensorboard"] if is_tensorboard_available() else [],
    # The other strategies copy weights that are still being trained into the output folder.
    "hub_strategy": "end",
    # Processes with different numbers of images would see some of them twice.
    "dataloader_drop_last": True,
    # The transforms and the loss need more than the arguments of the model's `forward`.
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
}
# Fields of `TrainingArguments` that the programs decide themselves.
WITHOUT_EFFECT = {
    "optim": "the recipes use AdamW",
    "optim_args": "the recipes use AdamW",
    "optim_target_modules": "the recipes use AdamW",
    "resume_from_checkpoint": "training resumes from the last complete checkpoint in `output_dir`",
    "save_only_model": "training could not resume from such checkpoints",
    "ignore_data_skip": "a resumed run would see other images",
    "hub_strategy": "`output_dir` holds no model until the run has come to its end, when it is pushed",
    "hub_always_push": "the model is pushed once, at the end",
    "auto_find_batch_size": "the number of images per step is part of the recipe",
    **dict.fromkeys(
        ("dataloader_drop_last", "train_sampling_strategy"), "an epoch consists of full batches in random order"
    ),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
         "dataloader_in_order", "remove_unused_columns", "label_names", "accelerator_config"),
        "the training has its own data loaders",
    ),
    **dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics", "prediction_loss_only", "eval_do_concat_batches",
         "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval"),
        "the training has its own evaluation",
    ),
}  # fmt: skip
# These may change between the run that wrote a checkpoint and the run that resumes from it.
FREE_TO_CHANGE = {
    "output_dir", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "disable_tqdm", "run_name",
    "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "log_level", "per_device_eval_batch_size",
    "push_to_hub", "hub_model_id", "hub_strategy", "max_bad_images", "local_rank", "project", "ddp_timeout",
}  # fmt: skip
# What has no effect on a frozen trunk, or needs a trunk that is trained.
TRAINS_THE_TRUNK = {
    "layer_decay": "it is a factor on the learning rates of the trunk",
    "drop_path_rate": "the trunk drops no paths",
    "drop_path_growth": "the trunk drops no paths",
    "hvt_pool_choices": "each of the schedules is learnt by the trunk",
    "teacher": "distillation trains the whole model",
    "gradient_checkpointing": "the trunk gets no gradients",
}
# Values with which they do nothing, as texts: fields of the configuration are texts on the command line.
NEUTRAL = {"layer_decay": ("1", "1.0")}
USUALLY_NEUTRAL = ("None", "none", "False", "0", "0.0")
RECORD = "training.yaml"

GROUPS = (DataArguments, ModelArguments, RecipeArguments, TrainingArguments)
METAVARS = {int: "INT", float: "FLOAT", string_to_bool: "BOOL", dict: "JSON", str: "TEXT"}
PRECEDENCE = """\
A configuration file holds one `flag: value` per line, without the dashes. Flags override the file, and the file
overrides the recipe. The defaults below apply where the recipe sets nothing."""


@dataclass
class Arguments:
    """
    All flags of a run.

    Attributes:
        data, model, recipe, training: the flags by group.
        given: the flags from the file and the command line.
        record: the same and those of the recipe.
        command: the command line, for the model card.
    """

    data: DataArguments
    model: ModelArguments
    recipe: RecipeArguments
    training: TrainingArguments
    given: dict[str, Any]
    record: dict[str, Any]
    command: str = ""


class TitledTrainingArguments(TrainingArguments):
    """Gives the fields of `TrainingArguments` a title in the help text."""

    _argument_group_name = "training (the TrainingArguments of Transformers)"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the introduction, and names the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        says_nothing = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
        return text if says_nothing or "efault" in text else f"{text} (default: %(default)s)"


class Parser(HfArgumentParser):
    """The parser of the training flags, which raises an error of one line instead of ending the program."""

    def __init__(self, prog: str, introduction: str | None = None):
        super().__init__(
            (*GROUPS[:3], TitledTrainingArguments),
            prog=prog,
            usage="%(prog)s [FILE.yaml|FILE.json] [--flag value …]",
            description="\n\n".join(filter(None, [introduction, PRECEDENCE])),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.dataclass_types = list(GROUPS)
        for action in self._actions:
            action.default = DEFAULTS.get(action.dest, action.default)
            # Dashes within a flag work too, and are not shown.
            action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]
            is_opposite = isinstance(action, argparse._StoreFalseAction)
            if is_opposite or action.dest in WITHOUT_EFFECT:
                action.help = argparse.SUPPRESS
            elif action.nargs != 0 and action.choices is None:
                action.metavar = METAVARS.get(action.type, "VALUE") if action.dest not in CONFIG_FIELDS else "VALUE"

    def error(self, message: str) -> NoReturn:
        raise NotStartedError(message)


def flag_names() -> list[str]:
    """The names of all flags, without their dashes."""
    return [name for group in GROUPS for name in group.__dataclass_fields__]


def parse_arguments(
    argv: list[str] | None = None, introduction: str | None = None, prog: str | None = None
) -> Arguments:
    """
    Reads `[FILE.yaml | FILE.json] --flag value …`. `--help` prints all flags and ends the program.

    Args:
        argv: the words after the program's name; by default those of the command line.
        introduction: the start of the help text.
        prog: the program's name in the help text and in the model card; by default that of the running script.

    Raises:
        ValueError: in one line, for whatever is wrong with flags or file.
        OSError: if the file cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or f"python {sys.argv[0]}"
    parser = Parser(prog, introduction)
    is_file = bool(argv) and argv[0].endswith((".yaml", ".yml", ".json"))
    if "--help" not in argv and "-h" not in argv:
        # Only what is given counts: the recipe comes before the defaults.
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    from_file = read_file(parser, Path(argv[0])) if is_file else {}
    namespace, rest = parser.parse_known_args(argv[is_file:])
    if rest:
        parser.error(f"{rest[0]} is not a flag{suggest(parser, rest[0])}.")
    given = from_file | vars(namespace)
    record = {**DEFAULTS, **choose_recipe(given), **given}
    check_given(given)
    check_read(record, given)
    check_frozen_trunk(record, given)
    data, model, recipe, training = parser.parse_dict(record)
    return Arguments(data, model, recipe, training, given, record, f"{prog} {shlex.join(argv)}")


def read_file(parser: Parser, path: Path) -> dict[str, Any]:
    """The flags in a configuration file, each with the type of its flag."""
    try:
        # JSON is YAML too.
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold lines of the form `flag: value`.")
    actions = {action.dest: action for action in parser._actions}
    values = {}
    for name, value in content.items():
        if name not in actions:
            raise ValueError(f"{path} sets {name!r}, which is not a flag{suggest(parser, str(name))}.")
        # YAML reads 1e-3 as a text.
        is_typed_text = isinstance(value, str) and actions[name].type is not None
        values[name] = typed(parser, actions[name], value) if is_typed_text else value
    return values


def typed(parser: Parser, action: argparse.Action, value: str) -> Any:
    try:
        return parser._get_value(action, value)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def suggest(parser: Parser, name: str) -> str:
    names = [action.dest for action in parser._actions]
    close = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), names, n=1)
    return f": did you mean --{close[0]}?" if close else ", see --help"


def choose_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The named recipe, or the one that suits the model."""
    name = given.get("recipe") or ("finetune" if given.get("model_name_or_path") else "deit")
    check_recipe(name)
    # A rate that you give replaces the recipe's, whether it is a base rate or not.
    rates = {"learning_rate", "base_learning_rate"}
    skipped = rates if rates & given.keys() else set()
    return {"recipe": name, **{key: value for key, value in RECIPES[name].items() if key not in skipped}}


def check_given(given: dict[str, Any]):
    """Raises a `ValueError` for flags that contradict each other or have no effect."""
    if {"learning_rate", "base_learning_rate"} <= given.keys():
        raise ValueError("`learning_rate` and `base_learning_rate` both set the learning rate: give only one.")
    if "tensorboard" in (given.get("report_to") or ()) and not is_tensorboard_available():
        raise ValueError("`report_to='tensorboard'` needs a missing package: python -m pip install tensorboard")
    for name in sorted(WITHOUT_EFFECT.keys() & given.keys()):
        if given[name] != DEFAULTS.get(name):
            raise ValueError(f"`{name}={given[name]!r}` has no effect, because {WITHOUT_EFFECT[name]}: leave it out.")


def check_read(record: dict[str, Any], given: dict[str, Any]):
    """Raises a `ValueError` for flags that only other flags make use of."""
    crop = record.get("train_crop", RecipeArguments.train_crop)
    for name in (field for field in RecipeArguments.__dataclass_fields__ if field in given):
        if name.startswith("distillation") and not record.get("teacher"):
            raise ValueError(f"`{name}={given[name]!r}` has no effect without `teacher`: give one, or leave it out.")
        if name == "crop_min_scale" and crop != "random_resized":
            raise ValueError(
                f"`{name}={given[name]!r}` has no effect with `train_crop={crop!r}`: leave it out, or choose "
                "`train_crop='random_resized'`."
            )


def check_frozen_trunk(record: dict[str, Any], given: dict[str, Any]):
    """Raises a `ValueError` for flags that contradict `freeze_trunk`."""
    if not record.get("freeze_trunk"):
        return
    if not record.get("model_name_or_path"):
        raise ValueError("`freeze_trunk=True` needs a trained model: set `model_name_or_path`.")
    for name, reason in TRAINS_THE_TRUNK.items():
        if name in given and str(given[name]) not in NEUTRAL.get(name, USUALLY_NEUTRAL):
            raise ValueError(f"`{name}={given[name]!r}` contradicts `freeze_trunk=True`, because {reason}: drop one.")


def full_record(args: Arguments) -> dict[str, Any]:
    """All settings that a run depends on: the whole recipe, and every other flag that is set."""
    return {
        "recipe": asdict(args.recipe),
        "training": {name: value for name, value in args.record.items() if hasattr(args.training, name)},
        "model": {k: v for k, v in asdict(args.model).items() if v is not None},
        "data": {k: v for k, v in asdict(args.data).items() if v is not None},
    }


def check_same_run(args: Arguments, output_dir: Path):
    """
    Raises:
        ValueError: if the output folder holds a run with other settings, from which this run must not resume.
    """
    path = output_dir / RECORD
    if not path.is_file():
        return
    earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    now = yaml.safe_load(yaml.safe_dump(full_record(args)))
    for group, values in now.items():
        before = earlier.get(group, {})
        for name in sorted(values.keys() | before.keys()):
            if name not in FREE_TO_CHANGE and values.get(name) != before.get(name):
                raise ValueError(
                    f"`output_dir={str(output_dir)!r}` holds a run with {name}={before.get(name)!r}, and this run has "
                    f"{name}={values.get(name)!r}: choose another `output_dir`, or resume with the same settings."
                )
