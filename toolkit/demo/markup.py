"""The HTML parts of the demo page: the tokens of a schedule, the costs of a forward pass, and messages."""

import math
from html import escape

import torch

from ..inspection.stats import format_macs
from ..shared.folders import counted
from .files import MAX_FILE_MEGABYTES, MAX_FILES, MAX_MEGAPIXELS
from .models import Answer, Schedule, ServedModel


HEADER = """
<h1>HPool-ViT</h1>
<p>HPool-ViT is a Vision Transformer that pools its tokens between blocks. It needs far fewer multiply-accumulates than
a plain ViT with the same number of parameters. Upload an image to see what the model answers, what the answer costs,
and which parts of the image the remaining tokens stand for.</p>
"""
LIMITS = (
    f"At most {MAX_FILES} images of {MAX_FILE_MEGABYTES} MB and {MAX_MEGAPIXELS} megapixels each. They stay on the "
    "machine that runs this page and are deleted after an hour."
)
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#header h1 { font-size: 2.1rem; margin: 0.4rem 0 0.2rem; }
#header p { max-width: 50rem; line-height: 1.5; opacity: 0.85; }
#schedule .tab-like-container, #schedule .min_value, #schedule .max_value { display: none; }
#tokens p { font-size: 0.85rem; margin: 8px 0 0; }
.stages { display: flex; align-items: flex-end; gap: 12px; }
.stages figure { margin: 0; text-align: center; }
.stages svg { display: block; margin: 0 auto 4px; fill: var(--color-accent); }
.stages figcaption { font-size: 0.75rem; line-height: 1.25; white-space: nowrap; }
.stages span { opacity: 0.7; }
#examples .grid-wrap, #images .grid-wrap { height: auto; min-height: 0; }
#examples .grid-container, #images .grid-container { display: flex; flex-flow: row wrap; gap: 8px; }
#examples .gallery-item, #images .gallery-item { width: auto; height: auto; }
#examples .grid-container::before { content: "Examples"; width: 100%; font-size: 0.82rem; opacity: 0.75; }
#examples .thumbnail-item { width: 46px; height: 46px; }
#images .thumbnail-item { width: 118px; height: 118px; }
#images .grid-wrap { max-height: 290px; overflow-y: auto; }
#images .gallery-item:only-child, #images .grid-wrap { max-height: 290px; overflow-y: auto; }
#images .gallery-item:only-child .thumbnail-item { width: 100%; height: 276px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; }
.tiles div { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 10px 14px;
  background: var(--block-background-fill); }
.tiles b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.tiles span { font-size: 0.8rem; opacity: 0.75; }
#panels img { max-width: 100%; margin: 0 auto; }
.message { border-left: 4px solid #d97706; padding: 8px 14px; background: rgb(217 119 6 / 10%); }
.message p { margin: 2px 0; overflow-wrap: anywhere; }
.note { font-size: 0.82rem; opacity: 0.75; }
footer { display: none !important; }
"""


def pooled_blocks(schedule: Schedule) -> str:
    """Where a schedule pools, in words. Blocks are counted from 0, as in `hvt_pool`."""
    if not schedule.hvt_pool:
        return "No pooling"
    pooling = "Pooling" if schedule.speed is None else f"Speed {schedule.speed:g}, pooling"
    return f"{pooling} at block{'s' * (len(schedule.hvt_pool) > 1)} {', '.join(map(str, schedule.hvt_pool))}"


def draw_schedule(schedule: Schedule) -> str:
    """One grid of squares per stage with a square per token, and the costs."""
    starts = ["at first", *(f"block {block}" for block in schedule.hvt_pool)]
    # All stages fit in one line, with squares of one size.
    step = min(6.0, 300 / sum(map(_columns, schedule.tokens)))
    figures = [
        f"<figure>{_squares(tokens, step)}<figcaption><b>{tokens}</b><br><span>{start}</span></figcaption></figure>"
        for tokens, start in zip(schedule.tokens, starts, strict=True)
    ]
    label = f"Tokens per stage: {', '.join(map(str, schedule.tokens))}"
    return (
        f'<div class="stages" role="img" aria-label="{label}">{"".join(figures)}</div>'
        f"<p>{pooled_blocks(schedule)}: {format_macs(schedule.macs)} multiply-accumulates (MACs) per image</p>"
    )


def _columns(tokens: int) -> int:
    return math.ceil(math.sqrt(tokens))


def _squares(tokens: int, step: float) -> str:
    columns = _columns(tokens)
    squares = "".join(
        f'<rect x="{index % columns * step:.2f}" y="{index // columns * step:.2f}" '
        f'width="{step * 0.8:.2f}" height="{step * 0.8:.2f}"/>'
        for index in range(tokens)
    )
    height = math.ceil(tokens / columns) * step
    return f'<svg width="{columns * step:.1f}" height="{height:.1f}" aria-hidden="true">{squares}</svg>'


def draw_tiles(model: ServedModel, schedule: Schedule, answer: Answer, num_images: int) -> str:
    """Latency, images per second, tokens and multiply-accumulates, one tile each."""
    device = model.model.device.type
    where = f"on the CPU, {counted(torch.get_num_threads(), 'thread')}" if device == "cpu" else f"on {device}"
    share = schedule.macs / model.macs_without_pooling
    batch = "one by one" if num_images == 1 else f"in a batch of {num_images}"
    tiles = {
        "latency": (f"{answer.milliseconds:.1f} ms", f"per image, {where}"),
        "rate": (f"{answer.images_per_second:,.0f} / s", f"images, {batch}"),
        "tokens-per-stage": (" → ".join(map(str, schedule.tokens)), "tokens per stage"),
        "macs": (f"{format_macs(schedule.macs)} MACs", f"{share:.0%} of the MACs without pooling"),
    }
    return '<div class="tiles">{}</div>'.format(
        "".join(f'<div id="{name}"><b>{value}</b><span>{text}</span></div>' for name, (value, text) in tiles.items())
    )


def caption(scores: dict[str, float]) -> str:
    return ", ".join(f"{label} {score:.0%}" for label, score in scores.items())


def format_messages(messages: list[str]) -> str:
    """A box of messages, or nothing. Messages may contain text from visitors, such as names of files."""
    lines = "".join(f"<p>{escape(message)}</p>" for message in messages)
    return f'<div class="message" role="alert">{lines}</div>' if messages else ""
