"""What the tests share: tiny models, and processes that do not know the package."""

import subprocess
import sys
from pathlib import Path

import torch

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.toolkit import command


TESTS = Path(__file__).parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
TOOLKIT = ROOT / "toolkit"

# The modules that a saved folder of model and image processor carries.
CODE = {
    "configuration_hpool_vit.py",
    "image_processing_hpool_vit.py",
    "merging_hpool_vit.py",
    "modeling_hpool_vit.py",
    "pooling_hpool_vit.py",
}


def tiny_config(**overrides) -> HPoolViTConfig:
    """Four blocks of width 32 on images of 32 × 32; the stages have 64, 31 and 15 tokens."""
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
        "hvt_pool": [1, 3],
        "num_labels": 3,
    }
    return HPoolViTConfig(**{**tiny, **overrides})


def tiny_model(seed: int = 0, **overrides) -> HPoolViTForImageClassification:
    """A tiny model in evaluation mode whose weights are large enough to make every part of it count."""
    torch.manual_seed(seed)
    return HPoolViTForImageClassification(tiny_config(**{"initializer_range": 0.2, **overrides})).eval()


def run_python(*args, hide: tuple[str, ...] = (), check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Runs Python on `args` in a fresh process in which the modules in `hide` cannot be imported."""
    command = list(map(str, args))
    if hide:
        hiding = "; ".join(f"sys.modules[{name!r}] = None" for name in hide)
        program = (
            f"import runpy, sys; {hiding}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = ["-c", program, *command]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, **kwargs)
    assert not check or result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


def run_command(*args, **kwargs) -> subprocess.CompletedProcess:
    """Runs `hpool-vit` with `args` in a fresh process; keywords as for `run_python`."""
    return run_python("-m", "hpool_vit.toolkit.command", *args, **kwargs)


def call_command(capsys, *args) -> subprocess.CompletedProcess:
    """
    Runs `hpool-vit` with `args` in this process: in a fresh one, most of the time goes into imports.

    Returns:
        What `run_command(…, check=False)` returns.
    """
    capsys.readouterr()  # what was printed before
    words, status = list(map(str, args)), 0
    try:
        command.main(words)
    except SystemExit as ended:
        status = ended.code or 0
    printed = capsys.readouterr()
    return subprocess.CompletedProcess(words, status, printed.out, printed.err)


def save_with_processor(folder: Path, model) -> Path:
    """Saves a model and an image processor for it, and returns the folder."""
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return folder
