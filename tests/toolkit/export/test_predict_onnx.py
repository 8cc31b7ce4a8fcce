"""`predict_onnx.py` decodes and prepares every file as the image processor does, with NumPy and Pillow alone."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
from helpers import tiny_model
from image_files import BAD_FILES, encoded, picture
from PIL import ExifTags, Image, ImageCms

from hpool_vit import HPoolViTImageProcessorPil
from hpool_vit.toolkit.export import predict_onnx
from hpool_vit.toolkit.export.predict_onnx import open_image, preprocess, to_rgb
from hpool_vit.toolkit.inference.inputs import read_image
from hpool_vit.toolkit.shared.images import BadImageError, decode_image


def alpha(seed: int = 8) -> Image.Image:
    return picture(seed).convert("L")


def ramp(low: float, high: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 30 * 40).reshape(30, 40).astype(dtype))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def half_seen_palette() -> bytes:
    image = picture(4).convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(image, transparency=bytes(range(256)))


FILES = {
    "rgb.png": encoded(picture(1, (57, 40))),
    "tall.png": encoded(picture(2, (9, 31))),
    "long.png": encoded(picture(3, (2, 128))),
    "photo.jpg": encoded(picture(1, (57, 40)), "JPEG"),
    **{f"turned{number}.jpg": encoded(picture(1, (57, 40)), "JPEG", exif=turned(number)) for number in range(1, 9)},
    "turned.png": encoded(picture(1, (57, 40)), exif=turned(6)),
    "grey.png": encoded(picture(4).convert("L")),
    "bits.png": encoded(picture(4).convert("1")),
    "palette.png": encoded(picture(5).convert("P")),
    "palette_transparency.png": half_seen_palette(),
    "palette_one_transparent.gif": encoded(picture(5).convert("P"), "GIF", transparency=7),
    "grey_transparent.png": encoded(picture(5).convert("L"), transparency=100),
    "rgb_transparent.png": encoded(Image.new("RGB", (9, 8), (10, 20, 30)), transparency=(10, 20, 30)),
    "grey_alpha.png": encoded(Image.merge("LA", (picture(5).convert("L"), alpha()))),
    "alpha.png": encoded(Image.merge("RGBA", (*picture(7).split(), alpha()))),
    "alpha.webp": encoded(Image.merge("RGBA", (*picture(7).split(), alpha())), "WEBP"),
    "turned_alpha.png": encoded(Image.merge("RGBA", (*picture(7).split(), alpha())), exif=turned(8)),
    "print.jpg": encoded(picture(6).convert("CMYK"), "JPEG"),
    "lab.tif": encoded(ImageCms.profileToProfile(
        picture(6), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"), "TIFF"),
    "16bits.png": encoded(ramp(0, 65535, "uint16")),
    "dark16bits.png": encoded(ramp(0, 200, "uint16")),
    "16bits.tif": encoded(ramp(0, 65535, "uint16"), "TIFF"),
    "8bits_in_32.tif": encoded(ramp(0, 255, "int32"), "TIFF"),
    "16bits_in_32.tif": encoded(ramp(0, 65535, "int32"), "TIFF"),
    "floats_to_1.tif": encoded(ramp(0, 1, "float32"), "TIFF"),
    "floats_to_255.tif": encoded(ramp(0, 255, "float32"), "TIFF"),
    "preview.mpo": encoded(picture(), "MPO", save_all=True, append_images=[picture(1)]),
}  # fmt: skip
RAMPS = [
    "16bits.png",
    "16bits.tif",
    "8bits_in_32.tif",
    "16bits_in_32.tif",
    "floats_to_1.tif",
    "floats_to_255.tif",
]
REFUSED = {
    **BAD_FILES,
    "negative_floats.tif": (encoded(ramp(-1, 1, "float32"), "TIFF"), "values from -1 to 1 in mode 'F'"),
    "too_bright.tif": (encoded(ramp(0, 300, "float32"), "TIFF"), "values from 0 to 300 in mode 'F'"),
    "32bits.tif": (encoded(ramp(0, 2**20, "int32"), "TIFF"), "values from 0 to 1.04858e+06 in mode 'I'"),
    "nan.tif": (encoded(Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)), "TIFF"), "values from nan"),
    "just_too_long.png": (encoded(picture(3, (2, 129))), "too long: 2 × 129 pixels"),
    "pages.tif": (encoded(picture(), "TIFF", save_all=True, append_images=[picture(1)]), "animated: 2 frames"),
}
SETTINGS = {
    "crop": {},
    "stretch": {"size": {"height": 32, "width": 36}, "do_center_crop": False},
    "pad": {"crop_size": {"height": 45, "width": 40}},
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_pixels_of_the_image_processor(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(FILES[name])
    ours, (expected, _) = to_rgb(open_image(file)), decode_image(FILES[name])
    assert ours.mode == expected.mode == "RGB"
    assert np.array_equal(ours, expected)
    for settings in SETTINGS.values():
        image_processor = HPoolViTImageProcessorPil.for_config(tiny_model().config, **settings)
        pixels = preprocess(open_image(file), json.loads(image_processor.to_json_string()))
        prepared = image_processor(str(file)).pixel_values[0]
        assert pixels.dtype == np.float32 and pixels.shape == prepared.shape
        np.testing.assert_allclose(pixels, prepared, atol=1e-5)


@pytest.mark.parametrize("name", RAMPS)
def test_black_stays_black_and_white_white_in_integers_and_floating_point(name):
    pixels = np.asarray(to_rgb(Image.open(io.BytesIO(FILES[name]))))
    assert (pixels[0, 0].tolist(), pixels[-1, -1].tolist()) == ([0, 0, 0], [255, 255, 255])
    assert len(np.unique(pixels)) > 200


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_predict_refuses_is_refused_for_the_same_reason(name, tmp_path):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImageError, match=f"^{re.escape(reason)}") as expected:
        read_image(str(tmp_path / name), timeout=1)
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}") as ours:
        to_rgb(open_image(tmp_path / name))
    assert str(expected.value).startswith(str(ours.value))


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("gone.png", "No such file or directory"),
        ("", "a folder"),
        ("pipe.png", "not a regular file"),
    ):
        with pytest.raises(ValueError, match=f"^unreadable: {reason}$"):
            open_image(tmp_path / name)


def test_a_file_of_more_than_a_gibibyte_is_refused_unread(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(predict_onnx.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"^too large: more than 1024 MiB$"):
        open_image(tmp_path / "large.png")


def test_images_of_one_channel_stay_as_they_are():
    config = {"do_rescale": True, "rescale_factor": 1 / 255}
    assert preprocess(picture().convert("L"), config).shape == (1, 20, 24)


def test_many_bad_files_are_counted_and_the_first_ones_named():
    lines = predict_onnx.summary("skipped", [f"{number}.png: truncated" for number in range(25)])
    assert lines[0] == "25 images skipped:" and len(lines) == 22 and lines[-1] == "  … and 5 more"
    assert predict_onnx.summary("converted", []) == ["0 images converted"]


def test_wrong_flags_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    for words, message in (
        (["--top_k", "0"], "--top_k 0 must be at least 1"),
        (["--image_size", "0"], "--image_size 0 must be one number of pixels, or height and width"),
        (["--image_size", "32,x"], "--image_size 32,x must be one number"),
        (["--image_size", "32,32,32"], "--image_size 32,32,32 must be one number"),
        ([], "no readable preprocessor_config"),
    ):
        monkeypatch.setattr(sys, "argv", ["predict_onnx.py", "a.png", "--model", str(tmp_path / "model.onnx"), *words])
        with pytest.raises(ValueError, match=message):
            predict_onnx.main()


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ({"shortest_edge": 256}, {"shortest_edge": 439}),
        ({"height": 256, "width": 256}, {"height": 439, "width": 439}),
        ({"height": 256, "width": 320}, {"height": 439, "width": 549}),
    ],
    ids=["short side", "square", "two sides"],
)
def test_another_image_size_keeps_the_share_that_is_cut_out(size, resized):
    config = {"do_center_crop": True, "size": size, "crop_size": {"height": 224, "width": 224}}
    square = predict_onnx.parse_image_size("384")
    changed = predict_onnx.for_image_size(config, square)
    assert changed["size"] == resized and changed["crop_size"] == square == {"height": 384, "width": 384}


@pytest.mark.parametrize("size", [{"height": 256, "width": 438}, {"shortest_edge": 256}])
def test_a_square_fits_into_what_was_resized_for_a_crop_that_is_none(size):
    config = {"do_center_crop": True, "size": size, "crop_size": {"height": 224, "width": 384}}
    changed = predict_onnx.for_image_size(config, {"height": 512, "width": 512})
    assert all(512 <= pixels < 600 for pixels in changed["size"].values())


@pytest.mark.parametrize(
    ("size", "crop", "resized"),
    [
        ({"height": 256, "width": 438}, (224, 384), {"height": 512, "width": 657}),
        ({"shortest_edge": 256}, (224, 224), {"shortest_edge": 658}),
        ({"height": 448, "width": 576}, None, {"height": 448, "width": 576}),
    ],
    ids=["two sides", "short side", "no crop"],
)
def test_an_image_size_has_a_height_and_a_width(size, crop, resized):
    config = {"do_convert_rgb": True, "do_resize": True, "resample": 2, "do_center_crop": bool(crop), "size": size}
    config["crop_size"] = crop and dict(zip(("height", "width"), crop, strict=True))
    changed = predict_onnx.for_image_size(config, predict_onnx.parse_image_size("448,576"))
    assert changed["size"] == resized
    # Black bars would be where the resized image does not fill the crop.
    pixels = preprocess(Image.new("RGB", (90, 60), "white"), changed)
    assert pixels.shape == (3, 448, 576) and pixels.min() == 255


def test_without_a_crop_another_image_size_is_that_of_the_resized_image():
    changed = predict_onnx.for_image_size({"size": {"shortest_edge": 32}}, {"height": 48, "width": 48})
    assert changed["size"] == {"height": 48, "width": 48} and changed["do_resize"]
