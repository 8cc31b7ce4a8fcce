"""Export a trained model: a function for programs, and the command `hpool-vit export`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation, PreTrainedModel

from hpool_vit import HPoolViTConfig

from ..shared.console import check_at_least_one, parse_value
from ..shared.files import check_output_dir, folder_written_whole, write_json
from ..shared.measuring import Logits
from ..shared.options import HvtPool, MergeRatio, Model, OutputDir, Speed
from ..shared.saved_model import check_weights, load_saved_model, segments
from .checks import BATCH_SIZES, ExportError, check_preprocessing, image_sizes, largest_difference, random_images
from .formats import FORMATS, check_options, one_of, trace


TOLERANCE = 1e-4
INT8_FILE = "model_int8.onnx"
RECORD = "export.json"
# What is given without a purpose is refused, so "not given" is None.
DEFAULTS = {"num_calibration_images": 64, "batch_size": 8, "num_threads": 0}


@dataclass
class Int8Options:
    """
    How to quantise the Linear layers of an ONNX model, and how to measure the result.

    Args:
        method: "dynamic" takes the range of a layer's input when the model runs, "static" takes it from images.
        calibration_dir: the images for "static".
        num_calibration_images: how many of them to use.
        eval_dir: labelled images, one sub-folder per class, to measure the accuracy with.
        batch_size: images per batch in the measurements.
        num_threads: threads in the measurements; 0 means all cores.
    """

    method: str | None = None
    calibration_dir: Path | None = None
    num_calibration_images: int | None = None
    eval_dir: Path | None = None
    batch_size: int | None = None
    num_threads: int | None = None

    def check(self) -> None:
        """Raises a `ValueError` for options that do not go together."""
        if self.method not in (None, "dynamic", "static"):
            raise ExportError(f"`int8={self.method}` is unknown: choose dynamic or static.")
        if self.method == "static" and not self.calibration_dir:
            raise ExportError("`int8=static` needs `calibration_dir`, a folder of images like those to classify.")
        check_at_least_one(num_calibration_images=self.num_calibration_images, batch_size=self.batch_size)
        if self.num_threads is not None and self.num_threads < 0:
            raise ExportError(f"`num_threads={self.num_threads}` must be at least 1, or 0 for all cores.")
        for name, value in asdict(self).items():
            if value is not None and not self.method:
                raise ExportError(f"`{name}` is only used with `int8`: set it to dynamic or static too.")
            if isinstance(value, Path) and not value.is_dir():
                raise ExportError(f"`{name}={value}` is not a folder.")
        for name in ("calibration_dir", "num_calibration_images"):
            value = getattr(self, name)
            if value is not None and self.method != "static":
                raise ExportError(
                    f"`{name}={value}` has no effect with `int8={self.method}`: leave it out, or choose static."
                )

    def with_defaults(self) -> "Int8Options":
        """The options with a number for each that was not given."""
        return replace(self, **{name: value for name, value in DEFAULTS.items() if getattr(self, name) is None})


def export_model(
    model: str,
    output_dir: str | Path,
    *,
    format: str = "onnx",
    dynamic_image_size: bool = False,
    speed: float | None = None,
    int8: str | None = None,
    calibration_dir: str | Path | None = None,
    num_calibration_images: int | None = None,
    eval_dir: str | Path | None = None,
    batch_size: int | None = None,
    num_threads: int | None = None,
    runtime: str | Path | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """
    Exports a trained model to ONNX, which runs without PyTorch, to the format of `torch.export`, which runs without
    this package and Transformers, compiled ahead of time for machines like this one, or as a page that runs it in a
    browser. The folder also gets
    preprocessor_config.json, labels.json, export.json with what was measured and, for ONNX, predict_onnx.py. It
    appears only if the exported model gives the logits of PyTorch.

    Of a model for segmentation, the logits have the shape (batch_size, num_labels, rows, columns), and the folder has
    no program.

    Args:
        model (`str`): a saved folder, or an id on the Hub.
        output_dir (`str` or `Path`): a folder that does not exist yet, or is empty.
        format (`str`): `"onnx"`, `"torch_export"`, `"aot"` or `"web"`.
        dynamic_image_size (`bool`): whether the exported model takes images of any multiple of the patch size. It
            takes any number of them in either case.
        speed (`float`, *optional*): one of the speeds that the model offers; 1: no pooling. Default: the model's own.
        int8 (`str`, *optional*): `"dynamic"` or `"static"` also writes model_int8.onnx, with Linear layers in int8.
        calibration_dir (`str` or `Path`, *optional*): a folder of images, which `"static"` needs.
        num_calibration_images (`int`, *optional*): how many of them to use. Default: 64.
        eval_dir (`str` or `Path`, *optional*): a folder of images, one sub-folder per class, to compare the accuracy
            of int8 and float32 on.
        batch_size (`int`, *optional*): images per batch in the measurements of int8. Default: 8.
        num_threads (`int`, *optional*): threads in the measurements of int8. Default: 0, which means all cores.
        runtime (`str` or `Path`, *optional*): for `"web"`, the package onnxruntime-web as a file or folder, where the
            npm registry cannot be reached. By default it is downloaded once.
        overrides: fields of the configuration to change, `hvt_pool` and `merge_ratio`. They exclude `speed`.

    Returns:
        The content of export.json.

    Raises:
        ValueError: if the model cannot be exported, or if the exported model differs from PyTorch.
        ImportError: if a package is missing.
    """
    folders = [None if path is None else Path(path) for path in (calibration_dir, eval_dir)]
    options = Int8Options(int8, folders[0], num_calibration_images, folders[1], batch_size, num_threads)
    check_options(format, {"int8": int8, "dynamic_image_size": dynamic_image_size, "runtime": runtime})
    options.check()
    options = options.with_defaults()
    chosen = FORMATS[format]
    chosen.check_packages()
    check_output_dir(output_dir)
    is_segmenter = segments(model)
    if is_segmenter:
        check_segmenter_options(model, format, int8)
    files = {} if is_segmenter else chosen.files(runtime)
    with folder_written_whole(output_dir) as folder:
        overrides |= {} if speed is None else {"speed": speed}
        network, image_processor, preprocessing, notes = load(model, **overrides)
        if is_segmenter:
            check_image_size(model, network.config, image_processor, dynamic_image_size)
        elif chosen.prepares_images:
            check_preprocessing(image_processor, preprocessing, network.config)
        record = {"model": str(model), "format": format, "torch": torch.__version__}
        record |= overrides | ({"notes": notes} if notes else {})
        record |= write_model(network, folder / chosen.file_name, format, dynamic_image_size)
        labels = [network.config.id2label[index] for index in range(network.config.num_labels)]
        write_json(folder / "preprocessor_config.json", preprocessing)
        write_json(folder / "labels.json", labels)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        chosen.describe(network, folder)
        if int8:
            record["int8"] = write_int8(folder, labels, preprocessing, network.config, options)
        write_json(folder / RECORD, record)
    return record


def load(name: str, **overrides: Any) -> tuple[PreTrainedModel, Any, dict[str, Any], list[str]]:
    """
    A trained model in float32, its image processor, the content of its preprocessor_config.json, and notes for the
    user.
    """
    auto_class = AutoModelForSemanticSegmentation if segments(name) else AutoModelForImageClassification
    model, image_processor, notes, new = load_saved_model(
        name, auto_class=auto_class, dtype=torch.float32, attn_implementation="sdpa", **overrides
    )
    if model.config.model_type != HPoolViTConfig.model_type:
        raise ExportError(f"{name} is a model of the type {model.config.model_type!r}, not an HPool-ViT.")
    check_weights(name, model, new)
    preprocessing = image_processor.to_dict()
    preprocessing.pop("auto_map", None)  # the exported folder does not have the code that it names
    return model, image_processor, preprocessing, [note.removeprefix("note: ") for note in notes]


def check_segmenter_options(name: str, format: str, int8: str | None) -> None:
    """Raises an `ExportError` for what is there for classifiers alone."""
    if not FORMATS[format].takes_segmenters:
        others = one_of([other for other, chosen in FORMATS.items() if chosen.takes_segmenters])
        raise ExportError(f"{name} gives each pixel a class, and `format={format}` is for classifiers: use {others}.")
    if int8:
        raise ExportError(f"{name} gives each pixel a class, and `int8={int8}` is for classifiers: leave it out.")


def check_image_size(name: str, config: HPoolViTConfig, image_processor: Any, dynamic_image_size: bool) -> None:
    """Raises an `ExportError` if the image processor prepares images of a size that the exported model refuses."""
    image = torch.zeros(3, *config.image_shape, dtype=torch.uint8)
    prepared = tuple(image_processor(image, return_tensors="pt").pixel_values.shape[2:])
    if prepared != config.image_shape and not dynamic_image_size:
        raise ExportError(
            f"{name} has the `image_size` {config.image_shape} in its configuration, and its image processor prepares "
            f"images of {prepared}: set `dynamic_image_size`."
        )


def write_model(model: PreTrainedModel, file: Path, format: str, dynamic_image_size: bool) -> dict[str, Any]:
    """Writes the exported model, compares it with `model`, and returns what was measured."""
    options = {"interpolate_pos_encoding": dynamic_image_size, "return_dict": True}
    module = FORMATS[format].module(model, **options).eval()
    FORMATS[format].write(trace(module, model.config, dynamic_image_size), file)
    logits = Logits(model, **options).eval()
    difference = largest_difference(logits, FORMATS[format].open(file), model.config, dynamic_image_size)
    if not difference <= TOLERANCE:  # also true for NaN
        raise ExportError(
            f"The exported model differs from PyTorch by {difference:.1e}, more than {TOLERANCE:.0e}: nothing is kept."
        )
    return {
        "batch_sizes": BATCH_SIZES,
        "image_sizes": image_sizes(model.config, dynamic_image_size),
        "largest_difference": difference,
        "megabytes": megabytes(file),
    }


def write_int8(
    folder: Path, labels: list[str], preprocessing: dict[str, Any], config: HPoolViTConfig, options: Int8Options
) -> dict[str, Any]:
    """Writes the model in int8 beside the one in float32, and returns what was measured."""
    from .predict_onnx import open_model
    from .quantize import compare, find_images, find_labelled_images, measure_speedup, quantize

    labelled, notes = find_labelled_images(options.eval_dir, labels) if options.eval_dir else ([], [])
    calibration = []
    if options.method == "static":
        calibration, more = find_images(options.calibration_dir, options.num_calibration_images)
        notes = [*dict.fromkeys(notes + more)]
    quantize(folder / "model.onnx", folder / INT8_FILE, calibration, preprocessing)
    models = [open_model(folder / name, options.num_threads) for name in ("model.onnx", INT8_FILE)]
    generator = torch.Generator().manual_seed(0)
    images = random_images(options.batch_size, config.num_channels, config.image_shape, generator).numpy()
    record = {
        "method": options.method,
        "megabytes": megabytes(folder / INT8_FILE),
        "batch_size": options.batch_size,
        **measure_speedup(*models, images),
        **({"notes": notes} if notes else {}),
    }
    return record | (compare(*models, labelled, preprocessing, options.batch_size) if labelled else {})


def megabytes(file: Path) -> float:
    """The size of a model, with the file of weights that ONNX adds from 2 GB on."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) / 1e6


