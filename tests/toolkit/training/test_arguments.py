"""Flags, configuration files and recipes of the training programs, and the help text."""

import json
import re

import pytest
import yaml
from helpers import call_command

from hpool_vit.toolkit.training import arguments
from hpool_vit.toolkit.training.arguments import (
    RECORD,
    WITHOUT_EFFECT,
    check_same_run,
    flag_names,
    full_record,
    parse_arguments,
)
from hpool_vit.toolkit.training.model import CONFIG_FIELDS, config_overrides, field_help
from hpool_vit.toolkit.training.recipes import RECIPES


SIZES = ["--hidden_size", "32", "--image_size", "32"]


def parse(tmp_path, *flags, file=None):
    return parse_arguments(
        [*([str(file)] if file else []), "--output_dir", str(tmp_path / "out"), "--use_cpu", *flags]
    )


def test_a_recipe_sets_what_no_flag_sets(tmp_path):
    args = parse(tmp_path, "--recipe", "deit", "--dataset_name", "digits", *SIZES)
    assert args.recipe.base_learning_rate == 5e-4
    assert args.recipe.mixup_alpha == 0.8
    assert args.training.weight_decay == 0.025
    assert args.training.num_train_epochs == 300
    assert args.model.drop_path_rate == 0.1


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("recipe: tiny\nnum_train_epochs: 7\nweight_decay: 1e-3\nhvt_pool: [1, 3]\n")
    args = parse(tmp_path, "--num_train_epochs", "3", file=file)
    assert args.training.num_train_epochs == 3
    assert args.training.weight_decay == 1e-3
    assert args.model.hvt_pool == [1, 3]
    assert args.recipe.train_crop == RECIPES["tiny"]["train_crop"]


def test_json_files_are_read_too(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"recipe": "finetune", "dataset_name": "digits", "seed": 5}))
    args = parse(tmp_path, file=file)
    assert (args.recipe.recipe, args.data.dataset_name, args.training.seed) == ("finetune", "digits", 5)


def test_trained_weights_are_fine_tuned_and_new_ones_trained_as_deit_unless_a_recipe_is_named(tmp_path):
    assert parse(tmp_path, "--model_name_or_path", "folder").recipe.recipe == "finetune"
    assert parse(tmp_path, "--preset", "hvt-s-1").recipe.recipe == "deit"


def test_a_given_learning_rate_replaces_the_recipes_of_either_kind(tmp_path):
    args = parse(tmp_path, "--recipe", "deit", "--learning_rate", "0.01")
    assert args.recipe.base_learning_rate is None and args.training.learning_rate == 0.01
    args = parse(tmp_path, "--recipe", "finetune", "--base_learning_rate", "0.01")
    assert args.recipe.base_learning_rate == 0.01


