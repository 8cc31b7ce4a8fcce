"""
Writes the demo page with its models as the repository of a Hugging Face Space, complete and ready to be uploaded.

    python examples/make_space.py --model_name_or_path DIR [DIR …] --examples_dir photos --output_dir outputs/space
    python outputs/space/app.py                                             # as it will look
    hf upload NAME/hpool-vit outputs/space --repo-type space                # when you have looked at it
"""

import argparse
import re
import shutil
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

import hpool_vit

from ..shared.console import run
from ..shared.files import check_output_dir, folder_written_whole
from .files import DIGIT_LABELS, find_examples
from .models import load_models


HERE = Path(__file__).resolve().parent
MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


def local_modules(program: Path) -> list[Path]:
    """The program and the modules beside it that it imports, directly or not."""
    finder = ModuleFinder([str(program.parent)])
    finder.run_script(str(program))
    return sorted(Path(module.__file__) for module in finder.modules.values() if module.__file__)


def make_space(folders: list[Path], examples_dir: Path | None, output_dir: Path):
    """
    Args:
        folders: saved folders; only what is needed to load them is copied.
        examples_dir: images, of which those that the page would offer are copied.
        output_dir: a folder that does not exist yet, or is empty; it appears complete or not at all.

    Raises:
        ValueError: for a folder or images that the page could not show.
    """
    check_output_dir(output_dir)
    models = load_models(folders)
    with folder_written_whole(output_dir) as space:
        shutil.copytree(HERE / "space", space, dirs_exist_ok=True)
        # The page is tested with the Gradio that is installed here.
        card = (space / "README.md").read_text(encoding="utf-8")
        card = re.sub(r"(?m)^sdk_version: .*$", f"sdk_version: {version('gradio')}", card)
        (space / "README.md").write_text(card, encoding="utf-8")
        copy_files(local_modules(HERE / "app.py"), space)
        package = Path(hpool_vit.__file__).parent
        copy_files([package / "__init__.py", *package.glob("*_hpool_vit.py")], space / "hpool_vit")
        for folder in folders:
            files = [file for pattern in MODEL_FILES for file in folder.glob(pattern)]
            copy_files(files, space / "models" / folder.resolve().name)
        if any(model.labels != DIGIT_LABELS for model in models.values()) and examples_dir:
            photos = [Path(file) for file, _ in find_examples([], examples_dir, scratch=space)]
            copy_files(photos, space / "photos")


def copy_files(files: list[Path], folder: Path):
    folder.mkdir(exist_ok=True, parents=True)
    for file in files:
        target = folder / file.name
        if target.exists():
            raise ValueError(f"{file} and another file would both become {target.name}: rename one of them.")
        shutil.copy(file, target)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", type=Path, nargs="+", required=True, metavar="DIR", help="folders of saved models"
    )
    parser.add_argument("--examples_dir", type=Path, help="images to offer; models of handwritten digits have digits")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet, or is empty")
    args = parser.parse_args(argv)
    run(lambda: make_space(args.model_name_or_path, args.examples_dir, args.output_dir))
    print(f"The Space is in {args.output_dir}. See it with: python {args.output_dir / 'app.py'}")


if __name__ == "__main__":
    main()
