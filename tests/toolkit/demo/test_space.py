"""`hpool-vit demo --output_dir`: a folder that is a whole Space."""

import re
import sys
from importlib.metadata import version
from modulefinder import ModuleFinder

import pytest
import yaml
from helpers import run_python
from image_files import write_folder

from hpool_vit.toolkit.demo.app import command
from hpool_vit.toolkit.demo.space import make_space


# Runs the page of the Space in this folder, asks for it once, and tells which package and models it used.
RUN_APP = """
import json, runpy, urllib.request
import gradio, hpool_vit

def ask(demo):
    with urllib.request.urlopen(demo.local_url) as page, urllib.request.urlopen(demo.local_url + "config") as config:
        components = json.load(config)["components"]
        models = [part["props"]["choices"] for part in components if part["props"].get("label") == "Model"]
        print("RESULT", json.dumps({"package": hpool_vit.__file__, "status": page.status, "models": models}))

gradio.Blocks.block_thread = ask
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def space(saved_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    write_folder(folder / "photos", classes=("ant",))
    command([saved_folder], examples_dir=folder / "photos" / "ant", output_dir=folder / "space")
    return folder / "space"


def test_the_space_has_what_the_hub_asks_for(space):
    card = (space / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["sdk"] == "gradio" and metadata["sdk_version"] == version("gradio")
    assert metadata["app_file"] == "app.py" and (space / "app.py").is_file()
    assert tuple(map(int, metadata["python_version"].split("."))) >= (3, 11)
    assert len(metadata["short_description"]) <= 60


def test_the_requirements_name_all_packages_that_the_page_imports(space):
    names = {
        "PIL": "pillow",
        "pillow_heif": "pillow-heif",
        "sklearn": "scikit-learn",
        "gradio": "gradio",
        "numpy": "matplotlib",
    }
    names |= dict.fromkeys(("yaml", "huggingface_hub", "safetensors", "typer"), "transformers")
    required = set(re.findall(r"(?m)^[a-z-]+", (space / "requirements.txt").read_text())) | {"gradio"}
    # The Space is all that the finder knows, so every other package counts as missing.
    finder = ModuleFinder([str(space)])
    finder.run_script(str(space / "app.py"))
    imported = {name.partition(".")[0] for name in finder.badmodules} - sys.stdlib_module_names
    imported.remove("hpool_vit")  # names that it defines when they are used
    assert {"torch", "gradio", "PIL"} <= imported
    assert {names.get(name, name) for name in imported} <= required


def test_the_page_runs_with_nothing_but_the_space(space):
    result = run_python("-c", RUN_APP, cwd=space)
    answer = yaml.safe_load(result.stdout.partition("RESULT")[2])
    assert answer["status"] == 200 and answer["package"] == f"{space}/hpool_vit/__init__.py"
    assert answer["models"] == [[["tiny-hpool-vit", "tiny-hpool-vit"]]]
    assert len(list((space / "photos").iterdir())) == 8


def test_the_space_holds_the_package_and_its_license_but_no_other_files_of_the_checkout(space):
    names = {path.name for path in (space / "hpool_vit").iterdir()} - {"__pycache__"}
    assert {"__init__.py", "modeling_hpool_vit.py", "toolkit", "LICENSE"} <= names
    assert not names & {"setup.py", "tests", "docs", "examples", ".git"}


def test_a_folder_in_the_way_and_a_model_that_cannot_be_shown_are_refused(space, saved_folder, tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"):
        make_space([saved_folder], space)
    with pytest.raises(ValueError, match="is not the folder of a saved HPool-ViT"):
        make_space([tmp_path], tmp_path / "new")
    assert not (tmp_path / "new").exists()
