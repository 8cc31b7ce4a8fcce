"""The wheel and the source distribution: what is in them, and that each works where nothing of the checkout is."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import CODE, ROOT, TESTS, TOOLKIT
from image_files import write_folder
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import hpool_vit
from hpool_vit.toolkit.command import COMMANDS


# Builds take half a minute, and so does each command in a new process.
pytestmark = pytest.mark.slow
MODULES = CODE | {"__init__.py", "py.typed"}
DATA = {
    path.relative_to(ROOT).as_posix()
    for path in TOOLKIT.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
# The licence is also copied into repositories and Spaces.
FILES = MODULES | DATA | {"LICENSE"}
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


def test_the_wheel_has_the_core_and_the_toolkit_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
        metadata = f"hpool_vit-{hpool_vit.__version__}.dist-info"
        description = wheel.read(f"{metadata}/METADATA").decode()
    files = {name for name in names if not name.startswith(metadata)}
    assert files == {f"hpool_vit/{name}" for name in FILES}
    assert f"{metadata}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in description
    assert (ROOT / "README.md").read_text(encoding="utf-8") in description


def test_the_source_distribution_has_what_builds_and_explains_the_package(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    assert names >= FILES | documents | {"setup.py", "pyproject.toml"}
    assert not {name.partition("/")[0] for name in names} & {"tests", "examples", "docs"}


class Environment:
    """
    A new virtual environment in which everything that is installed here can be imported except this package: torch
    alone would be gigabytes to install. A `.pth` file appends this environment's folder to the path, and Python does
    not follow the `.pth` files in there, one of which leads to the checkout.
    """

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        new = subprocess.run([self.bin / "python", "-c", ask], capture_output=True, text=True, check=True)
        Path(new.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.variables["OMP_NUM_THREADS"] = "1"

    def install(self, distribution: Path):
        """Downloads nothing, and ignores what is installed: the metadata of the checkout's own package is visible."""
        command = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--no-index", "--no-deps"]
        command += ["--no-build-isolation", "--ignore-installed", distribution]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    def run(self, program: str, *args, cwd: Path) -> subprocess.CompletedProcess:
        command = [self.bin / program, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=self.variables)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works_in_an_environment_of_its_own(kind, distributions, tmp_path):
    environment = Environment(tmp_path / "venv")
    missing = environment.run("python", "-c", "import hpool_vit", cwd=tmp_path)
    assert "No module named 'hpool_vit'" in missing.stderr
    environment.install(distributions[kind])

    program = TESTS / "programs" / "use_installed_package.py"
    result = environment.run("python", program, tmp_path / "model", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert Path(report["file"]).parent.parent == Path(report["site_packages"])
    assert report["version"] == hpool_vit.__version__
    assert report["same_logits"] and report["model"] == "HPoolViTModel"
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == CODE


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The folder of someone who has a ViT and photos, and no checkout."""
    desk = tmp_path_factory.mktemp("desk")
    labels = {"id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **sizes, **labels))
    vit.save_pretrained(desk / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(desk / "vit")
    write_folder(desk / "photos", ("ant", "bee"), per_class=4)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(desk / "photo.jpg")
    return desk


@pytest.fixture(scope="module")
def hpool_vit_command(distributions, tmp_path_factory, desk) -> Callable[..., str]:
    """Runs the command `hpool-vit` that the wheel installed, and returns what it printed."""
    environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
    environment.install(distributions["wheel"])

    def run(*args) -> str:
        result = environment.run("hpool-vit", *args, cwd=desk)
        assert result.returncode == 0, f"hpool-vit {' '.join(map(str, args))}\n{result.stdout}{result.stderr[-3000:]}"
        return result.stdout

    return run


def test_the_installed_command_lists_its_sub_commands(hpool_vit_command):
    overview = hpool_vit_command("--help")
    assert all(re.search(rf"\b{name}\b", overview) for name in COMMANDS)


def test_the_installed_command_converts_draws_classifies_exports_and_trains_outside_the_checkout(
    hpool_vit_command, desk
):
    hpool_vit_command("convert", "vit", "--output_dir", "model", "--hvt_pool", "1,3")
    assert (desk / "model" / "config.json").is_file()
    assert "stage 2" in hpool_vit_command("stats", "model")

    hpool_vit_command("visualize", "model", "photo.jpg", "--output", "pooling.png")
    with Image.open(desk / "pooling.png") as picture:
        picture.verify()

    lines = hpool_vit_command("predict", "model", "photo.jpg", "--output", "answers.jsonl")
    answers = (desk / "answers.jsonl").read_text() if (desk / "answers.jsonl").exists() else lines
    assert "photo.jpg" in answers and ("ant" in answers or "bee" in answers)

    hpool_vit_command("export", "model", "--output_dir", "exported")
    assert list((desk / "exported").glob("*.onnx")) and (desk / "exported" / "predict_onnx.py").is_file()

    flags = ["--train_dir", "photos", "--validation_share", "0.25", "--model_name_or_path", "model"]
    flags += ["--output_dir", "trained", "--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu"]
    hpool_vit_command("train", *flags, "--report_to", "none")
    assert (desk / "trained" / "model.safetensors").is_file()

    hpool_vit_command("demo", "trained", "--output_dir", "space")
    assert (desk / "space" / "app.py").is_file()
