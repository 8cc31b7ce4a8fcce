"""
Exports a trained model: to ONNX, which runs without PyTorch (predict_onnx.py), or to torch.export's format, which runs
without this package and Transformers. The folder also gets what preparing images takes, preprocessor_config.json and
labels.json, and appears only if the exported model answers as PyTorch does.

    pip install onnx onnxscript onnxruntime
    python export.py --model_name_or_path outputs/quickstart --output_dir outputs/onnx
    python export.py --model_name_or_path my-model --output_dir outputs/int8 --int8 dynamic --eval_dir photos/val
    python export.py --model_name_or_path my-model --output_dir outputs/pt2 --format torch_export --dynamic_image_size

The number of images in a batch is free. So is their size with --dynamic_image_size, in multiples of the patch. --int8
adds a second model, model_int8.onnx, and measures it against the first.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torchvision.transforms.v2.functional import to_pil_image

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from ..shared.console import run
from ..shared.files import check_output_dir, folder_written_whole, write_json
from ..shared.saved_model import SavedModelError, check_weights, load_saved_model


TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 5)
INT8_FILE = "model_int8.onnx"
RECORD = "export.json"


class ExportError(ValueError):
    """A model that cannot be exported, or was not exported right; the message says why."""


class LogitsOnly(nn.Module):
    """A model whose output is one tensor, the logits: other programs know no output classes."""

    def __init__(self, model: HPoolViTForImageClassification, interpolate_pos_encoding: bool):
        super().__init__()
        self.model = model
        self.interpolate_pos_encoding = interpolate_pos_encoding

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(
            pixel_values, interpolate_pos_encoding=self.interpolate_pos_encoding, return_dict=True
        ).logits


@dataclass
class Format:
    """
    Args:
        file_name: the model's name in the exported folder.
        packages: what it needs beyond the training environment.
        write: saves a program.
        open: opens such a file, as a function from images to logits.
    """

    file_name: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]

    def check_packages(self):
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(f"This needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(program: ExportedProgram, file: Path):
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


def open_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


FORMATS = {
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, open_onnx),
    "torch_export": Format("model.pt2", (), torch.export.save, open_torch_export),
}


def load(name: str) -> tuple[HPoolViTForImageClassification, Any, dict[str, Any]]:
    """A model in float32 with its whole classifier, its image processor, and what preprocessor_config.json says."""
    try:
        model, image_processor, _, new = load_saved_model(name, dtype=torch.float32, attn_implementation="sdpa")
        if model.config.model_type != HPoolViTConfig.model_type:
            raise ExportError(
                f"--model_name_or_path {name} holds a model of the type {model.config.model_type!r}, no HPool-ViT."
            )
        check_weights(name, model, new)
    except SavedModelError as error:
        raise ExportError(str(error)) from error
    preprocessing = image_processor.to_dict()
    preprocessing.pop("auto_map", None)  # the code that it names does not go along
    return model, image_processor, preprocessing


def check_preprocessing(image_processor: Any, preprocessing: dict[str, Any], config: HPoolViTConfig):
    """Raises an `ExportError` unless predict_onnx.py prepares an image as the image processor does."""
    from .predict_onnx import preprocess

    height, width = (round(1.4 * side) for side in config.image_shape)
    image = random_images(1, 3, (height, 2 * width), torch.Generator().manual_seed(0))[0]
    image = to_pil_image((0.5 + 0.2 * image).clamp(0, 1)).convert("L" if config.num_channels == 1 else "RGB")
    expected = image_processor(image, return_tensors="pt").pixel_values[0]
    pixels = torch.from_numpy(preprocess(image, preprocessing))
    # Pillow and torchvision round the resized pixels differently, by a level or two of 255.
    if pixels.shape != expected.shape or (pixels - expected).abs().max() > 0.1:
        raise ExportError(
            f"{type(image_processor).__name__} prepares images otherwise than predict_onnx.py can: save the model "
            "with an HPoolViTImageProcessor, or choose --format torch_export."
        )


def image_sizes(config: HPoolViTConfig, dynamic_image_size: bool) -> list[tuple[int, int]]:
    """Sizes (height, width) to check: the model's own; with `dynamic_image_size` also larger and smaller ones."""
    (rows, columns), patch = config.patch_grid(), config.patch_shape
    grids = [(rows, columns)]
    if dynamic_image_size:
        grids += [(rows + 2, columns + 1), (rows, 2 * columns), (max(rows - 1, 2), max(columns - 2, 2))]
    return [(rows * patch[0], columns * patch[1]) for rows, columns in grids]


def export_program(model: LogitsOnly, config: HPoolViTConfig) -> ExportedProgram:
    """The computation as a graph, in which the batch, and for `interpolate_pos_encoding` the image size, are free."""
    height, width = config.image_shape
    shapes: dict[int, Any] = {0: Dim("batch")}
    if model.interpolate_pos_encoding:
        shapes |= {2: config.patch_shape[0] * Dim("rows", min=2), 3: config.patch_shape[1] * Dim("columns", min=2)}
        # Sizes other than the model's, and unlike each other, or tracing would take them for the only ones.
        height, width = height + config.patch_shape[0], width + 2 * config.patch_shape[1]
    images = torch.zeros(2, config.num_channels, height, width)
    program = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": shapes}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def random_images(batch_size: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Smooth colours with a little noise, which unlike noise alone have tokens that differ clearly."""
    coarse = torch.randn(batch_size, channels, 6, 6, generator=generator)
    images = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return images + 0.2 * torch.randn(images.shape, generator=generator)


