"""`hpool-vit convert` recognises its source, makes a complete folder, and refuses in one line what does not apply."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TESTS, call_command, run_command, run_python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hpool_vit.toolkit.command import main
from hpool_vit.toolkit.conversion.checkpoint import ConversionError
from hpool_vit.toolkit.conversion.convert import convert, read_labels, write_folder


REFERENCE = TESTS / "data" / "hvt_tiny_reference.safetensors"
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
}
# Loads a folder in a process without the package, and writes the logits of a batch.
USE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
print(model.config.id2label[model.config.num_labels - 1], list(processor.image_mean), dict(processor.crop_size))
"""


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """`pixel_values` and the `logits` of the paper's implementation."""
    return {name: tensor for name, tensor in load_file(REFERENCE).items() if not name.startswith("model.")}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The state dict of the paper's implementation."""
    tensors = load_file(REFERENCE)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def hvt(tmp_path_factory, weights) -> Path:
    """A checkpoint of the paper's training code."""
    with safe_open(REFERENCE, "pt") as file:
        args = argparse.Namespace(**json.loads(file.metadata()["args"]))
    path = tmp_path_factory.mktemp("hvt") / "checkpoint.pth"
    torch.save({"model": weights, "args": args, "epoch": 299}, path)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A folder of Transformers' ViT without an image processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit") / "vit"
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(folder)
    return folder


def load(folder: Path):
    return AutoModelForImageClassification.from_pretrained(folder)


