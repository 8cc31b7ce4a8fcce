"""
Classify image files with an exported model. `hpool-vit export` puts this program into the folder beside the model. It
needs only NumPy, Pillow and ONNX Runtime:

    python -m pip install numpy pillow onnxruntime
    python predict_onnx.py photo.jpg
    python predict_onnx.py --model model_int8.onnx --top_k 1 photos/*.jpg

Files that cannot be used are reported with the reason, and the others are answered. The exit status is 0 if every file
was classified, 1 if not, and 2 if the program did not start because of its flags or the model.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


# With the package pillow-heif, Pillow reads HEIC and HEIF too.
with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()


# The rules of the image processor, HPoolViTImageProcessor. How many times its short side an image may be long:
MAX_ASPECT_RATIO = 64
# By the type of an array, the ranges in which its largest value may lie, and the value of white: the end of the range.
# Other types are integers.
SCALES = {"uint16": ((0, 65535),), "uint32": ((0, 255), (256, 65535), (2**31, 2**32 - 1))}
SCALES |= dict.fromkeys(("float16", "float32", "float64"), ((0, 1), (2, 255)))
OTHER_SCALES = ((0, 255), (256, 65535))
# Files in these modes can look different in RGB, so the report lists them.
REPORTED_MODES = {"CMYK": "CMYK", "P": "palette", "PA": "palette"}
MAX_BYTES = 1 << 30
MAX_LINES = 20


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


def read_file(file: Path) -> bytes:
    try:
        if not file.is_file():
            file.stat()  # raises for a file that does not exist
            # A device or a pipe may never end.
            raise ValueError(f"unreadable: {'a folder' if file.is_dir() else 'not a regular file'}")
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"too large: more than {MAX_BYTES >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror or error}") from error


def open_image(file: Path | str) -> Image.Image:
    """
    Decodes an image file, upright according to its EXIF data. The mode is the file's: `to_rgb` makes RGB of it.

    Raises:
        ValueError: with the reason, for a file that the image processor would refuse too.
    """
    data = io.BytesIO(read_file(Path(file)))
    # Pillow's decoders raise all kinds of errors for a broken file, from OSError to struct.error.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(data)
        num_frames = getattr(image, "n_frames", 1)
    except Image.UnidentifiedImageError as error:
        raise ValueError("unreadable: not an image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from error
    except Exception as error:
        raise ValueError(why_unreadable(error)) from error
    check_decodable(image, num_frames)
    try:
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    except Exception as error:
        raise ValueError(why_unreadable(error)) from error
    return image


def check_decodable(image: Image.Image, num_frames: int):
    """Raises a `ValueError` for an opened image that must not be decoded; only its header has been read."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too large: {image.width * image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
    # Many cameras write photos as MPO files, whose second image is a preview or a depth map.
    if num_frames > 1 and image.format != "MPO":
        raise ValueError(f"animated: {num_frames} frames")
    if min(image.size) <= 1:
        raise ValueError(f"too small: {image.width} × {image.height} pixels")
    # Resizing the short side of a longer image would make an image of unbounded size.
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"too long: {image.width} × {image.height} pixels, and one side may be at most {MAX_ASPECT_RATIO} times "
            "the other"
        )


def why_unreadable(error: Exception) -> str:
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return f"{reason}: {str(error) or type(error).__name__}"


