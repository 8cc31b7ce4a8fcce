"""The Trainer program that people copy: it fine-tunes, evaluates and saves."""

import json

import pytest
import run_image_classification
from helpers import EXAMPLES, TESTS, run_python, tiny_model
from huggingface_hub import ModelCard
from image_files import write_folder
from PIL import Image
from transformers import AutoModelForImageClassification

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.training.recipes import recipe_arguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_vit_is_fine_tuned_with_pooling_and_loads_without_the_package(tmp_path, vit_folder):
    photos, output = write_folder(tmp_path / "photos", per_class=12), tmp_path / "out"
    flags = ["--train_dir", photos, "--model_name_or_path", vit_folder, "--hvt_pool", "1", "--output_dir", output]
    program = EXAMPLES / "run_image_classification.py"
    printed = run_python(program, *flags, "--num_train_epochs", 2, "--use_cpu").stdout
    assert "on 4 images, saved in" in printed  # a tenth of 36, and at least one of each class
    run_python(TESTS / "programs" / "use_saved_folder.py", output, tmp_path / "copy", hide=("hpool_vit",))
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.hvt_pool == [1] and model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "image-classification" and str(photos) in card.text
    with Image.open(output / "confusion_matrix.png") as picture:
        assert picture.size[0] > 400
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 2.0


def test_a_preset_gets_new_weights_and_a_trained_model_keeps_its_own(tmp_path):
    recipe, labels = recipe_arguments("finetune"), ["ant", "bee", "cat"]
    model, processor = run_image_classification.load_model("hvt-ti-1", "1,5", recipe, labels)
    assert model.config.hvt_pool == [1, 5] and model.num_labels == 3
    assert processor.crop_size == {"height": 224, "width": 224}
    trained = tiny_model()
    trained.save_pretrained(tmp_path)
    HPoolViTImageProcessor.for_config(trained.config).save_pretrained(tmp_path)
    model, _ = run_image_classification.load_model(str(tmp_path), None, recipe, labels)
    assert model.config.hvt_pool == [1, 3]
    assert (model.classifier.weight == trained.classifier.weight).all()
