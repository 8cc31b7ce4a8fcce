"""What training starts from."""

import json

import pytest
import torch
from helpers import save_with_processor, tiny_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.conversion.checkpoint import ConversionError
from hpool_vit.toolkit.conversion.sources import is_hpool_vit
from hpool_vit.toolkit.training.model import ModelArguments, build_model, start_from
from hpool_vit.toolkit.training.recipes import RecipeArguments, prepared_size


GRID = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2), "hvt_pool": [1]}


@pytest.fixture
def vit(tmp_path):
    """A folder of Transformers' ViT without an image processor."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    folder = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4)).save_pretrained(folder)
    return folder


def edit_config(folder, **fields):
    """Changes fields of a saved configuration; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    content = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def test_the_image_processor_of_a_model_is_kept_where_it_fits(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    height, width = model.config.image_shape
    for kwargs in (
        {"do_center_crop": False, "size": {"height": height, "width": width}},
        {"crop_size": {"height": height, "width": width}, "size": {"shortest_edge": height + 3}},
    ):
        saved = HPoolViTImageProcessor(image_mean=[0.1, 0.2, 0.3], **kwargs)
        saved.save_pretrained(tmp_path)
        _, processor, _ = start_from(str(tmp_path), RecipeArguments(), {})
        assert processor.to_dict() == saved.to_dict()


def test_an_image_processor_of_another_size_gives_way_to_one_that_fits(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    HPoolViTImageProcessor(do_center_crop=False, size={"shortest_edge": 8}, image_mean=[0.1] * 3).save_pretrained(
        tmp_path
    )
    _, processor, _ = start_from(str(tmp_path), RecipeArguments(), {})
    assert prepared_size(processor) == model.config.image_shape and list(processor.image_mean) == [0.1] * 3


@pytest.mark.parametrize("content", [b'{"model_type": ', b"[1, 2]", b"\xff"])
def test_a_damaged_configuration_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json .*not a JSON|config\.json is not a JSON") as error:
        is_hpool_vit(str(tmp_path))
    assert "\n" not in str(error.value)


class TestAnotherConfiguration:
    @pytest.mark.parametrize("fields", [{}, {"use_class_token": True}, GRID], ids=["row", "class token", "grid"])
    @pytest.mark.parametrize("records_stages", [True, False])
    def test_position_embeddings_are_resized_as_the_model_itself_does(self, tmp_path, fields, records_stages):
        trained = tiny_model(**fields)
        folder = save_with_processor(tmp_path / "trained", trained)
        if not records_stages:  # as in a folder of version 0.1
            edit_config(folder, stages=None)
        larger, processor, notes = start_from(str(folder), RecipeArguments(), {"image_size": (48, 64)})
        pixel_values = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            expected = trained(pixel_values, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(larger.eval()(pixel_values).logits, expected, rtol=0, atol=1e-5)
        assert prepared_size(processor) == (48, 64)
        assert "Resized the position embeddings from 8 × 8 to 12 × 16 patches." in notes
        assert not any("newly initialised" in note for note in notes)

    def test_another_grid_of_as_many_patches_is_resized_too(self, tmp_path):
        trained = tiny_model(image_size=(16, 64), hvt_pool=None)
        folder = save_with_processor(tmp_path / "trained", trained)
        turned, _, _ = start_from(str(folder), RecipeArguments(), {"image_size": (64, 16)})
        pixel_values = torch.randn(2, 3, 64, 16)
        with torch.no_grad():
            expected = trained(pixel_values, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(turned.eval()(pixel_values).logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("before", "now"), [("linear", "convolutional"), ("convolutional", "linear")])
    def test_the_projection_of_the_patches_is_reshaped(self, tmp_path, before, now, pixel_values):
        trained = tiny_model(patchify_technique=before)
        folder = save_with_processor(tmp_path / "trained", trained)
        model, _, notes = start_from(str(folder), RecipeArguments(), {"patchify_technique": now})
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(pixel_values).logits, trained(pixel_values).logits)
        assert notes == []

    def test_a_new_class_token_has_no_position(self, tmp_path):
        trained = tiny_model()
        folder = save_with_processor(tmp_path / "trained", trained)
        model, _, notes = start_from(str(folder), RecipeArguments(), {"use_class_token": True})
        positions = model.hpool_vit.embeddings.position_embeddings
        assert (
            torch.equal(positions[:, 1:], trained.hpool_vit.embeddings.position_embeddings)
            and not positions[:, 0].any()
        )
        assert notes == ["newly initialised: hpool_vit.embeddings.cls_token"]

    def test_stages_on_the_grid_take_nothing_from_stages_along_the_row(self, tmp_path):
        trained = tiny_model(hvt_pool=[1], pool_kernel_size=4, pool_stride=4)  # 16 tokens, as on the grid
        folder = save_with_processor(tmp_path / "trained", trained)
        model, _, notes = start_from(str(folder), RecipeArguments(), GRID)
        assert not model.hpool_vit.pooling["1"].position_embeddings.any()
        assert notes == ["newly initialised: hpool_vit.pooling.1.position_embeddings"]

    def test_a_head_of_another_size_starts_anew_and_nothing_else(self, tmp_path):
        folder = save_with_processor(tmp_path / "trained", tiny_model())
        _, _, notes = start_from(str(folder), RecipeArguments(), {"num_labels": 5})
        assert notes == ["newly initialised: classifier.bias", "newly initialised: classifier.weight"]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("patch_size", 8),
            ("patch_size", (2, 8)),
            ("hidden_size", 64),
            ("intermediate_size", 32),
            ("num_attention_heads", 4),
            ("num_channels", 1),
            ("num_register_tokens", 2),
        ],
    )
    def test_a_field_that_the_weights_decide_is_refused(self, tmp_path, field, value):
        trained = tiny_model()
        folder = save_with_processor(tmp_path / "trained", trained)
        with pytest.raises(ConversionError) as error:
            start_from(str(folder), RecipeArguments(), {field: value})
        have = getattr(trained.config, field)
        assert str(error.value) == f"`{field}={value!r}` cannot be chosen: the trained model has {have!r}."

    def test_weights_that_are_not_those_of_the_configuration_are_refused(self, tmp_path):
        folder = save_with_processor(tmp_path / "trained", tiny_model())
        edit_config(folder, intermediate_size=32)
        with pytest.raises(ConversionError, match=r"fc1.* has another shape than its config.json says.*damaged"):
            start_from(str(folder), RecipeArguments(), {})


class TestPoolingThatIsNotRead:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"pool_mode": "merge", "pool_kernel_size": "2,2"},
                "`pool_kernel_size` does not apply to `pool_mode='merge'`",
            ),
            (
                {"pool_mode": "max", "merge_ratio": "0.3"},
                "`merge_ratio` does not apply to `pool_mode='max'`, only to merge",
            ),
            ({"hvt_pool": "none", "merge_ratio": "0.3"}, "`merge_ratio` does not apply: with `hvt_pool=none`"),
        ],
        ids=["windows", "ratio", "no pooling"],
    )
    @pytest.mark.parametrize("start", ["vit", "hpool_vit", "preset", "config", "fields"])
    def test_is_refused_whatever_the_model(self, tmp_path, vit, start, fields, message):
        save_with_processor(tmp_path / "hpool_vit", tiny_model())
        starts = {
            "vit": {"model_name_or_path": str(vit)},
            "hpool_vit": {"model_name_or_path": str(tmp_path / "hpool_vit")},
            "preset": {"preset": "hvt-ti-1"},
            "config": {"config_name": str(tmp_path / "hpool_vit")},
            "fields": {},
        }
        with pytest.raises(ConversionError) as error:
            build_model(ModelArguments(**starts[start], **fields), RecipeArguments(), ["a", "b"])
        assert message in str(error.value)

    def test_is_what_the_model_does_not_read_and_not_what_a_new_one_would_not(self, tmp_path):
        folder = save_with_processor(tmp_path / "trained", tiny_model(pool_mode="merge"))
        start = {"model_name_or_path": str(folder)}
        model, _, _ = build_model(ModelArguments(**start, merge_ratio="0.3"), RecipeArguments(), ["a", "b"])
        assert model.config.merge_ratio == 0.3
        with pytest.raises(ConversionError, match=r"`pool_stride` does not apply to `pool_mode='merge'`"):
            build_model(ModelArguments(**start, pool_stride="3"), RecipeArguments(), ["a", "b"])

    def test_counts_every_schedule(self, tmp_path):
        fields = {"pool_mode": "merge", "merge_ratio": "0.3", "hvt_pool_choices": "none;1", "hidden_size": "32"}
        fields |= {"num_attention_heads": "2", "image_size": "32", "patch_size": "4"}
        model, _, _ = build_model(ModelArguments(**fields), RecipeArguments(), ["a", "b"])
        assert model.config.hvt_pool is None and model.config.merge_ratio == 0.3


