"""The pictures of pooling: what they show of a photo, and the program that writes them."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOOLKIT, run_python, tiny_model
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hpool_vit import HPoolViTImageProcessor, HPoolViTImageProcessorPil
from hpool_vit.configuration_hpool_vit import POOL_MODES
from hpool_vit.toolkit.inspection.figure import borders, patch_colours, token_cells
from hpool_vit.toolkit.inspection.trace import block_macs, trace_pooling
from hpool_vit.toolkit.inspection.visualize import draw, draw_chart, load, main, prepare, trace_images


LABELS = {0: "ant", 1: "bee", 2: "cat"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved folder per way of pooling."""
    root = tmp_path_factory.mktemp("folders")
    for pool_mode in POOL_MODES:
        ratios = {"merge_ratio": [0.25, 0.5]} if pool_mode == "merge" else {}
        model = tiny_model(pool_mode=pool_mode, use_class_token=True, id2label=LABELS, **ratios)
        model.save_pretrained(root / pool_mode)
        HPoolViTImageProcessor.for_config(model.config).save_pretrained(root / pool_mode)
    return {pool_mode: root / pool_mode for pool_mode in POOL_MODES}


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((280, 200)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def visualize(folder: Path, photo: Path, output: Path, *args):
    main(["--model_name_or_path", str(folder), "--image", str(photo), "--output", str(output), *map(str, args)])


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.verify()
        return picture.size


def texts(figure: Figure) -> list[str]:
    written = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        written += [text.get_text() for text in axes.texts] + [axes.get_title(loc="left")]
    return written


def traced(figure_of: str, photo: Path, folders: dict[str, Path], **overrides):
    model, image_processor = load(str(folders[figure_of]), **overrides)
    image = Image.open(photo)
    return model, image, *trace_images(model, image_processor, [image])


class TestWhatTheModelSees:
    @pytest.mark.parametrize("backend", [HPoolViTImageProcessor, HPoolViTImageProcessorPil])
    @pytest.mark.parametrize("image_size", [None, (24, 48)])
    def test_the_photo_in_the_picture_is_the_input_before_it_is_normalised(self, backend, image_size, photo):
        processor = backend.for_config(tiny_model().config)
        pixel_values, (seen,) = prepare(processor, [Image.open(photo)], tiny_model().config, image_size)
        assert pixel_values.shape == (1, 3, *(image_size or (32, 32)))
        normalised = (seen - np.array(processor.image_mean)) / np.array(processor.image_std)
        np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0), normalised, atol=1e-5)

    def test_pixels_that_fill_no_patch_are_not_in_it(self, photo):
        config = tiny_model().config
        processor = HPoolViTImageProcessor.for_config(config)
        pixel_values, (seen,) = prepare(processor, [Image.open(photo)], config, (35, 41))
        assert pixel_values.shape[2:] == (35, 41)
        assert seen.shape == (32, 40, 3)

    @pytest.mark.parametrize(
        "attributes",
        [
            {"do_center_crop": False, "size": {"height": 32, "width": 32}},
            {"size": {"height": 40, "width": 36}, "crop_size": {"height": 32, "width": 32}},
        ],
    )
    def test_every_way_to_resize_gives_the_size_that_was_asked_for(self, attributes, photo):
        config = tiny_model().config
        processor = HPoolViTImageProcessor.for_config(config, **attributes)
        assert prepare(processor, [Image.open(photo)], config, (20, 44))[0].shape == (1, 3, 20, 44)

    def test_greyscale_models_see_grey(self, photo):
        config = tiny_model(num_channels=1).config
        processor = HPoolViTImageProcessor.for_config(config, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
        pixel_values, (seen,) = prepare(processor, [Image.open(photo).convert("RGB")], config)
        assert pixel_values.shape == (1, 1, 32, 32)
        np.testing.assert_allclose(seen, (pixel_values[0] * 0.5 + 0.5).expand(3, -1, -1).permute(1, 2, 0), atol=1e-6)


class TestThePicture:
    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_it_has_the_photo_two_panels_per_stage_and_the_rollout(self, pool_mode, photo, folders):
        model, _, trace, seen = traced(pool_mode, photo, folders)
        figure = draw(seen, trace, model.config)
        pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
        np.testing.assert_allclose(pictures[0], seen[0])
        assert len(pictures) == 1 + 2 * 2 + 1 + 2  # the last two are the keys of the colours
        probability, label = trace.logits[0].softmax(-1).max(-1)
        assert {LABELS[int(label)], f"{probability:.1%}"} <= set(texts(figure))
        tokens = model.config.tokens_per_stage()
        assert {f"{tokens[0]} → {tokens[1]} tokens", f"{tokens[1]} → {tokens[2]} tokens"} <= set(texts(figure))

    def test_each_group_of_merged_patches_has_the_one_colour_of_their_mean(self, photo, folders):
        model, _, trace, seen = traced("merge", photo, folders)
        (drawn,) = (axes.images[0] for axes in draw(seen, trace, model.config).axes[4:5])
        groups = trace.stages[2].groups[0]
        colours = patch_colours(seen[0], trace.grid)
        for group in range(trace.stages[2].num_tokens):
            patches = drawn.get_array().reshape(-1, 3)[groups.numpy() == group]
            np.testing.assert_allclose(patches, colours[groups == group].mean(0).expand(len(patches), 3), atol=1e-5)

    def test_a_patch_in_two_windows_is_split_between_their_tokens(self):
        trace = trace_pooling(tiny_model(image_size=(4, 24), hvt_pool=[0]), torch.randn(1, 3, 4, 24))
        assert trace.stages[1].num_tokens == 2  # windows of the patches 0 to 2 and 2 to 4; the last is in none
        assert token_cells(trace.stages[1], 0, (1, 6)).tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 1, -1]]

    def test_borders_run_between_different_tokens_only(self):
        lines = borders(np.array([[0, 0, 1], [0, 2, 2]]), (2, 3))
        assert sorted(lines) == [[(1, 1), (1, 2)], [(1, 1), (2, 1)], [(2, 0), (2, 1)], [(2, 1), (3, 1)]]

    def test_several_images_share_one_picture(self, photo, folders):
        model, image_processor = load(str(folders["max"]))
        trace, seen = trace_images(model, image_processor, [Image.open(photo), Image.new("RGB", (60, 60))])
        figure = draw(seen, trace, model.config, ["one.jpg", "two $.jpg"])
        assert {"one.jpg", "two $.jpg"} <= set(texts(figure))
        with pytest.raises(ValueError, match="1 images, 1 names and 2 traced images"):
            draw(seen[:1], trace, model.config)

    def test_a_model_that_never_pools_has_rollout_and_prediction_alone(self, photo, folders):
        model, _, trace, seen = traced("max", photo, folders, hvt_pool=None)
        figure = draw(seen, trace, model.config)
        assert len([axes for axes in figure.axes if axes.images]) == 3

    def test_a_model_without_classifier_says_so(self, photo, folders):
        model, _, trace, seen = traced("max", photo, folders)
        trace.logits = None
        assert "none: the model has\nno classifier" in texts(draw(seen, trace, model.config))

    def test_the_chart_has_tokens_and_macs_of_each_block(self, photo, folders):
        model, _, trace, _ = traced("avg", photo, folders)
        tokens, macs = draw_chart(trace, model.config).axes
        assert [bar.get_height() for bar in tokens.patches] == [64] * 4 + [64, 31, 31, 15]
        expected = [macs / 1e6 for macs in block_macs(model.config)]
        assert [bar.get_height() for bar in macs.patches[4:]] == pytest.approx(expected)

    def test_pyplot_knows_of_no_figure(self, photo, folders):
        model, _, trace, seen = traced("max", photo, folders)
        draw(seen, trace, model.config)
        pyplot = sys.modules.get("matplotlib.pyplot")
        assert pyplot is None or pyplot.get_fignums() == []


