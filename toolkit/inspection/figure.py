"""Draws what an HPool-ViT makes of the patches of an image. The figures do without pyplot, so threads can draw."""

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpool_vit import HPoolViTConfig
from hpool_vit.pooling_hpool_vit import POOLINGS

from .stats import format_macs
from .trace import PoolingTrace, StageTrace, block_macs


# Inches.
PANEL, GAP, MARGIN, CHART = 2.4, 0.16, 0.2, 2.6
NAME, FIRST_HEADER, SECOND_HEADER, PREDICTION = 0.44, 0.56, 0.42, 2.2
SHARE_COLOURS, ROLLOUT_COLOURS, SIZE_COLOURS = "inferno", "magma", "YlGnBu"
STAGE_COLOURS = matplotlib.colormaps["YlGnBu_r"]
TOP_K = 5

SECOND_ROW = {
    "max": "Which patches won the max pooling",
    "avg": "What each patch supplied to the averages",
    "merge": "Patches per token: pale keeps its detail",
}


def draw(
    images: list[np.ndarray],
    trace: PoolingTrace,
    config: HPoolViTConfig,
    names: list[str] | None = None,
    chart: bool = True,
) -> Figure:
    """
    Draws, for each image, what the model saw, its prediction, and attention rollout. Each pooling stage has one panel
    with its tokens in the colours of their patches, and below it one panel with what each patch supplied (for merging,
    how many patches share a token).

    Args:
        images (`list` of arrays of shape `(height, width, 3)`):
            The images as the model saw them, in [0, 1], without pixels at the right and the bottom that do not fill a
            patch.
        trace (`PoolingTrace`): the trace of these images.
        config (`HPoolViTConfig`): the configuration of the model.
        names (`list[str]`, *optional*): a heading for each image.
        chart (`bool`, defaults to `True`): whether to draw the tokens and MACs per block below.

    Returns:
        `matplotlib.figure.Figure`: the figure, which is not registered with pyplot.

    Raises:
        ValueError: if the numbers of images, names and traced images differ.
    """
    if not len(images) == len(names or images) == len(trace.rollout):
        raise ValueError(
            f"{len(images)} images, {len(names or images)} names and {len(trace.rollout)} traced images: pass as many "
            "of each."
        )
    num_columns = len(trace.stages) + 1
    height = PANEL * min(max(images[0].shape[0] / images[0].shape[1], 0.3), 3)
    second_height = max(height, PREDICTION) if len(trace.stages) > 1 else PREDICTION
    band = FIRST_HEADER + height + SECOND_HEADER + second_height + (NAME if names else 0)
    width = 2 * MARGIN + num_columns * PANEL + (num_columns - 1) * GAP
    figure = Figure(figsize=(max(width, 7.4 if chart else 0), len(images) * band + chart * CHART + MARGIN), dpi=100)
    scales = _Scales(trace)
    for index, image in enumerate(images):
        top = index * band
        if names:
            _write(figure, MARGIN, top + NAME - 0.08, names[index], fontsize=13, color="0.35")
            top += NAME
        _draw_band(figure, top, height, image, trace, index, config, scales)
    if chart:
        _draw_chart(figure, len(images) * band, trace, config)
    return figure


def draw_chart(trace: PoolingTrace, config: HPoolViTConfig) -> Figure:
    """
    Draws the tokens and multiply-accumulates of each block, in front of those of the same model without pooling.

    Args:
        trace (`PoolingTrace`): the trace of any images.
        config (`HPoolViTConfig`): the configuration of the model.

    Returns:
        `matplotlib.figure.Figure`: the figure, which is not registered with pyplot.
    """
    figure = Figure(figsize=(11, CHART + MARGIN), dpi=100)
    _draw_chart(figure, 0, trace, config)
    return figure


class _Scales:
    """Colours that mean the same in every panel of a figure. Shares are relative to an even share."""

    def __init__(self, trace: PoolingTrace):
        pooled = trace.stages[1:] or trace.stages
        num_patches = trace.rollout.shape[1]
        self.shares = [stage.patch_share * num_patches for stage in trace.stages]
        self.rollout = trace.rollout * num_patches
        highest = max(float(share.max()) for share in self.shares[1:] or self.shares)
        self.share_norm = Normalize(0, max(highest, 1))
        # One outlier must not use up the range of colours.
        self.rollout_norm = Normalize(float(self.rollout.min()), float(self.rollout.quantile(0.995)), clip=True)
        self.size_norm = LogNorm(1, max(2, *(int(stage.sizes.max()) for stage in pooled)))


