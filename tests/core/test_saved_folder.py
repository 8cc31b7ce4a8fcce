"""What a folder made by `save_pretrained` must do for somebody who does not have the package."""

import json

import pytest
import torch
from helpers import CODE, TESTS, run_python, tiny_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

from hpool_vit import (
    HPoolViTConfig,
    HPoolViTForImageClassification,
    HPoolViTImageProcessor,
    HPoolViTImageProcessorPil,
    HPoolViTModel,
)


def use(folder, copy, *hidden: str) -> dict:
    # Code of saved folders is cached beside the models: a home of its own shows what the folder alone can do.
    environment = {"HF_HOME": str(copy.parent / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    program = TESTS / "programs" / "use_saved_folder.py"
    result = run_python(program, folder, copy, hide=("hpool_vit", *hidden), env=environment, cwd=copy.parent)
    return json.loads(result.stdout.split("RESULT ")[1])


@pytest.mark.parametrize("hidden", [(), ("torchvision", "timm")], ids=["with torchvision", "without torchvision"])
def test_a_saved_folder_does_everything_without_the_package_and_so_does_its_copy(saved_folder, tmp_path, hidden):
    first = use(saved_folder, tmp_path / "copy", *hidden)
    second = use(tmp_path / "copy", tmp_path / "copy of copy", *hidden)
    pixel_values = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        expected = HPoolViTForImageClassification.from_pretrained(saved_folder)(pixel_values).logits
    assert first["logits"] == second["logits"] == expected.tolist()
    assert first["weights_that_differ"] == second["weights_that_differ"] == []
    assert first["pooled"] == second["pooled"]
    assert first["processors"]["pil"] == "HPoolViTImageProcessorPil"
    assert first["processors"]["None"] == "HPoolViTImageProcessor" + ("Pil" if hidden else "")
    assert first["processors"] == second["processors"]
    assert first["pixels"]["None"] == pytest.approx(first["pixels"]["pil"], abs=1e-2)
    assert {answer["label"] for answer in first["classes"]} == {"ant", "bee", "cat"}
    assert first["classes"] == second["classes"]
    assert first["feature_shape"] == [1, 15, 32]
    for name in ("copy", "copy of copy"):
        assert {path.name for path in (tmp_path / name).glob("*.py")} == CODE
    assert {path.name for path in (tmp_path / "copy-base").glob("*.py")} == CODE - {"image_processing_hpool_vit.py"}


@pytest.mark.parametrize("cls", [HPoolViTImageProcessor, HPoolViTImageProcessorPil])
def test_an_image_processor_alone_saves_a_complete_folder(cls, tmp_path):
    cls().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "image_processing_hpool_vit.py",
        "configuration_hpool_vit.py",
    }
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"]["AutoImageProcessor"] == {
        "torchvision": "image_processing_hpool_vit.HPoolViTImageProcessor",
        "pil": "image_processing_hpool_vit.HPoolViTImageProcessorPil",
    }


def test_the_folder_names_every_auto_class_whichever_model_was_saved(saved_folder, tmp_path):
    HPoolViTModel.from_pretrained(saved_folder).save_pretrained(tmp_path)
    for folder in (saved_folder, tmp_path):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == {
            "AutoBackbone": "modeling_hpool_vit.HPoolViTBackbone",
            "AutoConfig": "configuration_hpool_vit.HPoolViTConfig",
            "AutoModel": "modeling_hpool_vit.HPoolViTModel",
            "AutoModelForImageClassification": "modeling_hpool_vit.HPoolViTForImageClassification",
            "AutoModelForSemanticSegmentation": "modeling_hpool_vit.HPoolViTForSemanticSegmentation",
        }


def test_with_the_package_imported_nothing_needs_to_be_trusted(saved_folder):
    assert type(AutoConfig.from_pretrained(saved_folder)) is HPoolViTConfig
    assert type(AutoModel.from_pretrained(saved_folder)) is HPoolViTModel
    assert type(AutoModelForImageClassification.from_pretrained(saved_folder)) is HPoolViTForImageClassification
    for backend, cls in ((None, HPoolViTImageProcessor), ("pil", HPoolViTImageProcessorPil)):
        assert type(AutoImageProcessor.from_pretrained(saved_folder, backend=backend)) is cls
    classifier = pipeline("image-classification", model=str(saved_folder))
    assert type(classifier.model) is HPoolViTForImageClassification


