"""
`hpool-vit export`: exported models give the logits of PyTorch, in float32 to 1e-4, in int8 to a quarter of the spread
of the logits, or half of it with fixed ranges. Most tests call the function: a new process takes seconds to start.
"""

import contextlib
import csv
import io
import json
import os
import re
import sys
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call_command, run_python, tiny_config, tiny_model
from image_files import BAD_FILES, CONVERTED_FILES, encoded, picture, write_folder
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor

from hpool_vit import HPoolViTForImageClassification, HPoolViTImageProcessor, HPoolViTImageProcessorPil
from hpool_vit.toolkit import command
from hpool_vit.toolkit.export.checks import check_preprocessing
from hpool_vit.toolkit.export.export import Int8Options, export_model, report
from hpool_vit.toolkit.export.formats import FORMATS, Format
from hpool_vit.toolkit.export.predict_onnx import open_model, predict, preprocess
from hpool_vit.toolkit.export.quantize import find_images, find_labelled_images, read_batches


# Together: every ln_order, pool mode and kind of patches, with and without a class token, merging all odd tokens and
# some (which sorts them), and weighing tokens by their size.
VARIANTS = {
    "max": {"pool_mode": "max", "ln_order": "residual"},
    "avg": {"pool_mode": "avg", "ln_order": "pre", "use_class_token": True, "patchify_technique": "convolutional"},
    "merge-half": {"pool_mode": "merge", "ln_order": "post"},
    "merge-some": {
        "pool_mode": "merge",
        "ln_order": "residual",
        "merge_ratio": 0.3,
        "proportional_attention": True,
        "use_class_token": True,
    },
    "merge-importance": {
        "pool_mode": "merge",
        "merge_rule": "importance",
        "merge_ratio": 0.3,
        "proportional_attention": True,
        "use_class_token": True,
    },
}
# An export takes seconds: each run of the suite has one variant, the slow tests have the others.
variants = pytest.mark.parametrize(
    "variant", ["max", *(pytest.param(name, marks=pytest.mark.slow) for name in list(VARIANTS)[1:])]
)
HIDDEN = ("torch", "torchvision", "transformers", "hpool_vit")


def save(folder, **overrides):
    """A folder of a model of two blocks and its image processor."""
    model = tiny_model(**{"num_hidden_layers": 2, "hvt_pool": [1], **overrides})
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return model


def export(source, output, **options):
    export_model(str(source), output, **options)
    return output


def onnx_logits(folder, images: torch.Tensor, name: str = "model.onnx") -> torch.Tensor:
    return torch.from_numpy(predict(open_model(folder / name), images.numpy()))


