"""Linear probing: a frozen trunk, and features that are computed once."""

import json
import shutil
from pathlib import Path

import pytest
import run_image_classification_no_trainer
import torch
from helpers import EXAMPLES, run_python, tiny_model
from image_files import write_folder
from safetensors.torch import load_file

from hpool_vit import HPoolViTImageProcessor, HPoolViTModel
from hpool_vit.toolkit import command
from hpool_vit.toolkit.training.arguments import parse_arguments
from hpool_vit.toolkit.training.checkpoints import list_checkpoints
from hpool_vit.toolkit.training.model import freeze_trunk
from hpool_vit.toolkit.training.optimization import WeightAverage, make_optimizer, parameter_groups
from hpool_vit.toolkit.training.recipes import RecipeArguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PROGRAMS = {
    "trainer": lambda words: command.main(["train", *words]),
    "loop": run_image_classification_no_trainer.main,
}
both_programs = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
FLAGS = "--recipe linear-probe --use_cpu --disable_tqdm true --logging_steps 1 --report_to none --num_train_epochs 3"
FLAGS += " --per_device_train_batch_size 4 --learning_rate 0.01"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model(dropout=0.1, drop_path_rate=0.2)
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return folder


def words(source: Path, photos: Path, output_dir: Path, *flags: str) -> list[str]:
    places = f"--model_name_or_path {source} --train_dir {photos} --validation_dir {photos} --output_dir {output_dir}"
    return " ".join([FLAGS, places, *flags]).split()


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def assert_close_weights(first: Path, second: Path, tolerance: float = 1e-6):
    others = load_file(second / "model.safetensors")
    for name, tensor in load_file(first / "model.safetensors").items():
        torch.testing.assert_close(tensor, others[name], rtol=tolerance, atol=tolerance)


def assert_same_trunk(source: Path, trained: Path):
    before, after = (load_file(folder / "model.safetensors") for folder in (source, trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@both_programs
@pytest.mark.parametrize("flags", ["", "--ema_decay 0.5", "--train_crop none --horizontal_flip 0.5 --mixup_alpha 0.3"])
def test_only_the_classifier_trains(program, flags, tmp_path, source, photos):
    program(words(source, photos, tmp_path, flags))
    assert_same_trunk(source, tmp_path)


@both_programs
def test_features_computed_once_train_as_the_images_do(program, tmp_path, source, photos):
    for name in ("true", "false"):
        program(words(source, photos, tmp_path / name, f"--cache_features {name}"))
    losses = losses_of(tmp_path / "true")
    assert len(losses) == 18 and losses == pytest.approx(losses_of(tmp_path / "false"), abs=1e-6)
    assert_close_weights(tmp_path / "true", tmp_path / "false")


def test_the_trunk_sees_each_training_image_once(tmp_path, source, photos, monkeypatch):
    seen, forward = [], HPoolViTModel.start

    def count(self, pixel_values, *args):
        seen.append((len(pixel_values), torch.is_grad_enabled(), self.training))
        return forward(self, pixel_values, *args)

    monkeypatch.setattr(HPoolViTModel, "start", count)
    PROGRAMS["loop"](words(source, photos, tmp_path, "--eval_strategy no"))
    assert sum(size for size, *_ in seen[:6]) == 24
    assert not any(grad or training for _, grad, training in seen)


@both_programs
def test_a_probe_resumes(program, tmp_path, source, photos):
    program(words(source, photos, tmp_path / "whole", "--save_total_limit 5"))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for checkpoint in list_checkpoints(tmp_path / "part")[1:]:
        shutil.rmtree(checkpoint)
    program(words(source, photos, tmp_path / "part", "--save_total_limit 5"))
    assert_close_weights(tmp_path / "whole", tmp_path / "part", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [["-m", "hpool_vit.toolkit.command", "train"], [str(EXAMPLES / "run_image_classification_no_trainer.py")]],
    ids=PROGRAMS,
)
def test_two_processes_probe_as_one_with_twice_the_batch(start, tmp_path, source, photos, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = words(source, photos, tmp_path / "one")
    two = words(source, photos, tmp_path / "two", "--per_device_train_batch_size 2")
    run_python(*start, *one)
    run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *start, *two)
    assert_close_weights(tmp_path / "one", tmp_path / "two", 1e-5)
    assert_same_trunk(source, tmp_path / "two")


def test_augmentation_computes_features_in_every_epoch_and_says_so(tmp_path, source, photos, capsys):
    flags = "--train_crop padded --num_train_epochs 1"
    PROGRAMS["loop"](words(source, photos, tmp_path, flags))
    assert "the features are computed in every epoch, because of --train_crop" in capsys.readouterr().out


def test_a_probe_works_in_half_precision(tmp_path, source, photos):
    PROGRAMS["loop"](words(source, photos, tmp_path, "--bf16"))
    assert_same_trunk(source, tmp_path)


def test_a_frozen_trunk_has_no_gradients_optimizer_state_average_or_dropout():
    model = tiny_model(dropout=0.5, drop_path_rate=0.5)
    freeze_trunk(model)
    model.train()
    assert model.classifier.training and not any(module.training for module in model.hpool_vit.modules())
    optimizer = make_optimizer(model, 0.1, RecipeArguments(), parse_arguments(["--output_dir", "x"]).training)
    trained = {weight for group in optimizer.param_groups for weight in group["params"]}
    assert trained == set(model.classifier.parameters())
    assert set(WeightAverage(model, 0.9).averages) == {"classifier.weight", "classifier.bias"}
    assert {group["lr"] for group in parameter_groups(model, 0.1, 0.0, layer_decay=0.5)} == {0.1}
    model(pixel_values=torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(weight.grad is None for weight in model.hpool_vit.parameters())


def test_a_model_without_classifier_has_nothing_to_probe():
    with pytest.raises(ValueError, match=r"num_labels=0"):
        freeze_trunk(tiny_model(num_labels=0))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--model_name_or_path x --layer_decay 0.5", "layer_decay"),
        ("--model_name_or_path x --drop_path_rate 0.1", "drop_path_rate"),
        ("--model_name_or_path x --hvt_pool_choices none;1", "hvt_pool_choices"),
        ("--model_name_or_path x --teacher source", "teacher"),
        ("--preset hvt-s-1", "model_name_or_path"),
    ],
)
def test_what_contradicts_a_frozen_trunk_is_refused_by_name(flags, named):
    with pytest.raises(ValueError, match=f"{named}.*freeze_trunk|freeze_trunk.*{named}"):
        parse_arguments(["--freeze_trunk", "--output_dir", "x", *flags.split()])


def test_the_center_crop_is_refused_with_augmentation():
    with pytest.raises(ValueError, match=r"train_crop='center'.*random_erasing"):
        RecipeArguments(train_crop="center", horizontal_flip=0.0, random_erasing=0.5)
