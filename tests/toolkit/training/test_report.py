"""What a run leaves behind: tables, pictures, the machine."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from hpool_vit.toolkit.training.report import (
    describe_hardware,
    draw_confusion_matrix,
    draw_curves,
    final_report,
    memory_gb,
)


def one_hot(predictions: list[int], num_labels: int) -> np.ndarray:
    """Scores of which the prediction has the highest."""
    return np.eye(num_labels, dtype=np.float32)[predictions]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def below_title(path: Path) -> np.ndarray:
    """The picture without its topmost part, where the title states numbers of images."""
    picture = pixels(path)
    return picture[len(picture) // 15 :]


def test_the_final_report_tells_accuracies_and_confused_pairs(tmp_path):
    names = ["ant", "bee | wasp", "no\nimages", "cost $5 $"]
    labels = [0] * 4 + [1] * 5 + [3]
    predictions = [0, 0, 0, 1, 1, 1, 0, 0, 3, 0]
    report = final_report(one_hot(predictions, 4), np.array(labels), names, tmp_path / "new" / "folder")
    assert json.loads(json.dumps(report)) == {
        "num_images": 10,
        "mean_class_accuracy": pytest.approx((3 / 4 + 2 / 5 + 0) / 3),
        "classes_without_images": ["no images"],
        "most_confused": [
            {"label": "bee | wasp", "predicted": "ant", "images": 2, "share": 2 / 5},
            {"label": "ant", "predicted": "bee | wasp", "images": 1, "share": 1 / 4},
            {"label": "bee | wasp", "predicted": "cost $5 $", "images": 1, "share": 1 / 5},
            {"label": "cost $5 $", "predicted": "ant", "images": 1, "share": 1.0},
        ],
    }
    table = pd.read_csv(tmp_path / "new" / "folder" / "per_class_accuracy.csv")
    assert table["name"].tolist() == ["ant", "bee | wasp", "no images", "cost $5 $"]
    assert table["images"].tolist() == [4, 5, 0, 1] and table["right"].tolist() == [3, 2, 0, 0]
    assert table["accuracy"].tolist() == pytest.approx([3 / 4, 2 / 5, float("nan"), 0], nan_ok=True)
    picture = pixels(tmp_path / "new" / "folder" / "confusion_matrix.png")
    assert (picture == 204).all(axis=-1).sum() > 1000  # the row of the class without images is grey


def test_a_report_without_mistakes_names_no_confused_pair(tmp_path):
    report = final_report(one_hot([0, 1, 1], 2), np.array([0, 1, 1]), ["ant", "bee"], tmp_path)
    assert report["most_confused"] == [] and report["mean_class_accuracy"] == 1


def test_a_report_needs_a_name_for_every_label(tmp_path):
    with pytest.raises(ValueError, match="label_names has 2 names for 3 columns of scores"):
        final_report(one_hot([0, 1], 3), np.array([0, 1]), ["ant", "bee"], tmp_path)


@pytest.mark.parametrize("num_labels", [2, 10, 1000])
def test_a_single_mistake_is_visible_in_the_picture(num_labels, tmp_path):
    names = [f"class {index}" for index in range(num_labels)]
    matrix = np.eye(num_labels, dtype=int) * 50
    draw_confusion_matrix(matrix, names, tmp_path / "perfect.png")
    matrix[num_labels // 2, num_labels // 4] = 1
    draw_confusion_matrix(matrix, names, tmp_path / "mistake.png")
    perfect, mistake = below_title(tmp_path / "perfect.png"), below_title(tmp_path / "mistake.png")
    assert perfect.shape == mistake.shape and min(perfect.shape[:2]) > 450
    changed = np.abs(perfect - mistake).sum(axis=-1) > 40
    rows, columns = np.nonzero(changed)
    # One square cell, of two by two pixels at least.
    assert changed.sum() >= 4 and abs(np.ptp(rows) - np.ptp(columns)) <= 2
    assert np.ptp(rows) < changed.shape[0] / num_labels


@pytest.mark.parametrize(("num_labels", "has_counts"), [(20, True), (21, False)])
def test_few_classes_have_their_counts_in_the_picture_and_many_do_not(num_labels, has_counts, tmp_path):
    names = [str(index) for index in range(num_labels)]
    for count in (1, 888):
        draw_confusion_matrix(np.eye(num_labels, dtype=int) * count, names, tmp_path / f"{count}.png")
    differs = (below_title(tmp_path / "1.png") != below_title(tmp_path / "888.png")).any()
    assert differs == has_counts


def test_colours_show_shares_of_each_class_whatever_its_size(tmp_path):
    names, even = [str(index) for index in range(30)], np.eye(30, dtype=int) * 10
    even[3, 5] = 10  # half of them wrong
    uneven = even * np.arange(1, 31)[:, None]
    draw_confusion_matrix(even, names, tmp_path / "even.png")
    draw_confusion_matrix(uneven, names, tmp_path / "uneven.png")
    assert (below_title(tmp_path / "even.png") == below_title(tmp_path / "uneven.png")).all()


def log_history(**evaluations) -> list[dict]:
    """Two epochs of four steps, with `evaluations` at the end of each, and the summary that the Trainer adds."""
    log = []
    for step in range(1, 9):
        log.append(
            {"loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3 / step, "epoch": step / 4, "step": step}
        )
        if step % 4 == 0:
            log.append({**{key: values[step // 4 - 1] for key, values in evaluations.items()}, "epoch": step / 4})
    return [*log, {"train_runtime": 3.0, "train_loss": 0.7, "epoch": 2.0, "step": 8}]


def test_curves_have_a_panel_for_each_quantity_that_was_logged(tmp_path):
    full = log_history(eval_loss=[1, 0.8], eval_top1=[0.5, 0.6], eval_ema_top1=[0.4, 0.7], eval_runtime=[1, 1])
    assert draw_curves(full, tmp_path / "full.png") == tmp_path / "full.png"
    draw_curves(log_history(eval_loss=[1, 0.8]), tmp_path / "loss.png")
    draw_curves([{"epoch": 1.0, "loss": 0.5}], tmp_path / "point.png")
    heights = {name: len(pixels(tmp_path / f"{name}.png")) for name in ("full", "loss", "point")}
    assert heights["full"] > heights["loss"] > heights["point"] > 300


def test_curves_show_the_averaged_weights_beside_the_others(tmp_path):
    draw_curves(log_history(eval_top1=[0.5, 0.6]), tmp_path / "one.png")
    draw_curves(log_history(eval_top1=[0.5, 0.6], eval_ema_top1=[0.4, 0.7]), tmp_path / "two.png")
    green = [44, 160, 44]
    assert not (pixels(tmp_path / "one.png") == green).all(axis=-1).any()
    assert (pixels(tmp_path / "two.png") == green).all(axis=-1).sum() > 100


def test_curves_of_a_resumed_training_hold_each_epoch_once(tmp_path):
    log = log_history(eval_top1=[0.5, 0.6])
    draw_curves(log, tmp_path / "straight.png")
    # Steps that a killed run had logged after the checkpoint come again, with the values that count.
    stale = [{**entry, **{key: 9.0 for key in ("loss", "eval_top1") if key in entry}} for entry in log[3:6]]
    draw_curves([*log[:3], *stale, *log[3:]], tmp_path / "resumed.png")
    assert (pixels(tmp_path / "straight.png") == pixels(tmp_path / "resumed.png")).all()


@pytest.mark.parametrize(
    "log", [[], [{"train_runtime": 3.0, "epoch": 1.0}], [{"loss": float("nan"), "epoch": 1.0}], [{"loss": 1.0}]]
)
def test_curves_of_nothing_are_not_drawn(log, tmp_path):
    assert draw_curves(log, tmp_path / "curves.png") is None
    assert not any(tmp_path.iterdir())


def test_the_hardware_is_described_for_a_reader(monkeypatch):
    description = describe_hardware(num_processes=3)
    assert description["processes"] == 3 and description["gpus"] == []
    assert description["ram_gb"] == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.1)
    assert (
        1 <= description["cpu_threads"] <= os.cpu_count() and description["torch_threads"] == torch.get_num_threads()
    )
    assert description["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert {"python", "transformers", "accelerate", "datasets", "hpool_vit"} <= set(description["versions"])
    assert json.loads(json.dumps(description)) == description

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert describe_hardware(2)["gpus"] == ["NVIDIA H100, 85.0 GB"] * 2


def test_the_peak_of_memory_stays_when_the_memory_is_gone(monkeypatch):
    before = memory_gb("cpu")
    assert list(before) == ["peak_memory_gb"]
    block = np.ones(300_000_000, dtype=np.uint8)
    resident = psutil.Process().memory_info().rss / 1e9
    assert before["peak_memory_gb"] > 0.1 and resident > 0.3
    del block
    after = memory_gb(torch.device("cpu"))["peak_memory_gb"]
    assert resident - 0.01 <= after < 20 * resident

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    assert memory_gb("cuda:0")["peak_gpu_memory_gb"] == 2.5
