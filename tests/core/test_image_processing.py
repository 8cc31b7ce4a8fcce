import base64
import functools
import http.server
import io
import threading

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import tiny_config
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend

from hpool_vit import HPoolViTConfig, HPoolViTImageProcessor, HPoolViTImageProcessorPil, image_processing_hpool_vit


BACKENDS = [HPoolViTImageProcessor, HPoolViTImageProcessorPil]


def reopened(image: Image.Image, file_format: str = "PNG") -> Image.Image:
    """The image after a way through a real file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours with some texture, 400 × 300."""
    y, x = np.mgrid[0:300, 0:400] / 300
    channels = [np.sin(6 * x + 2 * y), np.cos(5 * y - x), np.sin(9 * x * y)]
    return Image.fromarray(np.stack([(127 * c + 128).astype(np.uint8) for c in channels], axis=-1))


@pytest.fixture(scope="module")
def variants(photo) -> dict:
    """The same scene in every form; all whose name begins with "grey" must come out alike, those with "rgb" too."""
    rgb, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    deep = grey.astype(np.uint16) * 257
    return {
        "rgb PNG": reopened(photo),
        "rgb array": rgb,
        "rgb read-only flipped twice": np.flip(np.flip(rgb, 1), 1),
        "rgb tensor, channels first": torch.from_numpy(rgb.copy()).permute(2, 0, 1),
        "rgb with full alpha": reopened(photo.convert("RGBA")),
        "rgba array with full alpha": np.asarray(photo.convert("RGBA")),
        "rgb 16-bit array": rgb.astype(np.uint16) * 257,
        "grey PNG": reopened(photo.convert("L")),
        "grey array of two axes": grey,
        "grey array of three axes": grey[..., None],
        "grey tensor of two axes": torch.from_numpy(grey.copy()),
        "grey 16-bit PNG": reopened(Image.fromarray(deep)),
        "grey 16-bit array": deep,
        "grey with full alpha": reopened(photo.convert("LA")),
        "palette": reopened(photo.convert("P", palette=Image.Palette.ADAPTIVE)),
        "cmyk JPEG": reopened(photo.convert("CMYK"), "JPEG"),
    }


@pytest.mark.parametrize("cls", BACKENDS)
def test_every_kind_of_image_works_alone_and_in_a_mixed_batch(cls, variants):
    processor = cls()
    batch = processor(list(variants.values()), return_tensors="pt").pixel_values
    assert batch.shape == (len(variants), 3, 224, 224) and batch.dtype == torch.float32
    outputs = dict(zip(variants, batch, strict=True))
    for name, image in variants.items():
        alone = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(alone[0], outputs[name], msg=name)
        kind = name.split()[0].replace("rgba", "rgb")
        if f"{kind} PNG" in outputs:
            torch.testing.assert_close(outputs[name], outputs[f"{kind} PNG"], atol=0.02, rtol=0, msg=name)
        else:  # palettes and CMYK lose a little colour
            assert (outputs[name] - outputs["rgb PNG"]).abs().mean() < 0.15, name


def test_both_backends_give_the_same_pixels(variants):
    torchvision, pil = (cls()(list(variants.values()), return_tensors="pt").pixel_values for cls in BACKENDS)
    assert (torchvision - pil).abs().max() < 0.1
    assert (torchvision - pil).abs().mean() < 5e-3


@pytest.mark.parametrize("cls", BACKENDS)
def test_the_pixels_are_those_of_resize_crop_and_normalise(cls, photo):
    expected = photo.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    expected = (np.asarray(expected) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = cls()(photo, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    assert np.abs(pixels - expected).max() < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_resize": False},
        {"size": {"height": 64, "width": 48}, "do_center_crop": False},
        {"resample": Image.Resampling.BILINEAR, "do_rescale": False, "do_normalize": False},
    ],
    ids=["default", "crop", "stretch", "resize"],
)
def test_channels_side_by_side_give_the_pixels_of_transformers_backend_to_the_bit(settings, photo):
    """The order of the channels in memory makes resizing faster; Transformers' backend puts one after the other."""
    names = ("resample", "image_mean", "image_std", "size", "default_to_square", "crop_size", "do_resize")
    names += ("do_center_crop", "do_rescale", "do_normalize")
    plain = type("Plain", (TorchvisionBackend,), {name: getattr(HPoolViTImageProcessor, name) for name in names})
    images = [photo, photo.rotate(90, expand=True), photo.convert("L").convert("RGB").resize((231, 257))]
    expected = [plain(**settings)(image, return_tensors="pt").pixel_values[0] for image in images]
    processor = HPoolViTImageProcessor(**settings)
    for disable_grouping in (True, False):
        prepared = processor(images, disable_grouping=disable_grouping).pixel_values
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(prepared, expected, strict=True))
    assert processor(photo, return_tensors="pt").pixel_values.is_contiguous()
    from_tensor = processor(torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()).pixel_values[0]
    assert torch.equal(from_tensor, expected[0])


