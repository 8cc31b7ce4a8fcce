"""The model card: what the Hub reads, what a reader learns, and that any text leaves it whole."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import TESTS, run_python, tiny_model
from huggingface_hub import ModelCard
from PIL import Image

from hpool_vit.toolkit.hub.card import write_model_card


def card_of(folder: Path, **kwargs) -> ModelCard:
    """The card as the Hub reads it, in a folder with the pictures that the card shows."""
    folder.mkdir(exist_ok=True)
    for name in kwargs.get("pictures", {}).values():
        (folder / name).touch()
    given = {"model": tiny_model(), "label_names": ["ant", "bee", "cat"], **kwargs}
    return ModelCard.load(write_model_card(folder, **given))


def block(card: ModelCard, language: str, section: str = "") -> str:
    """The first code block in a language, after the heading of a section."""
    text = card.text.partition(f"\n## {section}")[2]
    return re.search(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, flags=re.DOTALL | re.MULTILINE).group(2)


def titles(card: ModelCard) -> list[str]:
    return re.findall(r"^##? (.*)$", re.sub(r"^(`{3,}).*?^\1$", "", card.text, flags=re.DOTALL | re.MULTILINE), re.M)


def test_a_card_says_what_the_hub_wants_to_know(tmp_path):
    folder = tmp_path / "my-model"
    card = card_of(
        folder,
        data={"name": "uoft-cs/cifar10", "split": "test", "train_images": 50_000},
        results={"eval_top1": 0.9125, "ema_top5": np.float32(0.5), "eval_loss": 0.3, "mean_class_accuracy": 0.875},
        base_model="facebook/deit-tiny-patch16-224",
        license="apache-2.0",
    )
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.tags == ["hpool-vit", "image-classification", "custom_code"]
    assert card.data.metrics == ["accuracy"] and card.data.license == "apache-2.0"
    assert card.data.base_model == "facebook/deit-tiny-patch16-224" and card.data.datasets == "uoft-cs/cifar10"
    assert card.data.model_name == "my-model"
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "Top-1 accuracy": 0.9125,
        "Top-5 accuracy, averaged weights": 0.5,
    }
    top1 = results["Top-1 accuracy"]
    assert (top1.dataset_type, top1.dataset_split) == ("uoft-cs/cifar10", "test")
    assert (top1.task_type, top1.metric_type) == ("image-classification", "accuracy")
    assert "| Top-1 accuracy | 91.25% |" in card.text and "| loss | 0.3 |" in card.text
    assert "| Mean class accuracy | 87.50% |" in card.text


def test_a_card_describes_the_model_the_training_the_data_and_the_machine(tmp_path):
    card = card_of(
        tmp_path / "m",
        recipe={"learning_rate": 5e-4},
        data={"name": "digits", "train_images": 1437},
        results={"top1": 0.5},
        training={"seconds": 3723.6, "images_per_second": 1234.56, "epochs": 3, "seed": 0, "command": "python run.py"},
        hardware={"cpu": "AMD", "ram_gb": 25.3, "gpus": ["H100, 85.0 GB"] * 8, "versions": {"torch": "2.15"}},
        teacher="outputs/teacher",
        pictures={"Confusion matrix": "confusion_matrix.png", "Curves": "my curves.png"},
        bad_images="1 image skipped\nbee/7.jpg: truncated",
    )
    assert titles(card) == [
        "m", "How to use", "Results", "Training", "Data", "Hardware", "Pictures", "Citation",
    ]  # fmt: skip
    for line in (
        "| tokens per stage | 64 → 31 → 15 |",
        "| pooling | max pooling before blocks 1, 3 (counted from 0) |",
        f"| parameters | {tiny_model().num_parameters():,} |",
        "| distilled from | outputs/teacher |",
        "| time (h:mm:ss) | 1:02:04 |",
        "| images per second | 1235 |",
        "| seed | 0 |",
        "| train images | 1437 |",
        "| RAM (GB) | 25.3 |",
        "| GPUs | 8 × H100, 85.0 GB |",
        "| versions | torch 2.15 |",
        "![Confusion matrix](confusion_matrix.png)",
        "![Curves](my%20curves.png)",
        "bee/7.jpg: truncated",
        "Measured on: digits.",
    ):
        assert line in card.text.splitlines(), line
    assert block(card, "bash", "Training") == "python run.py"
    assert block(card, "yaml") == "learning_rate: 0.0005"


def test_a_card_leaves_out_what_is_not_known(tmp_path):
    card = card_of(tmp_path / "m", model=tiny_model(hvt_pool=None))
    assert titles(card) == ["m", "How to use", "Citation"]
    assert card.data.to_dict().keys() == {"library_name", "metrics", "pipeline_tag", "tags"}
    assert "| pooling | none |" in card.text and "| tokens per stage | 64 |" in card.text


def test_any_text_in_names_leaves_the_card_whole(tmp_path):
    names = [
        "a | b",
        "new\nline\r\n---\n",
        "狗 🐝 é",
        "*x* [y](z) <b> `c` $5$ \\",
        "lone \ud800 half",
        "{{ jinja }} {0}",
    ]
    folder = tmp_path / 'say "hi" | 狗'
    card = card_of(
        folder,
        label_names=names,
        data={"name": "what\n---\n| ever: 'x'", "split": "te|st"},
        results={"top1": 0.5},
        training={"command": "python a.py --x '```'\n  --y ````", "seed": 1},
        recipe={"note": "```\n---\n| é", "surrogate": "\ud800"},
        pictures={"a ] b": "ü [1].png"},
        bad_images="狗 \udcff.jpg: ```",
    )
    assert card.data.eval_results[0].dataset_name == "what --- | ever: 'x'" and card.data.model_name == folder.name
    assert titles(card)[1:] == ["How to use", "Results", "Training", "Data", "Pictures", "Citation"]
    assert (
        r"a \| b; new line ---; 狗 🐝 é; \*x\* \[y\](z) \<b\> \`c\` \$5\$ \\; lone half; {{ jinja }} {0}." in card.text
    )
    rows = [line for line in card.text.splitlines() if line.startswith("| ") and "é" not in line]
    assert len(rows) > 8 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert block(card, "bash", "Training") == "python a.py --x '```'\n  --y ````"
    assert yaml.safe_load(block(card, "yaml"))["note"] == "```\n---\n| é"
    compile(block(card, "python"), "usage", "exec")


def test_the_recipe_is_in_the_card_in_full(tmp_path):
    recipe = {"learning_rate": 5e-4, "betas": (0.9, 0.999), "mixup": {"alpha": 0.8}, "clip": None, "bf16": True}
    card = card_of(tmp_path / "m", recipe={**recipe, "folder": Path("a/b"), "decay": np.float64(0.025)})
    assert yaml.safe_load(block(card, "yaml")) == {**recipe, "betas": [0.9, 0.999], "folder": "a/b", "decay": 0.025}


def test_the_hub_gets_no_local_folder_as_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/warm-start").mkdir(parents=True)
    card = card_of(
        tmp_path / "m", base_model="outputs/warm-start", data={"name": str(tmp_path)}, results={"top1": 1.0}
    )
    assert card.data.base_model is None and card.data.datasets is None
    assert "| started from | outputs/warm-start |" in card.text


def test_long_lists_are_shortened_and_counted(tmp_path):
    names = [f"class {index}" for index in range(1000)]
    report = "\n".join(f"{index}.jpg: truncated" for index in range(75))
    card = card_of(tmp_path / "m", label_names=names, bad_images=report)
    assert "1000 classes: class 0; class 1;" in card.text
    assert "class 19 and 980 more." in card.text and "class 20" not in card.text
    assert "49.jpg: truncated\n… and 25 more lines" in card.text and "50.jpg" not in card.text


def test_a_card_leaves_out_pictures_that_do_not_exist(tmp_path):
    pictures = {"Curves": "curves.png", "Confusion matrix": "confusion_matrix.png"}
    (tmp_path / "confusion_matrix.png").touch()
    text = write_model_card(tmp_path, model=tiny_model(), label_names=["a"], pictures=pictures).read_text()
    assert "![Confusion matrix](confusion_matrix.png)" in text and "curves.png" not in text


def test_a_new_card_takes_the_place_of_an_old_one(tmp_path):
    card_of(tmp_path, results={"top1": 0.25})
    assert "25.00%" not in card_of(tmp_path, results={"top1": 0.75}).text


def test_a_card_for_the_hub_names_the_repository_and_has_examples_and_tables(tmp_path):
    widget = [{"src": "examples/bee.jpg", "example_title": "A bee", "output": [{"label": "bee", "score": 0.9}]}]
    table = "| model | top-1 |\n| --- | --- |\n| a | 1 |"
    card = card_of(tmp_path / "m", repo_id="bees/insects", widget=widget, tables={"a | b": table})
    assert titles(card) == ["insects", "How to use", "Results", "Citation"]
    assert 'name = "bees/insects"' in block(card, "python")
    assert card.data.widget == widget and f"### a \\| b\n\n{table}" in card.text


def test_a_card_keeps_the_sections_and_metadata_of_an_earlier_one(tmp_path):
    earlier = card_of(
        tmp_path / "m", data={"name": "uoft-cs/cifar10"}, results={"top1": 0.25}, license="mit", training={"seed": 7}
    )
    earlier.data.tags.append("insects")
    earlier.data.language = "en"
    kept = {"Results": "As *before*.", "Limits": "Only insects."}
    card = card_of(tmp_path / "n", results={"loss": 0.5}, training={"seed": 8}, kept=kept, kept_metadata=earlier.data)
    assert titles(card) == ["n", "How to use", "Results", "Training", "Limits", "Citation"]
    assert "As *before*." in card.text and "| loss |" not in card.text and "| seed | 8 |" in card.text
    assert (card.data.license, card.data.datasets, card.data.language) == ("mit", "uoft-cs/cifar10", "en")
    assert card.data.tags == ["hpool-vit", "image-classification", "custom_code", "insects"]
    assert [result.metric_value for result in card.data.eval_results] == [0.25] and card.data.model_name == "n"


def test_the_code_in_the_card_runs_beside_the_folder(saved_folder, tmp_path):
    folder = Path(shutil.copytree(saved_folder, tmp_path / 'a "model"'))
    card = card_of(folder)
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "photo.jpg")
    (tmp_path / "usage.py").write_text(block(card, "python") + "\nprint(features.shape, features.requires_grad)\n")
    result = run_python(tmp_path / "usage.py", cwd=tmp_path, hide=("hpool_vit",))
    assert {"ant", "bee", "cat"} == set(re.findall(r"'label': '(\w+)'", result.stdout))
    assert result.stdout.endswith("torch.Size([1, 32]) False\n")


def test_the_commands_in_the_card_name_the_model_as_the_shell_reads_it(tmp_path):
    for repo_id, name in (("bees/insects", "bees/insects"), (None, 'it\'s "mine" $HOME')):
        commands = block(card_of(tmp_path / 'it\'s "mine" $HOME', repo_id=repo_id), "bash").splitlines()
        assert [shlex.split(line)[:3] for line in commands] == [
            ["hpool-vit", "predict", name],
            ["hpool-vit", "visualize", name],
        ]


@pytest.mark.parametrize("fact", ["title", "year", "arXiv", "authors"])
def test_the_card_cites_the_paper_as_the_project_does(fact, tmp_path):
    paper = yaml.safe_load((TESTS.parent / "CITATION.cff").read_text())["preferred-citation"]
    citation = block(card_of(tmp_path / "m"), "bibtex")
    expected = {
        "title": paper["title"],
        "year": str(paper["year"]),
        "arXiv": paper["identifiers"][0]["value"],
        "authors": " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]),
    }
    assert expected[fact] in citation
