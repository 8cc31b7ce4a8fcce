"""Every image that can be used becomes RGB; every other one is named with its reason."""

import io
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
from image_files import BAD_FILES, CONVERTED_FILES, encoded, picture

from hpool_vit.toolkit.shared import images
from hpool_vit.toolkit.shared.images import (
    MAX_BYTES,
    BadImageError,
    BadImages,
    TooManyBadImagesError,
    decode_image,
    read_image,
)


def record(name, kind="skipped", reason="truncated"):
    return {"name": name, "kind": kind, "reason": reason}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_is_refused_with_its_reason_and_without_a_warning(name):
    data, reason = BAD_FILES[name]
    with warnings.catch_warnings(), pytest.raises(BadImageError, match=f"^{reason}"):
        warnings.simplefilter("error")
        decode_image(data)


def test_the_limit_of_pixels_is_pillows_own(monkeypatch):
    decode_image(encoded(picture(size=(30, 30))))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 899)
    with pytest.raises(BadImageError, match="900 pixels"):
        decode_image(encoded(picture(size=(30, 30))))


@pytest.mark.parametrize("name", CONVERTED_FILES)
def test_palettes_and_cmyk_become_rgb_and_are_noted(name):
    data, expected = CONVERTED_FILES[name]
    image, note = decode_image(data)
    assert (image.mode, image.size, note) == ("RGB", (24, 20), expected)
    with PIL.Image.open(io.BytesIO(data)) as original:
        assert np.array_equal(np.asarray(image), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA"])
def test_grey_and_transparent_images_become_rgb_without_a_note(mode):
    image, note = decode_image(encoded(picture().convert(mode)))
    assert (image.mode, note) == ("RGB", None)


def test_transparency_becomes_white():
    image, _ = decode_image(encoded(PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_keep_their_brightness():
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    image, note = decode_image(encoded(PIL.Image.fromarray(ramp)))
    assert note is None
    assert np.asarray(image)[..., 1].ravel().tolist() == list(range(256))


def test_an_image_is_turned_as_its_exif_data_say():
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    original = picture(size=(24, 20))
    image, _ = decode_image(encoded(original, exif=exif))
    assert np.array_equal(np.asarray(image), np.asarray(original.transpose(PIL.Image.Transpose.ROTATE_270)))


def test_a_photo_with_a_preview_beside_it_is_not_animated():
    image, _ = decode_image(encoded(picture(), "MPO", save_all=True, append_images=[picture(1)]))
    assert image.size == (24, 20)


def test_a_missing_file_and_a_missing_image_are_bad_images(tmp_path):
    with pytest.raises(BadImageError, match="unreadable: No such file"):
        read_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(BadImageError, match="no image"):
            read_image(nothing)


def test_an_address_that_cannot_be_read_is_a_bad_image_whatever_its_error_is(monkeypatch):
    class ClientResponseError(Exception):
        """What `datasets` raises, which is not an `OSError`."""

    def refuse(path):
        raise ClientResponseError("403,\nmessage='Forbidden'")

    monkeypatch.setattr(images, "open_path", refuse)
    with pytest.raises(BadImageError, match=r"^unreadable: 403, message='Forbidden'$"):
        read_image({"bytes": None, "path": "https://example.org/photo.jpg"})


def test_a_missing_package_is_not_a_bad_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets.utils.file_utils", None)
    with pytest.raises(ImportError, match="is missing"):
        read_image({"bytes": None, "path": "https://example.org/photo.jpg"})


def test_a_file_of_more_than_a_gibibyte_is_refused_unread(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadImageError, match=r"^too large: more than 1024 MiB$"):
        read_image({"bytes": None, "path": str(tmp_path / "large.png")})


def test_bad_images_are_counted_by_file_and_only_skipped_ones_count():
    bad_images = BadImages([record("a"), record("b")])
    bad_images.add([record("a"), record("c", "converted", "CMYK to RGB")])
    bad_images.check(max_bad_images=2)
    with pytest.raises(TooManyBadImagesError, match=r"2 images are bad.*`max_bad_images=1`.*b \(truncated\)"):
        bad_images.check(max_bad_images=1)


def test_bad_images_survive_on_disk_and_are_summed_up(tmp_path):
    bad_images = BadImages([record("ü.jpg"), record("b.png"), record("c.jpg", "converted", "CMYK to RGB")])
    bad_images.write(tmp_path / "bad_images.json")
    again = BadImages.read(tmp_path / "bad_images.json")
    assert again.records == bad_images.records
    assert again.summary().splitlines() == [
        "2 images skipped:",
        "  ü.jpg: truncated",
        "  b.png: truncated",
        "1 image converted:",
        "  c.jpg: CMYK to RGB",
    ]
    assert BadImages().summary().splitlines() == ["0 images skipped", "0 images converted"]
    assert again.summary(max_lines=1).splitlines()[2] == "  … and 1 more"
