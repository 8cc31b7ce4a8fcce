"""
Turns a trained Vision Transformer into an HPool-ViT that starts from its weights.

    python convert_vit_checkpoint.py --model_name_or_path google/vit-base-patch16-224 --output_dir warm --num_labels 2
    python convert_vit_checkpoint.py --model_name_or_path vit.safetensors --output_dir merged --pool_mode merge

The source is a folder or Hub id of Transformers' ViT (also of DINO and DeiT), DeiT, ViT-MSN or DINOv2 or of timm's
ViT and DeiT, or a file in timm's naming. What is dropped, newly initialised or assumed is printed. [`convert_vit`]
does the same in a program.
"""

import argparse
import math
import pickle
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.image_utils import PILImageResampling
from transformers.utils import cached_file

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.pooling_hpool_vit import HPoolViTPooling, resize_positions

from ..shared.console import run
from ..shared.files import check_output_dir, read_json
from .checkpoint import (
    Checkpoint,
    ConversionError,
    ConversionReport,
    build_model,
    check_labels,
    image_size_of,
    infer_heads,
    parameter_shapes,
    read_checkpoint,
    read_labels,
    refuse,
    resolve_overrides,
    write_folder,
)


# The pooling that a source of 12 blocks gets when none is asked for; the blocks are scaled to other depths.
POOLING_DEFAULTS = {"hvt_pool": [1, 5, 9]}
MERGE_DEFAULTS = {
    "hvt_pool": [3, 5, 7, 9],
    "merge_ratio": [37 / 196, 37 / 159, 37 / 122, 37 / 85],
    "proportional_attention": True,
}

POSITIONS = "hpool_vit.embeddings.position_embeddings"
STAGE_POSITIONS = ("zero", "pooled")
MODEL_TYPES = ("vit", "deit", "vit_msn", "dinov2")
FILE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")

# Names of Transformers' models, as patterns, and ours.
TRANSFORMERS_NAMES = (
    (r"^(vit|deit|dinov2)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q)uery\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(k)ey\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.lambda1$", ".scale"),
    (r"^cls_classifier\.", "classifier."),
)

# Attributes of an image processor that are kept. Images are converted to RGB whatever the source did.
PROCESSOR_ATTRIBUTES = ("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size")
PROCESSOR_ATTRIBUTES += ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")

# Tensors without which the source is nearly the same function, under our names and timm's.
DROPPABLE = r"^(embeddings\.)?(mask|dist|distillation)_token$|^(pooler|decoder|head_dist|distillation_classifier)\."

# Tensors without which it is another one.
STRANGERS = {
    r"^blocks\.\d+\.pos_embed$": "of the paper's model, for which there is convert_hvt_checkpoint.py",
    r"reg(ister)?_token": "of register tokens, which HPool-ViT does not have",
    r"norm_pre": "of a norm before the first block (CLIP), which HPool-ViT does not have",
    r"[qk]_norm": "of a norm of queries and keys, which HPool-ViT does not have",
    r"pre_logits": "of a hidden layer before the head, which HPool-ViT does not have",
    r"attn_pool": "of pooling by attention, which HPool-ViT does not have",
    r"rope|rel_pos|relative_position": "of relative or rotary positions, which HPool-ViT does not have",
    r"w12|weights_in|gate_proj|fc1_[gx]": "of a gated MLP (SwiGLU), which HPool-ViT does not have",
    r"^decoder_": "of a masked autoencoder's decoder, which HPool-ViT does not have",
}


@dataclass
class Source:
    """
    A trained ViT.

    Args:
        checkpoint: its tensors, asked for by our names.
        reads_class_token: whether its head, or what it is known for, reads the class token.
        fields: what else is known about it, as fields of our configuration.
        image_processor: attributes of its image processor; None: unknown.
        notes: what the user should know about it.
    """

    checkpoint: Checkpoint
    reads_class_token: bool
    fields: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Positions:
    """The source's position embeddings: `patches` of shape `(1, rows * columns, width)`, `grid` = (rows, columns)."""

    class_token: torch.Tensor | None
    patches: torch.Tensor
    grid: tuple[int, int]


