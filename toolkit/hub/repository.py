"""A complete model repository in a folder: weights, code, image processor, card, licence, examples; nothing else."""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from compare_runs import format_models
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import pipeline

from hpool_vit import HPoolViTForImageClassification

from ..inference.inputs import read_image
from ..shared.console import one_line
from ..shared.files import check_output_dir, folder_written_whole, read_json
from ..shared.images import BadImageError
from ..shared.measuring import format_table
from ..shared.saved_model import load_saved_classifier
from .card import escape, show_value, write_model_card
from .earlier_card import EarlierCard, read_earlier_card


LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
LONGEST_SIDE = 1024
TEXT_ENDINGS = (".json", ".md", ".py", "")


@dataclass
class Results:
    """Results beside those of the earlier card: `metrics` of these weights, and Markdown `tables` by title."""

    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)


def prepare_repository(
    model_name_or_path: Path,
    repo_id: str,
    output_dir: Path,
    *,
    license: str | None = None,
    results: list[Path] = (),
    examples: list[str] = (),
) -> list[str]:
    """
    Writes the repository, or nothing. What an earlier card or the records of a training in the folder say is kept;
    checkpoints, optimizer states and local paths are not.

    Args:
        model_name_or_path: the folder of a trained HPool-ViT with its image processor.
        repo_id: `owner/name` on the Hub.
        output_dir: a folder that does not exist yet, or is empty.
        license: the weights' licence, an identifier of the Hub; default: the earlier card's.
        results: JSON files of metrics or of comparisons.
        examples: image files, or `title=file`.

    Returns:
        Notes on what the repository lacks.

    Raises:
        ValueError, OSError: in one line, for whatever cannot be shared.
    """
    folder = Path(model_name_or_path)
    check_repo_id(repo_id)
    check_license(license)
    check_output_dir(output_dir)
    check_folder(folder)
    measured = read_results(results)
    earlier = read_earlier_card(folder)
    model, image_processor, _ = load_saved_classifier(str(folder))
    if not isinstance(model, HPoolViTForImageClassification):
        raise ValueError(f"--model_name_or_path {folder} holds a {type(model).__name__}, and no HPool-ViT.")
    with folder_written_whole(output_dir) as complete:
        # Saved again instead of copied: nothing else comes along, and the code is this version's.
        model.save_pretrained(complete)
        image_processor.save_pretrained(complete)
        shutil.copyfile(LICENSE, complete / "LICENSE")
        for picture in earlier.pictures:
            (complete / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / picture, complete / picture)
        classifier = pipeline("image-classification", model=model, image_processor=image_processor, device="cpu")
        widget = add_examples(examples, complete, classifier)
        license = license or getattr(earlier.metadata, "license", None)
        write_card(complete, model, repo_id, earlier, measured, widget, license)
        check_private(complete, folder)
    notes = {
        "--license is missing: the card does not say under which licence the weights are": license,
        "--examples are missing: the page will have no pictures to try": widget,
        "--results are missing: the card has none": earlier.sections.get("Results")
        or earlier.facts.get("results")
        or results,
    }
    return [note for note, given in notes.items() if not given]


def check_repo_id(repo_id: str):
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it needs an owner and a name.")
    except HFValidationError as error:
        raise ValueError(f"--repo_id {repo_id!r} must be `owner/name`: {error}") from error


def check_license(license: str | None):
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"--license {license!r} is no identifier of the Hub: give one such as apache-2.0, mit, cc-by-nc-4.0 or "
            "other."
        )


def check_folder(folder: Path):
    if not folder.is_dir():
        raise ValueError(f"--model_name_or_path {folder} is no folder: give the one that the model was saved in.")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for what, patterns in {
        "configuration (config.json)": r"config\.json",
        "weights (model.safetensors)": r"(model|pytorch_model)\S*\.(safetensors|bin)",
        "image processor (preprocessor_config.json)": r"(pre)?processor_config\.json",
    }.items():
        if not any(re.fullmatch(patterns, name) for name in names):
            raise ValueError(
                f"--model_name_or_path {folder} has no {what}: save the model and its image processor there with "
                "`save_pretrained`."
            )


