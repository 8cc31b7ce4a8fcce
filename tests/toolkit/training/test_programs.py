"""The two training programs: `hpool-vit train`, and the example with a loop of its own."""

import contextlib
import csv
import io
import json
import os
import re
import resource
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import compare_runs
import numpy as np
import pytest
import run_image_classification_no_trainer
import torch
import transformers.trainer
import yaml
from helpers import tiny_model
from huggingface_hub import HfApi, ModelCard
from image_files import BAD_FILES, CONVERTED_FILES, write_folder, write_parquet, write_tar
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline

from hpool_vit import HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.toolkit import command
from hpool_vit.toolkit.training.checkpoints import list_checkpoints, step_of


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def trainer(words: list[str]):
    """`hpool-vit train` in this process."""
    command.main(["train", *words])


def loop(words: list[str]):
    run_image_classification_no_trainer.main(words)


PROGRAMS = {"trainer": trainer, "loop": loop}
both_programs = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)

TINY = [
    "--recipe tiny --use_cpu --disable_tqdm true --logging_steps 1 --report_to none --per_device_train_batch_size 4",
    "--image_size 16 --patch_size 4 --hidden_size 32 --intermediate_size 64 --num_hidden_layers 2",
    "--num_attention_heads 2 --hvt_pool 1",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """24 images of 3 classes."""
    return write_folder(tmp_path_factory.mktemp("photos"))


def run(program, output_dir: Path, *flags: str) -> dict[str, float]:
    """Runs a program on the tiny model, and returns the results it wrote."""
    words = " ".join([*TINY, f"--output_dir {output_dir}", *flags]).split()
    program(words)
    return json.loads((output_dir / "all_results.json").read_text())


def error_of(program, output_dir: Path, *flags: str) -> str:
    """The one line that a program ends with, in which the command names flags and the example names arguments."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(printed):
        run(program, output_dir, *flags)
    assert stop.value.code not in (0, None)
    message = printed.getvalue().splitlines()[-1] if isinstance(stop.value.code, int) else stop.value.code
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in printed.getvalue()
    return message if program is trainer else re.sub(r"`(\w+)=([^`]*)`", r"--\1 \2", message)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path):
    for name, tensor in weights_of(first).items():
        torch.testing.assert_close(weights_of(second)[name], tensor, rtol=0, atol=0)


@both_programs
def test_a_run_leaves_a_model_a_card_pictures_and_logs(program, tmp_path, photos):
    results = run(program, tmp_path, f"--train_dir {photos} --num_train_epochs 2 --report_to tensorboard")
    assert results["eval_images"] == 3  # a stratified tenth, at least one of each class
    assert 0 <= results["eval_top1"] <= results["eval_top5"] == 1

    classify = pipeline("image-classification", model=str(tmp_path))
    assert {answer["label"] for answer in classify(str(photos / "ant" / "0.png"))} == {"ant", "bee", "cat"}
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "crop_min_scale" in card.text and "confusion_matrix.png" in card.text
    assert list(tmp_path.rglob("events.out.tfevents*"))
    for name in ("curves.png", "confusion_matrix.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 50
    assert "ant" in (tmp_path / "per_class_accuracy.csv").read_text()
    record = yaml.safe_load((tmp_path / "training.yaml").read_text())
    assert record["recipe"]["train_crop"] == "padded" and record["training"]["num_train_epochs"] == 2
    for checkpoint in list_checkpoints(tmp_path):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_both_programs_do_the_same(tmp_path, photos):
    flags = f"--train_dir {photos} --validation_dir {photos} --num_train_epochs 2 --ema_decay 0.5 --mixup_alpha 0.3"
    flags += " --gradient_accumulation_steps 2 --layer_decay 0.8 --drop_path_growth 0.05 --random_erasing 0.5"
    results = [run(program, tmp_path / name, flags) for name, program in PROGRAMS.items()]
    for name in ("eval_loss", "eval_ema_loss", "eval_top1", "eval_images"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name
    first, second = (weights_of(tmp_path / name) for name in PROGRAMS)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


@both_programs
def test_bad_images_are_skipped_and_named_at_the_end(program, tmp_path, capsys):
    folder = write_folder(tmp_path / "photos")
    for name, (content, _) in {**BAD_FILES, **CONVERTED_FILES}.items():
        (folder / "bee" / name).write_bytes(content)
    results = run(
        program,
        tmp_path / "out",
        f"--train_dir {folder} --validation_dir {folder} --num_train_epochs 1 --max_bad_images 50",
    )
    assert results["eval_images"] == 24 + len(CONVERTED_FILES)
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "out" / "bad_images.json").read_text())
    for name, (_, reason) in {**BAD_FILES, **CONVERTED_FILES}.items():
        assert name in printed
        assert any(record["name"].endswith(name) and reason in record["reason"] for record in records)
    assert f"{len(BAD_FILES)} images skipped" in (tmp_path / "out" / "README.md").read_text()


@both_programs
def test_a_class_without_validation_images_has_no_accuracy_and_no_effect(program, tmp_path, capsys):
    train = write_folder(tmp_path / "train")
    (train / "bee" / "0.png").rename(os.fsdecode(os.fsencode(train) + b"/bee/caf\xe9.png"))
    (train / "ant" / "up").symlink_to(tmp_path)
    (train / "cat" / "photo.xyz").touch()
    validation = write_folder(tmp_path / "validation", ("ant", "cat"), per_class=4)
    (validation / "bee").mkdir()
    out = tmp_path / "out"
    results = run(program, out, f"--train_dir {train} --validation_dir {validation} --num_train_epochs 1")
    assert results["eval_images"] == 8
    rows = list(csv.DictReader((out / "per_class_accuracy.csv").read_text().splitlines()))
    assert [row["images"] for row in rows] == ["4", "0", "4"]
    assert rows[1]["accuracy"] == "" and all(row["accuracy"] for row in (rows[0], rows[2]))
    mean = (float(rows[0]["accuracy"]) + float(rows[2]["accuracy"])) / 2
    assert f"| Mean class accuracy | {mean:.2%} |" in (out / "README.md").read_text()
    assert (out / "confusion_matrix.png").is_file()
    printed = capsys.readouterr().out
    assert f"{train}: 1 file with other endings was left out: .xyz" in printed
    assert f"{train}: 1 link to files that are listed elsewhere was left out: ant/up" in printed


@both_programs
def test_more_bad_images_than_allowed_stop_the_run_at_once(program, tmp_path):
    folder = write_folder(tmp_path / "photos")
    for index in range(4):
        (folder / "bee" / f"bad{index}.jpg").write_bytes(b"no picture")
    flags = f"--train_dir {folder} --validation_dir {folder} --num_train_epochs 2"
    assert "more than --max_bad_images 2" in error_of(program, tmp_path / "out", flags, "--max_bad_images 2")
    message = error_of(program, tmp_path / "other", flags, "--on_bad_image fail")
    assert re.search(r"bad\d\.jpg is unreadable", message)


@both_programs
def test_a_run_resumes_from_the_last_complete_checkpoint(program, tmp_path, photos, capsys):
    flags = f"--train_dir {photos} --validation_dir {photos} --num_train_epochs 3 --ema_decay 0.9 --drop_path_rate 0.3"
    flags += (
        " --drop_path_growth 0.05 --hidden_dropout_prob 0.1 --rand_augment_ops 2 --save_strategy steps --save_steps 4"
    )
    flags += " --save_total_limit 9"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(program, whole, flags)
    run(program, broken, flags)
    capsys.readouterr()
    # This is what a run leaves that was killed in epoch 2 while it wrote a checkpoint.
    for checkpoint in list_checkpoints(broken):
        if checkpoint.name not in ("checkpoint-4", "checkpoint-8"):
            (checkpoint / "complete.json").unlink()
    (broken / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    results = run(program, broken, flags)
    assert f"resuming from {broken}/checkpoint-8" in capsys.readouterr().out
    assert_same_weights(whole, broken)
    assert_same_weights(whole / "checkpoint-18" / "ema", broken / "checkpoint-18" / "ema")
    assert results["eval_top1"] == json.loads((whole / "all_results.json").read_text())["eval_top1"]


@both_programs
def test_a_resumed_run_removes_the_checkpoints_that_a_killed_one_had_yet_to_remove(program, tmp_path, photos):
    flags = f"--train_dir {photos} --num_train_epochs 1 --save_strategy steps --save_steps 1"
    run(program, tmp_path, flags, "--save_total_limit 9")
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [1, 2, 3, 4, 5]
    run(program, tmp_path, flags, "--save_total_limit 2")
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [4, 5]


@both_programs
def test_a_finished_run_started_again_changes_nothing(program, tmp_path, photos):
    flags = f"--train_dir {photos} --num_train_epochs 1"
    run(program, tmp_path, flags)
    before = weights_of(tmp_path)
    run(program, tmp_path, flags)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(tmp_path).items())


@both_programs
def test_a_full_disk_is_one_line_and_keeps_the_record_of_the_run(program, tmp_path, photos):
    flags = f"--train_dir {photos} --num_train_epochs 1"
    run(program, tmp_path, flags)
    record, before = (tmp_path / "training.yaml").read_text(), weights_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        message = error_of(program, tmp_path, flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large. Free some disk space and run the same command again." in message
    assert (tmp_path / "training.yaml").read_text() == record and not list(tmp_path.glob("*.part"))
    run(program, tmp_path, flags)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(tmp_path).items())


@both_programs
def test_a_run_does_not_resume_with_other_settings(program, tmp_path, photos):
    run(program, tmp_path, f"--train_dir {photos} --num_train_epochs 1")
    message = error_of(program, tmp_path, f"--train_dir {photos} --num_train_epochs 1 --mixup_alpha 0.2")
    assert "mixup_alpha=0.0, and this run has mixup_alpha=0.2" in message


@both_programs
def test_a_loss_that_is_not_finite_stops_with_step_rate_and_files(program, tmp_path, photos):
    flags = f"--train_dir {photos} --num_train_epochs 2 --learning_rate 1e30 --max_grad_norm 0 --warmup_steps 0"
    message = error_of(program, tmp_path, flags, "--save_strategy steps --save_steps 1 --lr_scheduler_type constant")
    assert re.search(r"step \d+ with learning rate 1e\+30; the batch's files: .*\.png|not finite at step \d+", message)
    for checkpoint in list_checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in weights_of(checkpoint).values())


@both_programs
def test_one_model_is_trained_for_several_schedules(program, tmp_path, photos, pixel_values):
    flags = [f"--train_dir {photos} --max_steps 4 --save_strategy steps --save_steps 2 --num_hidden_layers 3"]
    flags += ["--hvt_pool 2 --hvt_pool_choices none;2;0,2 --ema_decay 0.5 --seed 1"]
    run(program, tmp_path / "run", *flags)
    scores = json.loads((tmp_path / "run" / "schedules.json").read_text())
    assert list(scores) == ["none", "2", "0,2"] and all(0 <= score <= 1 for score in scores.values())
    assert "top-1 with schedule 0,2" in (tmp_path / "run" / "README.md").read_text()
    folders = [tmp_path / "run" / name for name in ("checkpoint-2", "checkpoint-4")]
    before, after = (HPoolViTForImageClassification.from_pretrained(folder) for folder in folders)
    assert after.config.hvt_pool == [2] and after.config.hvt_pool_choices == [None, [2], [0, 2]]
    for stage in after.hpool_vit.pooling:
        positions = (model.hpool_vit.pooling[stage].position_embeddings for model in (before, after))
        assert not torch.equal(*positions), stage


@pytest.mark.slow
@both_programs
def test_training_on_streams_resumes_too(program, tmp_path):
    for shard in range(2):
        write_parquet(tmp_path / f"train-{shard}.parquet", [0, 1, 2] * 4, first=12 * shard)
    write_parquet(tmp_path / "test.parquet", [0, 1, 2, 0, 1])
    flags = f"--train_files {tmp_path}/train-*.parquet --validation_files {tmp_path}/test.parquet --streaming"
    flags += " --class_names a b c --num_train_epochs 2 --save_strategy steps --save_steps 4 --save_total_limit 9"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(program, whole, flags)["eval_images"] == 5
    run(program, broken, flags)
    for checkpoint in list_checkpoints(broken)[1:]:
        (checkpoint / "complete.json").unlink()
    run(program, broken, flags)
    assert_same_weights(whole, broken)


def test_webdataset_archives_are_trained_on(tmp_path):
    write_tar(tmp_path / "train.tar", [0, 1, 2] * 4)
    write_tar(tmp_path / "val.tar", [0, 1, 2])
    flags = f"--train_files {tmp_path}/train.tar --validation_files {tmp_path}/val.tar --num_train_epochs 1"
    assert run(trainer, tmp_path / "out", flags)["eval_images"] == 3


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> Path:
    """A trained ViT of the photos' classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        id2label={0: "cat", 1: "bee", 2: "ant"},
        label2id={"cat": 0, "bee": 1, "ant": 2},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    HPoolViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


FROM_WEIGHTS = "--recipe finetune --use_cpu --disable_tqdm true --report_to none --per_device_train_batch_size 4"


@both_programs
def test_a_vit_is_converted_and_taught_by_itself(program, tmp_path, photos, vit_folder, capsys):
    flags = f"{FROM_WEIGHTS} --train_dir {photos} --model_name_or_path {vit_folder} --hvt_pool 1 --num_train_epochs 1"
    words = f"{flags} --teacher source --distillation_weight 0.7 --output_dir {tmp_path}".split()
    program(words)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.hvt_pool == [1] and model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert str(vit_folder) in ModelCard.load(tmp_path / "README.md").text


def test_a_ratio_that_the_image_processor_of_the_model_does_not_follow_is_noted(tmp_path, photos, vit_folder, capsys):
    flags = f"{FROM_WEIGHTS} --train_dir {photos} --hvt_pool 1 --num_train_epochs 1 --eval_crop_ratio 0.5"
    HPoolViTImageProcessor(crop_size={"height": 16, "width": 16}, size={"shortest_edge": 18}).save_pretrained(
        tmp_path / "vit"
    )
    AutoModelForImageClassification.from_pretrained(vit_folder).save_pretrained(tmp_path / "vit")
    note = "--eval_crop_ratio has no effect: the image processor of the model resizes to {'shortest_edge': 18}"
    for name, has_effect in ((tmp_path / "vit", False), (vit_folder, True)):
        trainer(f"{flags} --model_name_or_path {name} --output_dir {tmp_path / f'{name.name}-out'}".split())
        assert (note not in capsys.readouterr().out) == has_effect
    assert HPoolViTImageProcessor.from_pretrained(tmp_path / f"{vit_folder.name}-out").size == {"shortest_edge": 32}


def test_distillation_changes_what_is_learnt(tmp_path, photos, vit_folder):
    flags = f"--train_dir {photos} --num_train_epochs 1"
    run(trainer, tmp_path / "alone", flags)
    run(trainer, tmp_path / "taught", flags, f"--teacher {vit_folder}")
    assert any(
        not torch.equal(tensor, weights_of(tmp_path / "taught")[name])
        for name, tensor in weights_of(tmp_path / "alone").items()
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--teacher source", "--teacher source is the model that --model_name_or_path names"),
        ("--teacher {teacher}", "give a teacher that was trained on these labels"),
        ("--teacher {vit} --image_size 32", "takes images of 16 × 16 pixels, and the model 32 × 32"),
        ("--preset hvt-s-9", "not a preset"),
        ("--preset hvt-s-1 --model_name_or_path {vit}", "give only one"),
        ("--hvt_pool 7", "hvt_pool"),
        ("--ln_order sideways", "ln_order"),
        ("--model_name_or_path {empty}", "config.json"),
        ("--train_dir {empty}", "{empty}"),
        ("--dataset_name digits", "--train_dir"),
        ("--per_device_train_batch_size 400", "lower"),
    ],
)
def test_what_cannot_be_trained_gives_one_clear_line(tmp_path, photos, vit_folder, flags, message):
    (tmp_path / "empty").mkdir()
    tiny_model().save_pretrained(tmp_path / "teacher")
    HPoolViTImageProcessor().save_pretrained(tmp_path / "teacher")
    places = {"vit": vit_folder, "empty": tmp_path / "empty", "teacher": tmp_path / "teacher"}
    given = error_of(trainer, tmp_path / "out", f"--train_dir {photos}", flags.format(**places))
    assert message.format(**places) in given
    assert not list((tmp_path / "out").glob("*"))