def refusal(capsys, *words, status: int = 1) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()  # what saving the models printed
    with pytest.raises(SystemExit) as ended:
        command.main(["export", *map(str, words)])
    printed = capsys.readouterr().err
    assert ended.value.code == status and printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of three classes, eight each."""
    return write_folder(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def exported(saved_folder, photos, tmp_path_factory):
    """What the command leaves and prints."""
    output, printed = tmp_path_factory.mktemp("exported") / "onnx", io.StringIO()
    flags = ["--output_dir", output, "--int8", "dynamic", "--eval_dir", photos]
    with contextlib.redirect_stdout(printed):
        command.main(["export", str(saved_folder), *map(str, flags)])
    return output, printed.getvalue()


@variants
def test_the_onnx_model_gives_the_logits_of_pytorch_for_any_batch(variant, tmp_path):
    model = save(tmp_path / "model", **VARIANTS[variant])
    folder = export(tmp_path / "model", tmp_path / "onnx")
    for batch_size in (1, 3, 7):
        images = torch.randn(batch_size, 3, 32, 32)
        torch.testing.assert_close(onnx_logits(folder, images), model(images).logits, atol=1e-4, rtol=0)


# The other modes: tests of the graph.
@pytest.mark.parametrize("variant", ["avg", pytest.param("merge-some", marks=pytest.mark.slow)])
def test_the_onnx_model_takes_other_image_sizes(variant, tmp_path):
    model = save(tmp_path / "model", **VARIANTS[variant])
    folder = export(tmp_path / "model", tmp_path / "onnx", dynamic_image_size=True)
    for size in ((32, 32), (24, 44), (48, 20)):
        images = torch.randn(3, 3, *size)
        expected = model(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(onnx_logits(folder, images), expected, atol=1e-4, rtol=0)


@variants
def test_the_torch_export_model_gives_the_logits_of_pytorch_for_any_batch_and_size(variant, tmp_path):
    model = save(tmp_path / "model", **VARIANTS[variant])
    folder = export(tmp_path / "model", tmp_path / "pt2", format="torch_export", dynamic_image_size=True)
    program = torch.export.load(folder / "model.pt2").module()
    for batch_size, size in ((1, (32, 32)), (3, (24, 44)), (4, (48, 20))):
        images = torch.randn(batch_size, 3, *size)
        expected = model(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(program(images), expected, atol=1e-4, rtol=0)


def test_the_torch_export_model_runs_without_this_package_and_transformers(tmp_path):
    model = save(tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "pt2", format="torch_export")
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    program = tmp_path / "classify.py"
    program.write_text(
        "import sys, torch\n"
        "model, images, output = sys.argv[1:]\n"
        "torch.save(torch.export.load(model).module()(torch.load(images)), output)\n"
    )
    files = (folder / "model.pt2", tmp_path / "images.pt", tmp_path / "logits.pt")
    run_python(program, *files, hide=("transformers", "hpool_vit"), cwd=tmp_path)
    torch.testing.assert_close(torch.load(files[2]), model(images).logits, atol=1e-4, rtol=0)


# It compiles for half a minute, and merging for longer. An export compares the logits for every mode.
@pytest.mark.slow
def test_the_model_compiled_ahead_of_time_runs_without_this_package_and_transformers(tmp_path):
    model = save(tmp_path / "model", **VARIANTS["avg"])
    folder = export(tmp_path / "model", tmp_path / "aot", format="aot", dynamic_image_size=True)
    images = [torch.randn(3, 3, *size) for size in ((32, 32), (24, 44), (48, 20))]
    torch.save([*images, images[0][:1]], tmp_path / "images.pt")
    program = tmp_path / "classify.py"
    program.write_text(
        "import sys, torch\n"
        "model, images, output = sys.argv[1:]\n"
        "model = torch._inductor.aoti_load_package(model)\n"
        "torch.save([model(part) for part in torch.load(images)], output)\n"
    )
    files = (folder / "model.pt2", tmp_path / "images.pt", tmp_path / "logits.pt")
    run_python(program, *files, hide=("transformers", "hpool_vit"), cwd=tmp_path)
    for part, logits in zip(torch.load(files[1]), torch.load(files[2]), strict=True):
        expected = model(part, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_without_a_compiler_compiling_ahead_is_refused_with_the_remedy(saved_folder, tmp_path, capsys):
    with torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler")):
        message = refusal(capsys, saved_folder, "--output_dir", tmp_path / "out", "--format", "aot")
    assert "--format aot needs a C++ compiler: install g++" in message


def test_a_process_with_only_numpy_pillow_and_onnx_runtime_classifies(exported, saved_folder, photos):
    model = HPoolViTForImageClassification.from_pretrained(saved_folder)
    image_processor = HPoolViTImageProcessorPil.from_pretrained(saved_folder)
    files = [photos / "ant" / "0.png", photos / "cat" / "3.png"]
    for name in ("model.onnx", "model_int8.onnx"):
        flags = ["--top_k", 1] if name == "model.onnx" else ["--model", exported[0] / name, "--top_k", 1]
        lines = run_python(exported[0] / "predict_onnx.py", *flags, *files, hide=HIDDEN).stdout.splitlines()
        images = image_processor([Image.open(file) for file in files], return_tensors="pt")
        probabilities = model(**images).logits.softmax(-1)
        for file, line, expected in zip(files, lines, probabilities, strict=True):
            path, answer = line.split(": ")
            label, percent = answer.split()
            assert path == str(file) and label == model.config.id2label[expected.argmax().item()]
            tolerance = 5 if "int8" in name else 0.1
            assert float(percent.rstrip("%")) == pytest.approx(100 * expected.max().item(), abs=tolerance)


def test_int8_comes_close_to_pytorch_in_a_smaller_file_and_is_measured(exported, saved_folder):
    folder, printed = exported
    images = torch.randn(16, 3, 32, 32)
    expected = HPoolViTForImageClassification.from_pretrained(saved_folder)(images).logits
    torch.testing.assert_close(onnx_logits(folder, images), expected, atol=1e-4, rtol=0)
    difference = (onnx_logits(folder, images, "model_int8.onnx") - expected).abs().max()
    assert 0 < difference < 0.25 * expected.std()
    int8 = json.loads((folder / "export.json").read_text())["int8"]
    assert int8["num_images"] == 24 and int8["same_answer"] > 0.8
    assert "top-1 on 24 images" in printed and "times as fast" in printed


def test_static_int8_takes_its_ranges_from_real_images(photos, tmp_path):
    model = save(tmp_path / "model")
    options = {"int8": "static", "calibration_dir": photos, "num_calibration_images": 5}
    folder = export(tmp_path / "model", tmp_path / "onnx", **options)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    images = torch.stack([torch.from_numpy(preprocess(picture(seed), config)) for seed in range(8)])
    expected = model(images).logits
    assert 0 < (onnx_logits(folder, images, "model_int8.onnx") - expected).abs().max() < 0.5 * expected.std()


def test_the_exported_folder_prepares_images_and_names_labels(exported, saved_folder):
    folder, _ = exported
    assert json.loads((folder / "labels.json").read_text()) == ["ant", "bee", "cat"]
    ours, original = (HPoolViTImageProcessor.from_pretrained(path) for path in (folder, saved_folder))
    image = picture(7, (50, 41))
    assert torch.equal(ours(image).pixel_values[0], original(image).pixel_values[0])


@pytest.mark.parametrize(
    "image",
    [
        picture(1, (57, 40)),
        picture(2, (40, 57)),
        picture(3, (9, 31)),
        picture(4).convert("L"),
        picture(5).convert("P"),
        picture(6).convert("CMYK"),
        Image.merge("RGBA", (*picture(7).split(), picture(8).convert("L"))),
        Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50),
    ],
    ids=lambda image: f"{image.mode}-{image.width}x{image.height}",
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"size": {"height": 32, "width": 36}, "do_center_crop": False}, {"crop_size": {"height": 45, "width": 40}}],
    ids=["crop", "stretch", "pad"],
)
def test_images_are_prepared_as_by_the_image_processor(image, settings):
    image_processor = HPoolViTImageProcessorPil.for_config(tiny_model().config, **settings)
    expected = image_processor(image).pixel_values[0]
    ours = preprocess(image, json.loads(image_processor.to_json_string()))
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_an_export_that_does_not_answer_as_pytorch_does_leaves_nothing(tmp_path, capsys, monkeypatch):
    save(tmp_path / "model")
    wrong = Format(
        "model.pt2", lambda: None, torch.export.save, lambda file: lambda images: torch.full((len(images), 3), nan)
    )
    monkeypatch.setitem(FORMATS, "torch_export", wrong)
    words = (tmp_path / "model", "--output_dir", tmp_path / "out", "--format", "torch_export")
    assert "differs from PyTorch by nan" in refusal(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_input_is_refused_in_one_line_and_leaves_nothing(saved_folder, photos, tmp_path, capsys):
    unknown = write_folder(tmp_path / "unknown", ("ant", "wasp"), per_class=1)
    (tmp_path / "empty").mkdir()
    headless = save(tmp_path / "headless").base_model
    headless.save_pretrained(tmp_path / "headless")
    model = save(tmp_path / "nan")
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    save(tmp_path / "convnext")
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / "convnext")  # it crops by a share
    before = sorted(tmp_path.iterdir())
    good, out = saved_folder, ("--output_dir", tmp_path / "out")
    for words, parts in (
        ((tmp_path / "nowhere", *out), ("nowhere", "neither a folder")),
        ((tmp_path / "empty", *out), ("empty", "no config.json")),
        ((tmp_path / "headless", *out), ("headless", "no weights for classifier")),
        ((tmp_path / "nan", *out), ("nan", "classifier.bias are not finite")),
        ((tmp_path / "convnext", *out), ("ConvNextImageProcessor", "cannot prepare images", "--format torch_export")),
        ((good, "--output_dir", photos), ("photos", "not empty")),
        ((good, *out, "--int8", "dynamic", "--format", "torch_export"), ("--int8 dynamic needs --format onnx",)),
        ((good, *out, "--int8", "static"), ("--calibration_dir",)),
        ((good, *out, "--eval_dir", photos), ("--eval_dir", "--int8")),
        ((good, *out, "--int8", "dynamic", "--calibration_dir", photos), ("--calibration_dir", "has no effect")),
        ((good, *out, "--int8", "dynamic", "--batch_size", 0), ("--batch_size 0", "at least 1")),
        ((good, *out, "--num_calibration_images", 0), ("--num_calibration_images 0", "at least 1")),
        ((good, *out, "--num_threads", -1), ("--num_threads -1", "0 for all cores")),
        ((good, *out, "--int8", "dynamic", "--eval_dir", tmp_path / "gone"), ("--eval_dir", "gone", "not a folder")),
        ((good, *out, "--int8", "dynamic", "--eval_dir", unknown), ("wasp", "ant, bee, cat")),
        ((good, *out, "--int8", "static", "--calibration_dir", tmp_path / "empty"), ("empty", "no images")),
    ):
        message = refusal(capsys, *words)
        assert all(part in message for part in parts), message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", [{"num_calibration_images": 64}, {"batch_size": 8}, {"num_threads": 0}], ids=str)
def test_what_int8_alone_uses_is_refused_without_it(option, saved_folder, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` is only used with `int8`: set it to dynamic or static too"):
        export(saved_folder, tmp_path / "out", **option)


def test_what_static_int8_alone_uses_is_refused_with_dynamic(saved_folder, tmp_path, capsys):
    words = (saved_folder, "--output_dir", tmp_path / "out", "--int8", "dynamic", "--num_calibration_images", 5)
    message = "--num_calibration_images 5 has no effect with --int8 dynamic: leave it out, or choose static."
    assert message in refusal(capsys, *words)


def test_numbers_that_are_not_given_have_defaults(exported):
    assert json.loads((exported[0] / "export.json").read_text())["int8"]["batch_size"] == 8
    options = Int8Options("dynamic", num_threads=2).with_defaults()
    assert (options.num_calibration_images, options.batch_size, options.num_threads) == (64, 8, 2)


class TestSchedules:
    @pytest.fixture
    def folder(self, tmp_path):
        """A model that merges at block 1, and offers a speed."""
        speeds = {2.0: {"hvt_pool": [1], "merge_ratio": 0.5}}
        save(tmp_path / "model", pool_mode="merge", merge_ratio=0.3, speeds=speeds)
        return tmp_path / "model"

    def export(self, folder, output, capsys, *flags):
        """The record, and what the command prints; `torch_export` is the fastest format to write."""
        words = ("export", folder, "--output_dir", output, "--format", "torch_export", *flags)
        printed = call_command(capsys, *words).stdout
        return json.loads((output / "export.json").read_text()), printed

    @pytest.mark.parametrize(
        ("flags", "fields"),
        [
            (("--hvt_pool", "none"), {"hvt_pool": None}),
            (("--hvt_pool", "1", "--merge_ratio", "0.4"), {"hvt_pool": [1], "merge_ratio": 0.4}),
        ],
        ids=["without pooling", "another ratio"],
    )
    def test_one_is_chosen_and_recorded(self, flags, fields, folder, tmp_path, capsys):
        record, _ = self.export(folder, tmp_path / "out", capsys, *flags)
        assert fields.items() <= record.items() and "speed" not in record and "notes" not in record
        images = torch.randn(2, 3, 32, 32)
        expected = HPoolViTForImageClassification.from_pretrained(folder, **fields).eval()(images).logits
        exported = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
        torch.testing.assert_close(exported, expected, atol=1e-4, rtol=0)
        saved = HPoolViTForImageClassification.from_pretrained(folder).eval()(images).logits
        assert (saved - expected).abs().max() > 1e-3

    def test_one_that_was_not_trained_gets_a_note(self, tmp_path, capsys):
        save(tmp_path / "model", pool_mode="avg")
        flags = ("--hvt_pool", "none")
        record, printed = self.export(tmp_path / "model", tmp_path / "out", capsys, *flags)
        assert "was not trained for hvt_pool=none, only for 1: expect worse answers" in record["notes"][0]
        assert f"note: {record['notes'][0]}\n" in printed

    def test_the_saved_one_is_exported_without_flags(self, folder, tmp_path, capsys):
        record, _ = self.export(folder, tmp_path / "out", capsys)
        assert not {"hvt_pool", "merge_ratio", "speed", "notes"} & record.keys()

    @pytest.mark.parametrize("flags", [("--hvt_pool", "1"), ("--merge_ratio", "0.5")], ids=["blocks", "ratio"])
    def test_one_and_a_speed_exclude_each_other(self, flags, folder, tmp_path, capsys):
        message = refusal(capsys, folder, "--output_dir", tmp_path / "out", "--speed", 2, *flags)
        assert f"--speed 2.0 and {flags[0]} exclude each other: give only one." in message


def test_the_image_processor_of_a_vit_goes_along_too():
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    check_preprocessing(image_processor, image_processor.to_dict(), tiny_config())


def test_an_unknown_format_is_refused_with_the_known_ones(saved_folder, tmp_path, capsys):
    message = refusal(capsys, saved_folder, "--output_dir", tmp_path / "out", "--format", "caffe", status=2)
    assert all(name in message for name in ("--format", "onnx", "torch_export"))
    with pytest.raises(ValueError, match="`format=caffe` is unknown: choose one of onnx, torch_export"):
        export(saved_folder, tmp_path / "out", format="caffe")


def test_a_missing_package_is_named_with_the_command_that_installs_it(saved_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = refusal(capsys, saved_folder, "--output_dir", tmp_path / "out")
    assert message == 'error: The package onnxscript is missing: python -m pip install "hpool-vit[export]"\n'


def test_the_exported_program_does_not_start_with_wrong_flags(exported, photos, tmp_path):
    image = photos / "ant" / "0.png"
    for flags, part in (
        (("--model", tmp_path / "model.onnx", image), "preprocessor_config.json"),
        (("--model", exported[0] / "other.onnx", image), "other.onnx"),
        (("--image_size", 64, image), "--dynamic_image_size"),
        (("--top_k", 0, image), "--top_k 0 must be at least 1"),
    ):
        result = run_python(exported[0] / "predict_onnx.py", *flags, hide=HIDDEN, check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("error: ") and part in result.stderr


def test_the_exported_program_reports_bad_files_and_answers_the_others_as_predict_does(
    exported, saved_folder, photos, tmp_path, capsys
):
    for name, (content, _) in {**BAD_FILES, **CONVERTED_FILES}.items():
        (tmp_path / name).write_bytes(content)
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Path(strange).write_bytes(encoded(picture()))
    names = sorted([*BAD_FILES, *CONVERTED_FILES])
    files = [*(tmp_path / name for name in names), tmp_path / "gone.png", strange, photos / "ant" / "0.png"]
    ours = run_python(exported[0] / "predict_onnx.py", "--top_k", 1, *files, hide=HIDDEN, check=False)
    words = ("--top_k", 1, "--disable_tqdm", "--format", "csv")
    theirs = call_command(capsys, "predict", saved_folder, *words, *files)
    assert ours.returncode == theirs.returncode == 1
    # All but the seconds, and what the reasons of `predict` say about the flags of the image processor.
    (counted, *report), (expected, *lines) = (result.stderr.splitlines() for result in (ours, theirs))
    assert counted.partition(" in ")[0] == expected.partition(" in ")[0] == f"4 of {len(files)} files classified"
    assert report == [line.partition(", or pass `do_rescale")[0] for line in lines]
    rows = list(csv.DictReader(theirs.stdout.splitlines()))
    answers = [line.rpartition(": ")[2] for line in ours.stdout.splitlines()]
    assert len(answers) == len(rows) == len(files)
    for file, line, row in zip(files, ours.stdout.splitlines(), rows, strict=True):
        if row["error"]:
            assert line.startswith(f"{file}: bad: ") and row["error"].startswith(line.partition(": bad: ")[2])
        else:
            label, percent = line.rpartition(": ")[2].split()
            assert label == row["label"]
            assert float(percent.rstrip("%")) == pytest.approx(100 * float(row["score"]), abs=0.5)


def test_the_exported_program_ends_well_if_every_file_was_classified(exported, photos):
    file = photos / "bee" / "1.png"
    result = run_python(exported[0] / "predict_onnx.py", file, hide=HIDDEN)
    assert result.stdout.startswith(f"{file}: ") and result.stderr.startswith("1 of 1 files classified in ")
    assert result.stderr.endswith(" s\n0 images skipped\n0 images converted\n")


@pytest.fixture
def linked_photos(tmp_path) -> Path:
    """Images of three classes, two each, with links and with what systems leave."""
    folder = write_folder(tmp_path / "data" / "photos", per_class=2)
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "bee" / "top").symlink_to(folder.parent)
    for name in ("__MACOSX/._0.png", "@eaDir/0.png", "cat/._0.png", "cat/Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not an image")
    (folder / "cat" / "photo.xyz").touch()
    return folder


def test_images_to_calibrate_and_measure_with_are_each_taken_once_under_their_own_label(linked_photos):
    notes = [
        f"{linked_photos}: 1 file with other endings was left out: .xyz",
        f"{linked_photos}: 2 links to files that are listed elsewhere were left out: ant/up, bee/top",
    ]
    files = [str(linked_photos / label / f"{number}.png") for label in ("ant", "bee", "cat") for number in range(2)]
    found, found_notes = find_images(linked_photos, 100)
    assert sorted(found) == files and found_notes == notes
    assert len(find_images(linked_photos, 4)[0]) == 4 and find_images(linked_photos, 4) == find_images(
        linked_photos, 4
    )
    labelled, labelled_notes = find_labelled_images(linked_photos, ["cat", "ant", "wasp", "bee"])
    assert labelled == list(zip(files, [1, 1, 3, 3, 0, 0], strict=True)) and labelled_notes == notes


@pytest.mark.parametrize("name", ["tall.png", "wide.png", "negative.tif", "moving.gif", "dot.png", "text.jpg"])
def test_an_image_that_cannot_be_used_to_calibrate_is_refused_by_name(name, tmp_path):
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    config = HPoolViTImageProcessorPil.for_config(tiny_model().config).to_dict()
    files, _ = find_images(tmp_path, 8)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))} cannot be used: {re.escape(reason)}"):
        next(read_batches(files, config, batch_size=8))


def test_notes_on_the_folders_are_kept_and_shown():
    record = {
        "format": "onnx",
        "megabytes": 1.0,
        "largest_difference": 1e-6,
        "batch_sizes": [1],
        "image_sizes": [(32, 32)],
        "int8": {
            "method": "static",
            "megabytes": 1.0,
            "batch_size": 8,
            "speedup": [1, 1, 1],
            "notes": ["x was left out"],
        },
    }
    assert report(record).endswith("\nnote: x was left out")


@pytest.mark.slow
def test_the_exported_program_classifies_at_another_image_size(tmp_path, photos):
    model = save(tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "onnx", dynamic_image_size=True)
    file = photos / "bee" / "1.png"
    flags = ("--image_size", 48, "--top_k", 1)
    printed = run_python(folder / "predict_onnx.py", *flags, file, hide=HIDDEN).stdout
    image_processor = HPoolViTImageProcessorPil.for_config(tiny_model(image_size=48).config)
    images = image_processor(Image.open(file), return_tensors="pt")
    best = model(**images, interpolate_pos_encoding=True).logits.argmax().item()
    assert f": {model.config.id2label[best]} " in printed


def test_another_kind_of_int8_is_refused(saved_folder, tmp_path):
    with pytest.raises(ValueError, match="`int8=int4` is unknown: choose dynamic or static"):
        export_model(str(saved_folder), tmp_path / "out", int8="int4")