def convert_vit(
    model_name_or_path: str, stage_positions: str = "zero", use_ema: bool = False, **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """
    An HPool-ViT that starts from the weights of a trained ViT.

    Args:
        model_name_or_path (`str`):
            A folder or Hub id of Transformers' ViT, DeiT, ViT-MSN or DINOv2 or of timm's ViT or DeiT, or a file in
            timm's naming.
        stage_positions (`str`, defaults to `"zero"`):
            How the position embeddings of the new stages start: `"zero"`, or `"pooled"` from the first ones with the
            stages' own pooling.
        use_ema (`bool`, defaults to `False`):
            Take the moving average of the weights, where a training checkpoint has one.
        config_overrides:
            Fields of [`HPoolViTConfig`]: the pooling (`hvt_pool=None`: none at all), `num_labels` or `id2label`
            (another number than the source's makes a new head), `use_class_token` (by default if the source's head
            reads it), `image_size` (another one than the source's resizes the position embeddings), …

    Returns:
        The model, in evaluation mode and float32, and the report of what was dropped, newly initialised or assumed.

    Raises:
        ConversionError: for a source that cannot be converted; it names the file or the tensor.
        ValueError: for a configuration that no model can be built from.
    """
    return convert_source(read_source(model_name_or_path, use_ema), stage_positions, **config_overrides)


def read_source(model_name_or_path: str, use_ema: bool = False) -> Source:
    """Reads a trained ViT from a file, a folder or the Hub; arguments and errors as for [`convert_vit`]."""
    path = Path(model_name_or_path)
    if path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir()):
        return _read_timm(read_checkpoint(model_name_or_path, use_ema), {})
    config = read_json(cached_file(model_name_or_path, "config.json"))
    if config.get("model_type") in MODEL_TYPES:
        return _read_transformers(model_name_or_path)
    if "architecture" not in config:
        raise ConversionError(
            f"`{model_name_or_path}` has the `model_type` {config.get('model_type')!r}: convertible are "
            f"{', '.join(MODEL_TYPES)}, and ViT and DeiT of timm."
        )
    weights = cached_file(model_name_or_path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    return _read_timm(read_checkpoint(weights or cached_file(model_name_or_path, "pytorch_model.bin")), config)


def _read_transformers(model_name_or_path: str) -> Source:
    config = AutoConfig.from_pretrained(model_name_or_path)
    has_head = any("ForImageClassification" in name for name in config.architectures or [])
    auto_class = AutoModelForImageClassification if has_head else AutoModel
    try:
        model, loading = auto_class.from_pretrained(model_name_or_path, config=config, output_loading_info=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ConversionError(f"The weights of `{model_name_or_path}` cannot be read: {error}") from error
    tensors = model.state_dict()
    for name in sorted(loading["missing_keys"]):
        if not name.startswith("pooler."):
            raise ConversionError(f"The tensor `{name}` is missing: `{model_name_or_path}` is incomplete.")
        del tensors[name]
    tensors |= {name: torch.empty(0) for name in loading["unexpected_keys"]}
    names = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "attention_probs_dropout_prob")
    fields = {name: getattr(config, name) for name in names}
    # One rate of Transformers' ViT is applied in all three places.
    fields |= dict.fromkeys(("dropout", "hidden_dropout_prob", "projection_dropout_prob"), config.hidden_dropout_prob)
    if has_head:
        fields |= {"id2label": config.id2label, "label2id": config.label2id}
    checkpoint = Checkpoint({_our_name(name): tensor for name, tensor in tensors.items()})
    return Source(checkpoint, True, fields, _read_image_processor(model_name_or_path))


def _our_name(name: str) -> str:
    for pattern, replacement in TRANSFORMERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _read_image_processor(model_name_or_path: str) -> dict[str, Any] | None:
    try:
        attributes = AutoImageProcessor.from_pretrained(model_name_or_path).to_dict()
    except (OSError, ValueError):
        return None
    given = {name: attributes[name] for name in PROCESSOR_ATTRIBUTES if attributes.get(name) is not None}
    # What Transformers' processors leave open means no, while ours have the crop by default.
    return {"do_center_crop": False, **given}


def _read_timm(checkpoint: Checkpoint, config: dict[str, Any]) -> Source:
    """A file in timm's naming, with what a timm folder's `config.json` says about it, if there is one."""
    # The names of the original DeiT III.
    tensors = {re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name): value for name, value in checkpoint.tensors.items()}
    checkpoint.tensors = tensors
    inferred = "avg" if "fc_norm.weight" in tensors or "cls_token" not in tensors else "token"
    pooling = config.get("global_pool") or inferred
    if pooling not in ("avg", "token"):
        raise ConversionError(f"The source has `global_pool={pooling!r}`: convertible are 'avg' and 'token'.")
    source = Source(checkpoint, reads_class_token=pooling == "token")
    # timm's name of a final norm that follows the mean.
    source.fields["norm_after_pooling"] = "fc_norm.weight" in tensors
    if heads := config.get("model_args", {}).get("num_heads"):
        source.fields["num_attention_heads"] = heads
    if data := config.get("pretrained_cfg"):
        source.fields["image_size"] = tuple(data["input_size"][1:])
        source.image_processor = _timm_image_processor(data)
    return source


