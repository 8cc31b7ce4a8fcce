"""What the tests of the examples share."""

import pytest
from transformers import ViTConfig, ViTForImageClassification

from hpool_vit import HPoolViTImageProcessor


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A tiny ViT with random weights, and an image processor that fits it."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    HPoolViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder
