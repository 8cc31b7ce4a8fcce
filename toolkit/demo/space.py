"""The demo page with its models as the repository of a Hugging Face Space."""

import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import hpool_vit

from ..shared.files import check_output_dir, folder_written_whole
from .files import DIGIT_LABELS, find_examples
from .models import load_models


PACKAGE = Path(hpool_vit.__file__).parent
SPACE_FILES = Path(__file__).with_name("space_files")
MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


def make_space(
    models: Sequence[str | Path], output_dir: str | Path, *, examples_dir: str | Path | None = None
) -> None:
    """
    Writes a Space that is complete and ready to upload. It runs without this package being installed.

    Args:
        models: folders of saved models. Only the files that loading needs are copied.
        output_dir: a folder that does not exist yet, or is empty. It is written completely or not at all.
        examples_dir: images, of which those that the page would offer are copied.

    Raises:
        ValueError: if the page could not show a model or the images.
    """
    check_output_dir(output_dir)
    folders = list(map(Path, models))
    loaded = load_models(folders)
    with folder_written_whole(output_dir) as space:
        shutil.copytree(SPACE_FILES, space, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        # The page is tested with the version of Gradio that is installed here.
        card = (space / "README.md").read_text(encoding="utf-8")
        card = re.sub(r"(?m)^sdk_version: .*$", f"sdk_version: {version('gradio')}", card)
        (space / "README.md").write_text(card, encoding="utf-8")
        copy_package(space / "hpool_vit")
        for folder in folders:
            files = [file for pattern in MODEL_FILES for file in folder.glob(pattern)]
            copy_files(files, space / "models" / folder.resolve().name)
        if any(model.labels != DIGIT_LABELS for model in loaded.values()) and examples_dir is not None:
            photos = [Path(file) for file, _ in find_examples([], Path(examples_dir), scratch=space)]
            copy_files(photos, space / "photos")


def copy_package(folder: Path):
    """Copies this package. In a checkout, its folder holds more than the package."""
    copy_files([PACKAGE / "__init__.py", PACKAGE / "LICENSE", *PACKAGE.glob("*_hpool_vit.py")], folder)
    shutil.copytree(PACKAGE / "toolkit", folder / "toolkit", ignore=shutil.ignore_patterns("__pycache__"))


def copy_files(files: Iterable[Path], folder: Path):
    folder.mkdir(exist_ok=True, parents=True)
    for file in files:
        target = folder / file.name
        if target.exists():
            raise ValueError(f"{file} and another file would both become {target.name}: rename one of them.")
        shutil.copy(file, target)
