"""Position embeddings: those of the source taken apart and resized, and those of the stages, which are new."""

import math
from dataclasses import dataclass

import torch

from hpool_vit import HPoolViTConfig
from hpool_vit.pooling_hpool_vit import POOLINGS, Tokens, resize_positions

from .building import ConversionReport
from .checkpoint import Checkpoint, ConversionError
from .sources import Source


# How the position embeddings of a new stage start.
STAGE_POSITIONS = ("zero", "pooled")

# Of a model without position embeddings, if nothing says otherwise.
DEFAULT_IMAGE_SIZE = 224


@dataclass
class Positions:
    """
    The position embeddings of a source.

    Args:
        class_token: that of the class token, of shape `(1, 1, hidden_size)`; None if there is no class token.
        registers: those of the register tokens, of shape `(1, num_registers, hidden_size)`; None if they have none.
        patches: those of the patches, of shape `(1, rows * columns, hidden_size)`; None if there are none at all.
        grid: rows and columns of patches.
    """

    class_token: torch.Tensor | None
    registers: torch.Tensor | None
    patches: torch.Tensor | None
    grid: tuple[int, int]

    def resized(self, grid: tuple[int, int], report: ConversionReport) -> torch.Tensor:
        """Those of the patches for another grid, of shape `(1, rows * columns, hidden_size)`."""
        assert self.patches is not None
        if self.grid == grid:
            return self.patches
        old, new = ("{} × {}".format(*sides) for sides in (self.grid, grid))
        report.notes.append(f"Resized the position embeddings from {old} to {new} patches.")
        return resize_positions(self.patches, self.grid, grid)

    def fitted(self, config: HPoolViTConfig, report: ConversionReport) -> torch.Tensor:
        """Those of class token and patches as this configuration has them, of shape `(1, tokens, hidden_size)`."""
        patches = self.resized(config.patch_grid(), report)
        if not config.use_class_token:
            return patches
        class_token = torch.zeros_like(patches[:, :1]) if self.class_token is None else self.class_token
        return torch.cat((class_token, patches), dim=1)


def split_positions(source: Source, image_size: int | tuple[int, int] | None, report: ConversionReport) -> Positions:
    """
    Takes the position embeddings of the special tokens and of the patches apart.

    The grid of patches is that of the source's own image size. If the source does not say its image size, the grid is
    that of `image_size`, provided that the number of positions fits. Otherwise it is a square.
    """
    checkpoint = source.checkpoint
    if not source.fields.get("use_position_embeddings", True):
        return Positions(None, None, None, _grid_without_positions(source, image_size, report))
    positions = checkpoint.positions
    image_size = source.fields.get("image_size", image_size)
    num_positions = positions.shape[1]
    num_special = sum(f"embeddings.{token}" in checkpoint for token in ("cls_token", "distillation_token"))
    # Some models have position embeddings for their registers too, and some for the patches alone.
    with_registers = num_special + checkpoint.num_registers
    for num_patches in (num_positions - with_registers, num_positions - num_special, num_positions):
        if grid := _find_grid(num_patches, checkpoint, image_size):
            break
    else:
        raise ConversionError(
            f"The source has {num_positions} position embeddings, {with_registers} of them for special tokens, and "
            "the others do not form a square: pass the height and width of its images as `image_size`."
        )
    if image_size is None and num_patches > num_positions - num_special:
        report.notes.append(
            f"Assumed {grid[0]} × {grid[1]} patches and no position embedding of the class token. If the images of "
            "the source are not square, pass their height and width as `image_size`."
        )
    # (1, special tokens, hidden_size), (1, patches, hidden_size)
    special, patches = positions.split([num_positions - num_patches, num_patches], dim=1)
    has_class_token = source.has_class_token
    class_token = special[:, :1] if has_class_token and special.shape[1] else torch.zeros_like(patches[:, :1])
    registers = special[:, num_special:] if special.shape[1] > num_special else None
    return Positions(class_token if has_class_token else None, registers, patches, grid)


def _grid_without_positions(
    source: Source, image_size: int | tuple[int, int] | None, report: ConversionReport
) -> tuple[int, int]:
    """Rows and columns of patches of the source's images, which nothing in its tensors depends on."""
    known = source.fields.get("image_size", image_size)
    if known is None:
        known = DEFAULT_IMAGE_SIZE
        report.notes.append(f"Assumed images of {known} × {known} pixels. The model takes images of any size.")
    return _whole_patches(source.checkpoint, known)


def _whole_patches(checkpoint: Checkpoint, image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, columns = checkpoint.patch_weight.shape[2:]
    return height // rows, width // columns


def _find_grid(
    num_patches: int, checkpoint: Checkpoint, image_size: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    if image_size is not None:
        grid = _whole_patches(checkpoint, image_size)
        if math.prod(grid) == num_patches:
            return grid
    side = math.isqrt(num_patches)
    return (side, side) if side * side == num_patches else None


def start_stages(
    config: HPoolViTConfig, positions: torch.Tensor | None, stage_positions: str, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """
    The position embeddings of the new stages, under the model's names.

    Args:
        config: the configuration of the model.
        positions: the model's first position embeddings, of shape `(1, tokens, hidden_size)`; None: it has none.
        stage_positions: one of `STAGE_POSITIONS`.
        report: where the new names are added.
    """
    lengths = config.stage_positions()
    initial = {block: torch.zeros(1, length, config.hidden_size) for block, length in lengths.items()}
    if stage_positions == "pooled" and positions is not None:
        initial = _pool_positions(config, positions)
    names = {block: f"hpool_vit.pooling.{block}.position_embeddings" for block in lengths}
    report.initialised += [f"{name} ({stage_positions})" for name in names.values()]
    return {names[block]: initial[block] for block in lengths}


@torch.no_grad()
def _pool_positions(config: HPoolViTConfig, positions: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each stage with position embeddings makes of the model's first ones, by block."""
    lengths, pooled = config.stage_positions(), {}
    for schedule in config.schedules if lengths else []:
        tokens = Tokens(positions.float(), num_prefix_tokens=int(config.use_class_token), grid=config.patch_grid())
        for block in schedule:
            # A new stage adds zeros.
            tokens = POOLINGS[config.pool_mode](config.with_schedule(schedule), block)(tokens)
            # (1, tokens after the stage, hidden_size)
            if tokens.patch_tokens.shape[1] == lengths[block]:
                pooled.setdefault(block, tokens.patch_tokens.clone())
    return pooled