class TestImageProcessor:
    def test_of_a_vit_that_has_none_is_resized_by_the_recipe(self, vit):
        _, processor, _ = start_from(str(vit), RecipeArguments(eval_crop_ratio=0.5), {})
        assert processor.size == {"shortest_edge": 64} and prepared_size(processor) == (32, 32)

    def test_of_a_vit_is_kept_where_it_fits(self, vit):
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(vit)
        recipe = RecipeArguments(eval_crop_ratio=0.5)
        assert start_from(str(vit), recipe, {})[1].size == {"height": 32, "width": 32}
        assert start_from(str(vit), recipe, {"image_size": 48})[1].size == {"shortest_edge": 96}


@pytest.mark.parametrize("fields", [{"num_channels": "1"}, {"model_name_or_path": "trained"}], ids=["new", "trained"])
def test_a_model_that_takes_no_rgb_images_is_refused(tmp_path, monkeypatch, fields):
    monkeypatch.chdir(tmp_path)
    grey = tiny_model(num_channels=1)
    grey.save_pretrained("trained")
    statistics = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    HPoolViTImageProcessor.for_config(grey.config, **statistics).save_pretrained("trained")
    with pytest.raises(ValueError, match=r"`num_channels=1` cannot be trained here, because images are read in RGB"):
        build_model(ModelArguments(**fields), RecipeArguments(), ["a", "b"])
