"""How recoveries are measured: which photos teach, and which ones judge."""

import io
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import EXAMPLES, ROOT, tiny_model
from image_files import picture

from hpool_vit import HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.toolkit.shared.files import read_json, write_json


sys.path.insert(0, str(EXAMPLES / "research" / "leaderboard"))

import recovery
from photos import MEAN, STD, halves, load_photos, normalize


NUM_PHOTOS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A Parquet file of photos and a model of 224 pixels that merges at two speeds."""
    folder = tmp_path_factory.mktemp("place")
    photos = []
    for index in range(NUM_PHOTOS):
        file = io.BytesIO()
        # Smooth, because torchvision and the image processor round the middle of 227 pixels differently.
        picture(index, (2, 2)).resize((227, 240)).save(file, "PNG")
        photos.append({"bytes": file.getvalue()})
    pd.DataFrame({"image": photos, "label": [index % 3 for index in range(NUM_PHOTOS)]}).to_parquet(
        folder / "p.parquet"
    )
    options = {"image_size": 224, "patch_size": 32, "pool_mode": "merge", "hvt_pool": None, "use_class_token": True}
    model = tiny_model(**options, ln_order="pre", num_labels=3)
    model.save_pretrained(folder / "vit")
    HPoolViTImageProcessor.for_config(model.config, image_mean=MEAN, image_std=STD).save_pretrained(folder / "vit")
    model.config.speeds = {1.5: {"hvt_pool": [1], "merge_ratio": 0.5}, 2.0: {"hvt_pool": [0, 1], "merge_ratio": 0.5}}
    model.set_speed(1.5)
    model.save_pretrained(folder / "faster")
    write_json(folder / "faster" / "recovery.json", {"recovery": {"epochs": 3, "checks": [{"share": 1}]}})
    return folder


def run(*words) -> None:
    recovery.main(list(map(str, words)))


def test_only_the_half_that_is_chosen_by_teaches_and_is_prepared_as_the_other(place, monkeypatch):
    vit = HPoolViTForImageClassification.from_pretrained(place / "vit")
    processor = HPoolViTImageProcessor.from_pretrained(place / "vit")
    monkeypatch.setattr(recovery, "convert", lambda *args, **kwargs: (vit, processor, None))
    run("prepare", "--weights", place / "vit", "--photos", place / "p.parquet", "--to", place / "half")
    files = sorted((place / "half" / "photos").rglob("*.*"), key=lambda file: file.stem)
    files = [file for file in files if file.is_file()]
    chosen = halves(NUM_PHOTOS)[0].tolist()
    assert [int(file.stem) for file in files] == chosen
    assert [int(file.parent.name) for file in files] == [index % 3 for index in chosen]
    prepared = HPoolViTImageProcessor.from_pretrained(place / "half" / "vit")
    pixel_values = prepared([str(file) for file in files], return_tensors="pt").pixel_values
    expected = normalize(load_photos(place / "p.parquet").part(torch.tensor(chosen)).pixels)
    torch.testing.assert_close(pixel_values, expected, atol=0.15, rtol=0)


def test_each_speed_is_judged_on_the_other_half_against_the_model_without_pooling(place, monkeypatch, capsys):
    unpooled = HPoolViTForImageClassification.from_pretrained(place / "vit").eval()
    monkeypatch.setattr(recovery, "convert_vit", lambda *args, **kwargs: (unpooled, None))
    words = ["test", place / "faster", "--weights", place / "vit", "--photos", place / "p.parquet"]
    words += ["--output_dir", place / "results", "--resume", place / "answers"]
    run(*words)
    printed = capsys.readouterr().out
    record = read_json(place / "results" / "merging_recovery.json")
    assert record["num_photos"] == NUM_PHOTOS // 2 and record["half"] == "reporting"
    whole, *rows = record["rows"]
    assert [row["model"] for row in rows] == ["faster, speed 1", "faster, speed 1.5", "faster, speed 2"]
    assert whole["divergence"] == rows[0]["divergence"] == 0 and rows[0]["macs"] == whole["macs"]
    assert 1 < rows[1]["fewer_macs"] < rows[2]["fewer_macs"] and rows[2]["divergence"] > 0
    assert rows[1]["top1_lost"] == pytest.approx(whole["top1"] - rows[1]["top1"])
    assert rows[1]["recovery"] == {"epochs": 3}
    assert recovery.table(record["rows"]) in printed
    photos = load_photos(place / "p.parquet").part(halves(NUM_PHOTOS)[1])
    model = HPoolViTForImageClassification.from_pretrained(place / "faster", speed=2).eval()
    with torch.no_grad():
        correct = model(normalize(photos.pixels)).logits.argmax(-1) == photos.labels
    assert rows[2]["top1"] == 100 * correct.float().mean().item()
    # Known answers are not computed again.
    monkeypatch.setattr(HPoolViTForImageClassification, "from_pretrained", lambda folder: model)
    monkeypatch.setattr(recovery, "count_macs", lambda *args: 1)
    monkeypatch.setattr(model, "forward", None)
    monkeypatch.setattr(unpooled, "forward", None)
    run(*words)


@pytest.mark.parametrize("name", ["merging_recovery", "merging_recovery_few_photos"])
def test_the_published_table_is_that_of_the_raw_numbers(name):
    results = ROOT / "docs" / "results"
    published = read_json(results / f"{name}.json")
    assert recovery.table(published["rows"]) in (results / "merging.md").read_text(encoding="utf-8")
    assert published["half"] == "reporting" and published["num_photos"] == 650
