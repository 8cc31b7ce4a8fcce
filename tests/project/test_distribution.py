"""The wheel and the source distribution: what is in them, and that each works where nothing of the checkout is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import CODE, TESTS

import hpool_vit


ROOT = TESTS.parent
MODULES = CODE | {"__init__.py", "py.typed"}
NOT_PUBLISHED = ("__pycache__", "*.egg-info", "build", "dist", "outputs", "site", ".*")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """What `python -m build` makes of a copy of the checkout, as one without a `build` folder would be."""
    folder = tmp_path_factory.mktemp("distribution")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
    # Without isolation, for which setuptools would be downloaded.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (wheel,) = (folder / "dist").glob("*.whl")
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": archive}


def test_both_are_named_by_the_version_of_the_package(distributions):
    name = f"hpool_vit-{hpool_vit.__version__}"
    assert distributions["wheel"].name == f"{name}-py3-none-any.whl"
    assert distributions["sdist"].name == f"{name}.tar.gz"


def test_the_wheel_has_the_modules_of_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
        metadata = f"hpool_vit-{hpool_vit.__version__}.dist-info"
        description = wheel.read(f"{metadata}/METADATA").decode()
    files = {name for name in names if not name.startswith(metadata)}
    assert files == {f"hpool_vit/{name}" for name in MODULES}
    assert f"{metadata}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in description
    assert (ROOT / "README.md").read_text(encoding="utf-8") in description


def test_the_source_distribution_has_what_builds_and_explains_the_package(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    assert names >= MODULES | documents | {"setup.py", "pyproject.toml"}
    assert not {name.partition("/")[0] for name in names} & {"tests", "examples", "docs"}


@pytest.fixture
def environment(tmp_path) -> Path:
    """
    The Python of a new virtual environment in which all that is installed here can be imported, except this package:
    torch alone would be gigabytes to install. A `.pth` file appends this environment's folder to the path, and Python
    does not follow the `.pth` files in there, of which one leads to the checkout.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    new = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    Path(new, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    missing = subprocess.run([python, "-c", "import hpool_vit"], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'hpool_vit'" in missing.stderr
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works_in_an_environment_of_its_own(kind, distributions, environment, tmp_path):
    # Nothing is downloaded. What is installed is ignored, because the metadata of the checkout's own is visible.
    install = [sys.executable, "-m", "pip", "--python", environment, "install", "--no-index", "--no-deps"]
    install += ["--no-build-isolation", "--ignore-installed", distributions[kind]]
    result = subprocess.run(install, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [environment, TESTS / "programs" / "use_installed_package.py", tmp_path / "model"]
    result = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert Path(report["file"]).parent.parent == Path(report["site_packages"])
    assert report["version"] == hpool_vit.__version__
    assert report["same_logits"] and report["model"] == "HPoolViTModel"
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == CODE
