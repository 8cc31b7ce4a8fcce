"""The page that runs an exported model in a browser, as static files: what it needs besides the model."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.pooling_hpool_vit import POOLINGS

from ..inspection.trace import trace_pooling
from ..shared.measuring import Logits
from .checks import ExportError
from .runtime import read_runtime


WEB_FILES = Path(__file__).with_name("web_files")
# ONNX puts the weights of larger models into a second file, and no browser has memory for them.
MAX_BYTES = 2**31 - 2**24
DIGITS = [str(digit) for digit in range(10)]


class LogitsAndGroups(Logits):
    """
    A classifier that merges tokens. It returns the logits, and the token that each patch is in after each stage: int32
    of shape `(batch_size, stages, patches)`.
    """

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stages = self.model.base_model.pooling.in_use().values()
        groups = []
        hooks = [
            stage.register_forward_hook(lambda stage, args, tokens: groups.append(groups_of(tokens)))
            for stage in stages
        ]
        logits = super().forward(pixel_values)
        for hook in hooks:
            hook.remove()
        return logits, torch.stack(groups, dim=1).int()


def groups_of(tokens: Any) -> torch.Tensor:
    """The patch token of each patch; before any tokens merge, each patch is one."""
    if tokens.assignment is not None:
        return tokens.assignment
    batch_size, num_patches, _ = tokens.patch_tokens.shape
    return torch.arange(num_patches).expand(batch_size, -1)


def with_groups(model: HPoolViTForImageClassification, **options: Any) -> nn.Module:
    """
    The model to trace: with the groups of the patches if tokens merge, and with the logits alone if not.

    Raises:
        ExportError: for a model that a page cannot show.
    """
    config = model.config
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    if num_bytes > MAX_BYTES:
        raise ExportError(f"The model has {num_bytes / 1e9:.1f} GB, too much for a browser, which takes 2 GB.")
    if config.num_channels not in (1, 3):
        raise ExportError(f"The page shows pictures, and the model takes images of {config.num_channels} channels.")
    return (LogitsAndGroups if merges(model) else Logits)(model, **options)


def merges(model: HPoolViTForImageClassification) -> bool:
    return bool(model.config.hvt_pool) and POOLINGS[model.config.pool_mode].partitions


def describe(model: HPoolViTForImageClassification, folder: Path) -> None:
    """Writes what the page has to know of the model, tokens.json, and a picture to begin with, example.png."""
    (folder / "tokens.json").write_text(json.dumps(describe_tokens(model)), encoding="utf-8")
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    example = draw_seven() if labels == DIGITS else draw_house()
    example.save(folder / "example.png")


def describe_tokens(model: HPoolViTForImageClassification) -> dict[str, Any]:
    """
    Channels, rows and columns of patches, whether tokens merge and, for each stage, its block, how many tokens there
    are then, and the patches in the window of each token; None if tokens merge.
    """
    config = model.config
    trace = trace_pooling(model, torch.zeros(1, config.num_channels, *config.image_shape))
    stages = []
    for stage in trace.stages[1:]:
        windows = [token.nonzero().flatten().tolist() for token in stage.receptive_field[0]]
        windows = windows if stage.groups is None else None
        stages.append({"block": stage.block, "tokens": stage.num_tokens, "windows": windows})
    return {"channels": config.num_channels, "grid": trace.grid, "merges": merges(model), "stages": stages}


def page_files(runtime: str | Path | None) -> dict[str, bytes]:
    """The files of the page that are the same for every model, by their names in the folder."""
    files = {f"runtime/{name}": content for name, content in read_runtime(runtime).items()}
    return files | {file.name: file.read_bytes() for file in WEB_FILES.iterdir() if file.is_file()}


def draw_seven() -> Image.Image:
    """A digit as if written by hand."""
    image = Image.new("RGB", (256, 256))
    pen = ImageDraw.Draw(image)
    pen.line([(64, 48), (192, 48), (104, 216)], fill="white", width=32, joint="curve")
    return image.resize((32, 32), Image.Resampling.BOX)


def draw_house() -> Image.Image:
    """A house on a hill."""
    # The sky is paler towards the horizon. Drawn large and made smaller, edges are smooth.
    sky = Image.linear_gradient("L").resize((960, 720))
    image = Image.merge(
        "RGB", [sky.point(lambda value, low=low: low + value * (250 - low) // 255) for low in (70, 140, 220)]
    )
    pen = ImageDraw.Draw(image)
    pen.ellipse((640, 110, 750, 220), fill="#ffe27a")
    pen.ellipse((-300, 460, 800, 1100), fill="#4f8f4a")
    pen.ellipse((300, 500, 1400, 1200), fill="#3d7a45")
    pen.rectangle((330, 330, 610, 560), fill="#e9dcc3")
    pen.polygon([(290, 340), (470, 200), (650, 340)], fill="#a8432f")
    pen.rectangle((435, 440, 505, 560), fill="#5b3a26")
    for left in (360, 530):
        pen.rectangle((left, 380, left + 52, 432), fill="#8fb8d8", outline="white", width=6)
    pen.rectangle((706, 420, 734, 600), fill="#5b3a26")
    for left, top in ((630, 310), (710, 300), (670, 250)):
        pen.ellipse((left, top, left + 110, top + 170), fill="#2f6b3a")
    return image.resize((480, 360), Image.Resampling.LANCZOS)
