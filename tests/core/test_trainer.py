"""The Trainer, as a user starts it: in processes of its own, one or two, with the package or with a folder's code."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import CODE, TESTS, run_python, tiny_model

from hpool_vit import HPoolViTImageProcessor


TRAIN = TESTS / "programs" / "train.py"


def train(*args, **kwargs) -> list[dict]:
    """The results of each model, from one process or those of a launcher."""
    printed = run_python(*args, **kwargs).stdout
    return [json.loads(part.splitlines()[0]) for part in printed.split("RESULT ")[1:]]


@pytest.fixture(scope="module")
def whole(saved_folder, tmp_path_factory) -> tuple[Path, dict]:
    """A run of 4 steps, with a checkpoint after 2, and its results."""
    output = tmp_path_factory.mktemp("whole")
    [result] = train(TRAIN, output, 4, saved_folder)
    return output / saved_folder.name, result


def test_training_stopped_after_a_checkpoint_resumes_to_the_same_weights(saved_folder, whole, tmp_path):
    folder, expected = whole
    assert len(expected["losses"]) == 4 and expected["losses"][-1] < expected["losses"][0]
    shutil.copytree(folder / "checkpoint-2", tmp_path / saved_folder.name / "checkpoint-2")
    assert train(TRAIN, tmp_path, 4, saved_folder, "--resume") == [expected]


@pytest.mark.slow
def test_a_checkpoint_of_a_remote_code_model_is_complete_and_resumes_in_a_fresh_process(saved_folder, whole, tmp_path):
    train(TRAIN, tmp_path, 2, saved_folder, "--remote", hide=("hpool_vit",))
    # What the second process loads is the checkpoint, code and all.
    checkpoint = tmp_path / saved_folder.name / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*.py")} == CODE
    assert (checkpoint / "preprocessor_config.json").is_file()
    again = tmp_path / "again" / saved_folder.name
    shutil.copytree(checkpoint, again)
    shutil.copytree(checkpoint, tmp_path / "output" / saved_folder.name / "checkpoint-2")
    resumed = train(TRAIN, tmp_path / "output", 4, again, "--remote", "--resume", hide=("hpool_vit",))
    assert resumed == [whole[1]]


def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(tmp_path):
    # `ddp_find_unused_parameters=False`: a parameter without a gradient would stop the second step.
    variants = {
        "default": {},
        "merge": {"ln_order": "pre", "pool_mode": "merge", "use_class_token": True},
        "schedules": {"hvt_pool_choices": [None, [2], [1, 3], [3]]},
    }
    folders = [tmp_path / name for name in variants]
    for folder, variant in zip(folders, variants.values(), strict=True):
        model = tiny_model(**variant)
        model.save_pretrained(folder)
        HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = train(TRAIN, tmp_path / "one", 3, *folders, "--batch_size", 8)
    two = train(*launch, TRAIN, tmp_path / "two", 3, *folders, "--batch_size", 4, env=environment)
    assert len(one) == len(two) == len(variants)
    for first, second in zip(one, two, strict=True):
        assert second["processes"] == 2 and len(second["losses"]) == 3
        assert second["losses"] == pytest.approx(first["losses"], abs=1e-4)