@pytest.mark.parametrize("cls", BACKENDS)
def test_transparency_becomes_white(cls):
    clear = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    white = Image.new("RGB", (300, 300), "white")
    half = np.full((300, 300, 4), 0.5, dtype=np.float32)
    processor = cls()
    expected = processor(white, return_tensors="pt").pixel_values
    for image in (clear, np.asarray(clear), reopened(clear.convert("P"))):
        torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values, expected)
    greys = processor(half, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(greys, torch.full_like(greys, 0.75), atol=1e-2, rtol=0)


@pytest.mark.parametrize("cls", BACKENDS)
def test_an_array_with_an_impossible_number_of_channels_is_refused(cls):
    with pytest.raises(ValueError, match="channel"):
        cls()(np.zeros((40, 40, 7), dtype=np.uint8))


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("image_size", [32, 224, (64, 96), (384, 384)])
def test_for_config_gives_the_image_size_of_the_model(cls, image_size, photo):
    config = HPoolViTConfig(image_size=image_size, patch_size=16, hvt_pool=None)
    processor = cls.for_config(config)
    pixel_values = processor(photo, return_tensors="pt").pixel_values
    assert tuple(pixel_values.shape[2:]) == config.image_shape
    # The crop covers the image: nothing is padded.
    assert (pixel_values.amax((0, 2, 3)) > pixel_values.amin((0, 2, 3))).all()
    assert processor.size["shortest_edge"] >= max(config.image_shape)


@pytest.mark.parametrize("cls", BACKENDS)
def test_saving_keeps_every_attribute(cls, tmp_path):
    processor = cls.for_config(tiny_config(), image_mean=[0.5, 0.4, 0.3], resample=2)
    processor.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for name in ("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop", "do_convert_rgb"):
        assert getattr(loaded, name) == getattr(processor, name), name


@pytest.mark.parametrize("cls", BACKENDS)
def test_arrays_of_other_types_mean_the_same_image(cls, photo):
    pixels = np.dstack([np.asarray(photo), np.asarray(photo.convert("L"))])
    expected = cls()(pixels, return_tensors="pt").pixel_values
    as_float = cls()(pixels.astype(np.float32), return_tensors="pt").pixel_values
    torch.testing.assert_close(as_float, expected, atol=0.1, rtol=0)
    big_endian = (pixels[..., :3].astype(np.uint16) * 257).astype(">u2")
    rgb = cls()(pixels[..., :3], return_tensors="pt").pixel_values
    torch.testing.assert_close(cls()(big_endian, return_tensors="pt").pixel_values, rgb)
    mask = pixels[..., 0] > 127
    white = cls()(mask.astype(np.uint8) * 255, return_tensors="pt").pixel_values
    torch.testing.assert_close(cls()(mask, return_tensors="pt").pixel_values, white)


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_model_of_other_than_rgb_images_needs_a_decision(cls):
    config = tiny_config(num_channels=1)
    with pytest.raises(ValueError, match=r"num_channels=1.*do_convert_rgb=False"):
        cls.for_config(config)
    processor = cls.for_config(config, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    grey = np.zeros((40, 40), dtype=np.uint8)
    assert processor(grey, return_tensors="pt").pixel_values.shape == (1, 1, 32, 32)


def saved_variants(photo: Image.Image, folder) -> dict:
    """Files of all modes, and the Pillow image that each holds."""
    grey = np.asarray(photo.convert("L"))
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(grey))
    images = {
        "rgb.png": photo,
        "rgb.jpg": photo,
        "grey.png": photo.convert("L"),
        "bitmap.png": photo.convert("1"),
        "transparent.png": clear,
        "transparent_grey.png": clear.convert("LA"),
        "palette.png": photo.convert("P", palette=Image.Palette.ADAPTIVE),
        "print.jpg": photo.convert("CMYK"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "deep.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "integers.tif": Image.fromarray(grey.astype(np.int32) * 257),
        "unit_floats.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "floats.tif": Image.fromarray(grey.astype(np.float32)),
    }
    for name, image in images.items():
        image.save(folder / name)
    return {name: folder / name for name in images}


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_file_a_path_base64_and_the_opened_image_give_the_same_pixels(cls, photo, tmp_path):
    processor = cls()
    grey = processor(photo.convert("L"), return_tensors="pt").pixel_values
    for name, path in saved_variants(photo, tmp_path).items():
        pixels = processor(str(path), return_tensors="pt").pixel_values
        text = base64.b64encode(path.read_bytes()).decode()
        for same in (path, text, f"data:image/png;base64,{text}", Image.open(path)):
            assert torch.equal(processor(same, return_tensors="pt").pixel_values, pixels), name
        if name.startswith(("grey", "deep", "integers", "unit", "floats")):
            assert torch.equal(pixels, grey), name
    batch = processor([str(tmp_path / "deep.tif"), Image.open(tmp_path / "rgb.png")], return_tensors="pt").pixel_values
    assert torch.equal(batch[:1], grey)


@pytest.fixture
def server(photo, tmp_path, monkeypatch):
    """Serves a folder with photo.png on this machine, to a client that is not offline."""
    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_gives_the_same_pixels_and_every_failure_is_a_value_error(server, photo, monkeypatch):
    processor = HPoolViTImageProcessor()
    expected = processor(photo, return_tensors="pt").pixel_values
    assert torch.equal(processor(f"{server}/photo.png", return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match=r"missing.png' cannot be used: .*404"):
        processor(f"{server}/missing.png")
    with pytest.raises(ValueError, match="cannot be used"):
        processor("http://127.0.0.1:9/photo.png")
    monkeypatch.setattr(image_processing_hpool_vit, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(ValueError, match=r"photo.png' cannot be used: too large: more than 1000 bytes"):
        processor(f"{server}/photo.png")


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_file_is_turned_upright_and_an_opened_image_is_taken_as_it_is(cls, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = tmp_path / "turned.png"
    photo.rotate(90, expand=True).save(path, exif=exif)
    processor = cls()
    upright = processor(photo, return_tensors="pt").pixel_values
    assert torch.equal(processor(str(path), return_tensors="pt").pixel_values, upright)
    assert not torch.equal(processor(Image.open(path), return_tensors="pt").pixel_values, upright)


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((40, 40), -1000, np.int16), "from -1000 to -1000 in type torch.int16"),
        (np.full((40, 40), 70_000, np.int32), "from 70000 to 70000 in type torch.int32"),
        (np.full((40, 40), 1e6, np.float32), r"from 1e\+06 to 1e\+06 in type torch.float32"),
        (np.full((40, 40, 3), -0.5, np.float64), "from -0.5 to -0.5 in type torch.float64"),
        # Neither of the range [0, 1], which resizing has left a little, nor surely of 8 bits.
        (np.full((40, 40), 1.002, np.float32), r"from 1.002 to 1.002 in type torch.float32"),
        (np.full((40, 40), 70_000, np.uint32), "from 70000 to 70000 in type torch.uint32"),
        (np.full((40, 40), np.nan, np.float32), "from nan to nan"),
        (Image.fromarray(np.full((40, 40), 300.0, np.float32)), "from 300 to 300 in mode 'F'"),
        (Image.fromarray(np.full((40, 40), -7, np.int32)), "from -7 to -7 in mode 'I'"),
    ],
    ids=["negative", "32 bits", "large float", "negative float", "1.002", "uint32", "nan", "mode F", "mode I"],
)
def test_values_of_an_unknown_scale_are_refused_with_their_range(cls, pixels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cls()(pixels)
    if isinstance(pixels, Image.Image):
        pixels.save(tmp_path / "odd.tif")
        with pytest.raises(ValueError, match=f"odd.tif' cannot be used: .*{message}"):
            cls()(str(tmp_path / "odd.tif"))


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.float16, np.float32, np.float64])
def test_white_is_white_in_every_type(cls, dtype):
    white = {np.uint8: 255, np.uint16: 65535, np.uint32: 2**32 - 1, np.int64: 65535}.get(dtype, 1.0)
    pixels = np.full((60, 40), white, dtype)
    pixels[:30] = 0
    expected = cls()(np.where(pixels > 0, 255, 0).astype(np.uint8), return_tensors="pt").pixel_values
    assert torch.equal(cls()(pixels, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("cls", BACKENDS)
def test_floating_point_that_is_prepared_stays_as_it_is(cls):
    pixels = torch.randn(3, 40, 40)
    options = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    assert torch.equal(cls()(pixels, return_tensors="pt", **options).pixel_values[0], pixels)


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("size", [(2, 40_000), (40_000, 2), (10, 650)])
def test_an_image_that_resizing_would_blow_up_is_refused(cls, size, tmp_path):
    image = Image.new("RGB", size)
    image.save(tmp_path / "long.png")
    for source in (image, np.asarray(image), str(tmp_path / "long.png")):
        with pytest.raises(ValueError, match=f"{size[0]} × {size[1]} pixels, and one side may be at most 64 times"):
            cls()(source)
    assert cls()(Image.new("RGB", (10, 640)), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "there is no such file"), (b"text", "unreadable: not an image"), (b"", "unreadable: not an image")],
)
def test_a_file_that_is_not_an_image_is_refused_by_name(cls, content, reason, tmp_path):
    path = tmp_path / "no image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"no image.png' cannot be used: {reason}"):
        cls()(str(path))