def test_the_loop_refuses_flags_that_only_the_trainer_uses(tmp_path, photos):
    flags = f"--train_dir {photos} --load_best_model_at_end"
    assert "--load_best_model_at_end" in error_of(loop, tmp_path, flags)


@pytest.mark.slow
def test_runs_are_compared_by_seeds_macs_and_speed(tmp_path, photos, capsys):
    flags = f"--train_dir {photos} --validation_dir {photos} --num_train_epochs 1"
    for seed in (0, 1):
        run(trainer, tmp_path / f"pooled-seed{seed}", flags, f"--seed {seed}")
    run(trainer, tmp_path / "unpooled", flags, "--hvt_pool none")
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("pooled-seed0", "pooled-seed1", "unpooled")]
    compare_runs.main([*folders, "--reference", "unpooled", "--output", str(tmp_path / "table"), "--rounds", "2"])
    table = capsys.readouterr().out
    models = json.loads((tmp_path / "table.json").read_text())
    assert models["pooled"]["tokens"] == [16, 7] and models["unpooled"]["tokens"] == [16]
    assert models["pooled"]["macs"] < models["unpooled"]["macs"]
    assert set(models["pooled"]["runs"]) == {"0", "1"}
    first, second = (models["pooled"]["runs"][seed]["accuracy"] for seed in "01")
    assert f"| {(first + second) / 2:.1f} | {first:.1f}, {second:.1f} |" in table
    assert (tmp_path / "table.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="--reference other is not one of the runs: pooled, unpooled"):
        compare_runs.main([*folders, "--reference", "other", "--output", str(tmp_path / "table")])


class Hub:
    """Stands in for the Hub's client: remembers the weights in each folder that is uploaded, and sends nothing."""

    def __init__(self):
        self.uploads: list[tuple[str, dict[str, torch.Tensor]]] = []

    def create_repo(self, *args, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(repo_id="me/photos")

    def upload_folder(self, *args, folder_path, commit_message, **kwargs) -> Future:
        self.uploads.append((commit_message, weights_of(Path(folder_path))))
        done: Future = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    # Transformers calls functions of its own module or methods of the client, depending on its version.
    for owner in (HfApi, transformers.trainer):
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(owner, name, getattr(hub, name), raising=False)
    return hub


def test_push_to_hub_pushes_and_leaves_the_averaged_weights(tmp_path, photos, hub):
    flags = f"--train_dir {photos} --num_train_epochs 2 --ema_decay 0.9"
    run(trainer, tmp_path, flags, "--push_to_hub --hub_model_id me/photos")
    last = list_checkpoints(tmp_path)[-1]
    trained, averaged = weights_of(last)["classifier.weight"], weights_of(last / "ema")["classifier.weight"]
    assert not torch.equal(trained, averaged)
    assert_same_weights(last / "ema", tmp_path)
    # The Trainer's own default also uploads at every checkpoint, and copies its weights into the output folder first.
    ((message, pushed),) = hub.uploads
    assert message == "End of training"
    for name, tensor in weights_of(last / "ema").items():
        torch.testing.assert_close(pushed[name], tensor, rtol=0, atol=0)
