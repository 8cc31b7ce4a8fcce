"""The ONNX graph of every pool mode: one file for any batch and image size, without loops and branches."""

import onnx
import pytest
import torch
from helpers import tiny_model
from onnx import TensorProto, shape_inference

from hpool_vit.toolkit.export.formats import FORMATS, trace
from hpool_vit.toolkit.shared.measuring import Logits


# Merging half of the tokens and some, which sorts them; 2 × 2 windows and windows that overlap.
MODES = {
    "max": {"pool_mode": "max"},
    "avg": {"pool_mode": "avg"},
    "grid-max": {"pool_mode": "max", "pool_kernel_size": (2, 2), "pool_stride": (2, 2)},
    "grid-avg": {"pool_mode": "avg", "pool_kernel_size": (3, 2), "pool_stride": (2, 1)},
    "merge-distance": {"pool_mode": "merge", "merge_rule": "distance", "merge_ratio": 0.5},
    "merge-importance": {
        "pool_mode": "merge",
        "merge_rule": "importance",
        "merge_ratio": 0.3,
        "proportional_attention": True,
    },
}
CASES = [(mode, class_token) for mode in MODES for class_token in (False, True)]
# An export takes seconds: this one runs always, the others are slow tests.
QUICK = [("grid-max", True)]
cases = pytest.mark.parametrize(
    ("mode", "use_class_token"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
HOST_WORK = {"Loop", "Scan", "If", "NonZero", "Scatter", "ScatterND"}


def types_in(file) -> dict[str, int]:
    """The type of the elements of each value in a graph."""
    values = shape_inference.infer_shapes(onnx.load(file)).graph.value_info
    return {value.name: value.type.tensor_type.elem_type for value in values}


@cases
def test_one_graph_takes_any_batch_and_image_size_and_leaves_nothing_to_the_host(mode, use_class_token, tmp_path):
    sizes = {"num_hidden_layers": 2, "hvt_pool": [1], "use_class_token": use_class_token}
    model = tiny_model(**sizes, **MODES[mode])
    network = Logits(model, interpolate_pos_encoding=True, return_dict=True).eval()
    file = tmp_path / "model.onnx"
    FORMATS["onnx"].write(trace(network, model.config, dynamic_image_size=True), file)
    session = FORMATS["onnx"].open(file)
    for batch_size, size in ((1, (32, 32)), (3, (24, 44)), (2, (48, 20))):
        images = torch.randn(batch_size, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(session(images), network(images), atol=1e-4, rtol=0)
    nodes = onnx.load(file).graph.node
    assert not HOST_WORK & {node.op_type for node in nodes}
    # Merging scatters positions, a few numbers per image, and never hidden states.
    scatters = {node.output[0] for node in nodes if node.op_type == "ScatterElements"}
    assert not scatters or "merge" in mode
    assert all(types_in(file)[name] in (TensorProto.INT64, TensorProto.BOOL) for name in scatters)
