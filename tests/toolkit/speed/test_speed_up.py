"""`hpool-vit speed-up`: from any ViT and a folder of images to a folder that offers speeds."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import run_command, save_with_processor, tiny_config, tiny_model
from image_files import BAD_FILES, picture, write_folder
from PIL import Image
from transformers import AutoModel, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from hpool_vit import (
    HPoolViTForImageClassification,
    HPoolViTForSemanticSegmentation,
    HPoolViTImageProcessor,
    HPoolViTModel,
)
from hpool_vit.toolkit import block_macs, model_stats, predict, speed_up
from hpool_vit.toolkit.command import main
from hpool_vit.toolkit.export import export
from hpool_vit.toolkit.speed import costs, inputs, report
from hpool_vit.toolkit.speed import speed_up as speed_up_module
from hpool_vit.toolkit.speed.costs import MacsCost, TimeCost
from hpool_vit.toolkit.speed.inputs import as_asked_of_convert, load_photos, read_labels, read_pool


MERGE = {"pool_mode": "merge", "merge_ratio": 0.5, "proportional_attention": True}
LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
QUICK = {"trials": 12, "num_images": 24}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "insects", per_class=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_with_processor(tmp_path_factory.mktemp("source") / "tiny", tiny_model(**MERGE, **LABELS))


@pytest.fixture(scope="module")
def made(source, photos, tmp_path_factory) -> tuple[Path, dict]:
    output_dir = tmp_path_factory.mktemp("made") / "faster"
    record = speed_up(source, photos, output_dir, faster=[2, 1.5], **QUICK)
    return output_dir, record


def fail(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["speed-up", *map(str, words)])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and printed.err.count("\n") == 1, printed.err
    return printed.err


def test_the_folder_offers_the_speeds_and_opens_at_the_first(made):
    output_dir, record = made
    model = HPoolViTForImageClassification.from_pretrained(output_dir).eval()
    assert list(record["speeds"]) == ["2", "1.5"]
    assert set(model.config.speeds) == {1.5, 2.0}
    whole = model_stats(model.config.with_schedule(None))["macs"]
    for speed in (1.5, 2):
        row = record["speeds"][f"{speed:g}"]
        sped = HPoolViTForImageClassification.from_pretrained(output_dir, speed=speed)
        assert sped.config.hvt_pool == row["hvt_pool"] and sped.config.merge_ratio == row["merge_ratio"]
        assert model_stats(sped.config)["macs"] == row["macs"] <= whole / speed
        assert row["times_fewer_macs"] == pytest.approx(whole / row["macs"], rel=1e-4)
    assert model.config.hvt_pool == record["speeds"]["2"]["hvt_pool"]
    assert sum(block_macs(model.config)) < whole
    assert torch.equal(model.classifier.weight, tiny_model(**MERGE, **LABELS).classifier.weight)


def test_what_is_reported_was_measured_on_images_that_the_search_did_not_see(made, photos):
    output_dir, record = made
    assert record["images"]["searched"] == record["images"]["held_back"] == 12
    assert record["images"]["found"] == 24 and record["images"]["skipped"] == []
    processor = HPoolViTImageProcessor.from_pretrained(output_dir)
    model = HPoolViTForImageClassification.from_pretrained(output_dir).eval()
    # The same order as the search's, from the same seed.
    files = sorted(map(str, photos.rglob("*.png")))
    random.Random(0).shuffle(files)
    held_back = [Image.open(file).convert("RGB") for file in files[12:]]
    pixel_values = processor(held_back, return_tensors="pt").pixel_values
    with torch.no_grad():
        model.set_speed(1)
        expected = model(pixel_values).logits
        model.set_speed(2)
        answers = model(pixel_values).logits
    kl = torch.nn.functional.kl_div(
        answers.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True
    )
    row = record["speeds"]["2"]
    assert row["loss"] == pytest.approx(kl.item(), rel=1e-3)
    assert row["loss_interval"][0] <= row["loss"] <= row["loss_interval"][1]
    assert row["agreement"] == pytest.approx((answers.argmax(-1) == expected.argmax(-1)).float().mean().item())
    labels = torch.tensor([LABELS["label2id"][Path(file).parent.name] for file in files[12:]])
    assert row["accuracy"] == pytest.approx((answers.argmax(-1) == labels).float().mean().item(), rel=1e-4)


def test_record_picture_and_card_are_in_the_folder(made):
    output_dir, record = made
    assert json.loads((output_dir / "speed_up.json").read_text()) == record
    assert len(record["tried"]) == record["trials"] > 0
    assert {row["num_images"] for row in record["tried"]} >= {12}
    with Image.open(output_dir / "speed_up.png") as curve:
        assert curve.size[0] > 900
    card = (output_dir / "README.md").read_text()
    assert "takes 1, 2, 1.5; the folder opens at 2" in card and "12 images that the search did not see" in card
    assert "![What the search tried](speed_up.png)" in card
    assert not list(output_dir.parent.glob(".*"))


def test_the_command_prints_the_table_and_takes_several_numbers(source, photos, tmp_path, capsys):
    output_dir = tmp_path / "faster"
    words = ["--images", photos, "--faster", 1.3, 1.6, source, "--output_dir", output_dir, "--trials", 4]
    main(["speed-up", *map(str, words), "--num_images", "16"])
    printed = capsys.readouterr()
    assert "| 1.3 |" in printed.out and "| 1.6 |" in printed.out and "Saved in" in printed.out
    assert "searching: 100%" in printed.err
    assert HPoolViTForImageClassification.from_pretrained(output_dir).config.speeds.keys() == {1.3, 1.6}


def test_a_vit_of_transformers_becomes_faster(photos, tmp_path):
    sizes = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2}
    vit = ViTForImageClassification(ViTConfig(hidden_size=32, intermediate_size=64, **sizes, **LABELS)).eval()
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    record = speed_up(tmp_path / "vit", photos, tmp_path / "faster", faster=[1.5], **QUICK)
    model = HPoolViTForImageClassification.from_pretrained(tmp_path / "faster").eval()
    assert model.config.pool_mode == "merge" and model.config.proportional_attention
    assert "accuracy" in record["unpooled"]
    pixel_values = torch.randn(2, 3, 32, 32)
    model.set_speed(1)
    torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=1e-4)


def test_a_source_without_a_head_is_compared_by_its_features(photos, tmp_path):
    sizes = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(hidden_size=32, intermediate_size=64, **sizes), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    record = speed_up(tmp_path / "vit", photos, tmp_path / "faster", faster=[1.5], **QUICK)
    assert record["loss"] == "cosine"
    row = record["speeds"]["1.5"]
    assert 0 <= row["loss"] < 1 and "agreement" not in row and "accuracy" not in row
    model = AutoModel.from_pretrained(tmp_path / "faster", speed=1.5)
    assert isinstance(model, HPoolViTModel) and model.config.hvt_pool == row["hvt_pool"]
    card = (tmp_path / "faster" / "README.md").read_text()
    assert "image-feature-extraction" in card and "classif" not in card.partition("## Citation")[0].lower()
    # Saved without a head, and sped up again.
    model.save_pretrained(tmp_path / "base")
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(tmp_path / "base")
    again = speed_up(tmp_path / "base", photos, tmp_path / "again", faster=[1.3], **QUICK)
    assert again["loss"] == "cosine"


def test_a_merging_model_keeps_its_rule_and_dtype(photos, tmp_path):
    model = tiny_model(**{**MERGE, "proportional_attention": False}, **LABELS)
    save_with_processor(tmp_path / "half", model.to(torch.bfloat16))
    speed_up(tmp_path / "half", photos, tmp_path / "faster", faster=[1.5], **QUICK)
    made = HPoolViTForImageClassification.from_pretrained(tmp_path / "faster")
    assert made.dtype == torch.bfloat16 and not made.config.proportional_attention
    assert torch.equal(made.classifier.weight, model.classifier.weight)


def test_a_model_that_never_pooled_learns_to_merge(photos, tmp_path):
    save_with_processor(tmp_path / "plain", tiny_model(hvt_pool=None, **LABELS))
    speed_up(tmp_path / "plain", photos, tmp_path / "faster", faster=[1.5], **QUICK)
    made = HPoolViTForImageClassification.from_pretrained(tmp_path / "faster")
    assert made.config.pool_mode == "merge" and made.config.proportional_attention


def test_a_model_trained_with_other_pooling_has_nothing_to_compare_with(saved_folder, photos, tmp_path, capsys):
    message = fail(capsys, saved_folder, "--images", photos, "--output_dir", tmp_path / "faster")
    assert "was trained with max pooling at blocks 1,3" in message


def test_the_time_on_this_machine_can_be_what_counts(source, photos, tmp_path, monkeypatch, capsys):
    def seconds_per_image(model, pixel_values, schedules):
        """A machine that takes as long for a stage as for a fifth of the model."""
        assert len(pixel_values) == 8
        macs = MacsCost(model.config)
        return [(macs(schedule) / macs.unpooled + len(schedule) / 5) / 100 for schedule in schedules]

    for module in (costs, report, speed_up_module):
        monkeypatch.setattr(module, "seconds_per_image", seconds_per_image)
    record = speed_up(source, photos, tmp_path / "faster", faster=[1.2], measure="time", batch_size=8, **QUICK)
    row = record["speeds"]["1.2"]
    assert row["times_as_fast"] >= 1.2 and row["images_per_second"] == pytest.approx(120, rel=0.05)
    assert len(row["hvt_pool"]) == 1 and row["times_fewer_macs"] > 1.5
    words = ["--faster", "3", "--measure", "time", "--batch_size", 8]
    message = fail(capsys, source, "--images", photos, "--output_dir", tmp_path / "other", *words)
    assert "--faster 3 cannot be reached: the fastest is " in message and "times less time" in message
    assert not list(tmp_path.glob(".*"))


def test_what_the_machine_takes_is_measured(source, photos, tmp_path):
    model = HPoolViTForImageClassification.from_pretrained(source).eval()
    timed = TimeCost.measure(model, torch.randn(4, 3, 32, 32), MacsCost(model.config))
    assert timed[0][0] == () and len({schedule for schedule, _ in timed}) == len(timed) > 5
    assert all(seconds > 0 for _, seconds in timed)


def test_a_speed_that_cannot_be_reached_is_refused_with_the_fastest_that_can(source, photos, tmp_path, capsys):
    message = fail(capsys, source, "--images", photos, "--faster", 2, 40, "--output_dir", tmp_path / "faster")
    assert "--faster 40 cannot be reached: the fastest is " in message and "times fewer MACs" in message
    assert "half of the tokens merged at blocks 0,1,2,3. Ask for less." in message
    fastest = message.partition("the fastest is ")[2].split()[0]
    assert not (tmp_path / "faster").exists()
    speed_up(source, photos, tmp_path / "faster", faster=[float(fastest)], **QUICK)


def test_bad_images_are_skipped_counted_and_named(source, tmp_path, capsys):
    folder = write_folder(tmp_path / "images", per_class=6)
    for name in ("cut_off.jpg", "text.jpg"):
        (folder / name).write_bytes(BAD_FILES[name][0])
    words = [source, "--images", folder, "--output_dir", tmp_path / "faster", "--trials", 3, "--disable_tqdm"]
    main(["speed-up", *map(str, words)])
    printed = capsys.readouterr()
    assert "2 images skipped:" in printed.out and "text.jpg: unreadable" in printed.out and not printed.err
    record = json.loads((tmp_path / "faster" / "speed_up.json").read_text())
    assert sorted(Path(skipped["name"]).name for skipped in record["images"]["skipped"]) == ["cut_off.jpg", "text.jpg"]
    assert "accuracy" in record["unpooled"]
    assert any("18 images are few" in note for note in record["notes"])
    assert "text.jpg" in (tmp_path / "faster" / "README.md").read_text()


def test_too_few_images_are_refused_with_the_number_that_is_wanted(source, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    words = [source, "--images", folder, "--output_dir", tmp_path / "faster"]
    assert "has 0 images that can be read: at least 16 are needed" in fail(capsys, *words)
    picture(1).save(folder / "one.png")
    (folder / "text.jpg").write_bytes(BAD_FILES["text.jpg"][0])
    message = fail(capsys, *words)
    assert "has 1 image that can be read and 1 that cannot" in message and "text.jpg: unreadable" in message
    assert "--images" in message
    assert "is not a folder" in fail(capsys, source, "--images", folder / "one.png", *words[3:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--faster", "1"], "must be numbers above 1"),
        (["--faster", "nan"], "must be numbers above 1"),
        (["--minutes", "0"], "--minutes 0.0 must be more than 0"),
        (["--trials", "0"], "--trials 0 must be at least 1"),
        (["--num_images", "8"], "--num_images 8 must be at least 16"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(source, photos, tmp_path, capsys, words, message):
    assert message in fail(capsys, source, "--images", photos, "--output_dir", tmp_path / "faster", *words)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_none_and_a_folder_that_is_full_are_refused(source, photos, tmp_path, capsys):
    message = fail(capsys, tmp_path / "none", "--images", photos, "--output_dir", tmp_path / "faster")
    assert "none cannot be used" in message
    assert "is not empty" in fail(capsys, source, "--images", photos, "--output_dir", source)


def test_labels_are_read_from_names_of_folders_or_not_at_all():
    id2label = {0: "tench, Tinca tinca", 1: "goldfish"}
    files = ["p/Goldfish/1.jpg", "p/tinca tinca/x/2.jpg", "p/0/3.jpg"]
    assert read_labels(files, "p", id2label).tolist() == [1, 0, 0]
    assert read_labels([*files, "p/4.jpg"], "p", id2label) is None
    assert read_labels([*files, "p/shark/4.jpg"], "p", id2label) is None


def test_predict_takes_a_speed(made, photos, capsys):
    output_dir, _ = made
    file = str(photos / "ant" / "0.png")
    whole = tiny_model(**{**MERGE, "hvt_pool": None}, **LABELS)
    [prediction] = predict(str(output_dir), [file], speed=1)
    processor = HPoolViTImageProcessor.from_pretrained(output_dir)
    logits = whole(processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values).logits
    assert prediction.answers[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    main(["predict", str(output_dir), file, "--speed", "1.5", "--disable_tqdm"])
    with pytest.raises(SystemExit):
        main(["predict", str(output_dir), file, "--speed", "7", "--disable_tqdm"])
    assert "--speed 7.0 is not offered: choose one of 1, 1.5, 2" in capsys.readouterr().err


def test_a_speed_is_refused_for_models_that_have_none(photos, tmp_path, capsys):
    vit = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    vit.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path), str(photos), "--speed", "2"])
    assert "--speed is for HPool-ViTs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(source, photos, tmp_path):
    output_dir = tmp_path / "faster"
    words = ["speed-up", source, "--images", photos, "--output_dir", output_dir, "--trials", "400", "--faster", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hpool_vit.toolkit.command", *map(str, words)], stderr=subprocess.DEVNULL
    )
    trials = tmp_path / ".faster.speed-up" / "trials.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (trials.exists() and trials.read_text().count("\n") > 5):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = trials.read_text().splitlines()[:-1]
    assert len(kept) > 4 and not output_dir.exists()
    words[words.index("400")] = "8"
    run_command(*words)
    tried = json.loads((output_dir / "speed_up.json").read_text())["tried"]
    first = json.loads(kept[1])["schedule"]
    assert [block for block, _ in first] in [row["hvt_pool"] for row in tried]
    assert not trials.parent.exists()


def test_a_full_disk_ends_a_search_in_one_line_and_what_was_tried_stays(source, photos, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    words = [source, "--images", photos, "--output_dir", tmp_path / "faster", "--trials", "5", "--disable_tqdm"]
    with monkeypatch.context() as patch:
        patch.setattr(speed_up_module, "save_figure", full)
        assert "No space left on device" in fail(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == [".faster.speed-up"]
    with monkeypatch.context() as patch:
        patch.setattr(speed_up_module.TrialLog, "add", full)
        # Everything that is needed was tried already.
        main(["speed-up", *map(str, words)])
    assert [path.name for path in tmp_path.iterdir()] == ["faster"]


def test_the_page_offers_the_speeds(made, photos):
    pytest.importorskip("gradio")
    from hpool_vit.toolkit.demo.markup import pooled_blocks
    from hpool_vit.toolkit.demo.models import ServedModel

    output_dir, _ = made
    model = ServedModel(output_dir)
    assert [schedule.speed for schedule in model.schedules] == [2, 1.5, 1]
    assert model.saved_position == 0
    assert pooled_blocks(model.schedules[0]).startswith("Speed 2, pooling at block")
    inputs = model.prepare(Image.open(photos / "ant" / "0.png").convert("RGB"))
    for position, schedule in [*enumerate(model.schedules), (0, model.schedules[0])]:
        alone = HPoolViTForImageClassification.from_pretrained(output_dir, speed=schedule.speed).eval()
        expected = alone(inputs).logits.softmax(-1)
        torch.testing.assert_close(model.classify(inputs, position).probabilities, expected)


def test_what_is_exported_is_the_model_at_the_speed_that_is_asked_for(made):
    output_dir, record = made
    for speed, name in ((1.5, "1.5"), (None, "2")):
        model, *_ = export.load(str(output_dir), speed=speed)
        assert model.config.hvt_pool == record["speeds"][name]["hvt_pool"]


@pytest.mark.slow
def test_an_exported_model_has_the_speed_that_is_asked_for(made, tmp_path):
    output_dir, _ = made
    words = [output_dir, "--format", "torch_export", "--speed", 1.5, "--output_dir", tmp_path / "exported"]
    main(["export", *map(str, words)])
    assert json.loads((tmp_path / "exported" / "export.json").read_text())["speed"] == 1.5
    program = torch.export.load(tmp_path / "exported" / "model.pt2").module()
    pixel_values = torch.randn(2, 3, 32, 32)
    model = HPoolViTForImageClassification.from_pretrained(output_dir, speed=1.5).eval()
    torch.testing.assert_close(program(pixel_values), model(pixel_values).logits, atol=1e-4, rtol=1e-3)


def test_a_model_that_segments_is_refused(photos, tmp_path, capsys):
    model = HPoolViTForSemanticSegmentation(tiny_config(**MERGE))
    save_with_processor(tmp_path / "masks", model)
    message = fail(capsys, tmp_path / "masks", "--images", photos, "--output_dir", tmp_path / "faster")
    assert "segments images" in message


def test_what_the_converter_asks_for_it_must_be_asked():
    message = as_asked_of_convert("Its heads are unknown: pass `num_attention_heads`.")
    assert message == "Its heads are unknown: run `hpool-vit convert` first, with `num_attention_heads`."


def test_large_images_leave_fewer_to_learn_from(tmp_path, monkeypatch):
    photos = write_folder(tmp_path / "insects", per_class=16)
    image_processor = HPoolViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    monkeypatch.setattr(inputs, "MOST_BYTES_TO_LEARN_FROM", 20 * 2 * 3 * 32 * 32)
    loaded = load_photos(photos, image_processor, 16, 0)
    assert len(read_pool(loaded, image_processor)) == 20
    monkeypatch.setattr(inputs, "MOST_BYTES_TO_LEARN_FROM", 1)
    assert len(read_pool(loaded, image_processor)) == inputs.FEWEST_TO_LEARN_FROM
