"""Find the images that names stand for (files, folders, web addresses), and read them one by one."""

import os
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from PIL import Image

from ..shared.console import needs
from ..shared.folders import list_images
from ..shared.images import BadImageError, check_size, decode_image


with needs("predict"):
    import requests
    import urllib3


USER_AGENT = {"User-Agent": "hpool-vit-predict"}


def is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def read_names(stream: IO[bytes]) -> list[str]:
    """Names, one per line, or separated by zero bytes as `find -print0` writes them. They need not be UTF-8."""
    content = stream.read()
    separator = b"\0" if b"\0" in content else b"\n"
    return [os.fsdecode(name) for line in content.split(separator) if (name := line.rstrip(b"\r\n"))]


def list_inputs(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files among `names`, and notes. `-` reads more names from standard input."""
    expanded = []
    for name in [names] if isinstance(names, str) else map(os.fspath, names):
        expanded += read_names(sys.stdin.buffer) if name == "-" else [name]
    return list_files(expanded)


def list_files(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """
    Lists files and addresses as they are, and folders by the image files in them, see [`list_images`].

    Returns:
        The files in the order of `names`, each real file once at its first place, and notes on what was left out. A
        folder that has no images or cannot be read stays in the list, so that it is reported as a bad file.
    """
    found: dict[str, str] = {}
    notes, again = [], 0
    for name in names:
        is_folder = not is_address(name) and os.path.isdir(name)
        files, folder_notes = list_folder(name) if is_folder else ([name], [])
        notes += folder_notes
        for file in files:
            key = file if is_address(file) else os.path.realpath(file)
            again += key in found
            found.setdefault(key, file)
    if again:
        notes.append(f"{again} of the files were named again; each is classified once.")
    return list(found.values()), [f"note: {note}" for note in notes]


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """The image files in a folder, or the folder itself if it has none, and notes on what was left out."""
    listing = list_images(folder)
    unreadable = list(listing.unreadable)
    listing.unreadable.clear()  # these are reported as bad files
    return (listing.files or [folder] * (not unreadable)) + unreadable, listing.notes()


def read_bytes(name: str, timeout: float) -> bytes:
    """
    Reads a file or downloads from an address.

    Args:
        name: a path, or an address that begins with `http://` or `https://`.
        timeout: seconds until an address must have sent everything.

    Raises:
        BadImageError: if there is nothing to read, or more than `images.MAX_BYTES`.
    """
    if is_address(name):
        return download(name, timeout)
    if "://" in name and not os.path.exists(name):
        raise BadImageError("unreadable: only addresses that begin with http:// or https:// can be read")
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            os.listdir(name)
            raise BadImageError("unreadable: a folder without images")
        # A device or a pipe may never end.
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("unreadable: not a regular file")
        check_size(status.st_size)
        return Path(name).read_bytes()
    except OSError as error:
        raise BadImageError(f"unreadable: {error.strerror or error}") from error


def download(address: str, timeout: float) -> bytes:
    end = time.monotonic() + timeout
    parts, size = [], 0
    try:
        with requests.get(address, timeout=timeout, stream=True, headers=USER_AGENT) as response:
            if response.status_code != 200:
                raise BadImageError(f"unreadable: HTTP {response.status_code} {response.reason or ''}".rstrip())
            # Returns what has arrived so far, because a server may send one byte per second.
            while part := response.raw.read1(1 << 16, decode_content=True):
                parts.append(part)
                size += len(part)
                check_size(size)
                if time.monotonic() > end:
                    raise BadImageError(f"unreadable: not complete after {timeout:g} s")
            missing = response.raw.length_remaining
    except BadImageError:
        raise
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise BadImageError(f"unreadable: no answer in {timeout:g} s") from error
    # The messages of these errors are for developers.
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise BadImageError(f"unreadable: the download failed ({type(error).__name__})") from error
    if missing:
        raise BadImageError(f"truncated: {missing} bytes are missing")
    return b"".join(parts)


def read_image(name: str, timeout: float) -> tuple[Image.Image, str | None]:
    """
    Reads and decodes an image.

    Returns:
        The upright RGB image, and a note if it was converted.

    Raises:
        BadImageError: with the reason, if it cannot be classified.
    """
    return decode_image(read_bytes(name, timeout))
