"""The formats that a model is exported to: how to trace it, write it, and open it again."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch.export import Dim, ExportedProgram

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from ..shared.console import needs
from ..shared.measuring import Logits
from . import web
from .checks import ExportError


@dataclass
class Format:
    """
    A format of exported models.

    Args:
        file_name: the model's name in the exported folder.
        check_packages: raises an `ImportError` if packages are missing, or an `ExportError` for other needs.
        write: writes a traced model to a file.
        open: opens such a file as a function from images to logits.
        options: those options of `export_model` that not every format takes, and this one does.
        module: the module to trace, made from the model and keywords of its forward pass. Its first output is the
            logits.
        prepares_images: whether a program in the folder prepares images.
        files: the files that go into the folder whatever the model is, by name; takes `runtime`.
        describe: writes files about the model into the folder.
        usage: a command that uses the folder, with its name as `{folder}`.
        takes_segmenters: whether models for segmentation are exported too, alone: nothing of the folder's programs is
            for them.
    """

    file_name: str
    check_packages: Callable[[], None]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]
    options: frozenset[str] = frozenset()
    module: Callable[..., nn.Module] = Logits
    prepares_images: bool = False
    files: Callable[[str | Path | None], dict[str, bytes]] = lambda runtime: {}
    describe: Callable[[HPoolViTForImageClassification, Path], None] = lambda model, folder: None
    usage: str = ""
    takes_segmenters: bool = False


def check_options(format: str, options: dict[str, Any]) -> None:
    """Raises an `ExportError` for an unknown format, and for an option that is given and that it does not take."""
    if format not in FORMATS:
        raise ExportError(f"`format={format}` is unknown: choose one of {', '.join(FORMATS)}.")
    for name, value in options.items():
        if value not in (None, False) and name not in FORMATS[format].options:
            takers = one_of([other for other in FORMATS if name in FORMATS[other].options])
            given = f"`{name}`" if value is True else f"`{name}={value}`"
            raise ExportError(f"{given} needs `format={takers}`, not {format}.")


def one_of(names: list[str]) -> str:
    """The names as a choice: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def trace(model: nn.Module, config: HPoolViTConfig, dynamic_image_size: bool) -> ExportedProgram:
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


# Of an ONNX model, in their order.
OUTPUTS = ("logits", "groups")


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
        output_names=list(OUTPUTS[: len(program.graph_signature.user_outputs)]),
        dynamic_shapes={"pixel_values": {0: "batch", 2: "height", 3: "width"}},
        verbose=False,
    )
    ClearMetadataAndDocStringPass()(exported.model)  # notes on the PyTorch code, a fifth of a small model's file
    exported.save(file)


def open_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from .predict_onnx import open_model, predict

    session = open_model(file)
    return lambda pixel_values: torch.from_numpy(predict(session, pixel_values.numpy()))


# Both write to memory first: on a full disk PyTorch's own writer ends the whole process.
def write_torch_export(program: ExportedProgram, file: Path) -> None:
    archive = io.BytesIO()
    torch.export.save(program, archive)
    file.write_bytes(archive.getbuffer())


def write_aot(program: ExportedProgram, file: Path) -> None:
    archive = io.BytesIO()
    torch._inductor.aoti_compile_and_package(program, package_path=archive)
    file.write_bytes(archive.getbuffer())


def open_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


def check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError(
            "`format=aot` needs a C++ compiler: install g++, or name another one in the environment variable CXX."
        ) from error


def open_aot(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch._inductor.aoti_load_package(str(file))


def onnx_files(runtime: str | Path | None) -> dict[str, bytes]:
    program = Path(__file__).with_name("predict_onnx.py")
    return {program.name: program.read_bytes()}


FORMATS = {
    "onnx": Format(
        file_name="model.onnx",
        check_packages=check_onnx_packages,
        write=write_onnx,
        open=open_onnx,
        options=frozenset({"int8", "dynamic_image_size"}),
        prepares_images=True,
        files=onnx_files,
        takes_segmenters=True,
    ),
    "torch_export": Format(
        file_name="model.pt2",
        check_packages=lambda: None,
        write=write_torch_export,
        open=open_torch_export,
        options=frozenset({"dynamic_image_size"}),
        takes_segmenters=True,
    ),
    "aot": Format(
        file_name="model.pt2",
        check_packages=check_compiler,
        write=write_aot,
        open=open_aot,
        options=frozenset({"dynamic_image_size"}),
        takes_segmenters=True,
    ),
    "web": Format(
        file_name="model.onnx",
        check_packages=check_onnx_packages,
        write=write_onnx,
        open=open_onnx,
        options=frozenset({"runtime"}),
        module=web.with_groups,
        prepares_images=True,
        files=web.page_files,
        describe=web.describe,
        usage="Look at it: python -m http.server --directory {folder}",
    ),
}
