import io

import numpy as np
import pytest
import torch
from helpers import tiny_config
from PIL import Image

from hpool_vit import HPoolViTConfig, HPoolViTImageProcessor, HPoolViTImageProcessorPil


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
