"""Transformers' own exporter takes every kind of model, as docs/deploy.md says."""

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForImageClassification, exporters


if not hasattr(exporters, "ExportedModel"):
    pytest.skip("the exporters of this version of Transformers return no model that runs", allow_module_level=True)

VARIANTS = {
    "max": {"pool_mode": "max"},
    "grid-avg": {"pool_mode": "avg", "pool_kernel_size": (2, 2), "pool_stride": (2, 2), "use_class_token": True},
    "merge": {"pool_mode": "merge", "merge_ratio": 0.3, "proportional_attention": True, "use_class_token": True},
}


@pytest.mark.parametrize(
    "variant", ["max", *(pytest.param(name, marks=pytest.mark.slow) for name in list(VARIANTS)[1:])]
)
def test_transformers_exports_a_saved_folder_to_onnx_for_any_batch(variant, tmp_path):
    tiny_model(num_hidden_layers=2, hvt_pool=[1], **VARIANTS[variant]).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    config = exporters.OnnxConfig(dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}})
    exported = exporters.OnnxExporter().export(model, {"pixel_values": torch.zeros(2, 3, 32, 32)}, config=config)
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 32, 32)
        with torch.no_grad():
            expected = model(images).logits
        torch.testing.assert_close(exported(pixel_values=images).logits, expected, atol=1e-4, rtol=0)
