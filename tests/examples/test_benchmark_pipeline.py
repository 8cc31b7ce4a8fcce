import json

import pytest
import torch
from helpers import EXAMPLES, run_python, tiny_model
from models import find_model
from PIL import Image
from pipeline import find_images, main, make_photos, parse_args
from ways import STEPS, WAYS, Clock, Way, open_tensor, processors_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, schedule in {"flat": None, "pooled": [1, 3]}.items():
        tiny_model(hvt_pool=schedule, ln_order="pre").save_pretrained(root / name)
    return {name: str(root / name) for name in ("flat", "pooled")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder, 4)
    return folder


@pytest.mark.slow
def test_the_program_measures_each_way_for_each_model(folders, photos, tmp_path):
    output = tmp_path / "new" / "pipeline"
    flags = ["--images_dir", photos, "--batch_size", 2, "--num_workers", 1, "--threads", 1, "--rounds", 2]
    flags += ["--device", "cpu", "--output", output]
    result = run_python(EXAMPLES / "benchmark" / "pipeline.py", "--models", *folders.values(), *flags, cwd=tmp_path)
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["settings"]["num_images"] == 4 and results["machine"]["torch_threads"] == 1
    records = {(record["way"], record["model"]): record for record in results["records"]}
    assert list(records) == [(way, model) for way in WAYS for model in folders.values()]
    for record in records.values():
        assert sum(record["share"].values()) == pytest.approx(1, abs=1e-3)
        assert all(record["ms_per_image"][step] > 0 for step in STEPS if step != "answer")
        # Only Transformers' pipeline makes more of the logits than the best class.
        assert (record["ms_per_image"]["answer"] > 0) == record["way"].startswith("pipeline")
        assert record["images_per_second"][1] > 0 and record["keeps_up"] > 0
    assert records["device", folders["flat"]]["faster"] == [1, 1, 1]
    report = output.with_suffix(".md").read_text()
    assert report in result.stdout and "dataloader-pil" in report and "--num_workers 1" in report


def test_without_photos_the_program_makes_some(folders, tmp_path, capsys):
    output = tmp_path / "pipeline"
    flags = ["--num_images", "2", "--num_workers", "0", "--rounds", "1", "--ways", "device", "--threads", "1"]
    main(["--models", folders["pooled"], *flags, "--device", "cpu", "--output", str(output)])
    assert "2 images generated" in capsys.readouterr().out
    assert len(json.loads(output.with_suffix(".json").read_text())["records"]) == 1


def test_every_way_gives_the_same_classes(folders, photos):
    model = find_model(folders["pooled"])().eval()
    clock = Clock("cpu")
    processors = processors_for(model, clock)
    args = parse_args(["--models", folders["pooled"], "--num_workers", "0", "--batch_size", "3", "--device", "cpu"])
    files = find_images(photos, 4)
    answers = [Way(name, files, processors, clock, args).run(model, parallel=False) for name in WAYS]
    assert len(answers[0]) == 4 and all(answer == answers[0] for answer in answers)
    assert not clock.seconds  # nothing was measured


def test_the_clock_calls_other_what_no_step_took():
    clock = Clock("cpu")
    work = clock.wrap("decode", lambda: sum(range(200_000)))
    work()
    with clock.measure() as steps:
        work()
        sum(range(200_000))
    assert list(steps) == list(STEPS) and steps["decode"] > 0 and steps["other"] > 0
    assert steps["resize"] == steps["normalise"] == steps["forward"] == steps["answer"] == 0
    with clock.measure() as nothing:
        pass
    assert nothing["decode"] == 0


def test_the_photos_are_jpegs_of_both_orientations_and_always_alike(photos, tmp_path):
    files = find_images(photos, 10)
    assert len(files) == 4
    sizes = set()
    for file, again in zip(files, make_photos(tmp_path, 4), strict=True):
        with Image.open(file) as image:
            assert image.format == "JPEG"
            sizes.add(image.size)
        assert file.read_bytes() == again.read_bytes()
    assert sizes == {(500, 375), (375, 500)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reference", "hvt-s-1"], "--reference hvt-s-1 is not one of the models: vit-ti, hvt-ti-1"),
        (["--images_dir", "no-such-folder"], "--images_dir no-such-folder is not a folder"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--models", "pit_ti_224"], "a timm model has no pipeline"),
        (["--models", "vit-ti@image_size=32@num_hidden_layers=1", "hvt-ti-1"], "images of different sizes"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(flags, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--images_dir", str(photos), "--device", "cpu", "--output", str(tmp_path / "x"), *flags])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"has no images\."):
        find_images(tmp_path, 3)


def test_half_precision_runs_the_whole_way(folders, photos):
    args = parse_args(["--models", folders["pooled"], "--num_workers", "0", "--dtype", "bfloat16", "--device", "cpu"])
    model = find_model(folders["pooled"])().eval().to(torch.bfloat16)
    clock = Clock("cpu")
    way = Way("dataloader", find_images(photos, 2), processors_for(model, clock), clock, args)
    assert len(way.run(model, parallel=False)) == 2


def test_a_draft_is_smaller_but_not_below_the_size_to_resize_to(photos):
    file = find_images(photos, 1)[0]
    whole = open_tensor(file)
    assert whole.dtype == torch.uint8 and sorted(whole.shape) == [3, 375, 500]
    draft = open_tensor(file, size=100)
    assert min(draft.shape[1:]) in range(100, 375) and draft.shape[0] == 3
    assert open_tensor(file, size=256).shape == whole.shape
    # The same picture.
    shrunk = torch.nn.functional.interpolate(whole[None].float(), size=draft.shape[1:], mode="area")[0]
    assert (shrunk - draft.float()).abs().mean() < 3
