"""`hpool-vit visualize`: what the pictures of pooling show of a photo, and the command that writes them."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call_command, save_with_processor, tiny_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hpool_vit import HPoolViTImageProcessor, HPoolViTImageProcessorPil
from hpool_vit.configuration_hpool_vit import POOL_MODES
from hpool_vit.toolkit.command import main
from hpool_vit.toolkit.inspection.figure import borders, draw, draw_chart, patch_colours, token_cells
from hpool_vit.toolkit.inspection.trace import block_macs, trace_pooling
from hpool_vit.toolkit.inspection.visualize import load_model, prepare_images, trace_images
from hpool_vit.toolkit.shared.figures import save_figure
from hpool_vit.toolkit.shared.saved_model import SavedModelError


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
    main(["visualize", *map(str, (folder, photo, "--output", output, *args))])


def two_colours(path: Path) -> Path:
    """A photo whose left half is red and whose right half is blue."""
    pixels = np.zeros((200, 280, 3), dtype=np.uint8)
    pixels[:, :140, 0] = pixels[:, 140:, 2] = 255
    Image.fromarray(pixels).save(path)
    return path


def colour_at(picture: Path, axes: Axes, x: float, y: float) -> list[int]:
    """The colour in a written picture around a place in the axes, from (0, 0) at the lower left to (1, 1)."""
    with Image.open(picture) as image:
        box = axes.get_position()
        column = (box.x0 + x * box.width) * image.width
        row = (1 - box.y0 - y * box.height) * image.height
        pixels = np.asarray(image.convert("RGB"))[int(row) - 6 : int(row) + 7, int(column) - 6 : int(column) + 7]
        return np.median(pixels, axis=(0, 1)).tolist()


def texts(figure: Figure) -> list[str]:
    written = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        written += [text.get_text() for text in axes.texts] + [axes.get_title(loc="left")]
    return written


def traced(figure_of: str, photo: Path, folders: dict[str, Path], **overrides):
    model, image_processor = load_model(str(folders[figure_of]), **overrides)
    image = Image.open(photo)
    return model, image, *trace_images(model, image_processor, [image])


class TestWhatTheModelSees:
    @pytest.mark.parametrize("backend", [HPoolViTImageProcessor, HPoolViTImageProcessorPil])
    @pytest.mark.parametrize("image_size", [None, (24, 48)])
    def test_the_photo_in_the_picture_is_the_input_before_it_is_normalised(self, backend, image_size, photo):
        processor = backend.for_config(tiny_model().config)
        pixel_values, (seen,) = prepare_images(processor, [Image.open(photo)], tiny_model().config, image_size)
        assert pixel_values.shape == (1, 3, *(image_size or (32, 32)))
        normalised = (seen - np.array(processor.image_mean)) / np.array(processor.image_std)
        np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0), normalised, atol=1e-5)

    def test_pixels_that_fill_no_patch_are_not_in_it(self, photo):
        config = tiny_model().config
        processor = HPoolViTImageProcessor.for_config(config)
        pixel_values, (seen,) = prepare_images(processor, [Image.open(photo)], config, (35, 41))
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
        assert prepare_images(processor, [Image.open(photo)], config, (20, 44))[0].shape == (1, 3, 20, 44)

    def test_greyscale_models_see_grey(self, photo):
        config = tiny_model(num_channels=1).config
        processor = HPoolViTImageProcessor.for_config(config, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
        pixel_values, (seen,) = prepare_images(processor, [Image.open(photo).convert("RGB")], config)
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
        model, image_processor = load_model(str(folders["max"]))
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

    def test_no_figure_is_registered_with_pyplot(self, photo, folders):
        model, _, trace, seen = traced("max", photo, folders)
        draw(seen, trace, model.config)
        pyplot = sys.modules.get("matplotlib.pyplot")
        assert pyplot is None or pyplot.get_fignums() == []


class TestTheFile:
    @pytest.mark.parametrize("ending", ["png", "webp"])
    def test_it_shows_the_photo_and_its_tokens_in_their_places(self, ending, folders, tmp_path):
        # Patches stay apart here: only the one pair of neighbours that is most alike has merged.
        photo, picture = two_colours(tmp_path / "photo.png"), tmp_path / f"picture.{ending}"
        model, _, trace, seen = traced("merge", photo, folders, hvt_pool=[1], merge_ratio=0.02)
        figure = draw(seen, trace, model.config)
        save_figure(figure, picture)
        photo_panel, tokens_panel = [axes for axes in figure.axes if axes.images][:2]
        for panel in (photo_panel, tokens_panel):
            left, right = colour_at(picture, panel, 0.2, 0.5), colour_at(picture, panel, 0.8, 0.5)
            assert left[0] > 150 > left[2] and right[2] > 150 > right[0]
        assert colour_at(picture, photo_panel, -0.04, 0.5) == [255, 255, 255]

    def test_letters_that_the_font_lacks_are_no_warning(self, photo, folders, tmp_path, recwarn):
        model, _, trace, seen = traced("max", photo, folders)
        save_figure(draw(seen, trace, model.config, ["写真.jpg"]), tmp_path / "picture.png")
        assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


class TestTheCommand:
    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_it_writes_picture_chart_and_numbers(self, pool_mode, photo, folders, tmp_path, capsys):
        outputs = [tmp_path / "new" / name for name in ("panels.png", "chart.svg", "numbers.safetensors")]
        visualize(folders[pool_mode], photo, outputs[0], "--chart", outputs[1], "--save_tensors", outputs[2])
        model, _, trace, seen = traced(pool_mode, photo, folders)
        panel = draw(seen, trace, model.config, ["photo.jpg"], chart=False).axes[0]
        centre = seen[0][14:18, 14:18].mean((0, 1)) * 255
        np.testing.assert_allclose(colour_at(outputs[0], panel, 0.5, 0.5), centre, atol=60)
        assert "<svg" in outputs[1].read_text()
        numbers = load_file(outputs[2])
        assert numbers["macs_per_block"].tolist() == block_macs(load_model(str(folders[pool_mode]))[0].config)
        assert numbers["rollout"].shape == (1, 64)
        printed = capsys.readouterr().out
        assert f"{photo}: {LABELS[int(numbers['logits'].argmax())]} " in printed
        assert all(f"written: {path}" in printed for path in outputs)

    @pytest.mark.parametrize("flags", [(), ("--image_size", "48")], ids=["own size", "another size"])
    def test_it_draws_a_model_that_pools_on_the_grid(self, flags, photo, tmp_path):
        windows = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2), "hvt_pool": [1]}
        folder = save_with_processor(tmp_path / "grid", tiny_model(pool_mode="avg", **windows, id2label=LABELS))
        outputs = [tmp_path / name for name in ("panels.png", "chart.png", "numbers.safetensors")]
        visualize(folder, photo, outputs[0], "--chart", outputs[1], "--save_tensors", outputs[2], *flags)
        numbers = load_file(outputs[2])
        rows, columns = numbers["grid"].tolist()
        assert numbers["tokens_per_block"].tolist() == [rows * columns] + 3 * [rows // 2 * (columns // 2)]
        macs = numbers["macs_per_block"].tolist()
        assert macs == block_macs(load_model(str(folder))[0].config, (rows, columns)) and macs[1] < macs[0]
        assert all(output.is_file() for output in outputs)

    def test_it_takes_several_images(self, photo, folders, tmp_path, capsys):
        photos, picture = [photo, two_colours(tmp_path / "other.png")], tmp_path / "panels.png"
        result = call_command(capsys, "visualize", folders["merge"], *photos, "--output", picture)
        assert result.returncode == 0
        assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [
            *map(str, photos),
            "tokens",
            "written",
        ]
        assert result.stderr == ""
        model, image_processor = load_model(str(folders["merge"]))
        trace, seen = trace_images(model, image_processor, [Image.open(path).convert("RGB") for path in photos])
        figure = draw(seen, trace, model.config, [path.name for path in photos])
        second = [axes for axes in figure.axes if axes.images and np.array_equal(axes.images[0].get_array(), seen[1])]
        left, right = (colour_at(picture, second[0], x, 0.5) for x in (0.2, 0.8))
        assert left[0] > 150 > left[2] and right[2] > 150 > right[0]

    @pytest.mark.parametrize(
        ("pool_mode", "flags", "tokens"),
        [
            ("max", ["--hvt_pool", "2"], "64 → 31"),
            ("merge", ["--hvt_pool", "none"], "64"),
            ("merge", ["--hvt_pool", "0,1,3", "--merge_ratio", "0.5"], "64 → 32 → 16 → 8"),
            ("merge", ["--hvt_pool", "1,2", "--merge_ratio", "0.5,0.25"], "64 → 32 → 24"),
            ("avg", ["--image_size", "24,48"], "72 → 35 → 17"),
            ("merge", ["--image_size", "48"], "144 → 108 → 54"),
        ],
    )
    def test_other_schedules_and_sizes(self, pool_mode, flags, tokens, photo, folders, tmp_path, capsys):
        visualize(folders[pool_mode], photo, tmp_path / "panels.png", *flags)
        assert f"tokens: {tokens}\n" in capsys.readouterr().out

    def test_a_folder_without_classifier_gets_no_made_up_prediction(self, photo, folders, tmp_path, capsys):
        model, image_processor = load_model(str(folders["max"]))
        for part in (model.hpool_vit, image_processor):
            part.save_pretrained(tmp_path / "headless")
        visualize(tmp_path / "headless", photo, tmp_path / "panels.png")
        assert str(photo) not in capsys.readouterr().out

    @pytest.mark.parametrize("missing", ["hpool_vit.layers.3.mlp.fc1.weight", "hpool_vit.readout.query"])
    def test_a_folder_that_lacks_weights_is_refused(self, missing, photo, tmp_path):
        model = tiny_model(readout="attention", hvt_pool=None)
        save_with_processor(tmp_path / "model", model)
        weights = load_file(tmp_path / "model" / "model.safetensors")
        lacking = next(name for name in weights if name.startswith(missing.removesuffix(".query")))
        del weights[lacking]
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        with pytest.raises(SavedModelError, match=f"model has no weights for {lacking}: it is incomplete"):
            load_model(str(tmp_path / "model"))

    def test_one_of_its_speeds(self, photo, tmp_path, capsys):
        model = tiny_model(pool_mode="merge", hvt_pool=None, speeds={2.0: {"hvt_pool": [1], "merge_ratio": 0.5}})
        save_with_processor(tmp_path / "model", model)
        visualize(tmp_path / "model", photo, tmp_path / "panels.png", "--speed", 2)
        assert "tokens: 64 → 32\n" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["model", "missing.jpg"], "missing.jpg: unreadable: No such file"),
            (["model", "broken.jpg"], "broken.jpg: unreadable: not an image"),
            (["model", "."], ".: unreadable"),
            (["model", "https://x.org/a.jpg"], "https://x.org/a.jpg is an address, and only files can be drawn"),
            (["model", *["photo.jpg"] * 33], "There are 33 images: pass at most 32"),
            (["missing", "photo.jpg"], "missing is neither a folder here nor an id on the Hub"),
            (["vit", "photo.jpg"], "vit is a model of the type 'vit', not an HPool-ViT"),
            (["damaged", "photo.jpg"], "damaged cannot be loaded: "),
            (["--hvt_pool", "9"], "--hvt_pool 9 names block 9"),
            (["--hvt_pool", "0,1,2,3", "--image_size", "12"], "runs out of tokens"),
            (["--merge_ratio", "0.3"], "--merge_ratio is for models that merge"),
            (["--image_size", "0"], "--image_size 0 must be one number of pixels, or height and width"),
            (["--image_size", "1,2,3"], "--image_size 1,2,3 must be one number"),
            (["--image_size", "large"], "--image_size large must be one number"),
            (["--output", "photo.jpg"], "--output photo.jpg is also an image"),
            (["--output", "panels"], "--output panels must end in ."),
            (["--output", "folder.png"], "--output folder.png is a folder"),
            (["--chart", "panels.png"], "--chart panels.png is also --output: name another file"),
            (["--save_tensors", "numbers.npz"], "--save_tensors numbers.npz must end in .safetensors"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, words, message, photo, folders, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folders["max"], "model")
        shutil.copytree(folders["max"], "damaged")
        Path("damaged/model.safetensors").write_bytes(b"no weights")
        tiny = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 1}
        ViTForImageClassification(ViTConfig(**tiny)).save_pretrained("vit")
        ViTImageProcessor().save_pretrained("vit")
        Path("broken.jpg").write_bytes(b"no image")
        Path("folder.png").mkdir()
        words = words if not words[0].startswith("-") else ["model", "photo.jpg", *words]
        words = words if "--output" in words else [*words, "--output", "panels.png"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["visualize", *words])
        assert stopped.value.code == 1
        *notes, line = capsys.readouterr().err.strip().splitlines()
        assert all(note.startswith("note: ") for note in notes)
        assert line.startswith("error: ") and message in line
        assert not Path("panels.png").exists()