def read_results(paths: list[Path]) -> Results:
    """
    Reads metrics (`{"eval_top1": 0.9, …}`, as `all_results.json` has them), comparisons as `compare_runs.py` writes
    them, and other lists or dictionaries of rows, of which the plain values become a table.
    """
    results = Results()
    for path in map(Path, paths):
        content = read_json(path)
        title = path.stem.replace("_", " ")
        if isinstance(content, dict) and content and all(isinstance(value, int | float) for value in content.values()):
            results.metrics |= content
        elif is_comparison(content):
            results.tables[title] = format_models(content, next(iter(content)))
        else:
            results.tables[title] = format_rows(path, content)
    return results


def is_comparison(content: Any) -> bool:
    keys = {"runs", "macs", "images_per_second", "tokens"}
    rows = list(content.values()) if isinstance(content, dict) else []
    return bool(rows) and all(isinstance(row, dict) and keys <= row.keys() for row in rows)


def format_rows(path: Path, content: Any) -> str:
    if isinstance(content, dict):
        content = [{"name": name, **row} for name, row in content.items() if isinstance(row, dict)]
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"--results {path} holds no metrics and no rows: give a JSON file with either.")
    table = pd.json_normalize(content, sep=" ")
    is_plain = table.map(lambda cell: not isinstance(cell, list | dict)).all()
    table = table.loc[:, is_plain & table.notna().any()]
    rows = [
        ["" if pd.isna(cell) else escape(show_value(cell)) for cell in row] for row in table.itertuples(index=False)
    ]
    return format_table([escape(str(name).replace("_", " ")) for name in table.columns], rows)


def add_examples(examples: list[str], folder: Path, classifier: Any) -> list[dict[str, Any]]:
    """Copies the images into the folder, and returns them as the widget's examples with the model's answers."""
    widget = []
    for number, example in enumerate(examples):
        title, _, file = example.rpartition("=") if not Path(example).exists() else ("", "", example)
        title = one_line(title or re.sub(r"[_-]+", " ", Path(file).stem))
        try:
            image, _ = read_image(file, timeout=20)
        except BadImageError as error:
            raise ValueError(f"--examples {file} cannot be used: {error}") from error
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "example"
        taken = {entry["src"] for entry in widget}
        source = f"examples/{name}.jpg"
        source = source if source not in taken else f"examples/{name}-{number + 1}.jpg"
        (folder / source).parent.mkdir(exist_ok=True)
        # Encoded again, without what a camera writes beside the picture: place, owner, serial number.
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
        # The table of the earlier card would contradict these, which also go into the metadata.
        sections.pop("Results", None)
        facts["results"] = measured.metrics
    if widget:
        rows = [
            [f"![{escape(entry['example_title'])}]({entry['src']})", escape(show_answers(entry["output"]))]
            for entry in widget
        ]
        sections["Examples"] = format_table(["image", "answer"], rows)
    weights = f"`{license}`" if license else "not stated; ask the owner of this repository"
    sections["Licence"] = f"The code (the `.py` files): Apache-2.0, see [LICENSE](LICENSE). The weights: {weights}."
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
    """Raises a `ValueError` if a text in the repository names a folder of this machine."""
    places = {str(place) for place in (Path.home(), Path.cwd(), source.resolve(), repository) if len(place.parts) > 1}
    for file in sorted(repository.rglob("*")):
        if not file.is_file() or file.suffix not in TEXT_ENDINGS:
            continue
        text = file.read_text(encoding="utf-8")
        for place in sorted(places):
            # Not the beginning of another name.
            if re.search(re.escape(place) + r"(?![\w-])", text):
                raise ValueError(
                    f"{file.relative_to(repository)} would name the local folder {place}: take that out of the "
                    f"configuration or the card in {source}."
                )
