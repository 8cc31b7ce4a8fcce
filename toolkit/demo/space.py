"""The demo page with its models as the repository of a Hugging Face Space."""

import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import hpool_vit

from ..shared.files import check_output_dir, folder_written_whole
from .files import DIGIT_LABELS, find_examples
from .models import CHECKPOINT_PREFIX, load_models


PACKAGE = Path(hpool_vit.__file__).parent
SPACE_FILES = Path(__file__).with_name("space_files")


def make_space(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    examples_dir: str | Path | None = None,
    skip_bad: bool = False,
) -> None:
    """
    Writes a Space that is complete and ready to upload. It runs without this package being installed.

    Args:
        models: folders of saved models. What lies there besides the model and its image processor is left behind.
        output_dir: a folder that does not exist yet, or is empty. It is written completely or not at all.
        examples_dir: images, of which those that the page would offer are copied.
        skip_bad: report a model that the page could not show on standard error, and leave it out.

    Raises:
        ValueError: if the page could not show a model or the images. With `skip_bad`, if it could show no model.
    """
    check_output_dir(output_dir)
    loaded = load_models(list(map(Path, models)), skip_bad, device="cpu")
    # Two names of one folder, such as a link to the latest run, are one model.
    served = {model.folder.resolve(): model for model in loaded.values()}
    names = name_copies(list(served))
    with folder_written_whole(output_dir) as space:
        shutil.copytree(SPACE_FILES, space, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        # The page is tested with the version of Gradio that is installed here.
        card = (space / "README.md").read_text(encoding="utf-8")
        card = re.sub(r"(?m)^sdk_version: .*$", f"sdk_version: {version('gradio')}", card)
        (space / "README.md").write_text(card, encoding="utf-8")
        copy_package(space / "hpool_vit")
        for name, model in zip(names, served.values(), strict=True):
            # Saving again instead of copying takes every kind of file that loads, and leaves everything else behind.
            model.model.save_pretrained(space / "models" / name)
            model.image_processor.save_pretrained(space / "models" / name)
        if any(model.labels != DIGIT_LABELS for model in served.values()) and examples_dir is not None:
            photos = [Path(file) for file, _ in find_examples([], Path(examples_dir), scratch=space)]
            copy_files(photos, space / "photos")


def name_copies(folders: Sequence[Path]) -> list[str]:
    """
    What each of the absolute `folders` is called in the Space: its own name, after those of as many parents as tell it
    apart from the others. A checkpoint gets a parent's name in any case, because the page leaves out checkpoints.

    Raises:
        ValueError: if not even the whole path makes such a name.
    """
    endings = [["-".join(folder.parts[-length:]) for length in range(1, len(folder.parts))] for folder in folders]
    names = []
    for index, folder in enumerate(folders):
        taken = {ending for other in endings[:index] + endings[index + 1 :] for ending in other}
        free = [name for name in endings[index] if name not in taken and not name.startswith(CHECKPOINT_PREFIX)]
        if not free:
            raise ValueError(f"{folder} would have the name of a checkpoint or of another model: rename the folder.")
        names.append(free[0])
    return names


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
