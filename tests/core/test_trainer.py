"""The Trainer, as a user starts it: in processes of its own, one or two, with the package or with a folder's code."""

import json
import os
from pathlib import Path

import pytest
from helpers import CODE, TESTS, run_python, tiny_model

from hpool_vit import HPoolViTImageProcessor


TRAIN = TESTS / "programs" / "train.py"


def result_of(output: str) -> dict:
    return json.loads(output.split("RESULT ")[1].splitlines()[0])


def test_training_stopped_after_a_checkpoint_resumes_to_the_same_weights(saved_folder, tmp_path):
    whole = result_of(run_python(TRAIN, saved_folder, tmp_path / "whole", 4).stdout)
    run_python(TRAIN, saved_folder, tmp_path / "parts", 2)
    resumed = result_of(run_python(TRAIN, saved_folder, tmp_path / "parts", 4, "--resume").stdout)
    assert len(whole["losses"]) == 4 and whole["losses"][-1] < whole["losses"][0]
    assert resumed == whole


def test_a_checkpoint_of_a_remote_code_model_is_complete_and_resumes_in_a_fresh_process(saved_folder, tmp_path):
    run_python(TRAIN, saved_folder, tmp_path / "run", 2, "--remote", hide=("hpool_vit",))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*.py")} == CODE
    assert (checkpoint / "preprocessor_config.json").is_file()
    arguments = (TRAIN, checkpoint, tmp_path / "run", 4, "--remote", "--resume")
    resumed = result_of(run_python(*arguments, hide=("hpool_vit",)).stdout)
    assert resumed == result_of(run_python(TRAIN, saved_folder, tmp_path / "whole", 4).stdout)


def train_on_two_processes(folder: Path, output: Path) -> dict:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return result_of(run_python(*launch, TRAIN, folder, output, 3, "--batch_size", 4, env=environment).stdout)


@pytest.mark.parametrize(
    "variant", [{}, {"ln_order": "pre", "pool_mode": "merge", "use_class_token": True}], ids=["default", "merge"]
)
def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(variant, tmp_path):
    # `ddp_find_unused_parameters=False`: a parameter without a gradient would stop the second step.
    model = tiny_model(**variant)
    model.save_pretrained(tmp_path / "model")
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(tmp_path / "model")
    one = result_of(run_python(TRAIN, tmp_path / "model", tmp_path / "one", 3, "--batch_size", 8).stdout)
    two = train_on_two_processes(tmp_path / "model", tmp_path / "two")
    assert two["processes"] == 2 and len(two["losses"]) == 3
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
