"""Runs Transformers' own suites, fetched by `fetch_transformers_tests.py`, on HPool-ViT."""

import os
import re

import pytest
import torch


MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_training_test",
    "torch_compile_test",
)

# Why a suite may skip a test. Any other reason would be about this model, and is a failure.
REASONS = re.compile(
    # The machine.
    r"requires|Need at least \d+ FSDP workers"
    # What models of text or of several modalities have, and image classifiers have not.
    r"|resize_embeddings|inputs_embeds|language modeling head|sliding window|RoPE|[Ee]xpert|grouped_mm|router_logits"
    r"|TP plan|composite|No subconfigs|not resized|other modalities|take a cache as input"
    # What older models have: modules that half precision breaks, weights under other names, other ways to validate.
    r"|_keep_in_fp32_modules|No conversion found|No validation found|does not have dict size"
)

collect_ignore = ["transformers_tests"]


def is_selected(config) -> bool:
    return re.search(r"(?<!not )\bconformance\b", config.getoption("markexpr")) is not None


def pytest_ignore_collect(collection_path, config):
    # Importing the suites takes seconds, and they need to be fetched first.
    return None if is_selected(config) else True


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Transformers' suites")
    if is_selected(config):
        os.environ["HF_HUB_OFFLINE"] = "1"
        # What Transformers calls slow takes seconds with these models, which are so small that a second thread costs
        # more than it brings.
        os.environ["RUN_SLOW"] = "1"
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not REASONS.search(report.longrepr[-1]):
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[-1]}\nThis reason is not about images or the machine: see REASONS."
    return report
