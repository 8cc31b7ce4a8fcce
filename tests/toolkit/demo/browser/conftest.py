"""The demo page in its own process, and a browser that opens it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from chromium import watched_page
from helpers import tiny_model
from playwright.sync_api import Page

from hpool_vit import HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.toolkit.data.digits import load_digits_dataset


CHOICES = [[1], [1, 3], [1, 2, 3]]
NUM_STEPS = 300


def train_on_digits(model: HPoolViTForImageClassification, pixel_values: torch.Tensor, labels: torch.Tensor):
    """A few epochs with the schedules in turn: enough to recognize most digits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=NUM_STEPS)
    model.train()
    for step in range(NUM_STEPS):
        batch = torch.randint(len(labels), (64,))
        model.set_hvt_pool(CHOICES[step % len(CHOICES)])
        model(pixel_values[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.set_hvt_pool(CHOICES[1])
    model.eval()


@pytest.fixture(scope="session")
def digits():
    return load_digits_dataset()


@pytest.fixture(scope="session")
def digits_folder(digits, tmp_path_factory) -> Path:
    """A small model of handwritten digits with three schedules."""
    names = digits["train"].features["label"].names
    model = tiny_model(
        hidden_size=64,
        intermediate_size=128,
        ln_order="pre",
        initializer_range=0.02,
        hvt_pool=CHOICES[1],
        hvt_pool_choices=CHOICES,
        num_labels=10,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    size = {"height": 32, "width": 32}
    image_processor = HPoolViTImageProcessor.for_config(model.config, size=size, do_center_crop=False)
    train = digits["train"]
    pixel_values = image_processor(list(train["image"]), return_tensors="pt").pixel_values
    train_on_digits(model, pixel_values, torch.tensor(train["label"]))
    folder = tmp_path_factory.mktemp("demo") / "digits"
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@dataclass
class App:
    """A running page: its address, and the file with the output of its process."""

    url: str
    log: Path

    def read_log(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="session")
def app(digits_folder, saved_folder, tmp_path_factory) -> App:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    log = folder / "log"
    command = [sys.executable, Path(__file__).with_name("run_offline.py"), "hpool_vit.toolkit.command"]
    command += ["demo", digits_folder, saved_folder, "--server_port", str(port)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "PYTHONUNBUFFERED": "1"}
    # The page must stay offline by itself.
    del environment["HF_HUB_OFFLINE"]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment
        )
    try:
        deadline = time.monotonic() + 300
        while "The page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield App(re.search(r"http://\S+", log.read_text())[0], log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@pytest.fixture
def page(app, browser) -> Page:
    """The open page. After the test, checks that it asked no other machine for anything and logged no error."""
    page, asked, errors = watched_page(browser, 1240, 1000)
    page.goto(app.url)
    page.get_by_role("heading", name="HPool-ViT").wait_for()
    page.locator("#latency").wait_for()
    yield page
    page.close()
    hosts = {url.split("/")[2] if "//" in url else "" for url in asked}
    assert hosts <= {app.url.split("/")[2], ""}
    assert not errors
    assert "Traceback" not in app.read_log() and "OUTSIDE" not in app.read_log()
