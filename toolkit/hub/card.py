"""
The model card of an HPool-ViT: a README.md with the metadata that the Hub reads, and what a reader has to know.

Every section is left out for which nothing is given, so that a model can have a card whose training is not known.
"""

import datetime
import json
import numbers
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..shared.console import hub_id, one_line


ACCURACIES = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
SHARES = {**ACCURACIES, "mean_class_accuracy": "Mean accuracy of the classes"}
POOLINGS = {"max": "max pooling", "avg": "average pooling", "merge": "merging of similar tokens"}
WORDS = {"cpu": "CPU", "gpu": "GPU", "gpus": "GPUs", "ram": "RAM", "gb": "(GB)"}
TAGS = ("hpool-vit", "image-classification", "custom_code")
MAX_ITEMS_SHOWN = 20
MAX_BAD_LINES_SHOWN = 50

USAGE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

name = {name}  # this folder, or its id on the Hub

classifier = pipeline("image-classification", model=name, trust_remote_code=True)
print(classifier("photo.jpg", top_k=3))

# What the classifier sees: one vector of {hidden_size} numbers per image.
image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True)
pixel_values = image_processor(Image.open("photo.jpg"), return_tensors="pt").pixel_values
with torch.no_grad():
    features = model(pixel_values).pooler_output
"""

CITATION = """\
@inproceedings{pan2021scalable,
  title     = {Scalable Vision Transformers with Hierarchical Pooling},
  author    = {Pan, Zizheng and Zhuang, Bohan and Liu, Jing and He, Haoyu and Cai, Jianfei},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021},
  note      = {arXiv:2103.10619}
}
"""


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
    Writes `output_dir/README.md`, over one that is there. Nothing is looked up on the Hub. The same template serves a
    training, which knows everything, and a folder that is shared later, whose earlier card is kept.

    Args:
        output_dir (`Path`): the saved folder; its name is the model's name.
        model (`HPoolViTForImageClassification`): the saved model.
        label_names (`list[str]`): its labels in order; any text.
        recipe: all settings of the training, shown as YAML.
        data: `name` of the data set (a Hub id, a folder or any text), `split` that the results belong to, and any more
            values to show, such as numbers of images.
        results: metrics of the saved weights. `top1` and `top5` in [0, 1], with `eval_` or `ema_` before them or not,
            also go into the metadata.
        hardware: values to show, as `training_report.describe_hardware` returns them.
        training: `seconds`, `images_per_second`, `epochs`, `seed`, `command` (the command line), or others to show.
        base_model, teacher: Hub id or folder of the weights it started from, and of the model it was distilled from.
        pictures: files in `output_dir` by their titles; those that are not there are left out.
        bad_images: the report of the images that were skipped, a line each.
        license: the identifier of a licence on the Hub, such as `apache-2.0`.
        repo_id: what the model is called on the Hub, `owner/name`; the folder's name counts no longer then.
        tables: Markdown tables by title, shown among the results.
        widget: the examples of the page's widget, as the Hub documents them: `src`, `example_title`, `output`.
        kept: sections of an earlier card, Markdown by title, that stand instead of this one's; others come before
            the citation.
        kept_metadata: an earlier card's metadata, which fill in what is not given.

    Returns:
        The path of the card.
    """
    recipe, data, results, hardware, training, pictures = (
        dict(given or {}) for given in (recipe, data, results, hardware, training, pictures)
    )
    kept = dict(kept or {})
    name = one_line(repo_id.rpartition("/")[2] if repo_id else Path(output_dir).resolve().name)
    sections = {
        f"# {escape(name)}": _description(model, label_names),
        "## How to use": _usage(repo_id or name, model.config.hidden_size),
        "## Results": _results(results, data),
        "## Training": _training(training, recipe, base_model, teacher),
        "## Data": _data(data, bad_images),
        "## Hardware": _table("", "", hardware),
        "## Pictures": "\n\n".join(
            f"### {escape(title)}\n\n![{escape(title)}]({quote(str(file))})"
            for title, file in pictures.items()
            if (Path(output_dir) / file).is_file()
        ),
    }
    sections |= {f"## {title}": text for title, text in kept.items()}
    tables = {f"### {escape(title)}": table for title, table in (tables or {}).items()}
    sections["## Results"] = "\n\n".join(filter(None, [sections["## Results"], *_flatten(tables)]))
    sections["## Citation"] = _fence(CITATION, "bibtex")
    metadata = _metadata(name, results, data, kept_metadata or ModelCardData(), license, base_model, widget)
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text)
    file = Path(output_dir) / "README.md"
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n").save(file)
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
    """What the Hub reads; of an earlier card everything that this one does not say itself."""
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