def test_a_model_of_either_class_loads_from_the_others_folder(saved_folder, tmp_path, pixel_values):
    classifier = HPoolViTForImageClassification.from_pretrained(saved_folder)
    classifier.hpool_vit.save_pretrained(tmp_path)
    again = HPoolViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.hpool_vit(pixel_values)[0], classifier.hpool_vit(pixel_values)[0])


def test_the_package_may_be_imported_twice_and_after_a_remote_code_load(saved_folder, tmp_path):
    program = tmp_path / "import_late.py"
    program.write_text(
        "import importlib, sys\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "remote = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(remote).__module__.startswith('transformers_modules')\n"
        "import hpool_vit\n"
        "importlib.reload(hpool_vit)\n"
        "local = Auto.from_pretrained(sys.argv[1])\n"
        "assert type(local) is hpool_vit.HPoolViTForImageClassification, type(local)\n"
        "assert type(Auto.from_config(remote.config)).__module__ == type(remote).__module__\n"
    )
    run_python(program, saved_folder)


def test_without_trust_the_folder_is_not_executed(saved_folder, tmp_path):
    program = tmp_path / "no_trust.py"
    load = "AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)"
    program.write_text(f"import sys\nfrom transformers import AutoModel\n{load}")
    result = run_python(program, saved_folder, hide=("hpool_vit",), check=False)
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr


def test_the_package_imports_without_torchvision(tmp_path):
    program = tmp_path / "import_alone.py"
    program.write_text("import hpool_vit\nprint(hpool_vit.HPoolViTImageProcessorPil().backend)")
    assert run_python(program, hide=("torchvision", "timm")).stdout == "pil\n"


def test_a_subclass_of_a_script_saves_a_folder_that_loads(saved_folder, tmp_path):
    program = tmp_path / "subclass.py"
    program.write_text(
        "import sys, hpool_vit\n"
        "class Mine(hpool_vit.HPoolViTForImageClassification):\n    pass\n"
        "Mine.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], True)\n"
        "hpool_vit.HPoolViTImageProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])\n"
    )
    run_python(program, saved_folder, tmp_path / "mine")
    again = use(tmp_path / "mine", tmp_path / "copy")
    assert len(again["classes"]) == 3


def test_importing_the_package_loads_little_beyond_what_transformers_own_vit_needs():
    program = (
        "import sys\n"
        "from transformers import ViTForImageClassification, ViTImageProcessor, ViTImageProcessorPil\n"
        "before = set(sys.modules)\n"
        "import hpool_vit\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    new = run_python("-c", program).stdout.split()
    own = {name for name in new if name.startswith("hpool_vit")}
    assert len(own) == 6
    assert {name.partition(".")[0] for name in new} <= {"hpool_vit", "transformers"} and len(new) < 40


def test_loading_fills_no_weights_before_it_reads_them(saved_folder, monkeypatch):
    filled = []
    for name in ("normal_", "uniform_", "zero_", "fill_"):
        method = getattr(torch.Tensor, name)

        def fill(tensor, *args, method=method, **kwargs):
            if isinstance(tensor, torch.nn.Parameter) and tensor.device.type != "meta":
                filled.append(tensor.shape)
            return method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, fill)
    HPoolViTForImageClassification.from_pretrained(saved_folder)
    assert not filled
    tiny_model()
    assert filled  # a new model is filled


def test_the_pipeline_gets_files_of_every_kind_through_the_image_processor(saved_folder, tmp_path):
    classifier = pipeline("image-classification", model=saved_folder)
    processor, model = classifier.image_processor, classifier.model
    clear = Image.linear_gradient("L").resize((60, 40)).convert("RGBA")
    clear.putalpha(Image.radial_gradient("L").resize((60, 40)))
    deep = Image.fromarray((torch.arange(2400).reshape(40, 60) * 27).numpy().astype("uint16"))
    for name, image in (("clear.png", clear), ("deep.png", deep)):
        image.save(tmp_path / name)
        path = str(tmp_path / name)
        with torch.no_grad():
            expected = model(**processor(path, return_tensors="pt")).logits.softmax(-1)[0]
        answers = classifier(processor.fetch_images(path))
        given = torch.tensor([a["score"] for a in sorted(answers, key=lambda a: model.config.label2id[a["label"]])])
        torch.testing.assert_close(given, expected)
        # Given the path itself, Transformers decodes the file before the image processor sees it.
        by_path = torch.tensor(
            [a["score"] for a in sorted(classifier(path), key=lambda a: model.config.label2id[a["label"]])]
        )
        assert not torch.allclose(by_path, expected, atol=1e-4)
