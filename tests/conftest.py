"""Fixtures, and no network for any test."""

import os
import sys
from pathlib import Path


# Before anything imports huggingface_hub: no test may reach the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import EXAMPLES, save_with_processor, tiny_model


sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmark"), str(EXAMPLES / "research")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """`torch.compile` counts compilations per line of code over a whole process: this starts at none."""
    torch._dynamo.reset()


@pytest.fixture
def fresh_accelerator():
    """Each run of a program would be a process of its own."""
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory) -> Path:
    """A folder as `save_pretrained` of a model and of its image processor leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-hpool-vit"
    model = tiny_model(id2label={0: "ant", 1: "bee", 2: "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2})
    return save_with_processor(folder, model)


@pytest.fixture(scope="session")
def browser():
    """Chromium, one for all tests of a process: Playwright does not start twice in it."""
    from chromium import open_browser  # only tests of pages have Playwright

    with open_browser() as browser:
        yield browser
