"""
A page that shows HPool-ViTs at work: choose a saved folder, drop images, and see the likeliest classes, what the
answer costs, and which patches the surviving tokens stand for. It has the form of a Hugging Face Space.

    python examples/app.py                                       # the models in outputs
    python examples/app.py --model_name_or_path DIR [DIR …] --examples_dir photos

The page is at http://127.0.0.1:7860 and for this machine alone: `GRADIO_SERVER_NAME=0.0.0.0` opens it to others. It
loads nothing from the internet and sends nothing there.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


# These packages read it when they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
import PIL.Image
import torch

from ..shared.images import BadImageError, DataError
from ..shared.saved_model import SavedModelError
from .files import MAX_FILE_MEGABYTES, MAX_MEGAPIXELS, Example, find_examples, open_image, read_images, thumbnail
from .markup import CSS, HEADER, LIMITS, caption, draw_schedule, draw_tiles, format_messages
from .models import ServedModel, find_models, load_models


HERE = Path(__file__).resolve().parent
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif"]
# No links to other pages, and no history of calls, with which the browser would keep the images.
LAUNCH = {
    "theme": gr.themes.Soft(primary_hue="teal", font=FONTS, font_mono=["ui-monospace", "Menlo", "monospace"]),
    "css": CSS,
    "max_file_size": MAX_FILE_MEGABYTES * 2**20,
    "share": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "enable_monitoring": False,
    "run_history": False,
    "footer_links": [],
    "quiet": True,
}
PLAIN_GALLERY = {"show_label": False, "allow_preview": False, "interactive": False, "visible": False, "buttons": []}


@dataclass
class Page:
    """
    What happens when a visitor does something. What a method returns is in the order of its outputs in `build_demo`.

    Attributes:
        models: the models by the names under which they are offered.
        examples: the image files that are offered with each of them, and their thumbnails.
    """

    models: dict[str, ServedModel]
    examples: dict[str, list[Example]]

    def choose_model(self, name: str, files: list[str]) -> tuple:
        """Slider, schedule and examples of another model, and its first example if no other images were given."""
        model, pictures = self.models[name], [picture for _, picture in self.examples[name]]
        offered = {file for examples in self.examples.values() for file, _ in examples}
        if offered.issuperset(files):
            files = [file for file, _ in self.examples[name][:1]]
        last = len(model.schedules) - 1
        slider = gr.Slider(maximum=max(last, 1), value=model.saved_position, visible=last > 0)
        gallery = gr.Gallery(pictures, visible=bool(pictures))
        return slider, self.describe(name, model.saved_position), gallery, files

    def describe(self, name: str, position: float) -> str:
        """What a schedule is, which takes no time."""
        return draw_schedule(self.models[name].schedule(position))

    def take_example(self, name: str, event: gr.SelectData) -> list[str]:
        return [self.examples[name][event.index][0]]

    def answer(self, name: str, position: float, files: list[str], chosen: str) -> tuple:
        """The files that could be read, messages about the others, costs and gallery; then as `explain`."""
        model, messages = self.models[name], []
        # Of a large image, only the model's input and the thumbnail are kept.
        images = [(file, model.prepare(image), thumbnail(image)) for file, image in read_images(files, messages)]
        if not images:
            empty = gr.Gallery([], visible=False)
            return [], show_messages(messages), "", empty, None, gr.Image(None, visible=False)
        shown, inputs, pictures = zip(*images, strict=True)
        answer = model.classify(torch.cat(inputs), position)
        captions = [caption(model.top(probabilities, 1)) for probabilities in answer.probabilities]
        index = shown.index(chosen) if chosen in shown else 0
        # Framed is only what a visitor chose.
        return (
            list(shown),
            show_messages(messages),
            draw_tiles(model, model.schedule(position), answer, len(images)),
            gr.Gallery(list(zip(pictures, captions, strict=True)), visible=True, selected_index=index or None),
            *self.explain(name, position, shown[index]),
        )

    def choose_image(self, name: str, position: float, shown: list[str], event: gr.SelectData) -> tuple:
        file = shown[event.index]
        try:
            return file, *self.explain(name, position, file)
        except BadImageError as error:
            raise gr.Error(f"{Path(file).name} cannot be shown: {error}", print_exception=False) from error

    def explain(self, name: str, position: float, file: str) -> tuple:
        """The five likeliest classes of an image, and a picture of what the pooling does to it."""
        model = self.models[name]
        probabilities, panels = model.explain(open_image(file), position)
        return model.top(probabilities, 5), gr.Image(panels, visible=True)


def show_messages(messages: list[str]) -> gr.HTML:
    return gr.HTML(format_messages(messages), visible=bool(messages))


def build_demo(models: dict[str, ServedModel], examples: dict[str, list[Example]]) -> gr.Blocks:
    """
    The page.

    Args:
        models: the models by the names under which they are offered, at least one.
        examples: the image files that are offered with each of them, and their thumbnails; may be none.
    """
    page = Page(models, examples)
    # What visitors upload is deleted after an hour.
    with gr.Blocks(title="HPool-ViT", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(HEADER, elem_id="header")
        # The files that were given, those that are images, and the one of them that is explained.
        files, shown, chosen = gr.State([]), gr.State([]), gr.State("")
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                model = gr.Dropdown(list(models), value=next(iter(models)), label="Model", elem_id="model")
                slider = gr.Slider(
                    0,
                    1,
                    step=1,
                    label="Pooling schedule",
                    info="Left: cheaper. Right: more tokens.",
                    visible=False,
                    elem_id="schedule",
                    buttons=[],
                )
                schedule = gr.HTML(elem_id="tokens")
                # Of any type: what is no image gets a message that says what is wrong with it.
                upload = gr.File(label="Your images", file_count="multiple", height=150, elem_id="upload")
                gr.HTML(LIMITS, elem_classes="note")
            with gr.Column(scale=6, min_width=340):
                samples = gr.Gallery(elem_id="examples", height="auto", object_fit="cover", **PLAIN_GALLERY)
                messages = gr.HTML(visible=False, elem_id="messages")
                with gr.Row():
                    gallery = gr.Gallery(
                        elem_id="images", height="auto", object_fit="contain", min_width=240, **PLAIN_GALLERY
                    )
                    classes = gr.Label(label="Likeliest classes", num_top_classes=5, min_width=240, elem_id="classes")
        costs = gr.HTML(elem_id="costs")
        panels = gr.Image(
            show_label=False,
            interactive=False,
            visible=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="panels",
        )

        # The last files, model and schedule count, also if they change while an answer is on its way.
        answers = {
            "trigger_mode": "always_last",
            "fn": page.answer,
            "inputs": [model, slider, files, chosen],
            "outputs": [shown, messages, costs, gallery, classes, panels],
            "api_visibility": "private",
        }
        choice = {
            "fn": page.choose_model,
            "inputs": [model, files],
            "outputs": [slider, schedule, samples, files],
            "api_visibility": "private",
        }
        demo.load(**choice).then(**answers)
        model.input(**choice).then(**answers)
        slider.input(page.describe, [model, slider], schedule, api_visibility="private", trigger_mode="always_last")
        slider.input(**answers)
        upload.change(lambda given: given or [], upload, files, api_visibility="private").then(**answers)
        samples.select(page.take_example, model, files, api_visibility="private").then(**answers)
        gallery.select(page.choose_image, [model, slider, shown], [chosen, classes, panels], api_visibility="private")
    # Answers come one at a time, so that none overtakes another and none is measured beside another. A visitor waits
    # for at most 32 others, and no call comes in beside the page's own.
    return demo.queue(max_size=32, default_concurrency_limit=1, api_open=False)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", type=Path, nargs="+", metavar="DIR", help="folders that `save_pretrained` left"
    )
    parser.add_argument(
        "--models_dir",
        type=Path,
        default=HERE / "models" if (HERE / "models").is_dir() else Path("outputs"),
        help="without --model_name_or_path: where such folders lie, up to two levels deep (default: %(default)s)",
    )
    parser.add_argument(
        "--examples_dir",
        type=Path,
        default=HERE / "photos" if (HERE / "photos").is_dir() else None,
        help="images to offer; models of handwritten digits come with digits",
    )
    parser.add_argument("--server_port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args(argv)
    PIL.Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000
    with tempfile.TemporaryDirectory(prefix="hpool-vit-") as scratch:
        try:
            if args.model_name_or_path:
                models = load_models(args.model_name_or_path)
            else:
                models = load_models(find_models(args.models_dir), skip_bad=True)
            examples = {
                name: find_examples(model.labels, args.examples_dir, Path(scratch)) for name, model in models.items()
            }
            demo = build_demo(models, examples)
            _, url, _ = demo.launch(**LAUNCH, server_port=args.server_port, prevent_thread_lock=True)
        except (SavedModelError, DataError, OSError) as error:
            sys.exit(f"error: {error}")
        print(f"The page is at {url} (end it with Ctrl+C).", flush=True)
        demo.block_thread()


if __name__ == "__main__":
    main()