def _timm_image_processor(data: dict[str, Any]) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says about the preparation of images."""
    height, width = data["input_size"][1:]
    attributes = {
        "size": {"shortest_edge": int(max(height, width) / data.get("crop_pct", 0.875))},
        "crop_size": {"height": height, "width": width},
        "resample": PILImageResampling[data.get("interpolation", "bicubic").upper()],
        "image_mean": data.get("mean"),
        "image_std": data.get("std"),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def convert_source(
    source: Source, stage_positions: str = "zero", **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """As [`convert_vit`], for a source that has been read; it is used up."""
    if stage_positions not in STAGE_POSITIONS:
        raise ValueError(f"`stage_positions={stage_positions!r}` is unknown: choose {' or '.join(STAGE_POSITIONS)}.")
    overrides = resolve_overrides(config_overrides)
    report = ConversionReport(notes=list(source.notes))
    refuse(source.checkpoint, STRANGERS)
    positions = split_positions(source, overrides.get("image_size"), report)
    config = build_config(source, positions, overrides, report)
    given = convert_embeddings(source, config, positions, report)
    given |= convert_stages(config, given[POSITIONS], stage_positions, report)
    new = choose_new(source, config, report)
    report.dropped += source.checkpoint.drop(DROPPABLE)
    return build_model(config, source.checkpoint, given, new), report


def split_positions(source: Source, image_size: int | tuple[int, int] | None, report: ConversionReport) -> Positions:
    """
    Takes the position embeddings of special tokens and of patches apart.

    The grid is that of the source's own image size or, where the source does not tell it, that of `image_size`, if the
    number of positions fits; else it is a square.
    """
    checkpoint, positions = source.checkpoint, source.checkpoint.positions
    image_size = source.fields.get("image_size", image_size)
    num_positions = positions.shape[1]
    num_special = sum(f"embeddings.{token}" in checkpoint for token in ("cls_token", "distillation_token"))
    # Some models have positions for the patches alone.
    for num_patches in (num_positions - num_special, num_positions):
        if grid := _find_grid(num_patches, checkpoint, image_size):
            break
    else:
        raise ConversionError(
            f"The position embeddings hold {num_positions} positions, {num_special} of them of special tokens, and "
            "the others are no square: pass the source's `--image_size HEIGHT WIDTH`."
        )
    if image_size is None and num_patches > num_positions - num_special:
        report.notes.append(
            f"Assumed {grid[0]} × {grid[1]} patches and no position of the class token; if the source's images are no "
            "squares, pass their `--image_size`."
        )
    special, patches = positions.split([num_positions - num_patches, num_patches], dim=1)
    class_token = special[:, :1] if special.shape[1] else torch.zeros_like(patches[:, :1])
    return Positions(class_token if "embeddings.cls_token" in checkpoint else None, patches, grid)


def _find_grid(
    num_patches: int, checkpoint: Checkpoint, image_size: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    if image_size is not None:
        sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = tuple(size // patch for size, patch in zip(sizes, checkpoint.patch_weight.shape[2:], strict=True))
        if math.prod(grid) == num_patches:
            return grid
    side = math.isqrt(num_patches)
    return (side, side) if side * side == num_patches else None


def build_config(
    source: Source, positions: Positions, overrides: dict[str, Any], report: ConversionReport
) -> HPoolViTConfig:
    """What the tensors say, what else is known, the pooling's defaults and, above all, what the user wants."""
    fixed = source.checkpoint.shape_fields
    for name in fixed.keys() & overrides.keys():
        if overrides[name] != fixed[name]:
            raise ConversionError(f"`{name}={overrides[name]!r}` cannot be chosen: the source has {fixed[name]!r}.")
    assumed = {
        "image_size": image_size_of(source.checkpoint, positions.grid),
        "patchify_technique": "convolutional",
        "use_class_token": source.reads_class_token,
        "layer_norm_eps": 1e-6,  # timm's
    }
    # The grid tells the image size in whole patches.
    known = {name: value for name, value in source.fields.items() if name != "image_size"}
    if "num_attention_heads" not in known | overrides:
        known["num_attention_heads"] = infer_heads(fixed["hidden_size"])
        report.notes.append(f"Assumed {known['num_attention_heads']} attention heads, which the file does not tell.")
    known |= choose_labels(source, overrides)
    known |= choose_pooling(fixed["num_hidden_layers"], overrides)
    return HPoolViTConfig(**{**fixed, **assumed, **known, **overrides})