@torch.inference_mode()
def largest_difference(model: LogitsOnly, exported: Callable, config: HPoolViTConfig) -> float:
    """The largest difference of a logit over batches of several sizes, and images of several if they are free."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for size, batch_size in itertools.product(image_sizes(config, model.interpolate_pos_encoding), BATCH_SIZES):
        images = random_images(batch_size, config.num_channels, size, generator)
        differences.append((exported(images) - model(images)).abs().max())
    return torch.stack(differences).max().item()


def write_export(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes all files into `folder` and returns what was measured."""
    target = FORMATS[args.format]
    model, image_processor, preprocessing = load(args.model_name_or_path)
    config = model.config
    if args.format == "onnx":
        check_preprocessing(image_processor, preprocessing, config)
    labels = [config.id2label[index] for index in range(config.num_labels)]
    write_json(folder / "preprocessor_config.json", preprocessing)
    write_json(folder / "labels.json", labels)

    logits_only = LogitsOnly(model, args.dynamic_image_size).eval()
    file = folder / target.file_name
    target.write(export_program(logits_only, config), file)
    difference = largest_difference(logits_only, target.open(file), config)
    if not difference <= TOLERANCE:  # also for NaN
        raise ExportError(
            f"The exported model differs from PyTorch by {difference:.1e}, more than {TOLERANCE:.0e}: nothing is kept."
        )
    record = {
        "model_name_or_path": args.model_name_or_path,
        "format": args.format,
        "torch": torch.__version__,
        "batch_sizes": BATCH_SIZES,
        "image_sizes": image_sizes(config, args.dynamic_image_size),
        "largest_difference": difference,
        "megabytes": megabytes(file),
    }
    if args.int8:
        record["int8"] = add_int8(args, folder, labels, preprocessing, config)
    write_json(folder / RECORD, record)
    return record


def add_int8(args, folder: Path, labels: list[str], preprocessing: dict, config: HPoolViTConfig) -> dict[str, Any]:
    """Writes the model in int8 beside the one in float32, and returns what was measured."""
    from .predict_onnx import open_model
    from .quantize import compare, find_images, find_labelled_images, measure_speedup, quantize

    labelled = find_labelled_images(args.eval_dir, labels) if args.eval_dir else []
    calibration = find_images(args.calibration_dir, args.num_calibration_images) if args.int8 == "static" else []
    quantize(folder / "model.onnx", folder / INT8_FILE, calibration, preprocessing)
    models = [open_model(folder / name, args.num_threads) for name in ("model.onnx", INT8_FILE)]
    shape = (args.batch_size, config.num_channels, *config.image_shape)
    images = random_images(*shape[:2], shape[2:], torch.Generator().manual_seed(0)).numpy()
    record = {"method": args.int8, "megabytes": megabytes(folder / INT8_FILE), "batch_size": args.batch_size}
    record |= measure_speedup(*models, images)
    if labelled:
        record |= compare(*models, labelled, preprocessing, args.batch_size)
    return record


def megabytes(file: Path) -> float:
    """The size of a model, with the weights that ONNX keeps beside it from 2 GB on."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) / 1e6


def check_arguments(args: argparse.Namespace):
    """Raises an `ExportError` for flags that do not go together, before anything is computed."""
    if args.int8 and args.format != "onnx":
        raise ExportError(f"`--int8 {args.int8}` needs `--format onnx`, not `{args.format}`.")
    if args.int8 == "static" and not args.calibration_dir:
        raise ExportError("`--int8 static` needs `--calibration_dir`, a folder of images like those to classify.")
    for flag in ("eval_dir", "calibration_dir"):
        path = getattr(args, flag)
        if path and not args.int8:
            raise ExportError(f"`--{flag}` is for `--int8 dynamic` or `--int8 static`: add one, or leave it out.")
        if path and not path.is_dir():
            raise ExportError(f"`--{flag} {path}` is no folder.")
    FORMATS[args.format].check_packages()
    check_output_dir(args.output_dir)


def report(record: dict[str, Any]) -> str:
    """What was measured, for people."""
    sizes = ", ".join(f"{height} × {width}" for height, width in record["image_sizes"])
    lines = [
        f"{FORMATS[record['format']].file_name}: {record['megabytes']:.1f} MB, at most "
        f"{record['largest_difference']:.1e} from PyTorch's logits (batches of "
        f"{', '.join(map(str, record['batch_sizes']))}; images of {sizes})"
    ]
    if int8 := record.get("int8"):
        low, middle, high = int8["speedup"]
        lines.append(
            f"{INT8_FILE} ({int8['method']}): {int8['megabytes']:.1f} MB, {middle:.2f} times as fast "
            f"(middle half {low:.2f} to {high:.2f}) in batches of {int8['batch_size']}"
        )
        if "num_images" in int8:
            lines.append(
                f"top-1 on {int8['num_images']} images: {int8['top1_float32']:.2%}, in int8 {int8['top1_int8']:.2%}; "
                f"the same answer for {int8['same_answer']:.2%}"
            )
        else:
            lines.append("The accuracy of int8 was not measured: give --eval_dir, a folder of labelled images.")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of a trained model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that does not exist yet, or is empty")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument("--dynamic_image_size", action="store_true", help="take images of any multiple of the patch")
    parser.add_argument("--int8", choices=("dynamic", "static"), help="also write a model with Linear layers in int8")
    parser.add_argument("--calibration_dir", type=Path, help="folder of images, which --int8 static needs")
    parser.add_argument("--num_calibration_images", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--eval_dir", type=Path, help="folder of images, one sub-folder per class, named as its label")
    parser.add_argument("--batch_size", type=int, default=8, help="of the measurements (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, default=0, help="of the measurements; 0, the default: all cores")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    check_arguments(args)
    # The folder appears complete and checked, or not at all.
    with folder_written_whole(args.output_dir) as folder:
        record = write_export(args, folder)
    print(report(record))
    print(f"Saved in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
