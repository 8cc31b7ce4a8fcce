"""
The modes in which the benchmark runs a model, and the step that it times in each.

    eager, sdpa, flex, flash     attention: plain products, PyTorch's fused one (the default of every mode), Flex and
                                 Flash attention
    compile, compile-max-autotune, compile-reduce-overhead     torch.compile in that mode
    compile-freezing             torch.compile with the weights as constants, which are packed once; only inference
    aot                          compiled ahead of time by AOTInductor, and loaded from its package; only inference
    bf16                         bfloat16; in training by autocast, with weights in float32
    channels_last                images and weights in that memory format
    int8                         Linear layers in int8 by torchao, inputs quantised dynamically
    onnx, onnx-int8              ONNX Runtime on the CPU, in float32 and with Linear layers in int8
    roof                         the matrix products of the model alone (see roof.py)

Modes are joined by `+`: `bf16+compile`, `flash+bf16`, `bf16+roof`, `int8+compile`.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import Unavailable, find_model
from roof import record_products, run_products
from torch import nn

from hpool_vit.toolkit.shared.measuring import Logits, count_call_macs


ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention", "flash": "flash_attention_2"}
# Arguments of `torch.compile`.
COMPILE: dict[str, dict[str, Any]] = {
    "compile": {"mode": "default"},
    "compile-max-autotune": {"mode": "max-autotune"},
    "compile-reduce-overhead": {"mode": "reduce-overhead"},
    "compile-freezing": {"options": {"freezing": True}},
}
# Other ways to run a model, and what they can be combined with.
ENGINES: dict[str, Collection[str]] = {
    "int8": COMPILE,
    "aot": ("bf16",),
    "onnx": (),
    "onnx-int8": (),
    "roof": ("bf16", "channels_last"),
}
INFERENCE_ONLY = ("int8", "aot", "onnx", "onnx-int8", "compile-freezing")
PARTS = (*ATTENTION, *COMPILE, "bf16", "channels_last", *ENGINES)
TASKS = ("inference", "train")


@dataclass(frozen=True)
class Mode:
    """One way to run a model. `name` is what the user wrote; the weights and products have the type `dtype`."""

    name: str
    attention: str = "sdpa"
    compile: str | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    engine: str | None = None


def parse_mode(name: str, dtype: torch.dtype = torch.float32) -> Mode:
    """
    The mode that `name` describes, with weights in `dtype` unless it says otherwise.

    Raises:
        ValueError: if a part is unknown, or two parts exclude each other.
    """
    parts = name.split("+")
    for part in parts:
        if part not in PARTS:
            raise ValueError(
                f"--modes {name}: {part!r} is not one of {', '.join(PARTS)}, or several of them joined by +."
            )
    for kind in (ATTENTION, COMPILE, ENGINES):
        if len(given := [part for part in parts if part in kind]) > 1:
            raise ValueError(f"--modes {name}: {given[0]} and {given[1]} exclude each other.")
    engine = next((part for part in parts if part in ENGINES), None)
    combinable = PARTS if engine is None else ENGINES[engine]
    if other := [part for part in parts if part != engine and part not in combinable]:
        raise ValueError(f"--modes {name}: {engine} cannot be combined with {other[0]}.")
    return Mode(
        name=name,
        attention=next((ATTENTION[part] for part in parts if part in ATTENTION), "sdpa"),
        compile=next((part for part in parts if part in COMPILE), None),
        # ONNX Runtime and torchao start from float32.
        dtype=torch.bfloat16 if "bf16" in parts else torch.float32 if engine not in (None, "aot", "roof") else dtype,
        channels_last="channels_last" in parts,
        engine=engine,
    )


@dataclass(frozen=True)
class Row:
    """What is timed: a model in a mode at a task, on images of shape (batch_size, 3, image_size, image_size)."""

    model: str
    mode: Mode
    task: str
    image_size: int
    batch_size: int
    device: str = "cpu"
    threads: int = 1

    @property
    def trains(self) -> bool:
        return self.task == "train"

    @property
    def file_stem(self) -> str:
        """How the names of the model's files begin."""
        return f"{self.model.replace('/', '_')}-{self.image_size}"

    def check(self):
        """Raises `Unavailable` if the mode alone shows that the row cannot run."""
        engine = self.mode.engine
        for part in (engine, self.mode.compile):
            if self.trains and part in INFERENCE_ONLY:
                raise Unavailable(f"{part} is only for inference")
        if self.trains and self.mode.dtype == torch.float16:
            raise Unavailable("training in float16 needs loss scaling, which changes the step; use bf16")
        if self.device != "cpu" and engine in ("onnx", "onnx-int8"):
            raise Unavailable(f"{engine} is measured only on the CPU")


@dataclass
class Step:
    """`call` is timed; `state_bytes` stay allocated between two calls: the weights, and what training adds."""

    call: Callable[[], Any]
    state_bytes: int | None = None


