"""The page in Gradio: what it shows, and what happens when a visitor does something."""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path


# Gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch

from ..shared.images import BadImageError
from .files import MAX_FILE_MEGABYTES, Example, open_image, read_images, thumbnail
from .markup import CSS, HEADER, LIMITS, caption, draw_schedule, draw_tiles, format_messages
from .models import ServedModel


FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif"]
# No links to other pages.
LAUNCH = {
    "theme": gr.themes.Soft(primary_hue="teal", font=FONTS, font_mono=["ui-monospace", "Menlo", "monospace"]),
    "css": CSS,
    "max_file_size": MAX_FILE_MEGABYTES * 2**20,
    "share": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "enable_monitoring": False,
    "footer_links": [],
    "quiet": True,
}
# A history of calls would keep the images in the browser. Before 6.24, Gradio has none.
if "run_history" in inspect.signature(gr.Blocks.launch).parameters:
    LAUNCH["run_history"] = False
PLAIN_GALLERY = {"show_label": False, "allow_preview": False, "interactive": False, "visible": False, "buttons": []}


@dataclass
class Page:
    """
    The reactions to what a visitor does. A method returns values in the order of its outputs in `build_demo`.

    Attributes:
        models: the models by the names that the page shows.
        examples: the example files of each model with their thumbnails.
    """

    models: dict[str, ServedModel]
    examples: dict[str, list[Example]]

    def choose_model(self, name: str, files: list[str]) -> tuple:
        """Slider, schedule and examples of another model, and its first example unless the visitor gave images."""
        model, pictures = self.models[name], [picture for _, picture in self.examples[name]]
        offered = {file for examples in self.examples.values() for file, _ in examples}
        if offered.issuperset(files):
            files = [file for file, _ in self.examples[name][:1]]
        last = len(model.schedules) - 1
        slider = gr.Slider(maximum=max(last, 1), value=model.saved_position, visible=last > 0)
        gallery = gr.Gallery(pictures, visible=bool(pictures))
        return slider, self.describe(name, model.saved_position), gallery, files

    def describe(self, name: str, position: float) -> str:
        """A picture of a schedule, which does not need the model."""
        return draw_schedule(self.models[name].schedule(position))

    def take_example(self, name: str, event: gr.SelectData) -> list[str]:
        return [self.examples[name][event.index][0]]

    def answer(self, name: str, position: float, files: list[str], chosen: str) -> tuple:
        """The files that could be read, messages about the others, costs and gallery, and the values of `explain`."""
        model, messages = self.models[name], []
        # Keeps only the model's input and the thumbnail of a large image.
        images = [(file, model.prepare(image), thumbnail(image)) for file, image in read_images(files, messages)]
        if not images:
            empty = gr.Gallery([], visible=False)
            return [], show_messages(messages), "", empty, None, gr.Image(None, visible=False)
        shown, inputs, pictures = zip(*images, strict=True)
        answer = model.classify(torch.cat(inputs), position)
        captions = [caption(model.top(probabilities, 1)) for probabilities in answer.probabilities]
        index = shown.index(chosen) if chosen in shown else 0
        # Only an image that the visitor chose gets a frame.
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
        """The five most likely classes of an image, and a picture of what pooling does to it."""
        model = self.models[name]
        probabilities, panels = model.explain(open_image(file), position)
        return model.top(probabilities, 5), gr.Image(panels, visible=True)


def show_messages(messages: list[str]) -> gr.HTML:
    return gr.HTML(format_messages(messages), visible=bool(messages))


def build_demo(models: dict[str, ServedModel], examples: dict[str, list[Example]]) -> gr.Blocks:
    """
    Builds the page.

    Args:
        models: at least one model, by the names that the page shows.
        examples: the example files of each model with their thumbnails. The list may be empty.
    """
    page = Page(models, examples)
    # Uploads are deleted after an hour.
    with gr.Blocks(title="HPool-ViT", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(HEADER, elem_id="header")
        # The files that were given, those that are images, and the one that is explained.
        files, shown, chosen = gr.State([]), gr.State([]), gr.State("")
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                model = gr.Dropdown(list(models), value=next(iter(models)), label="Model", elem_id="model")
                slider = gr.Slider(
                    0,
                    1,
                    step=1,
                    label="Pooling schedule",
                    info="Left: fewer operations. Right: more tokens.",
                    visible=False,
                    elem_id="schedule",
                    buttons=[],
                )
                schedule = gr.HTML(elem_id="tokens")
                # Any type: a file that is not an image gets a message that says why.
                upload = gr.File(label="Your images", file_count="multiple", height=150, elem_id="upload")
                gr.HTML(LIMITS, elem_classes="note")
            with gr.Column(scale=6, min_width=340):
                samples = gr.Gallery(elem_id="examples", height="auto", object_fit="cover", **PLAIN_GALLERY)
                messages = gr.HTML(visible=False, elem_id="messages")
                with gr.Row():
                    gallery = gr.Gallery(
                        elem_id="images", height="auto", object_fit="contain", min_width=240, **PLAIN_GALLERY
                    )
                    classes = gr.Label(
                        label="Most likely classes", num_top_classes=5, min_width=240, elem_id="classes"
                    )
        costs = gr.HTML(elem_id="costs")
        panels = gr.Image(
            show_label=False,
            interactive=False,
            visible=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="panels",
        )

        # The latest files, model and schedule count, also if they change while an answer is computed.
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
    # One answer at a time: answers keep their order, and measurements do not disturb each other. A visitor waits for
    # at most 32 others. Only the page itself may call.
    return demo.queue(max_size=32, default_concurrency_limit=1, api_open=False)
