"""Predictions of all processes, and the metrics of them."""

import os
import subprocess
import sys
from fractions import Fraction

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_config, tiny_model

from hpool_vit.toolkit.shared.images import DataError
from hpool_vit.toolkit.training.evaluation import METRICS, Evaluator, compute_metrics
from hpool_vit.toolkit.training.report import final_report
from hpool_vit.toolkit.training.schedules import ScheduleSampler


def test_the_confusion_matrix_counts_predictions_per_class():
    metric = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True)
    result = metric.compute(predictions=[0, 1, 1, 1, 3, 0], references=[0, 0, 1, 1, 1, 3], num_labels=4)
    assert result == {
        "confusion_matrix": [[1, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]],
        "per_class_accuracy": [1 / 2, 2 / 3, None, 0.0],
    }


@pytest.mark.parametrize(("predictions", "references"), [([0, 2], [0, 1]), ([0, 1], [0, -1])])
def test_the_confusion_matrix_refuses_a_label_that_it_has_no_place_for(predictions, references):
    metric = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True)
    with pytest.raises(ValueError, match=r"holds (2|-1): with num_labels=2 give 0 to 1"):
        metric.compute(predictions=predictions, references=references, num_labels=2)


def test_accuracies_are_exact_fractions_of_the_images():
    # The label's score has the ranks 1, 2, 5, 6, 8, 1 and 3.
    ranks = [1, 2, 5, 6, 8, 1, 3]
    scores = np.tile(np.arange(8, 0, -1, dtype=np.float32), (len(ranks), 1))
    metrics = compute_metrics(scores, np.array(ranks) - 1)
    assert metrics == {"top1": float(Fraction(2, 7)), "top5": float(Fraction(5, 7))}


@pytest.mark.parametrize("num_labels", [1, 2, 5, 6, 7, 30])
def test_the_shortcut_for_many_labels_agrees_with_the_metric_on_all_scores(num_labels):
    generator = np.random.default_rng(num_labels)
    # Few different values, so there are ties everywhere.
    scores = generator.integers(0, max(2, num_labels // 2), (200, num_labels)).astype(np.float32)
    scores[:20, : num_labels // 2] = -np.inf
    labels = generator.integers(0, num_labels, 200)
    metric = evaluate.load(str(METRICS / "topk_accuracy"), keep_in_memory=True)
    assert compute_metrics(scores, labels) == metric.compute(predictions=scores, references=labels)


def test_computing_metrics_leaves_its_arguments_and_the_random_state_alone():
    scores, labels = np.random.default_rng(0).random((5, 9)), np.arange(5)
    before, state = scores.copy(), np.random.get_state()[1].copy()
    compute_metrics(scores, labels)
    assert (scores == before).all() and (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (
            [[0.1, 0.2], [float("nan"), 0.1]],
            [0, 1],
            r"NaN for 1 of 2 images, first for image 1: .* lower the learning",
        ),
        ([[0.1, 0.2], [0.3, 0.1]], [0, 2], r"labels\[1\] is 2: give integers from 0 to 1"),
        ([[0.1, 0.2], [0.3, 0.1]], [-100, 1], r"labels\[0\] is -100"),
        ([[0.1, 0.2], [0.3, 0.1]], [0.0, 1.0], r"labels has the type float64: give integers"),
        ([[0.1, 0.2], [0.3, 0.1]], [0, 1, 1], r"shape \(2, 2\) and labels \(3,\)"),
        ([0.1, 0.2], [0, 1], r"shape \(2,\)"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), r"at least one image"),
    ],
)
def test_meaningless_scores_and_labels_are_refused(scores, labels, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        compute_metrics(np.array(scores), np.array(labels))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        final_report(np.array(scores), np.array(labels), ["a", "b"], tmp_path)
    assert not any(tmp_path.iterdir())


CONCURRENT = """
import socket, sys, time
from pathlib import Path

folder, name, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def refuse(*args):
    raise AssertionError(f"a connection to {args[1:]}")

socket.socket.connect = refuse

import numpy as np
from hpool_vit.toolkit.training.evaluation import compute_metrics
from hpool_vit.toolkit.training.report import final_report

(folder / name).touch()
while not (folder / other).exists():
    time.sleep(0.01)
for right in range(1, 16):  # each process has numbers of its own
    images = 40 + int(name)
    predictions = np.where(np.arange(images) < right, 3, 4)
    metrics = compute_metrics(np.eye(9)[predictions], np.full(images, 3))
    assert metrics == {"top1": right / images, "top5": right / images}, metrics
report = final_report(np.eye(9)[predictions], np.full(images, 3), list("abcdefghi"), folder / f"report-{name}")
assert report["num_images"] == images and report["most_confused"][0]["images"] == images - right, report
print("done")
"""


@pytest.mark.slow
def test_processes_that_share_a_cache_compute_metrics_at_the_same_time_without_the_hub(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CONCURRENT, tmp_path, *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in ("01", "10")
    ]
    for process in started:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0 and output == "done\n", errors[-3000:]
    # The cache holds the code of the metrics, and nobody's predictions.
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files and [path for path in files if "modules" not in path.parts] == []


def batches_of(labels: list[list[int]]) -> list[dict]:
    torch.manual_seed(0)
    return [{"pixel_values": torch.randn(len(part), 3, 32, 32), "labels": torch.tensor(part)} for part in labels]


@pytest.mark.usefixtures("fresh_accelerator")
class TestEvaluator:
    def test_predictions_leave_out_placeholders_and_keep_the_order(self):
        batches, accelerator, model = batches_of([[0, -100], [2], [-100, 1]]), Accelerator(cpu=True), tiny_model()
        scores, labels = Evaluator(batches, model.config, lambda batch: []).predict(model, accelerator)
        assert labels.tolist() == [0, 2, 1]
        images = torch.stack(
            [batches[0]["pixel_values"][0], batches[1]["pixel_values"][0], batches[2]["pixel_values"][1]]
        )
        np.testing.assert_allclose(scores, model(images).logits.detach().numpy(), atol=1e-5)

    def test_an_evaluation_has_loss_accuracies_and_the_number_of_images(self):
        batches, accelerator, model = batches_of([[0, 1], [2]]), Accelerator(cpu=True), tiny_model()
        results = Evaluator(batches, model.config, lambda batch: []).evaluate(model, accelerator)
        images = torch.cat([batch["pixel_values"] for batch in batches])
        expected = torch.nn.functional.cross_entropy(model(images).logits, torch.tensor([0, 1, 2])).item()
        assert list(results) == ["loss", "top1", "top5", "images"] and results["images"] == 3
        assert results["loss"] == pytest.approx(expected, abs=1e-5)

    def test_every_schedule_is_evaluated_with_its_own_pooling(self):
        model = tiny_model(hvt_pool_choices=[None, [1, 3]])
        seen = []
        model.register_forward_pre_hook(lambda *args: seen.append(model.config.hvt_pool))
        evaluator = Evaluator(batches_of([[0, 1]]), model.config, lambda batch: [])
        schedules = ScheduleSampler(model, [None, [1, 3]], seed=0)
        scores = evaluator.evaluate_schedules(model, Accelerator(cpu=True), schedules)
        assert list(scores) == ["none", "1,3"] and seen == [None, [1, 3]]

    def test_no_readable_image_at_all_is_an_error(self):
        evaluator = Evaluator(batches_of([[-100, -100]]), tiny_config(), lambda batch: [])
        with pytest.raises(DataError, match="No validation image can be read"):
            evaluator.predict(tiny_model(), Accelerator(cpu=True))