def report(record: dict[str, Any]) -> str:
    """What was measured, for people."""
    sizes = ", ".join(f"{height} × {width}" for height, width in record["image_sizes"])
    lines = [
        f"{FORMATS[record['format']].file_name}: {record['megabytes']:.1f} MB; its logits differ from PyTorch's by at "
        f"most {record['largest_difference']:.1e} (batches of {', '.join(map(str, record['batch_sizes']))}; images of "
        f"{sizes})"
    ]
    lines += [f"note: {note}" for note in record.get("notes", [])]
    if int8 := record.get("int8"):
        low, middle, high = int8["speedup"]
        lines.append(
            f"{INT8_FILE} ({int8['method']}): {int8['megabytes']:.1f} MB, {middle:.2f} times as fast "
            f"(quartiles {low:.2f} and {high:.2f}) in batches of {int8['batch_size']}"
        )
        if "num_images" in int8:
            lines.append(
                f"top-1 on {int8['num_images']} images: {int8['top1_float32']:.2%}, in int8 {int8['top1_int8']:.2%}; "
                f"the same answer for {int8['same_answer']:.2%}"
            )
        else:
            lines.append("The accuracy of int8 was not measured: --eval_dir takes a folder of labelled images.")
        lines += [f"note: {note}" for note in int8.get("notes", [])]
    return "\n".join(lines)


