"""The formats that a model is exported to: how to trace it, write it, and open it again."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from hpool_vit import HPoolViTConfig

from ..shared.console import needs
from ..shared.measuring import Logits


@dataclass
class Format:
    """
    A format of exported models.

    Args:
        file_name: the model's name in the exported folder.
        check_packages: raises an `ImportError` if packages are missing.
        write: writes a traced model to a file.
        open: opens such a file as a function from images to logits.
    """

    file_name: str
    check_packages: Callable[[], None]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]


def trace(model: Logits, config: HPoolViTConfig, dynamic_image_size: bool) -> ExportedProgram:
    """
    The computation of a model as a graph for any batch size.

    Args:
        model: the model.
        config: its configuration.
        dynamic_image_size: whether the graph takes images of any multiple of the patch size.
    """
    height, width = config.image_shape
    shapes: dict[int, Any] = {0: Dim("batch")}
    if dynamic_image_size:
        shapes |= {2: config.patch_shape[0] * Dim("rows", min=2), 3: config.patch_shape[1] * Dim("columns", min=2)}
        # Tracing would fix sizes that equal the model's own, or each other.
        height, width = height + config.patch_shape[0], width + 2 * config.patch_shape[1]
    images = torch.zeros(2, config.num_channels, height, width)
    program = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": shapes}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def check_onnx_packages() -> None:
    with needs("export"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401


def write_onnx(program: ExportedProgram, file: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch", 2: "height", 3: "width"}},
        verbose=False,
    )
    ClearMetadataAndDocStringPass()(exported.model)  # notes on the PyTorch code, a fifth of a small model's file
    exported.save(file)


def open_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from .predict_onnx import open_model, predict

    session = open_model(file)
    return lambda pixel_values: torch.from_numpy(predict(session, pixel_values.numpy()))


def write_torch_export(program: ExportedProgram, file: Path) -> None:
    # On a full disk PyTorch's own writer ends the whole process.
    archive = io.BytesIO()
    torch.export.save(program, archive)
    file.write_bytes(archive.getbuffer())


def open_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


FORMATS = {
    "onnx": Format("model.onnx", check_onnx_packages, write_onnx, open_onnx),
    "torch_export": Format("model.pt2", lambda: None, write_torch_export, open_torch_export),
}
