"""
Draw the leaderboard and the recovery as one picture: what every method costs at which speed.

    python examples/research/leaderboard/curve.py --output docs/images/merging.png

It reads what `leaderboard.py leaderboard` and `recovery.py test` have written, and measures nothing itself.
"""

import argparse
from pathlib import Path
from typing import Any

from leaderboard import BEFORE, OURS, OURS_IN_FEW, UNPOOLED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hpool_vit.toolkit.shared.figures import save_figure
from hpool_vit.toolkit.shared.files import read_json


RECOVERED = "merged_recovered"
# By what the JSON calls a line: its name in the picture, its colour and its marker.
LINES = {
    OURS: ("HPool-ViT", "#d95f02", "o-"),
    RECOVERED: ("HPool-ViT, recovered without labels", "#7a0177", "D"),
    BEFORE: ("HPool-ViT 0.1", "#f0a35e", "o:"),
    "ToMe": ("ToMe", "#1b6f8a", "s-"),
    "ToMe, class importance": ("ToMe, class importance", "#58a6bd", "s:"),
    "PiToMe": ("PiToMe", "#4c9a52", "^-"),
    "size-ranked (ATM)": ("size-ranked (ATM)", "#9b8b3a", "v-"),
    "ATC": ("ATC", "#6a6a6a", "P-"),
    "DiffRate": ("DiffRate", "#222222", "X-"),
}
PANELS = {"divergence": "KL to the model without pooling, lower is better", "top1": "Top-1 on ImageNet photos, %"}


def lines(leaderboard: dict[str, Any], recovery: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """
    The points of each line, by speed.

    Raises:
        ValueError: for a family that the picture has no colour for.
    """
    points: dict[str, list[dict[str, Any]]] = {}
    for row in leaderboard["rows"]:
        # Four stages are nearly the same line as ours.
        if row["family"] not in (UNPOOLED, OURS_IN_FEW):
            points.setdefault(row["family"], []).append(row)
    # Of recovered weights, the schedules that pool: speed 1 is the model that they came from.
    points[RECOVERED] = [
        row for row in recovery["rows"] if row["model"].startswith(f"{RECOVERED},") and row["fewer_macs"] > 1
    ]
    if unknown := sorted(points.keys() - LINES.keys()):
        raise ValueError(
            f"The leaderboard has the family {unknown[0]!r}, which LINES does not name: add a line to it."
        )
    return {family: sorted(points.get(family, []), key=lambda row: row["fewer_macs"]) for family in LINES}


def draw(leaderboard: dict[str, Any], recovery: dict[str, Any]) -> Figure:
    """One panel for each of `PANELS`, against the multiply-accumulates saved."""
    whole = next(row for row in leaderboard["rows"] if row["family"] == UNPOOLED)
    points = lines(leaderboard, recovery)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for family, rows in points.items():
            label, color, marker = LINES[family]
            is_ours = family in (OURS, RECOVERED)
            axes.plot(
                [row["fewer_macs"] for row in rows],
                [row[measure] for row in rows],
                marker,
                color=color,
                label=label,
                linewidth=2.6 if is_ours else 1.3,
                markersize=7 if is_ours else 5,
                zorder=3 if is_ours else 2,
            )
        finish(axes, title)
        if measure == "divergence":
            axes.set_yscale("log")
            axes.legend(fontsize=8, loc="lower right")
        else:
            axes.axhline(whole[measure], color="0.4", linewidth=1, linestyle="--")
            axes.text(
                0.99,
                whole[measure],
                "without pooling",
                color="0.4",
                ha="right",
                va="bottom",
                transform=axes.get_yaxis_transform(),
            )
    return figure


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("Times fewer multiply-accumulates (DeiT-Tiny)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    axes.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs/images/merging.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    leaderboard, recovery = (
        read_json(args.results_dir / f"merging_{name}.json") for name in ("leaderboard", "recovery")
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw(leaderboard, recovery), args.output, dpi=90)
    print(f"Saved {args.output}.")


if __name__ == "__main__":
    main()