def command(
    model: Model,
    output_dir: OutputDir,
    format: Annotated[
        Literal["onnx", "torch_export", "aot", "web"],
        typer.Option(
            help="ONNX runs without PyTorch; torch.export's format needs PyTorch alone; aot is that compiled ahead of "
            "time, for machines like this one; web is a page that runs the model in a browser."
        ),
    ] = "onnx",
    dynamic_image_size: Annotated[
        bool, typer.Option(help="Take images of any multiple of the patch size, not only the model's own size.")
    ] = False,
    hvt_pool: HvtPool = None,
    merge_ratio: MergeRatio = None,
    speed: Speed = None,
    int8: Annotated[
        Literal["dynamic", "static"] | None,
        typer.Option(
            help="Also write an ONNX model with Linear layers in int8. The ranges of their inputs are taken when it "
            "runs (dynamic) or from --calibration_dir (static)."
        ),
    ] = None,
    calibration_dir: Annotated[Path | None, typer.Option(help="A folder of images, for --int8 static.")] = None,
    num_calibration_images: Annotated[
        int | None, typer.Option(help="How many of these images to use. Default: 64.")
    ] = None,
    eval_dir: Annotated[
        Path | None,
        typer.Option(help="A folder of images, one sub-folder per class, to compare int8 with float32 on."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per batch in the measurements of int8. Default: 8.")
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(help="Threads in the measurements of int8. Default: 0, which means all cores.")
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER_OR_TARBALL",
            help="onnxruntime-web for --format web, as `npm pack` gets it. Default: downloaded once from npm.",
        ),
    ] = None,
) -> None:
    """
    Export a trained model to ONNX, torch.export or a page for browsers, in float32 or also in int8.

    The folder appears only if the exported model gives the logits of PyTorch. It takes any number of images at once.
    For ONNX the folder includes predict_onnx.py, which classifies with NumPy, Pillow and ONNX Runtime alone:
    `python OUTPUT_DIR/predict_onnx.py photo.jpg`

    With --format web it is a page of static files, also for a static Space. The page runs the model on the visitor's
    device, and shows the classes, the time and what merged.

    Of a model for segmentation, the logits are a map of scores per class, and predict_onnx.py is left out.
    """
    given = {"hvt_pool": hvt_pool, "merge_ratio": merge_ratio}
    record = export_model(
        model,
        output_dir,
        format=format,
        dynamic_image_size=dynamic_image_size,
        speed=speed,
        int8=int8,
        calibration_dir=calibration_dir,
        num_calibration_images=num_calibration_images,
        eval_dir=eval_dir,
        batch_size=batch_size,
        num_threads=num_threads,
        runtime=runtime,
        **{name: parse_value(name, text) for name, text in given.items() if text is not None},
    )
    usage = FORMATS[format].usage.format(folder=output_dir)
    print(report(record), f"Saved in {output_dir}. {usage}".strip(), sep="\n")
