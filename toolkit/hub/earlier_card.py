"""
What a folder already says about its model, in its card or otherwise in the records of its training. Local paths are
reduced to their last names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..shared.files import read_json


PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}
# Every card gets these anew.
REWRITTEN = ("How to use", "Citation", "License", "Licence", "Examples")
# The beginning of the text that `model_card_template.md` writes.
DESCRIPTION = "An HPool-ViT, a Vision Transformer that pools its token sequence"

NAME = r"[^\s/'\"`|,;:()<>\[\]]"
LOCAL_PATHS = (
    r"(?<=')~?/[^'\n]+(?=')",
    r"(?<=\")~?/[^\"\n]+(?=\")",
    r"file:/+\S+",
    r"\b[A-Za-z]:[\\/]+[^\s'\"`|,;]+",
    rf"(?<![\w.~/\\<)\]*-])~?/{NAME}+(?:/+{NAME}+)*/?",
)


@dataclass
class EarlierCard:
    """Arguments for [`write_model_card`], and the picture files that the sections show."""

    sections: dict[str, str] = field(default_factory=dict)
    metadata: ModelCardData = field(default_factory=ModelCardData)
    facts: dict[str, Any] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)


def read_earlier_card(folder: Path) -> EarlierCard:
    """
    Reads the card of a folder, or the records of its training if it has none.

    Raises:
        ValueError: if the card or a record cannot be read.
    """
    if (folder / "README.md").is_file():
        return read_card(folder)
    return EarlierCard(facts=read_records(folder))


def read_card(folder: Path) -> EarlierCard:
    path = folder / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    sections = {title: text for title, text in split_sections(card.text).items() if title not in REWRITTEN}
    if sections.get("About", "").startswith(DESCRIPTION):
        del sections["About"]
    earlier = EarlierCard(metadata=card.data)
    # The widget's examples are files of another repository.
    vars(earlier.metadata).pop("widget", None)
    for title, text in sections.items():
        text = keep_pictures(text, folder, earlier.pictures)
        if text.strip():
            earlier.sections[without_local_paths(title)] = without_local_paths(text)
    for name in ("base_model", "datasets", "model_name"):
        value = getattr(earlier.metadata, name, None)
        if isinstance(value, str):
            setattr(earlier.metadata, name, without_local_paths(value))
    for result in earlier.metadata.eval_results or []:
        result.dataset_name = without_local_paths(result.dataset_name)
        result.dataset_type = without_local_paths(result.dataset_type)
    return earlier


def split_sections(text: str) -> dict[str, str]:
    """The text under each second-level heading, by title. The text before the first one is "About"."""
    sections: dict[str, list[str]] = {"About": []}
    title, fence = "About", None
    for line in text.splitlines():
        if mark := re.match(r"(`{3,}|~{3,})", line):
            # A fence ends a code block if it is at least as long as the one that started it.
            if fence is None:
                fence = mark[1]
            elif line.startswith(fence) and not line.strip(fence[0] + " "):
                fence = None
        heading = fence is None and re.match(r"## +(.+?)[ #]*$", line)
        if heading:
            title = heading[1]
            sections.setdefault(title, [])
        elif not (title == "About" and fence is None and line.startswith("# ")):
            sections[title].append(line)
    return {title: "\n".join(lines).strip() for title, lines in sections.items()}


def keep_pictures(text: str, folder: Path, pictures: list[str]) -> str:
    """Collects the picture files that the text shows, and removes pictures that are not in the folder."""

    def check(match: re.Match) -> str:
        target = unquote(match[1].strip("<>"))
        if target.startswith(("https://", "http://")):
            return match[0]
        path = (folder / target).resolve()
        inside = path.is_file() and path.is_relative_to(folder.resolve()) and not Path(target).is_absolute()
        if not inside or path.suffix.lower() not in PICTURE_ENDINGS:
            return ""
        pictures.append(path.relative_to(folder.resolve()).as_posix())
        return match[0]

    text = re.sub(r"!\[(?:\\.|[^\]\\])*\]\(([^)\s]+)\)", check, text)
    # Titles of removed pictures.
    return re.sub(r"(?m)^### .*\n+(?=### |\Z)", "", text).strip()


def read_records(folder: Path) -> dict[str, Any]:
    """The records of a training as arguments for a card; {} if there are none."""
    facts: dict[str, Any] = {}
    record: dict[str, Any] = {}
    if (folder / "training.yaml").is_file():
        try:
            record = yaml.safe_load((folder / "training.yaml").read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / 'training.yaml'} is not valid YAML: {error}") from error
        facts["recipe"] = scrub(record)
        data = record.get("data") or {}
        name = data.get("dataset_name") or data.get("train_dir") or ", ".join(data.get("train_files") or [])
        facts["data"] = scrub({"name": name} if name else {})
        facts["base_model"] = scrub((record.get("model") or {}).get("model_name_or_path"))
    if (folder / "all_results.json").is_file():
        measured = read_json(folder / "all_results.json")
        # With weight averaging, the averaged weights are the saved ones.
        saved = "eval_ema_" if (record.get("recipe") or {}).get("ema_decay") else "eval_"
        names = (saved + name for name in ("top1", "top5", "loss"))
        facts["results"] = {name: measured[name] for name in names if name in measured}
        training = {"seconds": "train_runtime", "images_per_second": "train_samples_per_second", "epochs": "epoch"}
        facts["training"] = {name: measured[key] for name, key in training.items() if key in measured}
    return facts


def scrub(value: Any) -> Any:
    """Applies `without_local_paths` to every string in nested lists and dictionaries."""
    if isinstance(value, str):
        return without_local_paths(value)
    if isinstance(value, Mapping):
        return {key: scrub(item) for key, item in value.items()}
    return [scrub(item) for item in value] if isinstance(value, list) else value


def without_local_paths(text: str) -> str:
    """Reduces each absolute path in the text (also `~/…`, `C:\\…`, `file://…`) to its last name."""
    for pattern in LOCAL_PATHS:
        text = re.sub(pattern, lambda match: last_name(match[0]), text)
    return text


def last_name(path: str) -> str:
    # In Markdown, backslashes also escape other characters.
    separators = r"[\\/]+" if re.match(r"[A-Za-z]:", path) else "/+"
    return [name for name in re.split(separators, path) if name][-1]
