"""A complete model repository in a folder: weights, code, image processor, card, license, examples, nothing else."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import pipeline

import hpool_vit
from hpool_vit import HPoolViTForImageClassification

from ..inference.inputs import read_image
from ..shared.console import one_line
from ..shared.files import check_output_dir, folder_written_whole
from ..shared.images import BadImageError
from ..shared.measuring import format_table
from ..shared.saved_model import load_saved_classifier, segments
from .card import escape, write_model_card
from .earlier_card import EarlierCard, read_earlier_card
from .results import Results, read_results


# Part of the package's data, so that an installed package has it too.
LICENSE = Path(hpool_vit.__file__).with_name("LICENSE")
LONGEST_SIDE = 1024
TEXT_ENDINGS = (".json", ".md", ".py", "")
# What stands before a path of its own: nothing that could be part of a longer one, or an escaped line break of JSON.
PATH_START = r"(?:(?<![\w.~@%-])|(?<=\\[nrt]))"


def prepare_repository(
    model: str | Path,
    repo_id: str,
    output_dir: str | Path,
    *,
    license: str | None = None,
    results: Sequence[Path] = (),
    examples: Sequence[str] = (),
) -> list[str]:
    """
    Writes a model repository, completely or not at all. It keeps what an earlier card or the records of a training in
    the folder say. It leaves out checkpoints, optimizer states and local paths.

    Args:
        model: the folder of a trained HPool-ViT with its image processor.
        repo_id: `owner/name` on the Hub.
        output_dir: a folder that does not exist yet, or is empty.
        license: the license of the weights, an identifier of the Hub. Default: the earlier card's.
        results: JSON files with metrics or comparisons, see [`read_results`].
        examples: image files, or `title=file`.

    Returns:
        Notes on what the repository lacks.

    Raises:
        ValueError, OSError: in one line, if something cannot be shared.
    """
    folder, output_dir = Path(model), Path(output_dir)
    check_repo_id(repo_id)
    check_license(license)
    check_output_dir(output_dir)
    check_folder(folder)
    check_task(folder, repo_id)
    measured = read_results(results)
    earlier = read_earlier_card(folder)
    classifier, image_processor, _ = load_saved_classifier(str(folder))
    if not isinstance(classifier, HPoolViTForImageClassification):
        raise ValueError(f"{folder} holds a {type(classifier).__name__}, not an HPool-ViT.")
    with folder_written_whole(output_dir) as complete:
        # Saving again instead of copying leaves everything else behind and writes the code of this version.
        classifier.save_pretrained(complete)
        image_processor.save_pretrained(complete)
        shutil.copyfile(LICENSE, complete / "LICENSE")
        copy_pictures(earlier.pictures, folder, complete)
        classify = pipeline("image-classification", model=classifier, image_processor=image_processor, device="cpu")
        widget = add_examples(examples, complete, classify)
        license = license or getattr(earlier.metadata, "license", None)
        write_card(complete, classifier, repo_id, earlier, measured, widget, license)
        check_private(complete, folder)
    has_results = bool(results or earlier.sections.get("Results") or earlier.facts.get("results"))
    return find_gaps(license, widget, has_results)


def find_gaps(license: str | None, widget: list[dict[str, Any]], has_results: bool) -> list[str]:
    notes = {
        "`license` is missing: the card does not say under which license the weights are.": bool(license),
        "`examples` are missing: the page has no pictures to try.": bool(widget),
        "`results` are missing: the card shows none.": has_results,
    }
    return [note for note, is_given in notes.items() if not is_given]


def check_repo_id(repo_id: str):
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it needs an owner and a name.")
    except HFValidationError as error:
        raise ValueError(f"`repo_id={repo_id!r}` must be of the form owner/name: {error}") from error


def check_license(license: str | None):
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"`license={license!r}` is not an identifier of the Hub: give one such as apache-2.0, mit, cc-by-nc-4.0 "
            "or other."
        )


def check_folder(folder: Path):
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the one in which the model was saved.")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for what, patterns in {
        "configuration (config.json)": r"config\.json",
        "weights (model.safetensors)": r"(model|pytorch_model)\S*\.(safetensors|bin)",
        "image processor (preprocessor_config.json)": r"(pre)?processor_config\.json",
    }.items():
        if not any(re.fullmatch(patterns, name) for name in names):
            raise ValueError(
                f"{folder} has no {what}: save the model and its image processor there with `save_pretrained`."
            )


def check_task(folder: Path, repo_id: str):
    if segments(str(folder)):
        raise ValueError(
            f"{folder} is a model for segmentation (`architectures` in config.json), and only repositories of "
            f"classifiers are prepared. The folder has its code already: upload it with `hf upload {repo_id} {folder} "
            "--exclude 'checkpoint-*' --exclude training_args.bin`."
        )


def copy_pictures(pictures: Sequence[str], source: Path, target: Path):
    for picture in pictures:
        (target / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / picture, target / picture)


def add_examples(examples: Sequence[str], folder: Path, classifier: Any) -> list[dict[str, Any]]:
    """Copies the images into the folder, and returns them as the widget's examples with the model's answers."""
    widget = []
    for number, example in enumerate(examples):
        title, _, file = example.rpartition("=") if not Path(example).exists() else ("", "", example)
        title = one_line(title or re.sub(r"[_-]+", " ", Path(file).stem))
        try:
            image, _ = read_image(file, timeout=20)
        except BadImageError as error:
            raise ValueError(f"`examples={file}` cannot be used: {error}") from error
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "example"
        taken = {entry["src"] for entry in widget}
        source = f"examples/{name}.jpg"
        source = source if source not in taken else f"examples/{name}-{number + 1}.jpg"
        (folder / source).parent.mkdir(exist_ok=True)
        # Encoding again drops what a camera stores beside the picture: place, owner, serial number.
        image.info.clear()
        image.save(folder / source, "JPEG", quality=90)
        answers = classifier(str(folder / source), top_k=5)
        output = [{"label": answer["label"], "score": round(answer["score"], 4)} for answer in answers]
        widget.append({"src": source, "example_title": title, "output": output})
    return widget


def write_card(
    output_dir: Path,
    model: HPoolViTForImageClassification,
    repo_id: str,
    earlier: EarlierCard,
    measured: Results,
    widget: list[dict[str, Any]],
    license: str | None,
):
    sections = dict(earlier.sections)
    facts = dict(earlier.facts)
    if measured.metrics:
        # The earlier card's table would contradict these metrics, which also go into the metadata.
        sections.pop("Results", None)
        facts["results"] = measured.metrics
    if widget:
        rows = [
            [f"![{escape(entry['example_title'])}]({entry['src']})", escape(show_answers(entry["output"]))]
            for entry in widget
        ]
        sections["Examples"] = format_table(["image", "answer"], rows)
    weights = f"`{license}`" if license else "not stated; ask the owner of this repository"
    sections["License"] = f"The code (the `.py` files): Apache-2.0, see [LICENSE](LICENSE). The weights: {weights}."
    config = model.config
    write_model_card(
        output_dir,
        model=model,
        label_names=[config.id2label[label] for label in range(config.num_labels)],
        license=license,
        repo_id=repo_id,
        tables=measured.tables,
        widget=widget or None,
        kept=sections,
        kept_metadata=earlier.metadata,
        **facts,
    )


def show_answers(answers: list[dict[str, Any]]) -> str:
    return ", ".join(f"{answer['label']} {answer['score']:.1%}" for answer in answers[:3])


def check_private(repository: Path, source: Path):
    """Raises a `ValueError` if a text file in the repository names a folder of this machine."""
    places = {str(place) for place in (Path.home(), Path.cwd(), source.resolve(), repository) if len(place.parts) > 1}
    for file in sorted(repository.rglob("*")):
        if not file.is_file() or file.suffix not in TEXT_ENDINGS:
            continue
        text = file.read_text(encoding="utf-8")
        for place in sorted(places):
            # A whole path: neither the end of another one, such as /model in owner/model, nor the beginning of a name.
            if re.search(PATH_START + re.escape(place) + r"(?![\w-])", text):
                raise ValueError(
                    f"{file.relative_to(repository)} would name the local folder {place}: remove it from the "
                    f"configuration or the card in {source}."
                )
