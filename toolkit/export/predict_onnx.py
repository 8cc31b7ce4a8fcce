"""
Classifies image files with a folder that export.py made. Needs only numpy, Pillow and ONNX Runtime:

    pip install numpy pillow onnxruntime
    python predict_onnx.py --model_dir outputs/onnx photo.jpg
    python predict_onnx.py --model_dir outputs/onnx --model_name model_int8.onnx --top_k 1 photos/*.jpg
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_json(model_dir: Path, name: str):
    """The content of `preprocessor_config.json` or `labels.json`; a `ValueError` says what is wrong with the file."""
    try:
        return json.loads((model_dir / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_dir {model_dir} has no readable {name}: make the folder with export.py.") from error


def open_model(file: Path, num_threads: int = 0) -> onnxruntime.InferenceSession:
    """A model on the CPU, by default on all its cores; a `ValueError` says what is wrong with the file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors; the warnings are about the graph, which no user can change
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no class
        raise ValueError(f"{file} is no model that ONNX Runtime opens: make it with export.py. ({error})") from error


def open_image(file: Path) -> Image.Image:
    """An image, upright as its EXIF data say; a `ValueError` names a file that is none."""
    try:
        return ImageOps.exif_transpose(Image.open(file))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no image that Pillow can read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency on white, and 16 bits as 8 (which Pillow's own conversion would clip to white)."""
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
    What `config`, the content of preprocessor_config.json, says: resize, centre crop, rescale, normalise.

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
    """`config` for square images of `size` pixels, of which the crop keeps its share."""
    share = max(config["crop_size"].values()) / config["size"]["shortest_edge"] if config.get("do_center_crop") else 1
    square = {"height": size, "width": size}
    resize = {"shortest_edge": round(size / share)} if "shortest_edge" in config["size"] else square
    return {**config, "do_resize": True, "size": resize, "crop_size": square}


def check_image_size(session: onnxruntime.InferenceSession, pixel_values: np.ndarray):
    """Raises a `ValueError` for images of another size than the model takes."""
    expected = session.get_inputs()[0].shape[1:]  # names stand for sizes that are free
    given = pixel_values.shape[1:]
    if any(isinstance(size, int) and size != other for size, other in zip(expected, given, strict=True)):
        raise ValueError(
            f"The model takes images of {' × '.join(map(str, expected))} (channels, height, width), and was given "
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
    parser.add_argument("--model_dir", type=Path, required=True, help="folder that export.py made")
    parser.add_argument("--model_name", default="model.onnx", help="the file in it (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=5, help="how many classes to print (default: %(default)s)")
    parser.add_argument("--image_size", type=int, help="pixels, for a model exported with --dynamic_image_size")
    args = parser.parse_args()

    config, labels = read_json(args.model_dir, "preprocessor_config.json"), read_json(args.model_dir, "labels.json")
    if args.image_size:
        config = for_image_size(config, args.image_size)
    session = open_model(args.model_dir / args.model_name)
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