def to_rgb(image: Image.Image) -> Image.Image:
    """
    8-bit RGB, with transparency on white, and integers and floating point scaled as the image processor scales them.

    Raises:
        ValueError: for values whose scale is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    # Pillow's own conversion would clip these.
    if image.mode.startswith(("I", "F")):
        pixels = to_8_bits(np.asarray(image), image.mode)
        return Image.fromarray(np.stack([pixels] * 3, axis=-1))
    if "A" in image.getbands() or "transparency" in image.info:
        return on_white(np.asarray(image.convert("RGBA")))
    return image.convert("RGB")


def to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
    low, high = pixels.min().item(), pixels.max().item()
    for least, white in SCALES.get(pixels.dtype.name, OTHER_SCALES):
        if low >= 0 and least <= high <= white:
            return (pixels.astype(np.float64) * (255 / white)).round().astype(np.uint8)
    raise ValueError(
        f"values from {low:g} to {high:g} in mode {mode!r}, whose scale is unknown: scale them to 8 bits (0 to 255)"
    )


def on_white(pixels: np.ndarray) -> Image.Image:
    """RGBA of shape (height, width, 4) as RGB on a white ground, a few rows at a time to save memory."""
    rgb = np.empty((*pixels.shape[:2], 3), dtype=np.uint8)
    step = max(2**22 // pixels.shape[1], 1)
    for start in range(0, len(pixels), step):
        rows = pixels[start : start + step].astype(np.float32)
        alpha = rows[..., 3:] / np.float32(255)
        rgb[start : start + step] = (rows[..., :3] * alpha + 255 * (1 - alpha)).round()
    return Image.fromarray(rgb)


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


def parse_image_size(text: str) -> dict:
    """Height and width from `320` or `224,384`. Raises a `ValueError` for any other text."""
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--image_size {text} must be one number of pixels, or height and width: 224,384.")
    return {"height": int(sides[0]), "width": int(sides[-1])}


def for_image_size(config: dict, size: dict) -> dict:
    """`config` for images of the `height` and `width` in `size`. The crop keeps its share of the image."""
    if not config.get("do_center_crop"):
        return {**config, "do_resize": True, "size": size}
    scales = {name: size[name] / pixels for name, pixels in config["crop_size"].items()}
    # Of height and width each has its own scale; the shortest edge must fill both sides of the crop.
    resize = {name: round(pixels * scales.get(name, max(scales.values()))) for name, pixels in config["size"].items()}
    return {**config, "do_resize": True, "size": resize, "crop_size": size}


def check_image_size(session: onnxruntime.InferenceSession, pixel_values: np.ndarray):
    """Raises a `ValueError` for images of a size that the model does not take."""
    expected = session.get_inputs()[0].shape[1:]  # free sizes have names
    given = pixel_values.shape[1:]
    if any(isinstance(size, int) and size != other for size, other in zip(expected, given, strict=True)):
        raise ValueError(
            f"The model takes images of {' × '.join(map(str, expected))} (channels, height, width), not of "
            f"{' × '.join(map(str, given))}: use the model's own size, or export the model with --dynamic_image_size."
        )


def predict(session: onnxruntime.InferenceSession, pixel_values: np.ndarray) -> np.ndarray:
    """Logits of shape (batch_size, num_labels) for images of shape (batch_size, num_channels, height, width)."""
    check_image_size(session, pixel_values)
    return session.run(["logits"], {"pixel_values": pixel_values})[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def classify(
    session: onnxruntime.InferenceSession, file: Path, config: dict, labels: list[str], top_k: int
) -> tuple[str, str | None]:
    """
    The most likely classes of an image file, and a note if it was converted.

    Raises:
        ValueError: with the reason, if the file cannot be used.
    """
    image = open_image(file)
    probabilities = softmax(predict(session, preprocess(image, config)[None])[0])
    if not np.isfinite(probabilities).all():
        raise ValueError("the model's answer is not a number")
    best = np.argsort(-probabilities)[:top_k]
    answer = ", ".join(f"{labels[index]} {probabilities[index]:.1%}" for index in best)
    note = REPORTED_MODES.get(image.mode)
    return answer, note and f"{note} to RGB"


def summary(kind: str, records: list[str]) -> list[str]:
    """How many files were `kind`, with at most `MAX_LINES` of them."""
    lines = [f"{len(records)} image{'s' * (len(records) != 1)} {kind}{':' * bool(records)}"]
    lines += [f"  {record}" for record in records[:MAX_LINES]]
    return lines + [f"  … and {len(records) - MAX_LINES} more"] * (len(records) > MAX_LINES)


def one_line(text: object) -> str:
    """`text` on one line that any terminal can take: names of files may hold anything."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", str(text)).split())


def main() -> int:
    """Returns the exit status; a `ValueError` says why the program does not start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--model", type=Path, help="the ONNX file; default: model.onnx beside this program")
    parser.add_argument("--top_k", type=int, default=5, help="how many classes to print; default: %(default)s")
    parser.add_argument(
        "--image_size", help="224, or height and width: 224,384; for a model exported with --dynamic_image_size"
    )
    args = parser.parse_args()

    if args.top_k < 1:
        raise ValueError(f"--top_k {args.top_k} must be at least 1.")
    size = None if args.image_size is None else parse_image_size(args.image_size)
    model = args.model or Path(__file__).with_name("model.onnx")
    config, labels = read_json(model.parent, "preprocessor_config.json"), read_json(model.parent, "labels.json")
    if size:
        config = for_image_size(config, size)
    session = open_model(model)
    blank = Image.new("RGB" if config.get("do_convert_rgb") else "L", (64, 64))
    check_image_size(session, preprocess(blank, config)[None])
    # A letter that the terminal cannot show must not stop the program.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")

    start, skipped, converted = time.perf_counter(), [], []
    for file in args.images:
        name = one_line(file)
        try:
            answer, note = classify(session, file, config, labels, args.top_k)
        except ValueError as error:
            answer, note = f"bad: {one_line(error)}", None
            skipped.append(f"{name}: {one_line(error)}")
        if note:
            converted.append(f"{name}: {note}")
        print(f"{name}: {answer}", flush=True)
    num_classified, seconds = len(args.images) - len(skipped), time.perf_counter() - start
    report = [f"{num_classified} of {len(args.images)} files classified in {seconds:.1f} s"]
    report += summary("skipped", skipped) + summary("converted", converted)
    print(*report, sep="\n", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    try:
        status = main()
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)