def prepare(row: Row, scratch: Path) -> Step:
    """
    Builds a model and the step to time.

    Args:
        row: what to time.
        scratch: a folder for exported models. Models that are in it already are used again.

    Raises:
        Unavailable: if the row cannot run here. Errors of PyTorch and other packages with the same cause are passed
            on.
    """
    row.check()
    if row.mode.engine in ("onnx", "onnx-int8"):
        return prepare_onnx(row, scratch)
    images = random_images(row).to(row.device)
    model = build(row).train(row.trains).to(row.device)
    if row.mode.channels_last:
        model, images = (part.to(memory_format=torch.channels_last) for part in (model, images))
    if row.mode.engine == "roof":
        call = (training_step if row.trains else inference_step)(row, model, images)
        return Step(functools.partial(run_products, record_products(model, call)))
    if row.mode.engine == "aot":
        return Step(
            inference_step(row, model, images, compiled_ahead(row, model, images, scratch)), weight_bytes(model)
        )
    if row.mode.engine == "int8":
        quantize(model)
    function = compiled(model, row.mode.compile) if row.mode.compile else model
    if row.trains:
        return Step(training_step(row, model, images, function), 4 * weight_bytes(model))
    return Step(inference_step(row, model, images, function), weight_bytes(model))


def random_images(row: Row) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(row.batch_size, 3, row.image_size, row.image_size, generator=generator)


def build(row: Row) -> Logits:
    torch.manual_seed(0)
    return Logits(find_model(row.model)(image_size=row.image_size, attention=row.mode.attention))


def weight_bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def inference_step(
    row: Row, model: nn.Module, images: torch.Tensor, function: Callable | None = None
) -> Callable[[], Any]:
    model.requires_grad_(False).to(row.mode.dtype)
    images = images.to(row.mode.dtype)
    return torch.inference_mode()(functools.partial(function or model, images))


def training_step(
    row: Row, model: nn.Module, images: torch.Tensor, function: Callable | None = None
) -> Callable[[], Any]:
    """Forward pass, cross-entropy, backward pass and AdamW's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.arange(len(images), device=images.device) % 2
    half = row.mode.dtype != torch.float32

    def step():
        with torch.autocast(images.device.type, dtype=row.mode.dtype, enabled=half):
            loss = nn.functional.cross_entropy((function or model)(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled(model: nn.Module, name: str) -> Callable:
    # Each model of a run is compiled separately, and all count towards the limit of the same lines of code.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    function = torch.compile(model, dynamic=False, **COMPILE[name])

    def call(images: torch.Tensor) -> torch.Tensor:
        # CUDA graphs: the outputs of the last step are no longer needed.
        torch.compiler.cudagraph_mark_step_begin()
        return function(images)

    return call


def compiled_ahead(row: Row, model: nn.Module, images: torch.Tensor, scratch: Path) -> Callable:
    """The model as AOTInductor compiles it for this batch size, loaded from its package."""
    package = scratch / f"{row.file_stem}-{row.batch_size}-{row.mode.name}.pt2"
    if not package.exists():
        model.requires_grad_(False).to(row.mode.dtype)
        with torch.no_grad():
            program = torch.export.export(model, (images.to(row.mode.dtype),), strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    return torch._inductor.aoti_load_package(str(package))


def quantize(model: nn.Module):
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise Unavailable("needs torchao: pip install torchao") from error
    quantize_(model.requires_grad_(False), Int8DynamicActivationInt8WeightConfig())


def prepare_onnx(row: Row, scratch: Path) -> Step:
    try:
        from hpool_vit.toolkit.export.predict_onnx import open_model, predict
    except ImportError as error:
        raise Unavailable("needs onnxruntime: pip install onnx onnxscript onnxruntime") from error
    file = export_onnx(row, scratch)
    session = open_model(file, row.threads)
    return Step(functools.partial(predict, session, random_images(row).numpy()), file.stat().st_size)


def export_onnx(row: Row, scratch: Path) -> Path:
    """The model's ONNX file in `scratch`, with a free batch size; written if it does not exist yet."""
    from hpool_vit.toolkit.export.export import FORMATS

    name = row.file_stem
    file = scratch / f"{name}.onnx"
    if not file.exists():
        FORMATS["onnx"].check_packages()
        model = build(row).eval()
        shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
        images = torch.zeros(2, 3, row.image_size, row.image_size)
        FORMATS["onnx"].write(torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False), file)
    if row.mode.engine == "onnx-int8":
        from hpool_vit.toolkit.export.quantize import quantize

        source, file = file, scratch / f"{name}-int8.onnx"
        if not file.exists():
            quantize(source, file, [], {})
    return file


@functools.cache
def count_macs_per_image(model: str, image_size: int, task: str) -> int:
    """Multiply-accumulates of one image, with the backward pass in training. Nothing is computed."""
    network = Logits(find_model(model)(image_size=image_size)).to("meta").train(task == "train")
    images = torch.zeros(1, 3, image_size, image_size, device="meta")
    if task == "train":
        return count_call_macs(lambda: network(images).sum().backward())
    with torch.no_grad():
        return count_call_macs(functools.partial(network.requires_grad_(False), images))


def import_libraries(mode: Mode):
    """Loads what the mode needs, so that memory measured after this is the model's."""
    if mode.compile:
        with torch.no_grad():
            torch.compile(nn.Linear(1, 1), **COMPILE[mode.compile])(torch.ones(1, 1))
    if mode.engine in ("onnx", "onnx-int8"):
        import onnxruntime  # noqa: F401