def choose_labels(source: Source, overrides: dict[str, Any]) -> dict[str, Any]:
    """The number of classes, and their names where both the names and the number are the source's."""
    num_labels = source.checkpoint.num_labels
    num_labels = overrides.get("num_labels", len(overrides.get("id2label") or range(num_labels)))
    check_labels(num_labels, overrides)
    if num_labels == len(source.fields.get("id2label", {})):
        return {"num_labels": num_labels}
    return {"num_labels": num_labels, "id2label": None, "label2id": None}


def choose_pooling(num_hidden_layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the pooling that is asked for, with the blocks scaled to the depth."""
    merges = overrides.get("pool_mode") == "merge"
    defaults = dict(MERGE_DEFAULTS if merges else POOLING_DEFAULTS)
    scaled = {math.ceil(block * num_hidden_layers / 12) for block in defaults["hvt_pool"]}
    defaults["hvt_pool"] = sorted(block for block in scaled if block < num_hidden_layers)
    num_stages = len(overrides.get("hvt_pool", defaults["hvt_pool"]) or [])
    if merges and isinstance(defaults["merge_ratio"], list) and num_stages != len(defaults["merge_ratio"]):
        defaults["merge_ratio"] = statistics.mean(defaults["merge_ratio"])
    return defaults


def convert_embeddings(
    source: Source, config: HPoolViTConfig, positions: Positions, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """The tensors of the embeddings that are not the source's as they are, under the model's names."""
    patches, grid = positions.patches, config.patch_grid()
    if positions.grid != grid:
        patches = resize_positions(patches, positions.grid, grid)
        old, new = ("{} × {}".format(*grid) for grid in (positions.grid, grid))
        report.notes.append(f"Position embeddings resized from {old} to {new} patches.")
    if not config.use_class_token:
        report.dropped += source.checkpoint.drop(r"(^|\.)cls_token$")
    else:
        class_token = torch.zeros_like(patches[:, :1]) if positions.class_token is None else positions.class_token
        patches = torch.cat((class_token, patches), dim=1)
    given = {POSITIONS: patches}
    if config.patchify_technique == "linear":
        given["hpool_vit.embeddings.patch_embeddings.projection.weight"] = source.checkpoint.patch_weight.flatten(1)
    return given


def convert_stages(
    config: HPoolViTConfig, positions: torch.Tensor, stage_positions: str, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """The position embeddings of the new stages, under the model's names; `positions` are the model's first ones."""
    given = {}
    if config.pool_mode == "merge":
        return given  # merged tokens keep the positions that they carry
    for schedule in config.schedules:
        stage_input = positions.float()
        for index, block in enumerate(schedule):
            stage = HPoolViTPooling(config.with_schedule(schedule), index)
            initial = stage.position_embeddings.detach()
            if stage_positions == "pooled":
                (stage_input,), _ = stage((stage_input,), None)
                initial = stage_input[:, -initial.shape[1] :].detach().clone()
            name = f"hpool_vit.pooling.{block}.position_embeddings"
            if name not in given:  # a block has the positions of the first schedule that pools there
                given[name] = initial
                report.initialised.append(f"{name} ({stage_positions})")
    return given


def choose_new(source: Source, config: HPoolViTConfig, report: ConversionReport) -> list[str]:
    """The model's names of what must start anew: a head or a class token that the source does not have."""
    checkpoint, shapes = source.checkpoint, parameter_shapes(config)
    new = []
    if config.use_class_token and "embeddings.cls_token" not in checkpoint:
        new.append("hpool_vit.embeddings.cls_token")
    head = [name for name in shapes if name.startswith("classifier.")]
    shape = checkpoint.shape_of("classifier.weight")
    if shape is None or shapes.get("classifier.weight") != tuple(shape):
        new += head
        report.dropped += checkpoint.drop(r"^(classifier|head)\.") if shape else []
    elif source.reads_class_token and not config.use_class_token:
        report.notes.append("The head was trained on the class token and reads the mean of the tokens now: train it.")
    report.initialised += new
    return new


def image_processor_for(source: Source, config: HPoolViTConfig, **overrides) -> HPoolViTImageProcessor:
    """
    The source's preparation of images or, if that is unknown, ours; at another image size the source's mean and
    standard deviation, and our crop.

    Args:
        source: what was read.
        config: the configuration of the model.
        overrides: attributes that shall differ.
    """
    attributes = source.image_processor or {}
    size = attributes.get("crop_size" if attributes.get("do_center_crop", True) else "size", {})
    if (size.get("height"), size.get("width")) == config.image_shape:
        return HPoolViTImageProcessor(**{**attributes, **overrides})
    kept = {name: attributes[name] for name in ("resample", "image_mean", "image_std") if name in attributes}
    return HPoolViTImageProcessor.for_config(config, **{**kept, **overrides})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="folder, Hub id or file in timm's naming")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    pooling = parser.add_mutually_exclusive_group()
    pooling.add_argument("--hvt_pool", type=int, nargs="+", metavar="BLOCK", help="blocks at whose input to pool")
    pooling.add_argument("--no_pooling", action="store_true", help="keep all tokens")
    parser.add_argument("--pool_mode", choices=("max", "avg", "merge"), default="max")
    parser.add_argument("--pool_kernel_size", type=int, help="of max and avg, in tokens")
    parser.add_argument("--pool_stride", type=int, help="of max and avg, in tokens")
    parser.add_argument("--merge_ratio", type=float, nargs="+", help="of merge: share per stage, or one for all")
    parser.add_argument("--proportional_attention", action=argparse.BooleanOptionalAction, help="of merge")
    parser.add_argument(
        "--stage_positions", choices=STAGE_POSITIONS, default="zero", help="start of the new positions"
    )
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--use_class_token", action="store_true", default=None, help="default: if the head reads it")
    token.add_argument("--no_class_token", dest="use_class_token", action="store_false", default=None)
    parser.add_argument("--num_labels", type=int, help="another number than the source's makes a new head")
    parser.add_argument("--labels", metavar="FILE", help="class names, one per line")
    parser.add_argument("--image_size", type=int, nargs="+", metavar="PIXELS", help="one number, or height and width")
    parser.add_argument("--image_mean", type=float, nargs=3, metavar="RGB", help="where the source does not tell it")
    parser.add_argument("--image_std", type=float, nargs=3, metavar="RGB", help="where the source does not tell it")
    parser.add_argument("--num_attention_heads", type=int, help="where the source does not tell it")
    parser.add_argument("--use_ema", action="store_true", help="take the moving average of a training checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of new tensors")
    return parser.parse_args(argv)


