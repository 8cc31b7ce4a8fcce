"""
Fetches the tests that Transformers runs on its own models, of the version that is installed, from the source
distribution on the package index, into `.cache/transformers-tests-VERSION`. Does nothing if they are there.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


VERSION = importlib.metadata.version("transformers")
SUITES = Path(__file__).parents[2] / ".cache" / f"transformers-tests-{VERSION}"


def fetch(folder: Path = SUITES):
    """Downloads the tests into `folder`, which exists only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        download(Path(work))
        (archive,) = Path(work).glob("transformers-*.tar.gz")
        unpack_tests(archive, Path(work))
        os.replace(Path(work, "tests"), folder)


def download(work: Path):
    # With its build isolated, so that nothing beyond pip needs to be installed: pip reads the metadata of a source
    # distribution by running its build backend.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", "transformers", "--dest", str(work), f"transformers=={VERSION}"]
    status = subprocess.run(command).returncode
    if status != 0:
        raise SystemExit(
            f"pip could not download the source distribution of transformers {VERSION}: check the connection, and "
            "that the installed version is one of the package index."
        )


def unpack_tests(archive: Path, work: Path):
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as source:
        members = [member for member in source if member.name.startswith(f"{root}/tests/") and member.isfile()]
        source.extractall(work, members=members, filter="data")
    os.replace(work / root / "tests", work / "tests")


if __name__ == "__main__":
    if not SUITES.exists():
        fetch()
    print(f"The tests of transformers {VERSION} are in {SUITES}.")
