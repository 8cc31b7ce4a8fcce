"""
Quantise the Linear layers of an ONNX model to int8 with ONNX Runtime, and measure what it costs in accuracy and saves
in time.

Everything else stays in float32, including attention's products of activations. Each output channel has its own scale.
The weights use 7 of the 8 bits, because the int8 instructions of x86 processors without VNNI overflow with all 8.
"""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..shared.console import needs
from ..shared.folders import as_utf8, escaped, list_images


with needs("export"):
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from .predict_onnx import open_image, predict, preprocess


def find_images(directory: Path, limit: int) -> tuple[list[str], list[str]]:
    """
    At most `limit` of the images in a folder and its sub-folders, a random sample that is always the same, and notes
    on what the folder holds besides images.
    """
    listing = list_images(directory)
    if not listing.files:
        raise ValueError(f"{directory} has no images.")
    return random.Random(0).sample(listing.files, min(limit, len(listing.files))), listing.notes()


def find_labelled_images(directory: Path, labels: list[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """
    Files and label numbers of a folder with one sub-folder per class, named like the model's label, and notes on what
    the folder holds besides images.
    """
    listing = list_images(directory)
    images = []
    for name, files in listing.by_subfolder().items():
        label = as_utf8(name)
        if label not in labels:
            known = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            raise ValueError(
                f"{directory / escaped(name)} is not named like a label of the model: rename it to one of {known}"
            )
        images += [(file, labels.index(label)) for file in files]
    if not images:
        raise ValueError(f"{directory} has no images in sub-folders named like the model's labels.")
    return images, listing.notes()


def read_batches(files: Sequence[str], preprocessing: dict, batch_size: int) -> Iterator[np.ndarray]:
    """
    Prepared images of shape (batch_size, num_channels, height, width); the last batch may be smaller.

    Raises:
        ValueError: for a file that cannot be used, by its name.
    """
    for start in range(0, len(files), batch_size):
        yield np.stack([prepare(file, preprocessing) for file in files[start : start + batch_size]])


def prepare(file: str, preprocessing: dict) -> np.ndarray:
    try:
        return preprocess(open_image(file), preprocessing)
    except ValueError as error:
        raise ValueError(f"{escaped(file)} cannot be used: {error}") from error


class CalibrationImages(CalibrationDataReader):
    """Batches of images in the form that ONNX Runtime asks for."""

    def __init__(self, batches: Iterator[np.ndarray]):
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch}


def linear_layers(file: Path) -> list[str]:
    """The names of the nodes that multiply by a weight. Products of two activations belong to attention."""
    graph = onnx.load(file, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and weights & set(node.input[:2])]


def quantize(file: Path, output: Path, calibration: Sequence[str], preprocessing: dict) -> None:
    """
    Writes a model with its Linear layers in int8.

    Args:
        file: the model in float32.
        output: the file to write.
        calibration: images that give the ranges of the layers' inputs. Without any, the ranges are taken when the
            model runs.
        preprocessing: the content of preprocessor_config.json.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        # Without this step ONNX Runtime warns that it is missing.
        prepared = Path(scratch) / file.name
        quant_pre_process(file, prepared, skip_symbolic_shape=True)
        _quantize_prepared(prepared, output, calibration, preprocessing)


def _quantize_prepared(file: Path, output: Path, calibration: Sequence[str], preprocessing: dict) -> None:
    options = {
        "nodes_to_quantize": linear_layers(file),
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
    }
    if not calibration:
        quantize_dynamic(file, output, **options)
        return
    images = CalibrationImages(read_batches(calibration, preprocessing, batch_size=8))
    quantize_static(file, output, images, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, **options)


def measure_speedup(float32: InferenceSession, int8: InferenceSession, images: np.ndarray, rounds: int = 15) -> dict:
    """How many times as fast int8 is: the quartiles over `rounds` in which both models take turns, after a warm-up."""
    speedups = []
    for _ in range(rounds + 2):
        seconds = []
        for session in (float32, int8):
            start = time.perf_counter()
            predict(session, images)
            seconds.append(time.perf_counter() - start)
        speedups.append(seconds[0] / seconds[1])
    return {"speedup": np.percentile(speedups[2:], (25, 50, 75)).tolist()}


def compare(
    float32: InferenceSession,
    int8: InferenceSession,
    images: list[tuple[str, int]],
    preprocessing: dict,
    batch_size: int,
) -> dict:
    """The accuracy of both models on labelled images, and the share of images for which their answers agree."""
    files, labels = zip(*images, strict=True)
    answers = [
        [predict(session, batch).argmax(-1) for session in (float32, int8)]
        for batch in read_batches(files, preprocessing, batch_size)
    ]
    right, other = (np.concatenate(answer) for answer in zip(*answers, strict=True))
    return {
        "num_images": len(labels),
        "top1_float32": float((right == labels).mean()),
        "top1_int8": float((other == labels).mean()),
        "same_answer": float((right == other).mean()),
    }