def config_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configuration that the command line names."""
    names = ("pool_mode", "pool_kernel_size", "pool_stride", "merge_ratio", "proportional_attention", "hvt_pool")
    names += ("use_class_token", "num_labels", "image_size", "num_attention_heads")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if len(overrides.get("image_size", [])) > 2:
        raise ConversionError(f"`--image_size` takes one number, or height and width, not {args.image_size}.")
    for name in ("merge_ratio", "image_size"):
        if len(overrides.get(name, [])) == 1:
            overrides[name] = overrides[name][0]
    if args.no_pooling:
        overrides["hvt_pool"] = None
    if args.labels:
        overrides |= read_labels(args.labels)
    return overrides


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    check_output_dir(args.output_dir)
    torch.manual_seed(args.seed)
    overrides = config_overrides(args)
    source = read_source(args.model_name_or_path, args.use_ema)
    model, report = convert_source(source, args.stage_positions, **overrides)
    given = {name: getattr(args, name) for name in ("image_mean", "image_std") if getattr(args, name) is not None}
    if source.image_processor is None and len(given) < 2:
        report.notes.append("Assumed ImageNet's mean and standard deviation of the pixels: see `--image_mean`.")
    write_folder(args.output_dir, model, image_processor_for(source, model.config, **given))
    print(report)
    print(f"Tokens per stage: {', '.join(map(str, model.config.tokens_per_stage()))}. Saved in {args.output_dir}.")


if __name__ == "__main__":
    run(main)
