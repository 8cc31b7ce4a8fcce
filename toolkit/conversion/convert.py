"""The command `hpool-vit convert`: from a trained ViT or a checkpoint of the paper's code to a saved HPool-ViT."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.configuration_hpool_vit import POOL_MODES
from hpool_vit.pooling_hpool_vit import POOLINGS

from ..shared.console import parse_value
from ..shared.files import check_output_dir, folder_written_whole
from ..shared.options import MergeRatio, OutputDir, hvt_pool_option, image_size_option, parse_image_size
from .building import ConversionReport
from .checkpoint import Checkpoint, ConversionError, read_checkpoint, square_or_pair
from .compare import NUM_IMAGES, compare_with_source
from .hvt import convert_checkpoint, is_hvt
from .image_processor import image_processor_for, with_channels
from .positions import STAGE_POSITIONS
from .sources import Source, is_checkpoint_file, read_source, timm_source
from .vit import convert_source


# What `convert` returns: the model, its image processor and the report.
Converted = tuple[HPoolViTForImageClassification, HPoolViTImageProcessor, ConversionReport]

# The arguments that a checkpoint of the paper's code leaves no choice in, and why.
DECIDED_BY_THE_PAPER = {
    "hvt_pool": "its tensors tell at which blocks it pools",
    "pool_mode": "it pools by the maximum",
    "merge_ratio": "it does not merge tokens",
    "proportional_attention": "it does not merge tokens",
    "stage_positions": "it has position embeddings for every stage",
    "use_class_token": "it has no class token",
    "num_labels": "its head tells the number of classes",
    "image_size": "its position embeddings tell the image size",
    "seed": "nothing in it starts anew",
    "architecture": "it says what it is",
}


def convert(
    source: str | Path,
    *,
    stage_positions: str | None = None,
    use_ema: bool = False,
    architecture: str | None = None,
    compare: str | Path | None = None,
    compare_images: int | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    seed: int | None = None,
    **config_overrides,
) -> Converted:
    """
    Builds an HPool-ViT from whatever the source turns out to be: a checkpoint of the paper's training code becomes the
    paper's model, as with [`convert_hvt`], and a trained ViT becomes an HPool-ViT that starts from its weights, as
    with [`convert_vit`].

    Args:
        source (`str`): a file, a folder or a Hub id.
        stage_positions (`str`, *optional*):
            How the position embeddings of the new stages start: `"zero"`, the default, or `"pooled"`.
        use_ema (`bool`, defaults to `False`):
            Whether to take the moving average of the weights of a training checkpoint.
        architecture (`str`, *optional*): timm's name of the model, for a file whose tensors do not tell.
        compare (`str`, *optional*):
            A folder of images: the report then says how close the pooled features come to the source's.
        compare_images (`int`, *optional*):
            Compare so many of these images, evenly spread over the folder. Default: 256.
        image_mean (`list[float]`, *optional*): the mean of the pixels, instead of the source's.
        image_std (`list[float]`, *optional*): the standard deviation of the pixels, instead of the source's.
        seed (`int`, *optional*): seed for new weights. Default: 0.
        config_overrides: fields of [`HPoolViTConfig`], such as `hvt_pool` or `num_labels`.

    Returns:
        The model, in evaluation mode and float32, its image processor, and the [`ConversionReport`].

    Raises:
        ConversionError: for a source that cannot be converted, or an argument that does not apply to it.
        ValueError: for a configuration that no model can be built from.
    """
    if compare is None and compare_images is not None:
        raise ConversionError(f"`compare_images={compare_images}` does not apply without `compare`: pass a folder.")
    given = dict(config_overrides)
    given |= {"stage_positions": stage_positions} if stage_positions is not None else {}
    given |= {"seed": seed} if seed is not None else {}
    given |= {"architecture": architecture} if architecture is not None else {}
    statistics = {"image_mean": image_mean, "image_std": image_std}
    statistics = {name: value for name, value in statistics.items() if value is not None}
    checkpoint = read_checkpoint(source, use_ema) if is_checkpoint_file(source) else None
    if checkpoint is not None and is_hvt(checkpoint):
        if compare is not None:
            raise ConversionError("`compare` does not apply: a checkpoint of the paper's code keeps its pooling.")
        return _convert_hvt(source, checkpoint, given, statistics)
    given.pop("architecture", None)
    if checkpoint is None:
        vit = read_source(source, use_ema, architecture)
    else:
        vit = timm_source(checkpoint, architecture=architecture)
    model, processor, report = _convert_vit(vit, given, statistics)
    if compare is not None:
        has_trained_head = not any(name.startswith("classifier.") for name in report.initialised)
        num_images = NUM_IMAGES if compare_images is None else compare_images
        report.comparison = compare_with_source(model, processor, compare, num_images, has_trained_head)
    return model, processor, report


def _convert_hvt(source: str | Path, checkpoint: Checkpoint, given: dict[str, Any], statistics: dict) -> Converted:
    for name in given.keys() & DECIDED_BY_THE_PAPER:
        raise ConversionError(
            f"`{name}` does not apply: `{source}` is a checkpoint of the paper's code, and "
            f"{DECIDED_BY_THE_PAPER[name]}."
        )
    model, report = convert_checkpoint(checkpoint, **given)
    _note_channels(model.config, report)
    return model, HPoolViTImageProcessor.for_config(model.config, **with_channels(statistics, model.config)), report


def _convert_vit(source: Source, given: dict[str, Any], statistics: dict) -> Converted:
    check_pooling(given)
    seed, stage_positions = given.pop("seed", 0), given.pop("stage_positions", "zero")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = convert_source(source, stage_positions, **given)
    if source.image_processor is None and len(statistics) < 2:
        report.notes.append(
            "Assumed ImageNet's mean and standard deviation of the pixels. If the source was trained with others, "
            "pass `image_mean` and `image_std`."
        )
    _note_channels(model.config, report)
    return model, image_processor_for(source, model.config, **statistics), report


def _note_channels(config: HPoolViTConfig, report: ConversionReport):
    if config.num_channels != 3:
        report.notes.append(
            f"The model takes images of {config.num_channels} channel(s), as arrays or Pillow images. The commands "
            "predict and train, and pipelines, read files in RGB and do not take it."
        )


def check_pooling(given: dict[str, Any], own: HPoolViTConfig | None = None):
    """
    Raises a `ConversionError` for an argument that the chosen pooling does not read.

    Args:
        given: fields of the configuration, and `stage_positions`.
        own: the configuration that they change. Default: a new one.
    """
    readers = {name: _arguments_of(name) for name in POOLINGS}
    own = own or HPoolViTConfig()
    hvt_pool, choices, speeds, pool_mode = (
        given.get(name, getattr(own, name)) for name in ("hvt_pool", "hvt_pool_choices", "speeds", "pool_mode")
    )
    for name in sorted(given.keys() & set().union(*readers.values())):
        if not (hvt_pool or speeds or any(choices or [])):
            raise ConversionError(f"`{name}` does not apply: with `hvt_pool=none` the model does not pool.")
        if name not in readers.get(pool_mode, {name}):
            modes = " and ".join(mode for mode, names in readers.items() if name in names)
            raise ConversionError(f"`{name}` does not apply to `pool_mode={pool_mode!r}`, only to {modes}.")


def _arguments_of(pool_mode: str) -> set[str]:
    """The arguments that only this pooling mode, or modes like it, read."""
    return {*POOLINGS[pool_mode].fields, *(["stage_positions"] if POOL_MODES[pool_mode].has_positions else [])}


def read_labels(path: str | Path) -> dict[str, dict]:
    """`id2label` and `label2id` from a text file with one class name per line."""
    labels = Path(path).read_text(encoding="utf-8").splitlines()
    if not labels or not all(label.strip() for label in labels):
        raise ConversionError(f"`{path}` must hold one class name per line and no empty line.")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConversionError(f"`{path}` has the class {twice!r} more than once: make the names distinct.")
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def write_folder(output_dir: str | Path, *parts: Any):
    """
    Saves a model and its image processor into a folder that appears complete or not at all.

    Args:
        output_dir: a folder that does not exist yet or is empty.
        parts: objects with a method `save_pretrained`.
    """
    with folder_written_whole(output_dir) as folder:
        for part in parts:
            part.save_pretrained(folder)


def describe(config: HPoolViTConfig) -> str:
    """A configuration in one line."""
    sizes = f"Image {config.image_size}, patch {config.patch_size}, width {config.hidden_size}"
    layers = f"{config.num_hidden_layers} blocks of {config.num_attention_heads} heads, {config.num_labels} classes"
    tokens = config.tokens_per_stage()
    if not config.hvt_pool:
        return f"{sizes}, {layers}; {tokens[0]} tokens without pooling."
    blocks, tokens = (", ".join(map(str, numbers)) for numbers in (config.hvt_pool, tokens))
    return f"{sizes}, {layers}; {config.pool_mode} pooling at blocks {blocks}: {tokens} tokens."


def parse_options(**options: str | None) -> dict[str, Any]:
    """The values of the options that were given."""
    values = {name: parse_value(name, text) for name, text in options.items() if text is not None}
    for name in ("image_mean", "image_std"):
        if type(values.get(name)) in (int, float):
            values[name] = [values[name]]
        if name in values and not _are_numbers(values[name]):
            raise ValueError(f"`{name}={options[name]}` must be one number per channel, such as 0.5,0.5,0.5.")
    if size := parse_image_size(options.get("image_size")):
        values["image_size"] = square_or_pair(size)
    return values


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int | float) for number in value)


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint file, a saved folder or a Hub id.")],
    output_dir: OutputDir,
    hvt_pool: Annotated[
        str | None, hvt_pool_option("1,5,9, or 3,5,7,9 to merge, scaled to the number of blocks")
    ] = None,
    pool_mode: Annotated[
        str | None, typer.Option(metavar="MODE", help=f"{', '.join(POOL_MODES)}. Default: max.")
    ] = None,
    pool_kernel_size: Annotated[
        str | None, typer.Option(metavar="WINDOW", help="What max and avg pool into one: 3 tokens, or 2,2 patches.")
    ] = None,
    pool_stride: Annotated[
        str | None, typer.Option(metavar="STEP", help="Step of max and avg: 2 tokens, or 2,2 patches.")
    ] = None,
    merge_ratio: MergeRatio = None,
    proportional_attention: Annotated[
        str | None,
        typer.Option(
            metavar="TRUE|FALSE", help="Whether attention weighs a merged token by its patches. Default: true."
        ),
    ] = None,
    stage_positions: Annotated[
        str | None,
        typer.Option(
            metavar="START",
            help=f"How the position embeddings of new stages start: {' or '.join(STAGE_POSITIONS)}. Default: zero.",
        ),
    ] = None,
    use_class_token: Annotated[
        str | None,
        typer.Option(
            metavar="TRUE|FALSE",
            help="Whether the model has a class token. Default: true if the source's head reads one.",
        ),
    ] = None,
    num_labels: Annotated[int | None, typer.Option(help="A number other than the source's makes a new head.")] = None,
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one class name per line.")] = None,
    image_size: Annotated[str | None, image_size_option("the source's")] = None,
    image_mean: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Mean of the pixels, such as 0.5,0.5,0.5, if it is unknown.")
    ] = None,
    image_std: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Standard deviation of the pixels, if it is unknown.")
    ] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="Needed if the source does not say.")] = None,
    use_ema: Annotated[
        bool, typer.Option("--use_ema", help="Take the moving average of a training checkpoint.")
    ] = False,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="timm's name of the model in a file, if its tensors do not tell."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES", help="Compare the features with the source's on the images of this folder."),
    ] = None,
    compare_images: Annotated[
        int | None, typer.Option(help=f"The most images to compare. Default: {NUM_IMAGES}.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for new weights. Default: 0.")] = None,
) -> None:
    """
    Turn a trained ViT, or a checkpoint of the paper's code, into an HPool-ViT folder.

    SOURCE is a folder or Hub id of Transformers' ViT (which DINO and many DeiT models use), DeiT, ViT-MSN, ViT-MAE,
    I-JEPA, DINOv2, DINOv3, CLIP, MetaCLIP 2, SigLIP or SigLIP 2, or of timm's ViT, DeiT, EVA-02, DINOv3 or Perception
    Encoder. It can also be a file (.pth, .bin, .safetensors) in timm's naming or from the paper's training code. The
    command recognises what it is by its configuration or by the names of its tensors.

    A ViT keeps its weights and gets the pooling that you choose. A checkpoint of the paper's code becomes the same
    model with the same answers. The command prints what it dropped, initialised anew or assumed.
    """
    check_output_dir(output_dir)
    options = parse_options(
        hvt_pool=hvt_pool,
        pool_kernel_size=pool_kernel_size,
        pool_stride=pool_stride,
        merge_ratio=merge_ratio,
        proportional_attention=proportional_attention,
        use_class_token=use_class_token,
        image_size=image_size,
        image_mean=image_mean,
        image_std=image_std,
    )
    plain = {
        "pool_mode": pool_mode,
        "stage_positions": stage_positions,
        "num_labels": num_labels,
        "num_attention_heads": num_attention_heads,
        "architecture": architecture,
        "compare": compare,
        "compare_images": compare_images,
        "seed": seed,
    }
    options |= {name: value for name, value in plain.items() if value is not None}
    options |= read_labels(labels) if labels else {}
    model, image_processor, report = convert(source, use_ema=use_ema, **options)
    write_folder(output_dir, model, image_processor)
    print(report)
    print(describe(model.config))
    print(f"Saved in {output_dir}.")