def _flatten(pairs: Mapping[str, str]) -> list[str]:
    return [part for pair in pairs.items() for part in pair]


def _description(model, label_names: list[str]) -> str:
    config = model.config
    blocks = ", ".join(map(str, config.hvt_pool or []))
    pooling = f"{POOLINGS[config.pool_mode]} before blocks {blocks} (the first is 0)" if blocks else "none"
    facts = {
        "labels": len(label_names),
        "image size": "{} × {} pixels".format(*config.image_shape),
        "parameters": f"{model.num_parameters():,}",
        "blocks": f"{config.num_hidden_layers}, {config.hidden_size} wide, {config.num_attention_heads} heads",
        "pooling": pooling,
        "tokens per stage": " → ".join(map(str, config.tokens_per_stage())),
    }
    return (
        "An HPool-ViT, a Vision Transformer that pools its token sequence between blocks, so that the later ones cost "
        "less ([Scalable Vision Transformers with Hierarchical Pooling](https://arxiv.org/abs/2103.10619)). It sorts "
        f"images into {len(label_names)} classes: {escape(show_value(label_names))}.\n\n{_table('', '', facts)}"
    )


def _usage(name: str, hidden_size: int) -> str:
    code = USAGE.format(name=json.dumps(name, ensure_ascii=False), hidden_size=hidden_size)
    return (
        "`trust_remote_code=True` lets Transformers run the model's code, which lies beside this file; with the "
        f"package `hpool_vit` imported it is not needed.\n\n{_fence(code, 'python')}"
    )


def _results(results: Mapping[str, float], data: Mapping[str, Any]) -> str:
    rows = {}
    for key, value in results.items():
        stem, title = _metric(key)
        rows[title] = f"{value:.2%}" if stem in SHARES else value
    table = _table("metric", "value", rows)
    on = " ".join(escape(data[key]) for key in ("name", "split") if data.get(key))
    return f"Measured on: {on}.\n\n{table}" if table and on else table


def _metric(key: str) -> tuple[str, str]:
    """A metric's name without the prefixes that tell how it was measured, and its title."""
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
) -> str:
    facts = {
        "started from": base_model,
        "distilled from": teacher,
        **{key: value for key, value in training.items() if key not in ("command", "seconds")},
    }
    if training.get("seconds") is not None:
        facts["time (h:mm:ss)"] = str(datetime.timedelta(seconds=round(training["seconds"])))
    parts = [_table("", "", facts)]
    if training.get("command"):
        parts.append("Command:\n\n" + _fence(training["command"], "bash"))
    if recipe:
        # Through JSON, which leaves plain values only: paths become text, tuples lists, NumPy's numbers numbers.
        plain = json.loads(json.dumps(dict(recipe), default=_plain))
        parts.append("Recipe:\n\n" + _fence(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "yaml"))
    return "\n\n".join(part for part in parts if part)


def _data(data: Mapping[str, Any], bad_images: str | None) -> str:
    parts = [_table("", "", data)]
    lines = (bad_images or "").strip().splitlines()
    if lines:
        more = len(lines) - MAX_BAD_LINES_SHOWN
        shown = [*lines[:MAX_BAD_LINES_SHOWN], *([f"… and {more} more lines"] if more > 0 else [])]
        parts.append("Bad images:\n\n" + _fence("\n".join(shown)))
    return "\n\n".join(part for part in parts if part)


def _table(name: str, value: str, rows: Mapping[str, Any]) -> str:
    lines = [
        f"| {escape(_title(key))} | {escape(show_value(row))} |"
        for key, row in rows.items()
        if row not in (None, [], {}, "")
    ]
    return "\n".join([f"| {name} | {value} |", "| --- | --- |", *lines]) if lines else ""


def _title(key: str) -> str:
    return " ".join(WORDS.get(word, word) for word in str(key).split("_"))


def show_value(value: Any) -> str:
    """A value for a reader: numbers with few digits, the same item several times as a number of items."""
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
    """Text as Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", one_line(text))


def _fence(text: str, language: str = "") -> str:
    """A code block, with a fence that is longer than any inside it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = "\n".join(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "�", line) for line in text.splitlines())
    return f"{fence}{language}\n{lines}\n{fence}"
