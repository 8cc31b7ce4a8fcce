"""What training starts from."""

import pytest
from helpers import tiny_model

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.conversion.sources import is_hpool_vit
from hpool_vit.toolkit.training.model import start_from
from hpool_vit.toolkit.training.recipes import RecipeArguments, prepared_size


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
