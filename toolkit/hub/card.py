"""
The model card of an HPool-ViT: a README.md with the metadata that the Hub reads and the facts that a reader needs.

`model_card_template.md` holds the text. A section for which nothing is given is left out, so a model whose training is
unknown gets a card too.
"""

import datetime
import json
import numbers
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..shared.console import hub_id, one_line


TEMPLATE = Path(__file__).with_name("model_card_template.md")
ACCURACIES = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
SHARES = {**ACCURACIES, "mean_class_accuracy": "Mean class accuracy"}
POOLING_NAMES = {"max": "max pooling", "avg": "average pooling", "merge": "merging of similar tokens"}
WORDS = {"cpu": "CPU", "gpu": "GPU", "gpus": "GPUs", "ram": "RAM", "gb": "(GB)"}
TAGS = ("hpool-vit", "image-classification", "custom_code")
MAX_ITEMS_SHOWN = 20
MAX_BAD_LINES_SHOWN = 50


def write_model_card(
    output_dir: Path,
    *,
    model,
    label_names: list[str],
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    results: Mapping[str, float] | None = None,
    hardware: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    teacher: str | None = None,
    pictures: Mapping[str, str] | None = None,
    bad_images: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    tables: Mapping[str, str] | None = None,
    widget: list[dict[str, Any]] | None = None,
    kept: Mapping[str, str] | None = None,
    kept_metadata: ModelCardData | None = None,
) -> Path:
    """
    Writes `output_dir/README.md` and replaces an existing one. Nothing is looked up on the Hub. The same template
    serves a training, which knows everything, and a folder that is shared later, whose earlier card is kept.

    Args:
        output_dir (`Path`): the saved folder. Its name is the model's name.
        model (`HPoolViTForImageClassification`): the saved model.
        label_names (`list[str]`): the names of its labels, in order. Any text is allowed. None: it extracts features.
        recipe: all settings of the training, shown as YAML.
        data: `name` of the data set (a Hub id, a folder or any text), the `split` on which the results were measured,
            and any other values to show, such as numbers of images.
        results: metrics of the saved weights. `top1` and `top5` in [0, 1], with or without the prefix `eval_` or
            `ema_`, also go into the metadata.
        hardware: values to show, as `describe_hardware` returns them.
        training: `seconds`, `images_per_second`, `epochs`, `seed`, `command` (the command line), and any others to
            show.
        base_model, teacher: Hub id or folder of the weights that training started from, and of the model that it was
            distilled from.
        pictures: files in `output_dir` by their titles. Files that do not exist are left out.
        bad_images: the report on the images that were skipped, one per line.
        license: a license identifier of the Hub, such as `apache-2.0`.
        repo_id: the model's id on the Hub, `owner/name`. It replaces the folder's name.
        tables: Markdown tables by title, shown below the results.
        widget: the examples of the page's widget, in the Hub's format: `src`, `example_title`, `output`.
        kept: sections of an earlier card, Markdown by title. They replace this card's sections of the same title; the
            others are placed before the citation.
        kept_metadata: metadata of an earlier card, used for fields that are not given.

    Returns:
        The path of the card.
    """
    data, results, training = dict(data or {}), dict(results or {}), dict(training or {})
    name = one_line(repo_id.rpartition("/")[2] if repo_id else Path(output_dir).resolve().name)
    metadata = _metadata(name, results, data, kept_metadata or ModelCardData(), license, base_model, widget)
    if not label_names:
        metadata.pipeline_tag, metadata.metrics = "image-feature-extraction", None
        metadata.tags = [tag.replace("image-classification", "image-feature-extraction") for tag in metadata.tags]
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_title=escape(name),
        **_description(model, label_names),
        **_usage(repo_id or name, model.config.hidden_size),
        measured_on=" ".join(escape(data[key]) for key in ("name", "split") if data.get(key)),
        results=_results(results),
        tables="\n\n".join(f"### {escape(title)}\n\n{table}" for title, table in (tables or {}).items()),
        **_training(training, recipe or {}, base_model, teacher),
        data=format_facts(data),
        bad_images=_bad_images(bad_images),
        hardware=format_facts(hardware or {}),
        pictures=_pictures(pictures or {}, Path(output_dir)),
        kept=dict(kept or {}),
    )
    file = Path(output_dir) / "README.md"
    # Jinja drops the last line break of a template.
    ModelCard(f"{card}\n").save(file)
    return file


def _metadata(
    name: str,
    results: Mapping[str, float],
    data: Mapping[str, Any],
    earlier: ModelCardData,
    license: str | None,
    base_model: str | None,
    widget: list[dict[str, Any]] | None,
) -> ModelCardData:
    """The metadata that the Hub reads. An earlier card's values fill in what this card does not say itself."""
    evaluated = _eval_results(results, data) or earlier.eval_results
    own = {
        "model_name": name if evaluated else None,
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": list(dict.fromkeys([*TAGS, *(earlier.tags or [])])),
        "metrics": ["accuracy"],
        "base_model": hub_id(base_model),
        "datasets": hub_id(data.get("name")),
        "eval_results": evaluated or None,
        "widget": widget,
    }
    given = {key: value for key, value in own.items() if value is not None}
    return ModelCardData(**{**vars(earlier), **given})


