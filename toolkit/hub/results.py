"""Results to show in a model card: metrics, comparisons of runs, and tables of any measurements."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..shared.files import read_json
from ..shared.measuring import format_table
from .card import escape, show_value


@dataclass
class Results:
    """`metrics` of the weights, and Markdown `tables` by title."""

    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)


def read_results(paths: Sequence[Path]) -> Results:
    """
    Reads JSON files. A file holds metrics (`{"eval_top1": 0.9, …}`, as `all_results.json` does), a comparison of runs
    (see [`format_comparison`]), or any other list or dictionary of rows, whose plain values become a table.

    Raises:
        ValueError: if a file holds neither metrics nor rows.
    """
    results = Results()
    for path in map(Path, paths):
        content = read_json(path)
        title = path.stem.replace("_", " ")
        if isinstance(content, dict) and content and all(isinstance(value, int | float) for value in content.values()):
            results.metrics |= content
        elif is_comparison(content):
            results.tables[title] = format_comparison(content, next(iter(content)))
        else:
            results.tables[title] = format_rows(path, content)
    return results


def is_comparison(content: Any) -> bool:
    keys = {"runs", "macs", "images_per_second", "tokens"}
    rows = list(content.values()) if isinstance(content, dict) else []
    return bool(rows) and all(isinstance(row, dict) and keys <= row.keys() for row in rows)


def format_comparison(models: dict[str, dict[str, Any]], reference: str) -> str:
    """
    A Markdown table that compares models.

    Args:
        models: for each model by name, `tokens` per stage, `macs` and `images_per_second`, and its `runs` by seed,
            each with `accuracy` in percent, `epochs` and `train_seconds`.
        reference: the model to which the ratios relate.
    """
    base = models[reference]
    columns = (
        "model", "tokens", "MACs M", "fewer", "images/s", "faster", "epochs", "trained in", "top-1 %", "per seed",
    )  # fmt: skip
    return format_table(list(columns), [_comparison_row(name, model, base) for name, model in models.items()])


def _comparison_row(name: str, model: dict[str, Any], base: dict[str, Any]) -> list[str]:
    runs = list(model["runs"].values())
    accuracies = [run["accuracy"] for run in runs]
    return [
        name,
        ", ".join(map(str, model["tokens"])),
        f"{model['macs'] / 1e6:.1f}",
        f"{base['macs'] / model['macs']:.2f} ×",
        f"{model['images_per_second']:.0f}",
        f"{model['images_per_second'] / base['images_per_second']:.2f} ×",
        f"{runs[0]['epochs']:g}",
        f"{statistics.mean(run['train_seconds'] for run in runs) / 60:.1f} min",
        f"{statistics.mean(accuracies):.1f}",
        ", ".join(f"{accuracy:.1f}" for accuracy in accuracies),
    ]


def format_rows(path: Path, content: Any) -> str:
    """A table of the plain values in a list of rows, or in a dictionary of rows by name."""
    if isinstance(content, dict):
        content = [{"name": name, **row} for name, row in content.items() if isinstance(row, dict)]
    is_rows = isinstance(content, list) and all(isinstance(row, dict) for row in content)
    rows = [_flatten(row) for row in content] if is_rows else []
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if _is_plain_column(rows, key)]
    if not columns:
        raise ValueError(f"`results={path}` holds neither metrics nor rows: give a JSON file with either.")
    cells = [["" if _is_missing(row.get(key)) else escape(show_value(row[key])) for key in columns] for row in rows]
    return format_table([escape(key.replace("_", " ")) for key in columns], cells)


def _flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dictionary whose nested dictionaries have become keys of several words."""
    flat = {}
    for key, value in row.items():
        flat |= _flatten(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_plain_column(rows: list[dict[str, Any]], key: str) -> bool:
    values = [row.get(key) for row in rows]
    return not any(isinstance(value, list) for value in values) and not all(map(_is_missing, values))


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN differs from itself
