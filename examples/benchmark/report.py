"""Summarise the rounds of a benchmark: medians, ratios within each round, and tables in Markdown."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from modes import Row

from hpool_vit.toolkit.shared.measuring import format_table, quartiles


NOTES = """\
images/s and all ratios: median over the rounds (quartiles). Ratios are taken within each round, in which all rows take
turns. *MACs*: multiply-accumulates per image, with the backward pass in training; *fewer*: than the reference's.
*faster*: than the reference in the same mode. p50, p95: of a whole batch. *memory*: on a CPU the peak of resident
memory during a step in a fresh process, above that with all libraries loaded; on a GPU the peak of PyTorch's tensors.
*of roof*: speed as a share of the model's matrix products alone. *of peak*: multiply-accumulates per second as a share
of those of one large matrix product."""


@dataclass
class Measurement:
    """The measurements of one row: images per second in each round, and seconds of each call."""

    row: Row
    reason: str | None = None
    macs: int | None = None
    memory_mb: float | None = None
    state_mb: float | None = None
    ready_seconds: float | None = None
    calls: int = 1
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    joules: float = 0.0

    @property
    def ran(self) -> bool:
        return self.reason is None and bool(self.rates)


def summarise(
    measurements: list[Measurement], reference: str, peaks: dict[torch.dtype, Measurement], has_energy: bool
) -> list[dict[str, Any]]:
    """
    One record per row, for JSON.

    Args:
        measurements: the rows of one group, all with the same number of rounds.
        reference: a model, which is compared in the same mode, or `model/mode`.
        peaks: the measurement of one large matrix product, by type.
        has_energy: whether `joules` were measured.
    """
    by_name = {(measurement.row.model, measurement.row.mode.name): measurement for measurement in measurements}
    records = []
    for measurement in measurements:
        row = measurement.row
        record: dict[str, Any] = {"model": row.model, "mode": row.mode.name, "macs": measurement.macs}
        if not measurement.ran:
            records.append({**record, "not_run": measurement.reason})
            continue
        model, _, mode = reference.rpartition("/")  # or a model, whose name may be a path
        base = by_name.get((reference, row.mode.name)) or by_name.get((model, mode))
        record |= describe_speed(measurement, has_energy)
        record |= compare(measurement, base)
        first = next(other for other in measurements if other.row.model == row.model)
        if first is not measurement and first.ran:
            record["over_first_mode"] = ratios(measurement, first)
        if roof := find_roof(measurement, measurements):
            record["of_roof"] = ratios(measurement, roof)
        if measurement.macs and row.mode.engine in (None, "roof", "onnx"):
            record["of_peak"] = share_of_peak(measurement, peaks[row.mode.dtype])
        records.append(record)
    return records


def describe_speed(measurement: Measurement, has_energy: bool) -> dict[str, Any]:
    p50, p95 = np.percentile(measurement.seconds, (50, 95)) * 1e3
    images = len(measurement.rates) * measurement.calls * measurement.row.batch_size
    return {
        "images_per_second": quartiles(measurement.rates),
        "latency_ms": {"p50": round(p50, 3), "p95": round(p95, 3), "calls": len(measurement.seconds)},
        "memory_mb": measurement.memory_mb,
        "state_mb": measurement.state_mb,
        "joules_per_image": float(f"{measurement.joules / images:.4g}") if has_energy else None,
        "ready_seconds": measurement.ready_seconds,
        "calls_per_round": measurement.calls,
        "rates": [float(f"{rate:.5g}") for rate in measurement.rates],
    }


def compare(measurement: Measurement, base: Measurement | None) -> dict[str, Any]:
    """The ratios to the reference: `faster`, `fewer_macs` and `memory_ratio`."""
    if base is None or not base.ran:
        return {}
    comparison: dict[str, Any] = {"faster": ratios(measurement, base)}
    if measurement.macs and base.macs:
        comparison["fewer_macs"] = round(base.macs / measurement.macs, 4)
    if measurement.memory_mb and base.memory_mb:
        comparison["memory_ratio"] = round(measurement.memory_mb / base.memory_mb, 4)
    return comparison


def ratios(measurement: Measurement, base: Measurement) -> list[float]:
    """Quartiles of the ratio of speeds within each round."""
    return quartiles([rate / other for rate, other in zip(measurement.rates, base.rates, strict=True)])


def find_roof(measurement: Measurement, measurements: list[Measurement]) -> Measurement | None:
    """The roof of the same model, with products of the same type."""
    row = measurement.row
    for other in measurements:
        same = (other.row.model, other.row.mode.dtype) == (row.model, row.mode.dtype)
        if same and other.row.mode.engine == "roof" and other is not measurement and other.ran:
            return other if row.mode.engine != "roof" else None
    return None


def share_of_peak(measurement: Measurement, peak: Measurement) -> list[float]:
    speeds = zip(measurement.rates, peak.rates, strict=True)
    return quartiles([rate * measurement.macs / (other * peak.macs) for rate, other in speeds])


def format_results(results: dict[str, Any]) -> str:
    """A whole run as Markdown."""
    machine, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    environment = ", ".join(f"{name}={value}" for name, value in machine["environment"].items())
    lines = [
        "# Benchmark",
        "",
        f"- command: `{results['command']}`",
        f"- machine: {machine['machine']}, {machine['cpu']}, {machine['cpu_cores']} cores, {machine['ram_gb']} GB",
        f"- GPUs: {', '.join(machine['gpus']) or 'none'}",
        f"- device {settings['device']}, {settings['threads']} threads, {settings['rounds']} rounds",
        f"- load average at the start: {results['load_average']}",
        f"- versions: {versions}",
        f"- environment: {environment or 'no variables for threads and memory'}",
        f"- energy: {results['energy']}",
        *([] if results["complete"] else ["- **unfinished**: groups are missing"]),
    ]
    for group in results["groups"]:
        lines += ["", f"## {title(group)}", "", format_group(group, settings["reference"])]
        for dtype, speed in group["matrix_peak_tflops"].items():
            lines += ["", f"One large matrix product ({dtype}): {speed[1]:.3g} TFLOP/s."]
    return "\n".join([*lines, "", NOTES, ""])


def title(group: dict[str, Any]) -> str:
    size = group["image_size"]
    return f"{group['task']}, {size} × {size}, batch {group['batch_size']}"


def format_group(group: dict[str, Any], reference: str) -> str:
    """The table of one group without empty columns, and below it what could not run."""
    ran = [row for row in group["rows"] if "not_run" not in row]
    columns = {
        "model": lambda row: row["model"],
        "mode": lambda row: row["mode"],
        "MACs G": lambda row: row["macs"] and f"{row['macs'] / 1e9:.3g}",
        "images/s": lambda row: spread(row["images_per_second"], "{:.4g}"),
        f"faster than {reference}": lambda row: spread(row.get("faster"), "{:.2f}", " ×"),
        "fewer MACs": lambda row: row.get("fewer_macs") and f"{row['fewer_macs']:.2f} ×",
        "over first mode": lambda row: spread(row.get("over_first_mode"), "{:.2f}", " ×"),
        "of roof": lambda row: spread(row.get("of_roof"), "{:.2f}"),
        "of peak": lambda row: row.get("of_peak") and f"{row['of_peak'][1]:.2f}",
        "p50 ms": lambda row: f"{row['latency_ms']['p50']:.4g}",
        "p95 ms": lambda row: f"{row['latency_ms']['p95']:.4g}",
        "memory MB": lambda row: row["memory_mb"] and f"{row['memory_mb']:.0f}",
        "memory ratio": lambda row: row.get("memory_ratio") and f"{row['memory_ratio']:.2f}",
        "J/image": lambda row: row["joules_per_image"] and f"{row['joules_per_image']:.3g}",
    }
    cells = {name: [cell(row) or "" for row in ran] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    rows = [list(values) for values in zip(*cells.values(), strict=True)]
    missing = [f"- {row['model']}, {row['mode']}: {row['not_run']}" for row in group["rows"] if "not_run" in row]
    parts = [format_table(list(cells), rows)] if rows else []
    return "\n\n".join([*parts, "\n".join(["Could not run:", "", *missing])] if missing else parts)


def spread(values: list[float] | None, pattern: str, unit: str = "") -> str:
    """A median with its quartiles."""
    if values is None:
        return ""
    low, median, high = (pattern.format(value) for value in values)
    return f"{median}{unit} ({low}–{high})"
