"""What the tests share: no network, tiny models, saved folders, and processes that do not know the package."""

import os
import subprocess
import sys
from pathlib import Path


# Before anything imports huggingface_hub: no test may reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor


TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory) -> Path:
    """A folder as `save_pretrained` of a model and of its image processor leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-hpool-vit"
    model = tiny_model(id2label={0: "ant", 1: "bee", 2: "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2})
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return folder