def _draw_band(figure, top, height, image, trace, index, config, scales):
    mode = config.pool_mode
    grey = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    lefts = [MARGIN + column * (PANEL + GAP) for column in range(len(trace.stages) + 1)]
    first = top + FIRST_HEADER
    second = first + height + SECOND_HEADER

    def panel(column: int, row: float, *title: str, height: float = height) -> Axes:
        axes = _place(figure, lefts[column], row, PANEL, height)
        for line, text in enumerate(reversed(title)):
            _write(figure, lefts[column], row - 0.08 - 0.2 * line, text, fontsize=12)
        axes.set_axis_off()
        return axes

    rows, columns = trace.grid
    extent = (0, columns, rows, 0)
    axes = panel(0, first, "What the model sees", f"{rows} × {columns} patches")
    axes.imshow(image, extent=extent, aspect="auto")
    grid = [[(0, row), (columns, row)] for row in range(rows + 1)] + [
        [(column, 0), (column, rows)] for column in range(columns + 1)
    ]
    axes.add_collection(LineCollection(grid, colors="white", linewidths=0.4, alpha=0.5))
    _draw_prediction(panel(0, second, "Prediction", height=PREDICTION), trace, index, config)

    for column, stage in enumerate(trace.stages[1:], start=1):
        before = trace.stages[column - 1].num_tokens
        axes = panel(column, first, f"Block {stage.block}", f"{before} → {stage.num_tokens} tokens")
        _draw_tokens(axes, stage, index, image, trace.grid)
        axes = panel(column, second)
        if stage.groups is not None:
            sizes = stage.sizes[index].gather(0, stage.groups[index])
            _draw_heat(axes, grey, sizes, trace.grid, scales.size_norm, SIZE_COLOURS)
        else:
            _draw_heat(axes, grey, scales.shares[column][index], trace.grid, scales.share_norm, SHARE_COLOURS)
    if len(trace.stages) > 1:
        _write(figure, lefts[1], second - 0.08, SECOND_ROW[mode], fontsize=12)

    token = "the class token" if config.reads_class_token else "all tokens"
    axes = panel(-1, first, "Attention rollout", f"from {token}")
    _draw_heat(axes, grey, scales.rollout[index], trace.grid, scales.rollout_norm, ROLLOUT_COLOURS)
    _draw_keys(figure, lefts[-1], second, scales, mode if len(trace.stages) > 1 else None)


def _draw_tokens(axes: Axes, stage: StageTrace, index: int, image: np.ndarray, grid: tuple[int, int]):
    """Draws each token in the colour of its patches. A patch that is in several tokens is split among them."""
    cells = token_cells(stage, index, grid).numpy()
    colours = (stage.share[index] @ patch_colours(image, grid)).numpy()
    picture = np.where(cells[..., None] >= 0, colours[cells], 0.12)
    axes.imshow(picture.clip(0, 1), extent=(0, grid[1], grid[0], 0), aspect="auto", interpolation="nearest")
    # The lines between small cells must not cover them.
    points = min(axes.bbox.height / len(cells), axes.bbox.width / grid[1]) * 72 / axes.figure.dpi
    width = min(1.0, points / 6)
    axes.add_collection(LineCollection(borders(cells, grid), colors="white", linewidths=width, capstyle="projecting"))


def token_cells(stage: StageTrace, index: int, grid: tuple[int, int]) -> torch.Tensor:
    """
    Which token is drawn in which cell.

    Returns:
        `torch.LongTensor` of shape `(rows * lanes, columns)`: the number of a token, or -1 for a patch that is in no
        token. `lanes` is the largest number of tokens that share a patch.
    """
    reached = stage.receptive_field[index]
    counts = reached.sum(0)
    lanes = max(1, int(counts.max()))
    tokens = torch.arange(len(reached))[:, None]
    # Neighbouring tokens overlap. Each takes one lane of the patches that it shares, and fills the others.
    cells = []
    for lane in range(lanes):
        distance = torch.where(reached, (lane - tokens) % lanes, lanes)
        cells.append(torch.where(counts > 0, distance.argmin(0), -1).view(grid))
    return torch.stack(cells, dim=1).flatten(0, 1)


def borders(cells: np.ndarray, grid: tuple[int, int]) -> list[list[tuple[float, float]]]:
    """The lines between the cells of different tokens, in units of patches."""
    height = grid[0] / len(cells)
    below = np.argwhere(cells[1:] != cells[:-1])
    beside = np.argwhere(cells[:, 1:] != cells[:, :-1])
    lines = [[(column, (row + 1) * height), (column + 1, (row + 1) * height)] for row, column in below]
    return lines + [[(column + 1, row * height), (column + 1, (row + 1) * height)] for row, column in beside]


