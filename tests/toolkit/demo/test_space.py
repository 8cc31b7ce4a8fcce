"""`hpool-vit demo --output_dir`: a folder that is a whole Space."""

import json
import re
import shutil
import sys
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import torch
import yaml
from helpers import call_command, run_python, save_with_processor, tiny_config, tiny_model
from image_files import write_folder
from safetensors.torch import load_file

from hpool_vit import HPoolViTForSemanticSegmentation
from hpool_vit.toolkit.demo.app import command
from hpool_vit.toolkit.demo.models import find_models, load_models
from hpool_vit.toolkit.demo.space import make_space, name_copies


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


def test_the_page_of_the_space_finds_checkpoints_too(saved_folder, tmp_path):
    checkpoints = [shutil.copytree(saved_folder, tmp_path / run / "checkpoint-12") for run in ("one", "two")]
    make_space(checkpoints, tmp_path / "space")
    names = [folder.name for folder in find_models(tmp_path / "space" / "models")]
    assert names == ["one-checkpoint-12", "two-checkpoint-12"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/o/run"], ["run"]),
        (["/o/run", "/o/run/checkpoint-5"], ["run", "run-checkpoint-5"]),
        (["/o/run/checkpoint-5/checkpoint-6"], ["run-checkpoint-5-checkpoint-6"]),
        (["/o/a/model", "/o/b/model", "/o/other"], ["a-model", "b-model", "other"]),
        (["/o/run/checkpoint-5", "/p/run/checkpoint-5"], ["o-run-checkpoint-5", "p-run-checkpoint-5"]),
        (["/o/run/checkpoint-5", "/p/run-checkpoint-5"], ["o-run-checkpoint-5", "p-run-checkpoint-5"]),
    ],
)
def test_models_get_as_much_of_their_paths_as_tells_them_apart(folders, names):
    assert name_copies(list(map(Path, folders))) == names


@pytest.mark.parametrize("folders", [["/checkpoint-5"], ["/a-b/c", "/a/b/c"]])
def test_models_that_nothing_tells_apart_are_refused(folders):
    with pytest.raises(ValueError, match="would have the name of a checkpoint or of another model: rename the folder"):
        name_copies(list(map(Path, folders)))


def test_a_model_with_two_names_is_copied_once(saved_folder, tmp_path):
    (tmp_path / "latest").symlink_to(saved_folder)
    make_space([tmp_path / "latest", saved_folder], tmp_path / "space")
    assert [folder.name for folder in (tmp_path / "space" / "models").iterdir()] == [saved_folder.name]


def test_any_files_that_load_become_a_model_of_the_space(tmp_path):
    folder = save_with_processor(tmp_path / "pickled", tiny_model())
    (folder / "training_args.bin").write_bytes(b"private")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    image_processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image_processor}))
    for name in ("model.safetensors", "preprocessor_config.json"):
        (folder / name).unlink()
    make_space([folder], tmp_path / "space")
    [saved], [served] = (
        load_models([folder]).values(),
        load_models(find_models(tmp_path / "space" / "models")).values(),
    )
    pixel_values = torch.randn(2, 3, 32, 32)
    assert torch.equal(served.classify(pixel_values, 0).probabilities, saved.classify(pixel_values, 0).probabilities)
    assert served.image_processor.to_dict() == saved.image_processor.to_dict()
    assert not list((tmp_path / "space" / "models").rglob("*.bin"))


def test_unusable_models_stop_a_space_only_if_they_were_named(saved_folder, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    shutil.copytree(saved_folder, outputs / "good")
    streets = save_with_processor(outputs / "streets", HPoolViTForSemanticSegmentation(tiny_config(hvt_pool=None)))
    save_with_processor(outputs / "trunk", tiny_model(num_labels=0))
    result = call_command(capsys, "demo", "--models_dir", outputs, "--output_dir", tmp_path / "space")
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    assert result.returncode == 0 and len(skipped) == 2
    assert "streets segments images" in skipped[0] and "trunk has no classes (num_labels is 0)" in skipped[1]
    assert [folder.name for folder in (tmp_path / "space" / "models").iterdir()] == ["good"]
    result = call_command(capsys, "demo", outputs / "good", streets, "--output_dir", tmp_path / "other")
    assert result.returncode == 1 and "streets segments images" in result.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("flag", "value"), [("--server_port", 7861), ("--device", "cpu")])
def test_what_only_a_served_page_uses_is_refused_for_a_space(flag, value, saved_folder, tmp_path, capsys):
    result = call_command(capsys, "demo", saved_folder, flag, value, "--output_dir", tmp_path / "space")
    [line] = result.stderr.splitlines()
    assert result.returncode == 1
    assert line == f"error: {flag} {value} is for serving the page, and --output_dir only writes it: leave it out."
    assert not (tmp_path / "space").exists()
