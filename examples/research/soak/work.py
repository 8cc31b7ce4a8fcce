"""What the parts of the soak share: a tiny training, processes that are bounded in time, and ways to compare files."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor


EXAMPLES = Path(__file__).resolve().parents[2]
HPOOL_VIT = [sys.executable, "-m", "hpool_vit.toolkit.command"]
PROGRAMS = {
    "hpool-vit train": [*HPOOL_VIT, "train"],
    "run_image_classification_no_trainer.py": [
        sys.executable,
        str(EXAMPLES / "run_image_classification_no_trainer.py"),
    ],
}
CLASSES = ("ant", "bee", "cat")
SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2}
# Everything random that a run can have: dropout, stochastic depth, augmentation, Mixup, and a moving average.
TRAINING = (
    "--recipe tiny --use_cpu --disable_tqdm true --report_to none --logging_steps 1 --per_device_train_batch_size 4 "
    "--hvt_pool 1 --save_strategy steps --save_steps 2 --save_total_limit 2 --ema_decay 0.9 --drop_path_rate 0.3 "
    "--hidden_dropout_prob 0.1 --rand_augment_ops 2 --mixup_alpha 0.3"
)
# No single process takes longer, also on a busy machine.
MOST_SECONDS = 300


def environment() -> dict[str, str]:
    """One thread, so that a run can be repeated to the bit, and no calls to the Hub."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(words: list[str], **kwargs) -> subprocess.CompletedProcess:
    """Runs a command to its end, for at most `MOST_SECONDS`. Bytes of its output that are not UTF-8 are escaped."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "backslashreplace"}
    with subprocess.Popen(words, env=environment(), start_new_session=True, **pipes, **kwargs) as process:
        try:
            stdout, stderr = process.communicate(timeout=MOST_SECONDS)
        except BaseException:
            # With all processes that it started.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def training_command(program: str, photos: Path, output_dir: Path, epochs: int) -> list[str]:
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    folders = ["--train_dir", str(photos), "--validation_dir", str(photos), "--output_dir", str(output_dir)]
    return [*PROGRAMS[program], *TRAINING.split(), *sizes, *folders, "--num_train_epochs", str(epochs)]


def write_photos(folder: Path, per_class: int = 8) -> Path:
    """One sub-folder per class with small pictures of random colours."""
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def write_model(folder: Path) -> Path:
    """A tiny model with random weights that are large enough to tell images apart."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
    config = HPoolViTConfig(**SIZES, hvt_pool=[1], initializer_range=0.2, **labels)
    HPoolViTForImageClassification(config).save_pretrained(folder)
    HPoolViTImageProcessor.for_config(config).save_pretrained(folder)
    return folder


def write_vit(folder: Path) -> Path:
    """A tiny ViT to convert."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SIZES, num_labels=len(CLASSES))).save_pretrained(folder)
    return folder


def digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def weights_of(output_dir: Path) -> dict[str, str]:
    """A digest of every file of weights in a finished run, those of its checkpoints and of the moving average too."""
    return {str(file.relative_to(output_dir)): digest(file) for file in sorted(output_dir.rglob("*.safetensors"))}


def names_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def peak_bytes(process: int | str) -> int:
    """The most memory that a process has had so far; `self` is this one. 0 except on Linux."""
    status = Path(f"/proc/{process}/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
