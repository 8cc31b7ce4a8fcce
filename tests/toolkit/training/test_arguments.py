"""Flags, configuration files and recipes of the training programs."""

import json

import pytest
import yaml

from hpool_vit.toolkit.training.arguments import RECORD, check_same_run, full_record, parse_arguments
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
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, *flags, file=file)
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    assert capsys.readouterr().err == ""
    return message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "deitt"], "--recipe deitt is unknown: choose deit, finetune, tiny"),
        (["--num_train_epoch", "3"], "--num_train_epoch is no flag: is --num_train_epochs meant?"),
        (["--learning_rate", "fast"], "argument --learning_rate"),
        (["--learning_rate", "1", "--base_learning_rate", "1"], "give only one"),
        (["--ema_decay", "2"], "--ema_decay 2.0 must be"),
        (["--on_bad_image", "cry"], "--on_bad_image"),
        (["--eval_strategy", "never"], "never"),
        (["--optim", "sgd"], "--optim sgd has no effect, as the recipes use AdamW: leave it out"),
        (["--save_only_model"], "a run could not go on"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_flag_gives_one_clear_line(capsys, tmp_path, flags, message):
    assert message in error_of(capsys, tmp_path, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learningrate: 1", "'learningrate', which is no flag: is --learning_rate meant?"),
        ("learning_rate: fast", "learning_rate"),
        ("just words", "holds no `flag: value` lines"),
        ("a: [1", "settings.yaml"),
    ],
)
def test_a_wrong_file_gives_one_clear_line(capsys, tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert message in error_of(capsys, tmp_path, file=file)


def test_a_missing_file_gives_one_clear_line(capsys, tmp_path):
    assert "nowhere.yaml" in error_of(capsys, tmp_path, file=tmp_path / "nowhere.yaml")


def test_the_record_of_a_run_says_all_of_its_recipe(tmp_path):
    record = full_record(parse(tmp_path, "--recipe", "tiny", "--dataset_name", "digits"))
    assert record["recipe"]["ema_decay"] == 0.0 and record["recipe"]["train_crop"] == "padded"
    assert record["training"]["learning_rate"] == 1e-3
    assert record["data"]["dataset_name"] == "digits"
    assert yaml.safe_load(yaml.safe_dump(record)) == record


def test_a_run_goes_on_only_with_the_settings_it_began_with(tmp_path):
    flags = ["--recipe", "tiny", "--dataset_name", "digits", "--hvt_pool", "1,3"]
    (tmp_path / RECORD).write_text(yaml.safe_dump(full_record(parse(tmp_path, *flags))))
    check_same_run(parse(tmp_path, *flags, "--logging_steps", "3"), tmp_path)
    with pytest.raises(ValueError, match=r"a run with seed=None, and this one has seed=3"):
        check_same_run(parse(tmp_path, *flags, "--seed", "3"), tmp_path)
    with pytest.raises(ValueError, match=r"mixup_alpha=0\.0, and this one has mixup_alpha=0\.5"):
        check_same_run(parse(tmp_path, *flags, "--mixup_alpha", "0.5"), tmp_path)
