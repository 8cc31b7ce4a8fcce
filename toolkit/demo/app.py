"""The demo page: it opens in your browser, or becomes a Hugging Face Space."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import PIL.Image
import typer
from huggingface_hub import constants

from ..shared.console import needs
from ..shared.options import Device


def serve(
    models: Sequence[str | Path] = (),
    *,
    models_dir: str | Path = "outputs",
    examples_dir: str | Path | None = None,
    server_port: int | None = None,
    device: str | None = None,
) -> None:
    """
    Serves the page until Ctrl+C. The page loads nothing from the internet and sends nothing there.

    Args:
        models: folders in which models and their image processors were saved.
        models_dir: the folder whose models are shown if `models` is empty, up to two levels deep.
        examples_dir: images to offer as examples. Models of handwritten digits bring their own.
        server_port: default: the first free port from 7860.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, …. Default: an accelerator if there is one.

    Raises:
        ValueError, OSError: in one line, if there is nothing to show, the device cannot be used, or the port is taken.
    """
    with offline():
        _serve(models, Path(models_dir), None if examples_dir is None else Path(examples_dir), server_port, device)


def _serve(
    models: Sequence[str | Path],
    models_dir: Path,
    examples_dir: Path | None,
    server_port: int | None,
    device: str | None,
) -> None:
    with needs("demo"):
        from .files import MAX_MEGAPIXELS, find_examples
        from .models import find_models, load_models
        from .page import LAUNCH, build_demo

    folders = list(map(Path, models)) or find_models(models_dir)
    # Models that somebody named must work. Of those that are only found, some may be damaged.
    served = load_models(folders, skip_bad=not models, device=device)
    with limited_pixels(MAX_MEGAPIXELS), tempfile.TemporaryDirectory(prefix="hpool-vit-") as scratch:
        examples = {name: find_examples(model.labels, examples_dir, Path(scratch)) for name, model in served.items()}
        demo = build_demo(served, examples)
        _, url, _ = demo.launch(**LAUNCH, server_port=server_port, prevent_thread_lock=True)
        print(f"The page is at {url} (stop it with Ctrl+C).", flush=True)
        demo.block_thread()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside the block this process does not call the Hub, and Gradio does not report its use."""
    gradio = os.environ.get("GRADIO_ANALYTICS_ENABLED")
    hub = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # The environment variables would come too late: the client has read them already.
    constants.HF_HUB_OFFLINE = constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = hub
        if gradio is None:
            del os.environ["GRADIO_ANALYTICS_ENABLED"]
        else:
            os.environ["GRADIO_ANALYTICS_ENABLED"] = gradio


@contextlib.contextmanager
def limited_pixels(megapixels: int) -> Iterator[None]:
    """Inside the block, an image of more pixels is not decoded."""
    usual = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = megapixels * 1_000_000
    try:
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = usual


def command(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL", help="Folders of saved models. Default: the models in --models_dir."),
    ] = None,
    models_dir: Annotated[
        Path, typer.Option(help="Folder in which models are searched, up to two levels deep.")
    ] = Path("outputs"),
    examples_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of images to offer as examples. Models of handwritten digits bring their own."),
    ] = None,
    server_port: Annotated[int | None, typer.Option(help="Default: the first free port from 7860.")] = None,
    device: Device = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Do not serve the page, but write it with its models as a Space into this new folder."),
    ] = None,
) -> None:
    """
    Try models on a page in your browser, or write the page as a Hugging Face Space.

    Choose a model, drop images, and see the most likely classes, what the answer costs, and which patches the
    remaining tokens stand for.

    The page is at http://127.0.0.1:7860 and only this machine can open it, unless you set GRADIO_SERVER_NAME=0.0.0.0.
    It loads nothing from the internet and sends nothing there.

    With --output_dir, the page becomes a Space: a folder that holds everything, so it runs without this package. Look
    at it with `python DIR/app.py`, and upload it with `hf upload OWNER/NAME DIR --repo-type space`.
    """
    if output_dir is None:
        serve(models or (), models_dir=models_dir, examples_dir=examples_dir, server_port=server_port, device=device)
        return
    for name, value in {"server_port": server_port, "device": device}.items():
        if value is not None:
            raise ValueError(
                f"`{name}={value}` is for serving the page, and `output_dir` only writes it: leave it out."
            )
    with offline():
        with needs("demo"):
            from .models import find_models
            from .space import make_space

        make_space(models or find_models(models_dir), output_dir, examples_dir=examples_dir, skip_bad=not models)
    print(f"The Space is in {output_dir}. Look at it with: python {output_dir / 'app.py'}")
