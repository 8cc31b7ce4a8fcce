"""Draws what a search tried: how much answers change at which speed. Does without pyplot, so that threads can draw."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


TRIED, CHOSEN, HELD_BACK = "0.72", "#d95f02", "#1b6f8a"


def draw_curve(record: dict[str, Any]) -> Figure:
    """
    Draws the loss, and with a head the agreement, against the speed: of all schedules that were tried, of those that
    were chosen, and of these on the images that were held back.

    Args:
        record (`dict`): the content of speed_up.json.

    Returns:
        `matplotlib.figure.Figure`: the figure, which is not registered with pyplot.
    """
    panels = [("loss", "KL to the model without pooling" if record["loss"] == "kl" else "1 − cosine")]
    panels += [("agreement", "Same answer as without pooling")] if record["loss"] == "kl" else []
    figure = Figure(figsize=(6 * len(panels), 4.4), dpi=100, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, record, name, title)
    return figure


def draw_panel(axes: Axes, record: dict[str, Any], name: str, title: str) -> None:
    tried, speeds = record["tried"], list(record["speeds"].values())
    most = max(row["num_images"] for row in tried)
    whole = [row for row in tried if row["num_images"] == most]
    few = [row for row in tried if row["num_images"] < most]
    by_time = record["measure"] == "time"
    groups = [(few, 6, "tried on few images"), (whole, 14, f"tried on {most} images")]
    # The share of a few images says little.
    for rows, size, label in groups[1:] if name == "agreement" else groups:
        axes.scatter([row["faster"] for row in rows], [row[name] for row in rows], s=size, color=TRIED, label=label)
    # The cost that the search minded, so that a point is in the place where it was looked for.
    places = [row["times_as_fast" if by_time else "times_fewer_macs"] for row in speeds]
    chosen = [row["searched"] for row in speeds]
    axes.plot(places, [row[name] for row in chosen], "o", color=CHOSEN, label="chosen")
    held_back = "chosen, on images held back" + " after recovery" * ("before_recovery" in record["unpooled"])
    axes.plot(places, [row[name] for row in speeds], "D-", color=HELD_BACK, label=held_back)
    axes.set_xlabel("Times as fast on this machine" if by_time else "Times fewer multiply-accumulates")
    axes.set_title(title, fontsize=11)
    if name == "agreement":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif min(row[name] for row in [*tried, *speeds]) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