class TestTheProgram:
    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_it_writes_picture_chart_and_numbers(self, pool_mode, photo, folders, tmp_path, capsys):
        outputs = [tmp_path / "new" / name for name in ("panels.png", "chart.svg", "numbers.safetensors")]
        visualize(folders[pool_mode], photo, outputs[0], "--chart", outputs[1], "--save_tensors", outputs[2])
        assert min(picture_size(outputs[0])) > 500
        assert "<svg" in outputs[1].read_text()
        numbers = load_file(outputs[2])
        assert numbers["macs_per_block"].tolist() == block_macs(load(str(folders[pool_mode]))[0].config)
        assert numbers["rollout"].shape == (1, 64)
        printed = capsys.readouterr().out
        assert f"{photo}: {LABELS[int(numbers['logits'].argmax())]} " in printed
        assert all(f"written: {path}" in printed for path in outputs)

    def test_a_real_process_takes_several_images(self, photo, folders, tmp_path):
        run_python(
            TOOLKIT / "inspection/visualize.py",
            *("--model_name_or_path", folders["merge"], "--output", tmp_path / "panels.png"),
            *("--image", photo, shutil.copy(photo, tmp_path / "other.jpg")),
        )
        width, height = picture_size(tmp_path / "panels.png")
        assert height > width * 0.9

    @pytest.mark.parametrize(
        ("pool_mode", "flags", "tokens"),
        [
            ("max", ["--hvt_pool", "2"], "64 → 31"),
            ("merge", ["--no_pooling"], "64"),
            ("merge", ["--hvt_pool", "0", "1", "3", "--merge_ratio", "0.5"], "64 → 32 → 16 → 8"),
            ("avg", ["--image_size", "24", "48"], "72 → 35 → 17"),
            ("merge", ["--image_size", "48"], "144 → 108 → 54"),
        ],
    )
    def test_other_schedules_and_sizes(self, pool_mode, flags, tokens, photo, folders, tmp_path, capsys):
        visualize(folders[pool_mode], photo, tmp_path / "panels.png", *flags)
        assert f"tokens: {tokens}\n" in capsys.readouterr().out

    def test_a_folder_without_classifier_gets_no_made_up_prediction(self, photo, folders, tmp_path, capsys):
        model, image_processor = load(str(folders["max"]))
        for part in (model.hpool_vit, image_processor):
            part.save_pretrained(tmp_path / "headless")
        visualize(tmp_path / "headless", photo, tmp_path / "panels.png")
        assert str(photo) not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--image", "missing.jpg"], "--image missing.jpg: unreadable: No such file"),
            (["--image", "broken.jpg"], "--image broken.jpg: unreadable: not an image"),
            (["--image", "."], "--image .: unreadable"),
            (["--image", *["photo.jpg"] * 33], "--image names 33 files: give at most 32"),
            (["--model_name_or_path", "missing"], "--model_name_or_path missing"),
            (["--model_name_or_path", "vit"], "--model_name_or_path vit is a model of the type 'vit', no HPool-ViT"),
            (["--model_name_or_path", "damaged"], "--model_name_or_path damaged cannot be loaded: "),
            (["--hvt_pool", "9"], "`hvt_pool=[9]` names block 9"),
            (["--hvt_pool", "0", "1", "2", "3", "--image_size", "12"], "runs out of tokens"),
            (["--merge_ratio", "0.3"], "--merge_ratio is for models that merge"),
            (["--image_size", "0"], "--image_size 0 must be one or two numbers"),
            (["--image_size", "1", "2", "3"], "--image_size 1 2 3 must be one or two numbers"),
            (["--output", "photo.jpg"], "--output photo.jpg is the file of --image too"),
            (["--output", "panels"], "--output panels must end in one of ."),
            (["--output", "folder.png"], "--output folder.png is a folder"),
            (["--chart", "panels.png"], "--chart panels.png is the file of --output too"),
            (["--save_tensors", "numbers.npz"], "--save_tensors numbers.npz must end in one of .safetensors"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, flags, message, photo, folders, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folders["max"], "damaged")
        Path("damaged/model.safetensors").write_bytes(b"no weights")
        tiny = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 1}
        ViTForImageClassification(ViTConfig(**tiny)).save_pretrained("vit")
        ViTImageProcessor().save_pretrained("vit")
        Path("broken.jpg").write_bytes(b"no image")
        Path("folder.png").mkdir()
        defaults = {"--model_name_or_path": folders["max"], "--image": photo, "--output": "panels.png"}
        given = [str(part) for flag, value in defaults.items() if flag not in flags for part in (flag, value)]
        if "--output" in flags:
            given[given.index("--image") + 1] = "photo.jpg"
        with pytest.raises(SystemExit) as stopped:
            main([*given, *flags])
        assert str(stopped.value).startswith("error: ")
        assert message in stopped.value.code
        assert "\n" not in stopped.value.code
        assert not Path("panels.png").exists()
