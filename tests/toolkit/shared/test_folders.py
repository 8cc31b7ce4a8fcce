"""Each image in a folder is found once, at its own place, whatever links and systems leave beside it."""

import os
import sys
from pathlib import Path

import pytest
from image_files import encoded, picture, write_folder
from PIL import Image

from hpool_vit.toolkit.shared.folders import as_utf8, list_images
from hpool_vit.toolkit.shared.images import decode_image, readable_endings, register_heif


NAMES = [f"{label}/{number}.png" for label in ("ant", "bee", "cat") for number in range(2)]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six images of three classes."""
    return write_folder(tmp_path / "data" / "photos", per_class=2)


def names(listing) -> list[str]:
    return [os.path.relpath(file, listing.folder) for file in listing.files]


def test_files_come_folder_by_folder_in_order_and_begin_with_the_folder_as_given(photos, monkeypatch):
    (photos / "ant" / "young").mkdir()
    (photos / "ant" / "young" / "LOUD.JPG").touch()
    (photos / "first.png").touch()
    listing = list_images(photos)
    assert names(listing) == ["first.png", *NAMES[:2], "ant/young/LOUD.JPG", *NAMES[2:]] and listing.notes() == []
    monkeypatch.chdir(photos.parent)
    assert list_images("photos/").files[0] == "photos/first.png"
    by_subfolder = list_images("photos/").by_subfolder()
    assert list(by_subfolder) == ["ant", "bee", "cat"]
    assert by_subfolder["ant"] == ["photos/ant/0.png", "photos/ant/1.png", "photos/ant/young/LOUD.JPG"]


def test_links_to_folders_above_are_left_out_and_named(photos):
    (photos / "ant" / "up").symlink_to(photos)
    (photos / "bee" / "top").symlink_to(photos.parent)
    (photos / "all").symlink_to(photos.parent.parent)
    listing = list_images(photos)
    assert names(listing) == NAMES and listing.subfolders == ["ant", "bee", "cat"]
    assert listing.notes() == [
        f"{photos}: 3 links to files that are listed elsewhere were left out: all, ant/up, bee/top"
    ]


def test_a_linked_file_or_folder_keeps_the_place_where_it_lies(photos):
    (photos / "ant" / "0_again.png").symlink_to(photos / "bee" / "0.png")
    (photos / "ant" / "more").symlink_to(photos / "cat")
    (photos / "copy").symlink_to(photos / "ant")
    listing = list_images(photos)
    assert names(listing) == NAMES and listing.subfolders == ["ant", "bee", "cat"]
    assert sorted(listing.links) == [str(photos / name) for name in ("ant/0_again.png", "ant/more", "copy")]


def test_links_to_elsewhere_are_followed_once(photos, tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", ("dog",), per_class=2) / "dog"
    (elsewhere / "back").symlink_to(photos)
    (elsewhere / "round").symlink_to(elsewhere.parent)
    (photos / "dog").symlink_to(elsewhere)
    (photos / "wolf").symlink_to(elsewhere)
    single = tmp_path / "single.png"
    single.write_bytes(encoded(picture()))
    for name in ("ant/a.png", "bee/b.png"):
        (photos / name).symlink_to(single)
    listing = list_images(photos)
    assert names(listing) == [*NAMES[:2], "ant/a.png", *NAMES[2:], "dog/0.png", "dog/1.png"]
    assert listing.subfolders == ["ant", "bee", "cat", "dog"]


def test_a_folder_that_holds_itself_in_many_ways_is_read_in_an_instant(photos):
    for label in ("ant", "bee", "cat"):
        for number in range(5):
            (photos / label / f"link{number}").symlink_to(photos.parent)
            (photos / label / f"more{number}").symlink_to(photos / "ant")
    assert names(list_images(photos)) == NAMES


def test_a_link_that_leads_nowhere_is_listed_so_that_somebody_reports_it(photos):
    (photos / "ant" / "lost.png").symlink_to("gone.png")
    (photos / "ant" / "self.png").symlink_to("self.png")
    assert names(list_images(photos))[2:4] == ["ant/lost.png", "ant/self.png"]


@pytest.mark.parametrize(
    "name",
    ["__MACOSX/0.png", ".AppleDouble/0.png", "@eaDir/0.png", ".git/0.png", "ant/._0.png", "ant/@eaDir/0.png/SYNO.jpg",
     "ant/.DS_Store", "ant/Thumbs.db", "ant/desktop.ini", "System Volume Information/0.png", "#recycle/0.png",
     "lost+found/0.png", ".ipynb_checkpoints/0-checkpoint.png"],
)  # fmt: skip
def test_what_systems_leave_is_neither_class_nor_image_nor_worth_a_note(name, photos):
    (photos / name).parent.mkdir(parents=True, exist_ok=True)
    (photos / name).write_bytes(encoded(picture()))
    listing = list_images(photos)
    assert names(listing) == NAMES and listing.subfolders == ["ant", "bee", "cat"] and listing.notes() == []


def test_other_endings_are_counted_and_named(photos):
    for number in range(20):
        (photos / "ant" / f"{number}.XYZ").touch()
    note = f"{photos}: 20 files with other endings were left out: .xyz"
    assert list_images(photos).notes() == [note]
    (photos / "README").touch()
    (photos / "ant" / "film.mpg").touch()
    assert list_images(photos).notes() == [
        f"{photos}: 22 files with other endings were left out: .xyz (20), no ending (1), .mpg (1)"
    ]


def test_a_pipe_is_left_out_because_reading_it_would_never_end(photos):
    os.mkfifo(photos / "ant" / "pipe.png")
    (photos / "bee" / "linked.png").symlink_to(photos / "ant" / "pipe.png")
    os.mkfifo(photos.parent / "pipe.png")
    (photos / "bee" / "pipe.png").symlink_to(photos.parent / "pipe.png")
    listing = list_images(photos)
    assert names(listing) == NAMES
    assert "ant/pipe.png" in "".join(listing.notes()) and "bee/pipe.png" in "".join(listing.notes())


def test_names_that_are_not_utf8_are_listed_and_shown_escaped(photos):
    folder = os.fsencode(photos) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"/\xe4.png", b"/\xe4.xyz"):
        with open(folder + name, "wb") as file:
            file.write(encoded(picture()))
    (photos / "bee" / "ü.png").touch()
    listing = list_images(photos)
    assert os.fsencode(listing.files[-3]) == folder + b"/\xe4.png"
    assert as_utf8(listing.files[-3]) == f"{photos}/caf\\xe9/\\xe4.png" and as_utf8("ü\n") == "ü\n"
    os.symlink(os.fsencode(photos), folder + b"/\xf6")
    assert (
        f"{photos}: 1 link to files that are listed elsewhere was left out: caf\\xe9/\\xf6"
        in list_images(photos).notes()
    )


def test_a_folder_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    listing = list_images(tmp_path / "no" / "where")
    assert listing.files == [] and listing.notes() == [
        f"{tmp_path}/no/where: {tmp_path}/no/where cannot be read: No such file or directory"
    ]


def test_avif_is_read_where_pillow_can_and_heic_where_its_package_is_installed(photos, monkeypatch):
    assert (".avif" in readable_endings()) == ("AVIF" in Image.SAVE)
    if "AVIF" in Image.SAVE:
        (photos / "ant" / "2.avif").write_bytes(encoded(picture(), "AVIF"))
        assert names(list_images(photos))[2] == "ant/2.avif"
        image, _ = decode_image((photos / "ant" / "2.avif").read_bytes())
        assert (image.mode, image.size) == ("RGB", (24, 20))

    class FakePackage:
        """Registers the ending, as the package does."""

        @staticmethod
        def register_heif_opener():
            monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")

    (photos / "ant" / "photo.HEIC").write_bytes(encoded(picture()))
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    register_heif()
    assert list_images(photos).notes() == [f"{photos}: 1 file with other endings was left out: .heic"]
    monkeypatch.setitem(sys.modules, "pillow_heif", FakePackage)
    register_heif()
    assert "ant/photo.HEIC" in names(list_images(photos)) and list_images(photos).notes() == []
