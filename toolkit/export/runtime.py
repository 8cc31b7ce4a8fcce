"""Get onnxruntime-web, which runs a model in a browser: from the npm registry, once, or from a file or folder."""

import base64
import hashlib
import os
import tarfile
import urllib.request
from io import BytesIO
from pathlib import Path

from ..shared.files import written_whole
from .checks import ExportError


VERSION = "1.30.0"
# Of the package, as the registry and `package-lock.json` write it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The part for the CPU alone.
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
NAME = f"onnxruntime-web-{VERSION}.tgz"
REGISTRY = "https://registry.npmjs.org"
MAX_BYTES = 1 << 28
TIMEOUT = 60  # seconds without an answer
REMEDY = f"Where npm works, `npm pack onnxruntime-web@{VERSION}` gets the file: pass it as `runtime`."


def read_runtime(source: str | Path | None = None) -> dict[str, bytes]:
    """
    The files of onnxruntime-web that a page needs.

    Args:
        source: the package as `npm pack` gets it, or a folder with the files, in which the version is not checked. By
            default the package comes from the cache, or from the npm registry (`NPM_CONFIG_REGISTRY`).

    Raises:
        ExportError: if the files cannot be had, or are not those of `VERSION`.
    """
    if source is not None and Path(source).is_dir():
        return read_folder(Path(source))
    archive = fetch() if source is None else read_archive(Path(source))
    with tarfile.open(fileobj=BytesIO(archive)) as package:
        # What has the right sum has these files.
        return {name: package.extractfile(f"package/dist/{name}").read() for name in FILES}


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files in a folder, or in the places in which npm and a package have them."""
    for place in ("", "dist", "package/dist", "node_modules/onnxruntime-web/dist"):
        files = [folder / place / name for name in FILES]
        if all(file.is_file() for file in files):
            return {file.name: file.read_bytes() for file in files}
    raise ExportError(f"`runtime={folder}` does not have {' and '.join(FILES)}. {REMEDY}")


def read_archive(file: Path) -> bytes:
    if not file.is_file():
        raise ExportError(f"`runtime={file}` is neither a file nor a folder. {REMEDY}")
    archive = file.read_bytes()
    if not is_whole(archive):
        raise ExportError(f"`runtime={file}` is not the package onnxruntime-web {VERSION}, or is damaged. {REMEDY}")
    return archive


def fetch() -> bytes:
    """The package from the cache. If it is not there, it is downloaded first."""
    cached = cache_folder() / NAME
    if cached.is_file() and is_whole(archive := cached.read_bytes()):
        return archive
    archive = download()
    cached.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(cached) as part:
        part.write_bytes(archive)
    return archive


def download() -> bytes:
    # npm takes its settings in small letters and in capitals.
    names = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
    registry = next(filter(None, map(os.environ.get, names)), REGISTRY)
    url = f"{registry.rstrip('/')}/onnxruntime-web/-/{NAME}"
    if not url.startswith(("http://", "https://")):
        raise ExportError(f"The npm registry {registry} is not a web address. {REMEDY}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            archive = response.read(MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ExportError(f"{url} cannot be downloaded: {getattr(error, 'reason', error)}. {REMEDY}") from error
    if not is_whole(archive):
        raise ExportError(f"{url} is not the package that was expected: its checksum is another. {REMEDY}")
    return archive


def is_whole(archive: bytes) -> bool:
    return "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode() == INTEGRITY


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpool_vit"


if __name__ == "__main__":
    read_runtime()
    print(cache_folder() / NAME)
