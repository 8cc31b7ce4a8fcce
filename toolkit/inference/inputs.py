"""From names on a command line to images: files, folders and addresses are listed, and then read one by one."""

import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import requests
import urllib3
from PIL import Image

from ..shared.images import BadImageError, decode_image


MAX_BYTES = 1 << 30
# The model sees the short side enlarged to its own size: a line of a million pixels would become an enormous image.
MAX_ASPECT_RATIO = 100
USER_AGENT = {"User-Agent": "hpool-vit-predict"}


def is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def read_names(stream: IO[bytes]) -> list[str]:
    """Names, one a line, or between zero bytes as `find -print0` writes them. Names that are no UTF-8 are kept."""
    content = stream.read()
    separator = b"\0" if b"\0" in content else b"\n"
    return [os.fsdecode(name) for line in content.split(separator) if (name := line.rstrip(b"\r\n"))]


def list_files(names: Iterable[str]) -> tuple[list[str], int]:
    """
    The files and addresses among `names`, and the image files in the folders among them, at any depth. Of a folder,
    hidden files and other endings than those of images are left out; links are followed.

    Returns:
        Each file once, at its first place, in the order of `names`, a folder's sorted; and how many were named again.
        A folder without images, or one that cannot be read, stands for itself, so that it is reported as a bad file.
    """
    found: dict[str, str] = {}
    again = 0
    for name in names:
        for file in list_folder(name) if not is_address(name) and os.path.isdir(name) else [name]:
            key = file if is_address(file) else os.path.abspath(file)
            again += key in found
            found.setdefault(key, file)
    return list(found.values()), again


def list_folder(folder: str) -> list[str]:
    Image.init()
    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    files, unreadable, seen = [], [], set()
    for path, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: unreadable.append(error)):
        status = os.stat(path)
        # A link to a folder above would be followed for ever.
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith("."))
        files += [os.path.join(path, name) for name in shown if os.path.splitext(name)[1].lower() in endings]
    return (files or [folder] * (not unreadable)) + [error.filename for error in unreadable]


def read_bytes(name: str, timeout: float) -> bytes:
    """
    The content of a file or an address.

    Args:
        name: a path, or an address that begins with `http://` or `https://`.
        timeout: seconds until an address must have given all of it.

    Raises:
        BadImageError: if there is none, or more than `MAX_BYTES`.
    """
    if is_address(name):
        return download(name, timeout)
    if "://" in name and not os.path.exists(name):
        raise BadImageError("unreadable: of addresses, only http:// and https:// are read")
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            os.listdir(name)
            raise BadImageError("unreadable: a folder without images")
        # A device or a pipe may never end.
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("unreadable: no regular file")
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
            # What has come so far each time: a server may send a byte a second.
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
    # The texts of these errors are for developers.
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise BadImageError(f"unreadable: the address gives nothing ({type(error).__name__})") from error
    if missing:
        raise BadImageError(f"truncated: {missing} bytes did not come")
    return b"".join(parts)


def check_size(size: int):
    if size > MAX_BYTES:
        raise BadImageError(f"too large: more than {MAX_BYTES >> 20} MiB")


def read_image(name: str, timeout: float) -> tuple[Image.Image, str | None]:
    """
    The image as [`image_decoding.decode_image`] gives it, upright and RGB, and its note.

    Raises:
        BadImageError: for whatever cannot be classified, with the reason.
    """
    image, note = decode_image(read_bytes(name, timeout))
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise BadImageError(f"too narrow: {image.width} × {image.height} pixels")
    return image, note