def _description(model, label_names: list[str]) -> dict[str, Any]:
    config = model.config
    blocks = ", ".join(map(str, config.hvt_pool or []))
    pooling = f"{POOLING_NAMES[config.pool_mode]} before blocks {blocks} (counted from 0)" if blocks else "none"
    facts = {
        "labels": len(label_names) or None,
        "image size": "{} × {} pixels".format(*config.image_shape),
        "parameters": f"{model.num_parameters():,}",
        "blocks": f"{config.num_hidden_layers}, {config.hidden_size} wide, {config.num_attention_heads} heads",
        "pooling": pooling,
        "tokens per stage": " → ".join(map(str, config.tokens_per_stage())),
    }
    return {
        "num_labels": len(label_names),
        "labels": escape(show_value(label_names)),
        "facts": format_facts(facts),
    }


def _usage(name: str, hidden_size: int) -> dict[str, Any]:
    """The model's name as Python and as the shell write it."""
    return {
        "python_name": json.dumps(name, ensure_ascii=False),
        "shell_name": shlex.quote(name),
        "hidden_size": hidden_size,
    }


def _results(results: Mapping[str, float]) -> str:
    rows = {}
    for key, value in results.items():
        stem, title = _metric(key)
        rows[title] = f"{value:.2%}" if stem in SHARES else value
    return format_facts(rows, "metric", "value")


def _metric(key: str) -> tuple[str, str]:
    """A metric's name without the prefixes that say how it was measured, and its title."""
    stem = key.removeprefix("eval_")
    averaged = ", averaged weights" if stem.startswith("ema_") else ""
    stem = stem.removeprefix("ema_")
    return stem, SHARES.get(stem, stem.replace("_", " ")) + averaged


def _eval_results(results: Mapping[str, float], data: Mapping[str, Any]) -> list[EvalResult]:
    name = one_line(data.get("name") or "unknown")
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=hub_id(name) or name,
            dataset_name=name,
            dataset_split=one_line(data["split"]) if data.get("split") else None,
            metric_type="accuracy",
            metric_name=_metric(key)[1],
            metric_value=float(value),
        )
        for key, value in results.items()
        if _metric(key)[0] in ACCURACIES
    ]


def _training(
    training: Mapping[str, Any], recipe: Mapping[str, Any], base_model: str | None, teacher: str | None
) -> dict[str, str]:
    facts = {
        "started from": base_model,
        "distilled from": teacher,
        **{key: value for key, value in training.items() if key not in ("command", "seconds")},
    }
    if training.get("seconds") is not None:
        facts["time (h:mm:ss)"] = str(datetime.timedelta(seconds=round(training["seconds"])))
    # JSON leaves only plain values: paths become text, tuples become lists, NumPy's numbers become numbers.
    plain = json.loads(json.dumps(dict(recipe), default=_plain))
    return {
        "training": format_facts(facts),
        "command": _fence(training["command"], "bash") if training.get("command") else "",
        "recipe": _fence(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "yaml") if recipe else "",
    }


def _bad_images(report: str | None) -> str:
    lines = (report or "").strip().splitlines()
    more = len(lines) - MAX_BAD_LINES_SHOWN
    shown = [*lines[:MAX_BAD_LINES_SHOWN], *([f"… and {more} more lines"] if more > 0 else [])]
    return _fence("\n".join(shown)) if lines else ""


def _pictures(pictures: Mapping[str, str], folder: Path) -> list[tuple[str, str]]:
    """Title and address of each picture that exists."""
    return [(escape(title), quote(str(file))) for title, file in pictures.items() if (folder / file).is_file()]


def format_facts(rows: Mapping[str, Any], name: str = "", value: str = "") -> str:
    """A Markdown table of two columns, without the rows that have no value; empty if no row is left."""
    lines = [
        f"| {escape(_title(key))} | {escape(show_value(row))} |"
        for key, row in rows.items()
        if row not in (None, [], {}, "")
    ]
    return "\n".join([f"| {name} | {value} |", "| --- | --- |", *lines]) if lines else ""


def _title(key: str) -> str:
    return " ".join(WORDS.get(word, word) for word in str(key).split("_"))


def show_value(value: Any) -> str:
    """A value for a reader: numbers have few digits, and repeated items are counted."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        counts = Counter(map(show_value, value))
        items = [f"{count} × {item}" if count > 1 else item for item, count in counts.items()]
        more = len(items) - MAX_ITEMS_SHOWN
        return "; ".join(items[:MAX_ITEMS_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return one_line(value)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def escape(text: Any) -> str:
    """Text as Markdown that shows it unchanged, also in a table."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", one_line(text))


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any fence inside it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = "\n".join(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "�", line) for line in text.splitlines())
    return f"{fence}{language}\n{lines}\n{fence}"
