"""Checkpoints of the paper's training code become HPool-ViTs that answer as the paper's implementation does."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import TESTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpool_vit.toolkit.conversion.checkpoint import ConversionError
from hpool_vit.toolkit.conversion.hvt import convert_hvt


SIZE_DEFINING = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
REFERENCE = TESTS / "data" / "hvt_tiny_reference.safetensors"


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """`pixel_values`, and the `pooled` and `logits` of the paper's implementation."""
    return {name: tensor for name, tensor in load_file(REFERENCE).items() if not name.startswith("model.")}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The state dict of the paper's implementation."""
    tensors = load_file(REFERENCE)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


@pytest.fixture
def train_args() -> argparse.Namespace:
    with safe_open(REFERENCE, "pt") as file:
        return argparse.Namespace(**json.loads(file.metadata()["args"]))


@pytest.fixture
def checkpoint(weights, train_args) -> dict:
    """What the paper's training script writes, with an optimizer's state."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {"model": weights, "optimizer": optimizer.state_dict(), "lr_scheduler": {"base_values": [5e-4]}}
    return {**state, "epoch": 299, "scaler": {"scale": 65536.0}, "args": train_args}


def save(path: Path, content) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def assert_answers_as_the_reference(model, reference):
    with torch.no_grad():
        pooled = model.hpool_vit(reference["pixel_values"]).pooler_output
        logits = model(reference["pixel_values"]).logits
    torch.testing.assert_close(pooled, reference["pooled"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-5)


def test_a_training_checkpoint_answers_as_the_papers_implementation(tmp_path, checkpoint, reference):
    model, report = convert_hvt(save(tmp_path / "best_checkpoint.pth", checkpoint))
    assert_answers_as_the_reference(model, reference)
    assert report.notes == []
    config = model.config
    assert config.hvt_pool == [1, 3]
    assert (config.pool_kernel_size, config.pool_stride) == (3, 2)
    assert (config.image_size, config.patch_size, config.num_labels) == (64, 8, 10)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 4, 2)
    assert config.drop_path_rate == 0.1


@pytest.mark.parametrize("name", ["bare.pth", "bare.bin", "bare.safetensors"])
def test_a_bare_state_dict_says_enough(tmp_path, weights, reference, name):
    model, report = convert_hvt(save(tmp_path / name, weights))
    assert_answers_as_the_reference(model, reference)
    assert "2 attention heads" in str(report)


def test_the_prefix_of_data_parallel_training_is_removed(tmp_path, weights, reference):
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    model, _ = convert_hvt(save(tmp_path / "wrapped.pth", {"model": wrapped}))
    assert_answers_as_the_reference(model, reference)


def test_the_moving_average_is_taken_when_asked_for(tmp_path, checkpoint, weights, reference):
    checkpoint["model_ema"] = weights
    checkpoint["model"] = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    model, _ = convert_hvt(save(tmp_path / "ema.pth", checkpoint), use_ema=True)
    assert_answers_as_the_reference(model, reference)
    del checkpoint["model_ema"]
    with pytest.raises(ConversionError, match="no moving average"):
        convert_hvt(save(tmp_path / "no_ema.pth", checkpoint), use_ema=True)


def test_a_model_without_a_head_becomes_one_without_labels(tmp_path, checkpoint, weights, reference):
    del weights["head.weight"], weights["head.bias"]
    checkpoint["args"].nb_classes = 0
    model, _ = convert_hvt(save(tmp_path / "features.pth", checkpoint))
    assert model.config.num_labels == 0
    with torch.no_grad():
        logits = model(reference["pixel_values"]).logits
    torch.testing.assert_close(logits, reference["pooled"], rtol=0, atol=1e-5)


def test_a_checkpoint_without_stages_becomes_a_model_without_pooling(tmp_path, weights):
    unpooled = {name: tensor for name, tensor in weights.items() if not name.endswith("pos_embed") or name[0] == "p"}
    model, _ = convert_hvt(save(tmp_path / "unpooled.pth", unpooled))
    assert model.config.hvt_pool is None


def test_of_several_windows_the_papers_is_taken_and_reported(tmp_path, weights):
    del weights["blocks.2.pos_embed"]
    path = save(tmp_path / "one_pool.pth", weights)
    model, report = convert_hvt(path)
    assert (model.config.pool_kernel_size, model.config.pool_stride) == (3, 2)
    assert "Assumed `pool_kernel_size=3`" in str(report)
    assert convert_hvt(path, pool_kernel_size=4, pool_stride=2)[0].config.pool_kernel_size == 4


def test_the_stride_of_the_arguments_is_ignored_as_in_the_papers_code(tmp_path, checkpoint, reference):
    checkpoint["args"].pool_stride = 3
    model, _ = convert_hvt(save(tmp_path / "stride.pth", checkpoint))
    assert_answers_as_the_reference(model, reference)


def test_the_number_of_heads_can_be_told(tmp_path, weights):
    model, report = convert_hvt(save(tmp_path / "bare.pth", weights), num_attention_heads=4)
    assert model.config.num_attention_heads == 4
    assert report.notes == []


def test_the_number_of_heads_cannot_be_chosen_where_the_checkpoint_tells_it(tmp_path, checkpoint):
    with pytest.raises(ConversionError, match="`num_attention_heads=4` cannot be chosen: the source has 2"):
        convert_hvt(save(tmp_path / "checkpoint.pth", checkpoint), num_attention_heads=4)


class TestRefusals:
    """What cannot be converted is named."""

    @pytest.fixture
    def refuse(self, tmp_path):
        """Converts some content and returns the message with which it is refused."""

        def run(content, name="checkpoint.pth") -> str:
            path = tmp_path / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                save(path, content)
            with pytest.raises(ConversionError) as error:
                convert_hvt(path)
            assert sorted(file.name for file in tmp_path.iterdir()) == [name]
            return str(error.value)

        return run

    def test_each_missing_tensor(self, refuse, checkpoint, weights):
        for name in list(weights):
            tensor = weights.pop(name)
            assert f"`{name}`" in refuse(checkpoint), name
            weights[name] = tensor

    def test_each_tensor_of_another_shape(self, refuse, checkpoint, weights):
        for name, tensor in weights.items():
            for wrong in (torch.cat((tensor, tensor)), tensor[..., :-1], tensor.flatten()[0]):
                weights[name] = wrong
                # One that defines a size makes its neighbours look wrong.
                named = "The tensor `" if name in SIZE_DEFINING else f"`{name}`"
                assert named in refuse(checkpoint), (name, wrong.shape)
            weights[name] = tensor

    def test_a_surplus_tensor(self, refuse, checkpoint, weights):
        weights["blocks.1.attn.relative_bias"] = torch.zeros(3)
        assert "`blocks.1.attn.relative_bias`" in refuse(checkpoint)

    def test_a_missing_block(self, refuse, checkpoint, weights):
        for block in (3, 1):
            for name in [name for name in weights if name.startswith(f"blocks.{block}.")]:
                del weights[name]
            assert f"`blocks.{block}.norm1.weight`" in refuse(checkpoint)
        assert "`blocks.1.norm1.weight`" in refuse(weights)

    def test_pooling_after_the_last_block(self, refuse, weights):
        weights["blocks.3.pos_embed"] = torch.zeros(1, 7, 128)
        assert "`blocks.3.pos_embed` belongs to a pooling after the last block" in refuse(weights)

    def test_lengths_that_no_pooling_gives(self, refuse, weights):
        weights["blocks.0.pos_embed"] = torch.zeros(1, 30, 128)
        assert "`blocks.*.pos_embed` hold 64, 30, 15" in refuse(weights)

    def test_arguments_that_contradict_the_tensors(self, refuse, checkpoint):
        checkpoint["args"].input_size = 72
        assert "`pos_embed`" in refuse(checkpoint)

    def test_a_width_whose_heads_are_unknown(self, refuse):
        odd = {"patch_embed.proj.weight": torch.zeros(96, 3, 8, 8), "pos_embed": torch.zeros(1, 64, 96)}
        odd |= {"blocks.0.mlp.fc1.weight": torch.zeros(192, 96)}
        assert "pass `num_attention_heads`" in refuse(odd)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "`patch_embed.proj.weight` is missing"),
            ({"cls_token": torch.zeros(1, 1, 64)}, "belongs to a plain ViT, which `convert_vit` takes"),
            ({}, "no state dict"),
            ({"epoch": 3}, "no state dict"),
            ({"model": {"epoch": 3}}, "no state dict"),
            ({0: torch.zeros(2)}, "no state dict"),
            ([torch.zeros(2)], "not a dictionary"),
            (b"", "truncated or damaged"),
            (b"<html>not found</html>", "damaged"),
        ],
        ids=["resnet", "vit", "empty", "numbers", "nested", "numbered", "list", "no bytes", "html"],
    )
    def test_something_else(self, refuse, content, expected):
        assert expected in refuse(content)

    @pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint.safetensors"])
    @pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
    def test_a_truncated_file(self, refuse, weights, tmp_path, name, share):
        content = save(tmp_path / name, weights).read_bytes()
        assert name in refuse(content[: int(share * len(content))], name)

    @pytest.mark.parametrize("place", ["args", "model", "note"])
    def test_a_pickled_object_is_not_executed(self, refuse, checkpoint, tmp_path, place):
        class Touch:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        checkpoint[place] = Touch()
        assert "posix.mkdir" in refuse(checkpoint) or os.name == "nt"

    def test_an_object_inside_the_arguments_is_not_executed(self, refuse, checkpoint, tmp_path):
        checkpoint["args"].output_dir = tmp_path
        assert "was not executed" in refuse(checkpoint)

    def test_an_old_pickle_is_not_executed_either(self, tmp_path, weights):
        class Touch:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({**weights, "x": Touch()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(ConversionError, match="was not executed"):
            convert_hvt(tmp_path / "old.pth")
        assert not (tmp_path / "executed").exists()

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConversionError, match="is not a file"):
            convert_hvt(tmp_path / "nothing.pth")
