"""The training programs as you start them: killed and started again, in several processes, on several machines."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CODE, EXAMPLES, TESTS, run_python
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hpool_vit.toolkit.training.checkpoints import find_last_checkpoint, list_checkpoints


TRAINER, LOOP = ["-m", "hpool_vit.toolkit.command", "train"], [EXAMPLES / "run_image_classification_no_trainer.py"]
both_programs = pytest.mark.parametrize(
    "program", [pytest.param(TRAINER, id="trainer"), pytest.param(LOOP, id="loop", marks=pytest.mark.slow)]
)

DIGITS = (
    "--recipe tiny --dataset_name digits --use_cpu --disable_tqdm true --logging_steps 1 --report_to none"
    " --image_size 16 --patch_size 4 --hidden_size 32 --intermediate_size 64 --num_hidden_layers 3"
    " --num_attention_heads 2 --hvt_pool 1 --train_crop none --horizontal_flip 0 --affine_degrees 10"
    " --affine_translate 0.1"
)
TORCHRUN = ["-m", "torch.distributed.run"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums of floats depend on the number of threads, and processes side by side must not fight for the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def command(program: list, output_dir: Path, flags: str, launcher: list = ()) -> list[str]:
    return [*map(str, launcher), *map(str, program), *DIGITS.split(), "--output_dir", str(output_dir), *flags.split()]


def results_of(output_dir: Path) -> dict[str, float]:
    return json.loads((output_dir / "all_results.json").read_text())


def losses_of(output_dir: Path) -> list[float]:
    """The losses of the steps."""
    log = json.loads((output_dir / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


def assert_same_weights(first: Path, second: Path):
    others = load_file(second / "model.safetensors")
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(tensor, others[name]), name


def kill_when(condition, process: subprocess.Popen, seconds: float = 240):
    """Kills a process, with its workers, as soon as the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the process did not get there"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


FLAGS = "--num_train_epochs 2 --max_train_images 512 --save_strategy steps --save_steps 3 --save_total_limit 2"
FLAGS += (
    " --dataloader_num_workers 1 --ema_decay 0.9 --drop_path_growth 0.1 --mixup_alpha 0.5 --max_validation_images 50"
)


@pytest.mark.slow
@both_programs
def test_a_run_killed_at_any_moment_ends_with_the_weights_of_a_run_that_was_not(program, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # The first kill comes while a checkpoint is written, the second at an arbitrary moment.
    conditions = [
        lambda: (killed / "checkpoint-6").is_dir(),
        lambda: find_last_checkpoint(killed).name == "checkpoint-9" and time.sleep(0.1) is None,
    ]
    unbroken = subprocess.Popen(
        [sys.executable, *command(program, whole, FLAGS)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for condition in conditions:
        process = subprocess.Popen(
            [sys.executable, *command(program, killed, FLAGS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        kill_when(condition, process)
    printed = run_python(*command(program, killed, FLAGS)).stdout
    assert "resuming from" in printed
    output, _ = unbroken.communicate()
    assert unbroken.returncode == 0, output[-3000:]
    assert_same_weights(whole, killed)
    last = list_checkpoints(whole)[-1].name
    assert_same_weights(whole / last / "ema", killed / last / "ema")
    assert results_of(whole)["eval_loss"] == results_of(killed)["eval_loss"]


# Without anything that each process draws at random.
EQUAL = "--num_train_epochs 1 --max_train_images 400 --max_validation_images 101 --learning_rate 3e-3"
EQUAL += " --drop_path_rate 0"


def assert_equal_runs(folders: list[Path]):
    first, second = map(losses_of, folders)
    assert len(first) == 12
    assert second == pytest.approx(first, abs=1e-4)
    first, second = map(results_of, folders)
    # 101 images do not fill the batches, and the processes get different numbers of them.
    assert first["eval_images"] == second["eval_images"] == 101
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], abs=1e-4)
    assert second["eval_top1"] == first["eval_top1"]
    for name, tensor in load_file(folders[0] / "model.safetensors").items():
        torch.testing.assert_close(load_file(folders[1] / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Callable[[list], Path]:
    """The folder of a run of one process, once for each program."""

    @functools.cache
    def run(*program) -> Path:
        folder = tmp_path_factory.mktemp("one") / "one"
        run_python(*command(program, folder, f"{EQUAL} --per_device_train_batch_size 32"))
        return folder

    return lambda program: run(*program)


@pytest.mark.slow
@both_programs
def test_two_processes_train_as_one_with_twice_the_batch(program, one_process, tmp_path):
    folders = [one_process(program), tmp_path / "two"]
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
    run_python(*command(program, folders[1], f"{EQUAL} --per_device_train_batch_size 16", launcher))
    assert_equal_runs(folders)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@both_programs
def test_two_machines_train_as_one_with_twice_the_batch(program, one_process, tmp_path):
    folders = [one_process(program), tmp_path / "two"]
    endpoint = f"127.0.0.1:{free_port()}"
    launcher = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", endpoint, "--rdzv_id", "test"]
    words = command(program, folders[1], f"{EQUAL} --per_device_train_batch_size 16", launcher)
    machines = [
        subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert_equal_runs(folders)


# As the configuration sets it for the processes that it starts.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.mark.slow
@both_programs
def test_two_processes_that_share_the_weights_train_as_one(program, tmp_path):
    flags = EQUAL.replace("--learning_rate", "--ema_decay 0.5 --learning_rate")
    folders = [tmp_path / "one", tmp_path / "two"]
    run_python(*command(program, folders[0], f"{flags} --per_device_train_batch_size 32"))
    words = command(program, folders[1], f"{flags} --per_device_train_batch_size 16")
    words.remove("--use_cpu")
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(TESTS / "programs" / "fsdp_on_cpu.py")]
    run_python(*launcher, *words, env={**os.environ, **FSDP2})
    assert_equal_runs(folders)
    averaged = [results_of(folder)["eval_ema_loss"] for folder in folders]
    assert averaged[1] == pytest.approx(averaged[0], abs=1e-4)
    assert_whole_and_same(folders[1], list_checkpoints(folders[1])[-1] / "ema")


def assert_whole_and_same(folder: Path, averaged: Path):
    """One process loads both folders, and the first holds the averaged weights."""
    first, second = (AutoModelForImageClassification.from_pretrained(path).state_dict() for path in (folder, averaged))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert {path.name for path in folder.iterdir()} & {path.name for path in averaged.iterdir()} >= CODE