def error_of(capsys, tmp_path, *flags, file=None) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        parse(tmp_path, *flags, file=file)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "deitt"], "`recipe='deitt'` is unknown: choose deit, finetune, tiny, linear-probe"),
        (["--num_train_epoch", "3"], "--num_train_epoch is not a flag: did you mean --num_train_epochs?"),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["--learning_rate", "1", "--base_learning_rate", "1"], "give only one"),
        (["--ema_decay", "2"], "`ema_decay=2.0` must be"),
        (["--on_bad_image", "cry"], "--on_bad_image"),
        (["--eval_strategy", "never"], "never"),
        (["--optim", "sgd"], "`optim='sgd'` has no effect, because the recipes use AdamW: leave it out"),
        (["--save_only_model"], "training could not resume"),
        (
            ["--distillation", "hard"],
            "`distillation='hard'` has no effect without `teacher`: give one, or leave it out",
        ),
        (["--distillation_weight", "0.7"], "`distillation_weight=0.7` has no effect without `teacher`"),
        (["--distillation_temperature", "2"], "`distillation_temperature=2.0` has no effect without `teacher`"),
        (["--recipe", "tiny", "--crop_min_scale", "0.5"], "has no effect with `train_crop='padded'`: leave it out"),
        (["--train_crop", "none", "--crop_min_scale", "0.5"], "`crop_min_scale=0.5` has no effect"),
        (["--hub_strategy", "every_save"], "`hub_strategy='every_save'` has no effect, because `output_dir` holds no"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_flag_gives_one_clear_line(capsys, tmp_path, flags, message):
    assert message in error_of(capsys, tmp_path, *flags)


def test_what_another_flag_makes_use_of_is_taken_with_it(tmp_path):
    args = parse(tmp_path, "--teacher", "folder", "--distillation", "hard", "--crop_min_scale", "0.5")
    assert (args.recipe.distillation, args.recipe.crop_min_scale) == ("hard", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learningrate: 1", "'learningrate', which is not a flag: did you mean --learning_rate?"),
        ("learning_rate: fast", "argument --learning_rate: invalid float value: 'fast'"),
        ("just words", "does not hold lines of the form `flag: value`"),
        ("a: [1", "settings.yaml is not valid YAML or JSON"),
    ],
)
def test_a_wrong_file_gives_one_clear_line(capsys, tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert message in error_of(capsys, tmp_path, file=file)


def test_a_file_is_read_as_utf_8(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_bytes("train_dir: f\u00fc\u00dfe".encode("latin-1"))
    assert "settings.yaml is not valid YAML or JSON" in error_of(capsys, tmp_path, file=file)


def test_a_missing_file_gives_one_clear_line(capsys, tmp_path):
    assert "nowhere.yaml" in error_of(capsys, tmp_path, file=tmp_path / "nowhere.yaml")


def test_the_record_of_a_run_says_all_of_its_recipe(tmp_path):
    record = full_record(parse(tmp_path, "--recipe", "tiny", "--dataset_name", "digits"))
    assert record["recipe"]["ema_decay"] == 0.0 and record["recipe"]["train_crop"] == "padded"
    assert record["training"]["learning_rate"] == 1e-3
    assert record["data"]["dataset_name"] == "digits"
    assert yaml.safe_load(yaml.safe_dump(record)) == record


def test_a_run_resumes_only_with_the_settings_that_it_started_with(tmp_path):
    flags = ["--recipe", "tiny", "--dataset_name", "digits", "--hvt_pool", "1,3"]
    (tmp_path / RECORD).write_text(yaml.safe_dump(full_record(parse(tmp_path, *flags))))
    check_same_run(parse(tmp_path, *flags, "--logging_steps", "3"), tmp_path)
    with pytest.raises(ValueError, match=r"a run with seed=None, and this run has seed=3"):
        check_same_run(parse(tmp_path, *flags, "--seed", "3"), tmp_path)
    with pytest.raises(ValueError, match=r"mixup_alpha=0\.0, and this run has mixup_alpha=0\.5"):
        check_same_run(parse(tmp_path, *flags, "--mixup_alpha", "0.5"), tmp_path)


def test_the_end_is_the_only_time_to_push(tmp_path):
    assert parse(tmp_path, "--push_to_hub").training.hub_strategy == "end"
    assert parse(tmp_path, "--push_to_hub", "--hub_strategy", "end").training.hub_strategy == "end"


def test_flags_may_be_written_with_dashes_too(tmp_path):
    assert parse(tmp_path, "--weight-decay", "0.5").training.weight_decay == 0.5


def test_the_command_line_is_kept_for_the_model_card(tmp_path):
    args = parse_arguments(["--train_dir", "my photos", "--use_cpu"], prog="hpool-vit train")
    assert args.command == "hpool-vit train --train_dir 'my photos' --use_cpu"


def test_a_choice_of_several_schedules_is_evaluated_with_the_first(tmp_path):
    overrides = config_overrides(parse(tmp_path, "--hvt_pool_choices", "2;none;1,3").model)
    assert overrides["hvt_pool"] == [2] and overrides["hvt_pool_choices"] == [[2], None, [1, 3]]
    unpooled = config_overrides(parse(tmp_path, "--hvt_pool", "none", "--hvt_pool_choices", "2;none").model)
    assert unpooled["hvt_pool"] is None or unpooled["hvt_pool"] == []
    with pytest.raises(ValueError, match=r"`hvt_pool=\[3\]` is not one of `hvt_pool_choices=\[\[2\], None\]`"):
        config_overrides(parse(tmp_path, "--hvt_pool", "3", "--hvt_pool_choices", "2;none").model)


def test_the_help_starts_with_examples_and_explains_every_flag_that_has_an_effect(capsys):
    text = call_command(capsys, "train", "--help").stdout
    assert text.startswith("usage: hpool-vit train [FILE.yaml|FILE.json] [--flag value …]\n")
    introduction = text.split("\ndata (")[0]
    assert (
        introduction.count("    hpool-vit train --") == 1 and "-m hpool_vit.toolkit.command train --" in introduction
    )
    groups = [line.split(" (")[0] for line in text.splitlines() if re.fullmatch(r"\w+ \(.*\):", line)]
    assert groups == ["data", "model", "recipe", "training"]
    flags = set(re.findall(r"^  --(\S+)", text, flags=re.MULTILINE))
    assert flags == set(flag_names()) - WITHOUT_EFFECT.keys()


def test_the_fields_of_the_configuration_are_explained_by_its_docstring():
    assert field_help("num_channels") == "Channels of the input (`in_channels`)."
    assert field_help("pool_stride") == field_help("pool_kernel_size") != field_help("pool_mode")
    assert not any("` of HPoolViTConfig" in field_help(name) for name in CONFIG_FIELDS)


def test_tensorboard_is_asked_for_only_where_it_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "is_tensorboard_available", lambda: False)
    parse(tmp_path, "--report_to", "none")
    assert "python -m pip install tensorboard" in error_of(capsys, tmp_path, "--report_to", "tensorboard")
