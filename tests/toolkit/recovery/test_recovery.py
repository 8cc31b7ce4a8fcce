"""What pooling costs is recovered without labels: `hpool-vit recover`, and `hpool-vit speed-up --recover`."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import save_with_processor, tiny_config, tiny_model
from image_files import write_folder

from hpool_vit import HPoolViTForImageClassification, HPoolViTForSemanticSegmentation
from hpool_vit.toolkit import recover, speed_up
from hpool_vit.toolkit.command import main
from hpool_vit.toolkit.recovery import learning, lessons
from hpool_vit.toolkit.recovery.effort import Effort, read_effort
from hpool_vit.toolkit.recovery.learning import Recovery
from hpool_vit.toolkit.recovery.lessons import VIEWS, Lessons
from hpool_vit.toolkit.recovery.recover import remove_place


LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
MERGE = {"pool_mode": "merge", "merge_ratio": 0.5, "proportional_attention": True}
POOLED = {
    "max": {"pool_mode": "max", "hvt_pool": [1, 3]},
    "avg": {"pool_mode": "avg", "hvt_pool": [1, 3]},
    "grid": {"pool_mode": "avg", "hvt_pool": [1, 3], "pool_kernel_size": (2, 2), "pool_stride": (2, 2)},
    "merge": {**MERGE, "hvt_pool": [1, 3]},
}


def pooled(mode: str, **overrides):
    """The original with pooling: its weights, and stages without position embeddings worth mentioning."""
    model = HPoolViTForImageClassification(tiny_config(**POOLED[mode], **LABELS, **overrides)).eval()
    model.load_state_dict(tiny_model(hvt_pool=None, **LABELS).state_dict(), strict=False)
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "insects", per_class=16)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_with_processor(tmp_path_factory.mktemp("original") / "vit", tiny_model(hvt_pool=None, **LABELS))


@pytest.fixture(autouse=True)
def large_steps(monkeypatch):
    """So that a few steps on few images change something, and on all machines the same."""
    monkeypatch.setattr(learning, "mixed_precision", lambda device: contextlib.nullcontext())
    for name in ("MERGING_RATE", "WINDOWS_RATE"):
        monkeypatch.setattr(learning, name, 5e-4)
    monkeypatch.setattr(learning, "EMA_DECAY", 0.9)
    monkeypatch.setattr(learning, "BATCH_SIZE", 8)


def fail(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    printed = capsys.readouterr()
    assert ended.value.code == 1 and printed.err.splitlines()[-1].startswith("error: "), printed.err
    return printed.err.splitlines()[-1]


def make_recovery(effort: Effort) -> Recovery:
    teacher = tiny_model(hvt_pool=None, **LABELS)
    images = torch.randn(28, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    schedules = [{"hvt_pool": [1, 3], "merge_ratio": 0.5}, {"hvt_pool": [2], "merge_ratio": 0.5}]
    held_back, taught = (Lessons(teacher, part) for part in images.tensor_split([12]))
    torch.manual_seed(0)  # of the new stages
    return Recovery(pooled("max", hvt_pool_choices=[[1, 3], [2]]), taught, held_back, schedules, effort)


@pytest.mark.parametrize(
    ("value", "effort"),
    [
        ("90s", Effort(seconds=90)),
        ("20m", Effort(seconds=1200)),
        ("1.5 h", Effort(seconds=5400)),
        ("10", Effort(epochs=10)),
        (0.5, Effort(epochs=0.5)),
    ],
)
def test_an_effort_is_a_time_or_a_number_of_epochs(value, effort):
    assert read_effort(value) == effort


@pytest.mark.parametrize("value", ["0", "0m", "-1", "20x", "m", "", "nan", "1h30m"])
def test_other_efforts_are_refused(value):
    with pytest.raises(ValueError, match="must be a time above 0 such as 90s, 20m or 1h, or a number of epochs"):
        read_effort(value)


def test_the_teacher_answers_each_view_of_an_image_once(monkeypatch):
    teacher, asked, answer = tiny_model(hvt_pool=None), [], lessons.answer

    def counted_answer(model, pixel_values):
        asked.append(len(pixel_values))
        return answer(model, pixel_values)

    monkeypatch.setattr(lessons, "answer", counted_answer)
    taught = Lessons(teacher, torch.randn(6, 3, 32, 32))
    for indices in ([0, 1, 2], [2, 3], [0, 3]):
        for view in range(len(VIEWS)):
            pixel_values, answers = taught.batch(torch.tensor(indices), view)
            torch.testing.assert_close(answers.logits, teacher(pixel_values).logits, atol=1e-5, rtol=1e-5)
    assert sum(asked) == 4 * len(VIEWS) and len(VIEWS) == 2


def test_the_second_view_is_mirrored_and_closer():
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    first, second = (view(ramp) for view in VIEWS)
    assert torch.equal(first, ramp) and second.shape == ramp.shape
    row = second[0, 0, 16]
    assert (row.diff() < 0).all()
    assert row[0].item() == pytest.approx(1 - 1 / 16, abs=0.02) and row[-1].item() == pytest.approx(1 / 16, abs=0.02)


def test_it_learns_in_bfloat16_where_that_is_fast_and_is_judged_in_float32(monkeypatch, tmp_path):
    dtypes, given = [], learning.answer

    def spied_answer(model, pixel_values):
        answers = given(model, pixel_values)
        dtypes.append((torch.is_grad_enabled(), answers.logits.dtype))
        return answers

    monkeypatch.setattr(learning, "answer", spied_answer)
    monkeypatch.setattr(learning, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    make_recovery(Effort(epochs=2)).run(tmp_path / "recovery.pt", {})
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.float32)}


def test_speeds_share_weights_that_are_closer_to_the_original(original, photos, tmp_path):
    output_dir = tmp_path / "faster"
    record = speed_up(original, photos, output_dir, faster=[2, 1.5], trials=4, num_images=32, recover=24)
    recovery = record["recovery"]
    assert recovery["is_kept"] and 4 < recovery["epochs"] <= 24
    # 16 of the search and 16 that were not read for it; a sixth is held back.
    assert (recovery["images"], recovery["held_back"]) == (26, 6)
    shares = [after / before for before, after in zip(recovery["before"], recovery["after"], strict=True)]
    assert sum(shares) / 2 < 0.95
    # On average over the speeds, also on the images of the report.
    assert sum(row["loss"] / row["before_recovery"]["loss"] for row in record["speeds"].values()) / 2 < 1
    assert record["unpooled"]["before_recovery"]["loss"] == pytest.approx(0, abs=1e-6)
    assert record["unpooled"]["loss"] > 1e-6
    model = HPoolViTForImageClassification.from_pretrained(output_dir)
    assert model.config.hvt_pool == record["speeds"]["2"]["hvt_pool"]
    before = HPoolViTForImageClassification.from_pretrained(original)
    assert not torch.equal(model.classifier.weight, before.classifier.weight)
    assert json.loads((output_dir / "speed_up.json").read_text()) == record
    card = (output_dir / "README.md").read_text()
    assert "KL before" in card and "All speeds share them, also 1" in card
    assert [path.name for path in tmp_path.iterdir()] == ["faster"]


def test_without_a_gain_on_images_held_back_the_weights_stay(original, photos, tmp_path, monkeypatch, capsys):
    for name in ("MERGING_RATE", "WINDOWS_RATE"):
        monkeypatch.setattr(learning, name, 0.0)
    words = [original, "--images", photos, "--output_dir", tmp_path / "faster", "--trials", 3, "--recover", 40]
    main(["speed-up", *map(str, [*words, "--num_images", 32])])
    printed = capsys.readouterr()
    assert "brought nothing on images held back, and the weights are the original's" in printed.out
    assert "recovering: 100%" in printed.err
    recovery = json.loads((tmp_path / "faster" / "speed_up.json").read_text())["recovery"]
    assert not recovery["is_kept"] and recovery["after"] == recovery["before"]
    # It did not go on to the end.
    assert recovery["ended"] == "the images held back showed no gain any more" and recovery["epochs"] <= 20
    model = HPoolViTForImageClassification.from_pretrained(tmp_path / "faster")
    expected = HPoolViTForImageClassification.from_pretrained(original).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    # `recover` writes nothing then.
    student = save_with_processor(tmp_path / "pooled", pooled("avg"))
    words = [student, "--teacher", original, "--images", photos, "--effort", 40, "--num_images", 32]
    message = fail(capsys, "recover", *words, "--output_dir", tmp_path / "recovered")
    assert "--effort 40 brought nothing on" in message and "so nothing is written" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faster", "pooled"]


@pytest.mark.parametrize("mode", POOLED)
def test_any_pooling_comes_closer_to_the_model_without(mode, original, photos, tmp_path):
    student = save_with_processor(tmp_path / "pooled", pooled(mode))
    record = recover(student, original, photos, tmp_path / "recovered", effort=24, num_images=32)
    [row] = record["schedules"].values()
    assert row["hvt_pool"] == [1, 3] and row["loss"] < 0.9 * row["before"]["loss"]
    model = HPoolViTForImageClassification.from_pretrained(tmp_path / "recovered")
    before = pooled(mode)
    assert model.config.pool_mode == before.config.pool_mode
    assert model.config.pool_kernel_size == before.config.pool_kernel_size
    assert all(new.shape == old.shape for new, old in zip(model.parameters(), before.parameters(), strict=True))


def test_the_command_writes_folder_record_and_card(original, photos, tmp_path, capsys):
    student = save_with_processor(tmp_path / "pooled", pooled("max"))
    words = [student, "--teacher", original, "--images", photos, "--effort", 16, "--num_images", 32]
    main(["recover", *map(str, [*words, "--output_dir", tmp_path / "recovered"])])
    printed = capsys.readouterr()
    assert "| 1,3 | 64 → 31 → 15 |" in printed.out and "Saved in" in printed.out and "recovering: 100%" in printed.err
    record = json.loads((tmp_path / "recovered" / "recovery.json").read_text())
    assert record["recovery"]["epochs"] > 4 and record["images"]["held_back"] == 16
    card = (tmp_path / "recovered" / "README.md").read_text()
    assert "### Recovery" in card and "KL before" in card and "distilled from" in card
    assert not list(tmp_path.glob(".*"))


def test_a_model_for_several_schedules_learns_for_all_of_them(original, photos, tmp_path):
    student = save_with_processor(tmp_path / "pooled", pooled("avg", hvt_pool_choices=[[1, 3], [2], None]))
    record = recover(student, original, photos, tmp_path / "recovered", effort=24, num_images=32)
    assert list(record["schedules"]) == ["1,3", "2"]
    assert all(row["loss"] < row["before"]["loss"] for row in record["schedules"].values())
    model = HPoolViTForImageClassification.from_pretrained(tmp_path / "recovered")
    assert model.config.hvt_pool == [1, 3] and model.config.hvt_pool_choices == [[1, 3], [2], None]


def test_a_killed_recovery_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = make_recovery(Effort(epochs=10))
    expected = whole.run(tmp_path / "whole.pt", {"seed": 0})
    killed, learn = make_recovery(Effort(epochs=10)), Recovery.learn

    def learn_until_killed(self):
        if self.progress.step == 12:
            raise KeyboardInterrupt
        return learn(self)

    monkeypatch.setattr(Recovery, "learn", learn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        killed.run(tmp_path / "killed.pt", {"seed": 0})
    steps = []
    monkeypatch.setattr(Recovery, "learn", lambda self: steps.append(self.progress.step) or learn(self))
    resumed = make_recovery(Effort(epochs=10))
    result = resumed.run(tmp_path / "killed.pt", {"seed": 0})
    assert 0 < steps[0] <= 12 and steps[-1] == 19
    assert result.after == pytest.approx(expected.after, rel=1e-3) and result.epochs == expected.epochs
    for own, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)
    # Another run begins anew.
    steps.clear()
    make_recovery(Effort(epochs=2)).run(tmp_path / "killed.pt", {"seed": 1})
    assert steps[0] == 0


def test_a_damaged_file_of_a_killed_run_begins_anew(tmp_path):
    (tmp_path / "recovery.pt").write_bytes(b"half")
    result = make_recovery(Effort(epochs=2)).run(tmp_path / "recovery.pt", {"seed": 0})
    assert result.epochs == 2


def test_a_time_ends_a_recovery(tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(learning, "PATIENCE", math.inf)  # on a fast machine nothing more is gained after a second
    result = make_recovery(Effort(seconds=1)).run(tmp_path / "recovery.pt", {"seed": 0}, shares.append)
    assert 1 <= result.seconds < 20 and shares == sorted(shares) and shares[-1] == 1
    assert result.ended == "the time was up"


def test_a_loss_that_is_not_finite_ends_it_with_the_best_weights_so_far(tmp_path, monkeypatch):
    learn = Recovery.learn
    monkeypatch.setattr(Recovery, "learn", lambda self: learn(self) if self.progress.step < 12 else float("nan"))
    recovery = make_recovery(Effort(epochs=10))
    result = recovery.run(tmp_path / "recovery.pt", {"seed": 0})
    assert result.ended == "the loss was not finite" and result.is_kept
    assert recovery.losses() == pytest.approx(result.after, rel=1e-3)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path, monkeypatch):
    loss = Recovery.loss
    monkeypatch.setattr(Recovery, "loss", lambda self, *answers: loss(self, *answers) * math.nan)
    recovery = make_recovery(Effort(epochs=2))
    before = {name: weight.clone() for name, weight in recovery.model.state_dict().items()}
    assert math.isnan(recovery_of_one_check(recovery).learn())
    assert all(torch.equal(weight, before[name]) for name, weight in recovery.model.state_dict().items())


def recovery_of_one_check(recovery: Recovery) -> Recovery:
    recovery.progress.checks.append(recovery.describe(recovery.losses()))
    return recovery


def test_what_is_hardly_lost_does_not_decide_alone():
    recovery = recovery_of_one_check(make_recovery(Effort(epochs=2)))
    recovery.progress.checks[0]["losses"] = [1e-8, 0.2]
    assert recovery.weight(0) == pytest.approx(0.1 / 2e-4, rel=0.01)


def test_nothing_of_a_killed_recovery_is_left(tmp_path):
    file = tmp_path / ".recovered.recover" / "recovery.pt"
    file.parent.mkdir()
    for name in ("recovery.pt", "recovery.pt.1234.part"):
        (file.parent / name).touch()
    remove_place(file)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_it_in_one_line(original, photos, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learning.torch, "save", full)
    student = save_with_processor(tmp_path / "pooled", pooled("avg"))
    words = [student, "--teacher", original, "--images", photos, "--output_dir", tmp_path / "recovered"]
    message = fail(capsys, "recover", *words, "--effort", "4", "--num_images", "32")
    assert "recovery.pt cannot be written" in message and "goes on where it stopped" in message
    assert not (tmp_path / "recovered").exists()


def test_what_cannot_be_recovered_is_refused(original, photos, tmp_path, capsys):
    student = save_with_processor(tmp_path / "pooled", pooled("avg"))

    def refused(model=student, teacher=original, images=photos, *words):
        given = [model, "--teacher", teacher, "--images", images, "--output_dir", tmp_path / "recovered"]
        return fail(capsys, "recover", *given, *words)

    assert "does not pool, so there is nothing to recover" in refused(original)
    assert "is not the folder or Hub id of an HPool-ViT" in refused(tmp_path)
    segmenter = HPoolViTForSemanticSegmentation(tiny_config(pool_mode="merge", **LABELS))
    assert "segments images" in refused(save_with_processor(tmp_path / "segmenter", segmenter))
    damaged = pooled("avg")
    damaged.hpool_vit.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan
    message = refused(save_with_processor(tmp_path / "damaged", damaged))
    assert "damaged is damaged: the weights hpool_vit.layers.0.mlp.fc1.weight are not finite" in message
    assert "--batch_size 0 must be at least 1" in refused(student, original, photos, "--batch_size", "0")
    assert "was trained with avg pooling" in refused(student, student)
    others = save_with_processor(tmp_path / "others", tiny_model(hvt_pool=None, num_labels=5))
    message = refused(student, others)
    assert f"--teacher {others} does not fit the model: labels 5 instead of 3" in message
    assert "--effort soon must be a time above 0" in refused(student, original, photos, "--effort", "soon")
    few = write_folder(tmp_path / "few", per_class=8)
    message = refused(student, original, few, "--num_images", "24")
    assert "leaves 12 images to learn from" in message and "16 besides as many for the report" in message
    words = [original, "--images", few, "--output_dir", tmp_path / "faster", "--recover"]
    assert "leaves 12 images to learn from: --recover needs 16" in fail(capsys, "speed-up", *words, "20m")
    assert "--recover often must be a time above 0" in fail(capsys, "speed-up", *words, "often")
    assert not (tmp_path / "recovered").exists() and not (tmp_path / "faster").exists()
