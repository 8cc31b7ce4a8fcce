"""
Classify image files with an exported model. `hpool-vit export` puts this program into the folder beside the model. It
needs only NumPy, Pillow and ONNX Runtime:

    python -m pip install numpy pillow onnxruntime
    python predict_onnx.py photo.jpg
    python predict_onnx.py --model model_int8.onnx --top_k 1 photos/*.jpg
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_json(folder: Path, name: str):
    """The content of `preprocessor_config.json` or `labels.json`. A `ValueError` says what is wrong with the file."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no readable {name}: the model must be in its exported folder.") from error


def open_model(file: Path, num_threads: int = 0) -> onnxruntime.InferenceSession:
    """
    Opens a model on the CPU.

    Args:
        file: the ONNX file.
        num_threads: the threads to use; 0 means all cores.

    Raises:
        ValueError: if ONNX Runtime cannot open the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors only; users cannot change what the warnings are about, the graph
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ValueError(f"{file} is not a model that ONNX Runtime can open: {error}") from error


def open_image(file: Path) -> Image.Image:
    """An image, upright according to its EXIF data. A `ValueError` names a file that is not an image."""
    try:
        return ImageOps.exif_transpose(Image.open(file))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not an image that Pillow can read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency on white, and 16 bits as 8 (Pillow's own conversion clips them to white)."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.float32)
        is_16_bit = image.mode != "I" or pixels.max() > 255
        image = Image.fromarray((pixels / (257 if is_16_bit else 1)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: Image.Image, config: dict) -> np.ndarray:
    """
    Prepares an image for the model: resize, centre crop, rescale, normalise.

    Args:
        image: the image.
        config: the content of preprocessor_config.json.

    Returns:
        float32 of shape (num_channels, height, width).
    """
    if config.get("do_convert_rgb"):
        image = to_rgb(image)
    if config.get("do_resize"):
        size = config["size"]
        if "shortest_edge" in size:
            short, edge = min(image.size), size["shortest_edge"]
            width, height = (int(edge * side / short) for side in image.size)
        else:
            width, height = size["width"], size["height"]
        image = image.resize((width, height), config["resample"])
    if config.get("do_center_crop"):
        width, height = config["crop_size"]["width"], config["crop_size"]["height"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if config.get("do_rescale"):
        pixels = pixels * np.float32(config["rescale_factor"])
    if config.get("do_normalize"):
        pixels = (pixels - np.float32(config["image_mean"])) / np.float32(config["image_std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def for_image_size(config: dict, size: int) -> dict:
    """`config` for square images of `size` pixels. The crop keeps its share of the image."""
    share = max(config["crop_size"].values()) / config["size"]["shortest_edge"] if config.get("do_center_crop") else 1
    square = {"height": size, "width": size}
    resize = {"shortest_edge": round(size / share)} if "shortest_edge" in config["size"] else square
    return {**config, "do_resize": True, "size": resize, "crop_size": square}


def check_image_size(session: onnxruntime.InferenceSession, pixel_values: np.ndarray):
    """Raises a `ValueError` for images of a size that the model does not take."""
    expected = session.get_inputs()[0].shape[1:]  # free sizes have names
    given = pixel_values.shape[1:]
    if any(isinstance(size, int) and size != other for size, other in zip(expected, given, strict=True)):
        raise ValueError(
            f"The model takes images of {' × '.join(map(str, expected))} (channels, height, width), not of "
            f"{' × '.join(map(str, given))}: leave --image_size out, or export with --dynamic_image_size."
        )


def predict(session: onnxruntime.InferenceSession, pixel_values: np.ndarray) -> np.ndarray:
    """Logits of shape (batch_size, num_labels) for images of shape (batch_size, num_channels, height, width)."""
    check_image_size(session, pixel_values)
    return session.run(["logits"], {"pixel_values": pixel_values})[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--model", type=Path, help="the ONNX file; default: model.onnx beside this program")
    parser.add_argument("--top_k", type=int, default=5, help="how many classes to print; default: %(default)s")
    parser.add_argument("--image_size", type=int, help="pixels, for a model exported with --dynamic_image_size")
    args = parser.parse_args()

    model = args.model or Path(__file__).with_name("model.onnx")
    config, labels = read_json(model.parent, "preprocessor_config.json"), read_json(model.parent, "labels.json")
    if args.image_size:
        config = for_image_size(config, args.image_size)
    session = open_model(model)
    for file in args.images:
        pixel_values = preprocess(open_image(file), config)
        probabilities = softmax(predict(session, pixel_values[None])[0])
        best = np.argsort(-probabilities)[: args.top_k]
        print(f"{file}: " + ", ".join(f"{labels[index]} {probabilities[index]:.1%}" for index in best))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