def refusal(capsys, *words) -> str:
    """The one line with which the command refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *map(str, words)])
    assert stopped.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def logits_without_the_package(tmp_path: Path, folder: Path, pixel_values: torch.Tensor) -> tuple[torch.Tensor, str]:
    save_file({"pixel_values": pixel_values}, tmp_path / "batch.safetensors")
    (tmp_path / "use.py").write_text(USE)
    answer = tmp_path / "answer.safetensors"
    process = run_python(tmp_path / "use.py", folder, tmp_path / "batch.safetensors", answer, hide=("hpool_vit",))
    return load_file(answer)["logits"], process.stdout.strip()


class TestTheSource:
    def test_a_checkpoint_of_the_papers_code_becomes_the_papers_model(self, tmp_path, hvt, reference, capsys):
        (tmp_path / "labels.txt").write_text("\n".join(f"class {index}" for index in range(10)))
        folder = tmp_path / "models" / "hvt-tiny"
        result = call_command(capsys, "convert", hvt, "--output_dir", folder, "--labels", tmp_path / "labels.txt")
        assert result.stdout == (
            "Dropped: nothing.\nNewly initialised: nothing.\n"
            "Image 64, patch 8, width 128, 4 blocks of 2 heads, 10 classes; "
            "max pooling at blocks 1, 3: 64, 31, 15 tokens.\n"
            f"Saved in {folder}.\n"
        )
        assert result.stderr == ""
        logits, printed = logits_without_the_package(tmp_path, folder, reference["pixel_values"])
        torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-5)
        assert printed == "class 9 [0.485, 0.456, 0.406] {'height': 64, 'width': 64}"
        assert load(folder).config.id2label[0] == "class 0"
        assert AutoImageProcessor.from_pretrained(folder).crop_size == {"height": 64, "width": 64}

    def test_a_vit_becomes_one_that_starts_from_its_weights(self, tmp_path, vit, pixel_values, capsys):
        words = ["--hvt_pool", "none", "--image_mean", "0.5,0.4,0.3", "--image_std", "0.5,0.5,0.5"]
        result = call_command(capsys, "convert", vit, "--output_dir", tmp_path / "out", *words)
        assert result.stdout == (
            "Dropped: nothing.\nNewly initialised: nothing.\n"
            "Image 32, patch 4, width 64, 4 blocks of 2 heads, 5 classes; 64 tokens without pooling.\n"
            f"Saved in {tmp_path / 'out'}.\n"
        )
        assert result.stderr == ""
        logits, printed = logits_without_the_package(tmp_path, tmp_path / "out", pixel_values)
        with torch.no_grad():
            expected = load(vit).eval()(pixel_values).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert printed == "LABEL_4 [0.5, 0.4, 0.3] {'height': 32, 'width': 32}"

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_the_papers_weights_are_recognised_by_the_names_of_their_tensors(
        self, tmp_path, weights, reference, suffix
    ):
        path = tmp_path / f"weights{suffix}"
        save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
        model, image_processor, _ = convert(path)
        with torch.no_grad():
            logits = model(reference["pixel_values"]).logits
        torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-5)
        assert image_processor.crop_size == {"height": 64, "width": 64}

    def test_the_papers_model_without_pooling_is_recognised_by_its_arguments(self, tmp_path, hvt, weights):
        content = torch.load(hvt, weights_only=False)
        content["model"] = {name: weights[name] for name in weights if not name.endswith(".pos_embed")}
        content["args"].pool_block_width = None
        torch.save(content, tmp_path / "unpooled.pth")
        assert convert(tmp_path / "unpooled.pth")[0].config.hvt_pool is None
        # Without the arguments it could be any ViT, and gets the pooling of one.
        torch.save(content["model"], tmp_path / "bare.pth")
        assert convert(tmp_path / "bare.pth")[0].config.hvt_pool == [1, 2, 3]


class TestTheOptions:
    def test_lists_have_commas(self, tmp_path, vit, capsys):
        words = ["--pool_mode", "merge", "--hvt_pool", "1,2", "--merge_ratio", "0.3,0.2", "--image_size", "32,48"]
        main(["convert", str(vit), "--output_dir", str(tmp_path / "out"), *words])
        config = load(tmp_path / "out").config
        assert (config.hvt_pool, config.merge_ratio) == ([1, 2], [0.3, 0.2])
        assert tuple(config.image_size) == (32, 48)
        assert config.use_class_token and config.proportional_attention
        assert "merge pooling at blocks 1, 2: 96, 68, 55 tokens" in capsys.readouterr().out

    def test_one_block_one_ratio_and_no_class_token(self, tmp_path, vit, capsys):
        words = ["--pool_mode", "merge", "--hvt_pool", "2", "--merge_ratio", "0.25"]
        words += ["--use_class_token", "false", "--proportional_attention", "false", "--image_size", "48"]
        main(["convert", str(vit), "--output_dir", str(tmp_path / "out"), *words])
        config = load(tmp_path / "out").config
        assert (config.hvt_pool, config.merge_ratio, config.image_size) == ([2], 0.25, 48)
        assert not config.use_class_token and not config.proportional_attention
        assert "Dropped: embeddings.cls_token." in capsys.readouterr().out

    def test_the_pooling_window_and_the_start_of_its_positions(self, tmp_path, vit):
        words = ["--pool_mode", "avg", "--pool_kernel_size", "4", "--pool_stride", "4", "--stage_positions", "pooled"]
        main(["convert", str(vit), "--output_dir", str(tmp_path / "out"), "--hvt_pool", "1", *words])
        model = load(tmp_path / "out")
        positions = load(vit).vit.embeddings.position_embeddings[:, 1:]
        expected = positions.unflatten(1, (16, 4)).mean(2)
        torch.testing.assert_close(model.hpool_vit.pooling["1"].position_embeddings, expected)

    def test_windows_of_the_grid(self, tmp_path, vit):
        words = ["--pool_mode", "max", "--pool_kernel_size", "2,2", "--pool_stride", "2,2", "--hvt_pool", "1"]
        main(["convert", str(vit), "--output_dir", str(tmp_path / "out"), *words])
        config = load(tmp_path / "out").config
        assert config.pool_kernel_size == (2, 2) and config.tokens_per_stage() == [64, 16]

    def test_a_new_head_is_the_same_with_the_same_seed(self, vit):
        state = torch.get_rng_state()
        heads = [convert(vit, num_labels=3, seed=seed)[0].classifier.weight for seed in (None, 0, 1)]
        assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
        assert torch.equal(torch.get_rng_state(), state)

    def test_names_from_a_file_keep_a_head_that_fits(self, tmp_path, vit):
        (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
        words = ["--output_dir", tmp_path / "out", "--labels", tmp_path / "labels.txt"]
        main(["convert", str(vit), *map(str, words)])
        ours = load(tmp_path / "out")
        assert ours.config.id2label[4] == "e"
        torch.testing.assert_close(ours.classifier.weight, load(vit).classifier.weight)

    def test_an_unknown_preparation_of_images_is_reported_unless_it_is_given(self, vit):
        assumed = "Assumed ImageNet's mean and standard deviation"
        assert assumed in str(convert(vit)[2])
        assert assumed in str(convert(vit, image_mean=[0.5] * 3)[2])
        assert assumed not in str(convert(vit, image_mean=[0.5] * 3, image_std=[0.5] * 3)[2])

    def test_a_checkpoint_of_the_papers_code_takes_another_preparation_of_images_too(self, hvt):
        image_processor = convert(hvt, image_mean=[0.5, 0.4, 0.3])[1]
        assert list(image_processor.image_mean) == [0.5, 0.4, 0.3]


class TestGreyscale:
    @pytest.fixture
    def grey(self, tmp_path) -> Path:
        ViTForImageClassification(ViTConfig(**VIT, num_channels=1)).save_pretrained(tmp_path / "grey")
        return tmp_path / "grey"

    def test_a_greyscale_vit_takes_greyscale_images(self, tmp_path, grey, capsys):
        words = ["--hvt_pool", "none", "--image_mean", "0.5", "--image_std", "0.25"]
        result = call_command(capsys, "convert", grey, "--output_dir", tmp_path / "out", *words)
        assert result.returncode == 0 and "images of 1 channel(s), as arrays or Pillow images" in result.stdout
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
        pixel_values = processor(image, return_tensors="pt").pixel_values
        assert pixel_values.shape == (1, 1, 32, 32) and list(processor.image_mean) == [0.5]
        with torch.no_grad():
            logits, expected = (load(folder).eval()(pixel_values).logits for folder in (tmp_path / "out", grey))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("size", [32, 64], ids=["kept", "new"])
    def test_its_own_image_processor_loses_the_conversion_to_rgb(self, grey, size):
        exact = {"height": size, "width": size}
        ViTImageProcessor(size=exact, image_mean=[0.4], image_std=[0.2]).save_pretrained(grey)
        processor = convert(grey, hvt_pool=None)[1]
        assert not processor.do_convert_rgb and (list(processor.image_mean), list(processor.image_std)) == (
            [0.4],
            [0.2],
        )

    def test_without_one_number_per_channel_it_is_refused(self, tmp_path, grey, capsys):
        line = refusal(capsys, grey, "--output_dir", tmp_path / "out")
        assert "--image_mean 0.485,0.456,0.406 must be one number per channel, and `num_channels=1`" in line


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--hvt_pool", "1,3"], "its tensors tell at which blocks it pools"),
            (["--hvt_pool", "none"], "its tensors tell at which blocks it pools"),
            (["--pool_mode", "avg"], "it pools by the maximum"),
            (["--merge_ratio", "0.3"], "it does not merge tokens"),
            (["--proportional_attention", "true"], "it does not merge tokens"),
            (["--stage_positions", "pooled"], "it has position embeddings for every stage"),
            (["--use_class_token", "false"], "it has no class token"),
            (["--num_labels", "3"], "its head tells the number of classes"),
            (["--image_size", "32"], "its position embeddings tell the image size"),
            (["--seed", "1"], "nothing in it starts anew"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_an_option_that_the_papers_checkpoint_decides(self, tmp_path, hvt, capsys, words, reason):
        line = refusal(capsys, hvt, "--output_dir", tmp_path / "out", *words)
        assert f"{words[0]} does not apply: `{hvt}` is a checkpoint of the paper's code, and {reason}." in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--merge_ratio", "0.3"], "--merge_ratio does not apply to --pool_mode max, only to merge."),
            (["--proportional_attention", "true", "--pool_mode", "avg"], "does not apply to --pool_mode avg"),
            (["--pool_stride", "2", "--pool_mode", "merge"], "--pool_stride does not apply to --pool_mode merge"),
            (["--stage_positions", "zero", "--pool_mode", "merge"], "only to max and avg."),
            (["--pool_kernel_size", "3", "--hvt_pool", "none"], "with --hvt_pool none the model does not pool"),
            (["--use_ema"], "--use_ema is for a training checkpoint"),
            (["--num_attention_heads", "4"], "--num_attention_heads 4 cannot be chosen: the source has 2."),
            (["--hvt_pool", "1,7"], "names block 7"),
            (["--pool_kernel_size", "large"], "'pool_kernel_size' with value 'large'"),
            (["--pool_stride", "0,2"], "--pool_stride (0, 2) must be one number or (rows, columns)"),
            (["--hvt_pool", "one"], "hvt_pool"),
            (["--pool_mode", "median"], "--pool_mode median is unknown: choose one of max, avg, merge."),
            (["--stage_positions", "random"], "--stage_positions random is unknown: choose zero or pooled."),
            (["--image_size", "1,2,3"], "--image_size 1,2,3 must be one number of pixels, or height and width"),
            (["--image_size", "true"], "--image_size true must be one number of pixels"),
            (["--image_size", "large"], "--image_size large must be one number of pixels, or height and width"),
            (["--image_mean", "0.5"], "--image_mean 0.5 must be one number per channel"),
            (["--image_std", "0.5,0.5"], "--image_std 0.5,0.5 must be one number per channel, and `num_channels=3`"),
            (["--image_std", "true"], "--image_std true must be one number per channel"),
            (["--compare_images", "10"], "--compare_images 10 does not apply without --compare: pass a folder"),
            (["--compare_images", "0"], "--compare_images 0 does not apply without --compare"),
            (["--labels", "nowhere.txt"], "nowhere.txt"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_an_option_that_does_not_fit_a_vit(self, tmp_path, vit, capsys, words, reason):
        assert reason in refusal(capsys, vit, "--output_dir", tmp_path / "out", *words)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--pool_kernel_size", "2,2"], "--pool_kernel_size 2,2 must be one number, at least 1"),
            (["--pool_kernel_size", "abc"], "--pool_kernel_size abc must be one number, at least 1"),
            (["--pool_stride", "2,2"], "the paper's code pools along the row of tokens"),
            (["--pool_stride", "0"], "--pool_stride 0 must be one number, at least 1"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_window_that_the_papers_code_does_not_have(self, tmp_path, hvt, capsys, words, reason):
        assert reason in refusal(capsys, hvt, "--output_dir", tmp_path / "out", *words)

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("nothing.pth", "`nothing.pth` is not a file"),
            ("nothing", "`nothing` is neither a file nor a folder"),
            ("empty", "`empty` has no config.json"),
        ],
    )
    def test_a_source_that_is_not_there(self, tmp_path, capsys, monkeypatch, source, reason):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        assert reason in refusal(capsys, source, "--output_dir", "out")

    def test_in_a_real_process_too(self, tmp_path):
        result = run_command("convert", tmp_path / "nothing.pth", "--output_dir", tmp_path / "out", check=False)
        assert result.returncode == 1
        assert result.stderr == f"error: `{tmp_path / 'nothing.pth'}` is not a file.\n"

    @pytest.mark.parametrize("labels", ["one\ntwo", "a\n" * 10, "a\n\nb"], ids=["few", "twice", "empty line"])
    def test_labels_that_do_not_fit(self, tmp_path, hvt, capsys, labels):
        (tmp_path / "labels.txt").write_text(labels)
        words = ["--output_dir", tmp_path / "out", "--labels", tmp_path / "labels.txt"]
        assert "class" in refusal(capsys, hvt, *words)
        assert not (tmp_path / "out").exists()

    def test_a_folder_with_something_in_it_stays_as_it_is(self, tmp_path, hvt, capsys):
        (tmp_path / "thesis.tex").write_text("x")
        assert "not empty" in refusal(capsys, hvt, "--output_dir", tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_head_that_does_not_fit_the_class_names_leaves_no_folder(self, tmp_path, hvt):
        (tmp_path / "labels.txt").write_text("one\ntwo")
        with pytest.raises(ConversionError, match="10 classes and 2 class names"):
            convert(hvt, **read_labels(tmp_path / "labels.txt"))


def test_a_folder_is_written_completely_or_not_at_all(tmp_path):
    class Part:
        def save_pretrained(self, folder):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "part").touch()

    class Full:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "new" / "model", Part(), Full())
    assert not list((tmp_path / "new").iterdir())
    write_folder(tmp_path / "new" / "model", Part(), Part())
    assert [path.name for path in (tmp_path / "new" / "model").iterdir()] == ["part"]
