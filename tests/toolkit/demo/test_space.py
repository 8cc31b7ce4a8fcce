"""`examples/make_space.py`: a folder that is a whole Space."""

import re
import sys
from importlib.metadata import version

import pytest
import yaml
from helpers import run_python
from image_files import write_folder

from hpool_vit.toolkit.demo import app
from hpool_vit.toolkit.demo.space import local_modules, main


@pytest.fixture(scope="module")
def space(saved_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    write_folder(folder / "photos", classes=("ant",))
    arguments = ["--model_name_or_path", saved_folder, "--examples_dir", folder / "photos" / "ant"]
    main(list(map(str, [*arguments, "--output_dir", folder / "space"])))
    return folder / "space"


def test_the_space_has_what_the_hub_asks_for(space):
    card = (space / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["sdk"] == "gradio" and metadata["sdk_version"] == version("gradio")
    assert metadata["app_file"] == "app.py" and (space / "app.py").is_file()
    assert tuple(map(int, metadata["python_version"].split("."))) >= (3, 11)
    assert len(metadata["short_description"]) <= 60


def test_the_requirements_name_all_that_the_page_imports(space):
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "transformers", "huggingface_hub": "transformers"}
    names |= {"safetensors": "transformers", "numpy": "matplotlib", "gradio": "gradio", "hpool_vit": "gradio"}
    required = set(re.findall(r"(?m)^[a-z-]+", (space / "requirements.txt").read_text())) | {"gradio"}
    sources = "\n".join(file.read_text() for file in [*space.glob("*.py"), *(space / "hpool_vit").glob("*.py")])
    imported = set(re.findall(r"(?m)^\s*(?:from|import) (\w+)", sources))
    imported -= {*sys.stdlib_module_names, *(file.stem for file in space.glob("*.py"))}
    assert {"torch", "gradio", "PIL"} <= imported
    assert {names.get(name, name) for name in imported} <= required


def test_the_page_runs_with_nothing_but_the_space(space):
    program = "import app, app_inference, hpool_vit; print(app.__file__, hpool_vit.__file__)"
    program += "; print(list(app_inference.load_models(app_inference.find_models(app.HERE / 'models'))))"
    printed = run_python("-c", program, cwd=space).stdout
    assert f"{space}/app.py {space}/hpool_vit/__init__.py" in printed and "['tiny-hpool-vit']" in printed
    assert len(list((space / "photos").iterdir())) == 8


def test_every_module_of_the_page_goes_along(space):
    assert {file.name for file in local_modules(app.HERE / "app.py")} <= {file.name for file in space.iterdir()}


def test_a_folder_in_the_way_and_a_model_that_cannot_be_shown_are_refused(space, saved_folder, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* exists and is not empty"):
        main(["--model_name_or_path", str(saved_folder), "--output_dir", str(space)])
    with pytest.raises(SystemExit, match=r"error: .* is no folder of a saved HPool-ViT"):
        main(["--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