def patch_colours(image: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """The mean colour of each patch, of shape `(rows * columns, 3)`."""
    pixels = torch.as_tensor(image, dtype=torch.float32).permute(2, 0, 1)
    return torch.nn.functional.adaptive_avg_pool2d(pixels, grid).flatten(1).T


def _draw_heat(axes, grey, values, grid, norm, colours):
    """Draws values of shape `(patches,)` over the photo."""
    heat = matplotlib.colormaps[colours](norm(values.view(grid).numpy()))[..., :3]
    heat = torch.as_tensor(heat).permute(2, 0, 1)[None]
    heat = torch.nn.functional.interpolate(heat, grey.shape[:2], mode="nearest")[0].permute(1, 2, 0).numpy()
    axes.imshow((heat * (0.6 + 0.6 * grey)).clip(0, 1), extent=(0, grid[1], grid[0], 0), aspect="auto")


def _draw_prediction(axes: Axes, trace: PoolingTrace, index: int, config: HPoolViTConfig):
    axes.set(xlim=(0, 1), ylim=(TOP_K, 0))
    if trace.logits is None:
        axes.text(0, 0.5, "none: the model has\nno classifier", fontsize=12, va="center", color="0.35")
        return
    probabilities, labels = trace.logits[index].softmax(-1).topk(min(TOP_K, config.num_labels))
    for row, (probability, label) in enumerate(zip(probabilities.tolist(), labels.tolist(), strict=True)):
        strong = {"fontsize": 12, "color": "black" if row == 0 else "0.35", "fontweight": "bold" if row == 0 else None}
        name = shorten(str(config.id2label[label]).split(",")[0])
        axes.text(0, row + 0.42, name, **strong, parse_math=False)
        axes.text(1, row + 0.42, f"{probability:.1%}", ha="right", **strong)
        axes.barh(row + 0.66, 1, height=0.22, color="0.92")
        axes.barh(row + 0.66, probability, height=0.22, color=STAGE_COLOURS(0.25) if row == 0 else "0.6")


def shorten(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _draw_keys(figure, left, top, scales, mode):
    lowest, highest = scales.rollout_norm.vmin, scales.rollout_norm.vmax
    keys = [("attention to a patch", ROLLOUT_COLOURS, f"{lowest:.1f}", f"{highest:.1f} × mean")]
    if mode and POOLINGS[mode].partitions:
        keys.append(("patches per token", SIZE_COLOURS, "1", f"{scales.size_norm.vmax:.0f}"))
    elif mode:
        keys.append(("supplied by a patch", SHARE_COLOURS, "0", f"{scales.share_norm.vmax:.1f} × mean"))
    for row, (title, colours, low, high) in enumerate(keys):
        axes = _place(figure, left, top + 0.3 + row * 1.0, PANEL, 0.2)
        axes.imshow(np.linspace(0, 1, 256)[None], cmap=colours, aspect="auto")
        axes.set_axis_off()
        axes.set_title(title, fontsize=12, loc="left", pad=4)
        for x, text, side in ((0, low, "left"), (1, high, "right")):
            axes.text(x, -0.25, text, ha=side, va="top", transform=axes.transAxes, fontsize=11, color="0.35")


def _draw_chart(figure: Figure, top: float, trace: PoolingTrace, config: HPoolViTConfig):
    tokens, num_patches = trace.tokens_per_block, trace.rollout.shape[1]
    schedule = [stage.block for stage in trace.stages[1:]]
    macs = block_macs(config.with_schedule(schedule), trace.grid)
    unpooled = block_macs(config.with_schedule(None), trace.grid)
    saved = f", {sum(unpooled) / sum(macs):.1f}× fewer" if schedule else ""
    unit, name = (1e9, "G") if max(unpooled) >= 1e9 else (1e6, "M")
    width = (figure.get_figwidth() - 2 * MARGIN - 0.9) / 2
    panels = (
        ("Tokens per block" + " (grey: without pooling)" * bool(schedule), tokens, [num_patches] * len(tokens)),
        (
            f"MACs per block ({name}): {format_macs(sum(macs))} in all blocks{saved}",
            *([n / unit for n in costs] for costs in (macs, unpooled)),
        ),
    )
    stage = np.searchsorted(schedule, range(len(tokens)), side="right")
    colours = [STAGE_COLOURS(0.1 + 0.6 * number / max(1, stage[-1])) for number in stage]
    for column, (title, values, full) in enumerate(panels):
        axes = _place(figure, MARGIN + 0.45 + column * (width + 0.45), top + 0.52, width - 0.1, CHART - 1.0)
        axes.bar(range(len(values)), full, color="0.93", width=0.86)
        axes.bar(range(len(values)), values, color=colours, width=0.86)
        axes.set_title(title, fontsize=12, loc="left", pad=8)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_xlabel("block", fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
        axes.tick_params(length=0, labelsize=11)
        axes.spines[["top", "right", "left"]].set_visible(False)


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the left and the top."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    )


def _write(figure: Figure, left: float, top: float, text: str, **kwargs):
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, parse_math=False, **kwargs)
