"""Classify or segment files, folders and web addresses: a function for programs, and `hpool-vit predict`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import pipeline

from ..shared.console import NotStartedError, check_at_least_one, needs, one_line, parse_value
from ..shared.options import Device, DisableTqdm, HvtPool, MergeRatio, Model, Speed
from ..shared.saved_model import load_saved_classifier, load_saved_segmenter, segments


with needs("predict"):
    from .classify import Predictions
    from .masks import Segmentations, Segmenter, mask_paths
    from .processes import choose_processes, find_files
    from .writing import check_not_overwritten, check_targets, choose_format, write_predictions


def predict(
    model: str,
    images: Iterable[str],
    *,
    top_k: int = 5,
    batch_size: int = 16,
    num_workers: int = 4,
    timeout: float = 20,
    device: str | None = None,
    num_thumbnails: int = 0,
    masks: str | Path | None = None,
    show_progress: bool = False,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Predictions:
    """
    Classifies images, or segments them. The predictions come while you iterate over the result:

        for prediction in predict("outputs/quickstart", ["photos", "https://example.org/dog.jpg"]):
            print(prediction.file, prediction.answers or prediction.reason)

    Files that cannot be classified get a `reason`; they do not stop the others. Under `torchrun` or
    `accelerate launch` the processes share the files, and each one gets all predictions.

    Args:
        model (`str`): a saved folder, or an id on the Hub.
        images (`Iterable[str]`): files, folders (searched at any depth), http(s) addresses, or `-` for names on
            standard input. A file that is named twice is classified once.
        top_k (`int`): answers per file.
        batch_size (`int`): images per forward pass, in each process.
        num_workers (`int`): threads that read files ahead, in each process.
        timeout (`float`): seconds until an address must have sent everything.
        device (`str`, *optional*): `cpu`, `cuda`, `cuda:1`, `mps`, …. Default: an accelerator if there is one.
        num_thumbnails (`int`): how many of the first files keep a small picture for a contact sheet.
        masks (`str`, *optional*): the folder for the masks of a segmentation model: PNG files whose pixels are the
            numbers of the classes, shown in colours. Its answers are the classes and their shares of the image.
        show_progress (`bool`): whether to show a progress bar on standard error.
        trust_remote_code (`bool`): whether to run code in the model's folder. HPool-ViTs do not need it.
        overrides: fields of the configuration to change, such as `hvt_pool`, or one of the model's speeds: `speed`.

    Returns:
        `Predictions`: an iterable of `Prediction`, with the `files` and `notes`.

    Raises:
        ValueError: for a wrong argument, or a model that cannot classify.
    """
    check_at_least_one(top_k=top_k, batch_size=batch_size, num_workers=num_workers)
    if not timeout > 0:
        raise ValueError(f"`timeout={timeout}` must be more than 0 seconds.")
    state, torch_device = choose_processes(device)
    files, notes = find_files(images, state)
    is_segmenter = segments(model, trust_remote_code=trust_remote_code)
    if is_segmenter and masks is None:
        raise ValueError(f"{model} segments images: give a folder for the `masks`.")
    if masks is not None and not is_segmenter:
        raise ValueError(
            f"`masks={str(masks)!r}` is for models that segment images, and {model} is none: leave it out."
        )
    load = load_saved_segmenter if is_segmenter else load_saved_classifier
    loaded, image_processor, model_notes = load(model, trust_remote_code=trust_remote_code, **overrides)
    settings = {
        "top_k": top_k,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "timeout": timeout,
        "num_thumbnails": num_thumbnails,
        "show_progress": show_progress,
        "notes": notes + model_notes,
    }
    if masks is not None:
        segmenter = Segmenter(loaded, image_processor, torch_device)
        check_not_overwritten(files, list(mask_paths(files, Path(masks)).values()))
        return Segmentations(segmenter, files, state, masks=Path(masks), **settings)
    classifier = pipeline("image-classification", model=loaded, image_processor=image_processor, device=torch_device)
    return Predictions(classifier, files, state, **settings)


def command(
    model: Model,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, http(s) addresses; - reads names from standard input.")
    ],
    output: Annotated[Path | None, typer.Option(help="File for the answers. Default: standard output.")] = None,
    format: Annotated[
        Literal["csv", "jsonl", "table"] | None,
        typer.Option(help="Format of the answers. Default: by the ending of --output, otherwise a table."),
    ] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="FILE.html or FILE.png for small pictures with their answers.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder for the masks, if the model segments images; needed then.")
    ] = None,
    max_contact_sheet: Annotated[int, typer.Option(help="How many files the sheet shows, the first ones.")] = 500,
    top_k: Annotated[int, typer.Option(help="Answers per file.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass, in each process.")] = 16,
    num_workers: Annotated[int, typer.Option(help="Threads that read files ahead, in each process.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds until an address must have sent everything.")] = 20,
    device: Device = None,
    hvt_pool: HvtPool = None,
    merge_ratio: MergeRatio = None,
    speed: Speed = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code in the model's folder. HPool-ViTs do not need it.")
    ] = False,
    disable_tqdm: DisableTqdm = False,
) -> int:
    """
    Classify files, folders (at any depth) and web addresses, or segment them.

    A model for segmentation writes one PNG file per image into the folder --masks: its pixels are the numbers of the
    classes, shown in colours. Its answers are the classes and their shares of the image.

    A file that is named twice is classified once. Files that cannot be used (missing, truncated, animated, enormous,
    not an image, …) are in the result with the reason and are listed at the end. They do not stop the others.

    Under `torchrun` or `accelerate launch` the processes share the files, and the first one writes the result in the
    order of the names: `torchrun --nproc_per_node 8 -m hpool_vit.toolkit.command predict MODEL IMAGES…`

    The exit status is 0 if every file was classified; 1 if not, or if there was none; 2 if the command did not start
    because of its flags or the model. The result appears when it is complete.
    """
    given = {"hvt_pool": hvt_pool, "merge_ratio": merge_ratio}
    try:
        output_format = choose_format(output, format)
        check_targets(output, contact_sheet)
        check_at_least_one(max_contact_sheet=max_contact_sheet)
        predictions = predict(
            model,
            images,
            top_k=top_k,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=timeout,
            device=device,
            num_thumbnails=max_contact_sheet if contact_sheet else 0,
            masks=masks,
            show_progress=not disable_tqdm,
            trust_remote_code=trust_remote_code,
            **{name: parse_value(name, value) for name, value in given.items() if value is not None},
            **({} if speed is None else {"speed": speed}),
        )
        check_not_overwritten(predictions.files, [output, contact_sheet])
    except ValueError as error:
        raise NotStartedError(str(error)) from error
    state = predictions.state
    if state.is_main_process:
        print(*predictions.notes, sep="\n", end="\n" * bool(predictions.notes), file=sys.stderr)
    try:
        num_bad = write_predictions(
            predictions, output, output_format, contact_sheet, max_contact_sheet, Path(model).name
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"Out of memory: lower `batch_size={batch_size}`.") from error
    except RuntimeError as error:
        raise ValueError(one_line(error)) from error
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
    return 1 if num_bad or not predictions.files else 0
