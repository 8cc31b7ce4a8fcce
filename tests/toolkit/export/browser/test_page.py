"""The exported page in a real browser, with the real onnxruntime-web: it answers as PyTorch does."""

import functools
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import watched_page
from helpers import tiny_model
from image_files import encoded, picture
from PIL import Image
from playwright.sync_api import Page, expect

from hpool_vit import HPoolViTImageProcessor, HPoolViTImageProcessorPil
from hpool_vit.toolkit import command, trace_pooling
from hpool_vit.toolkit.export import runtime
from hpool_vit.toolkit.export.predict_onnx import preprocess
from hpool_vit.toolkit.inspection.figure import patch_colours, token_cells


MODELS = {
    "merge": {"pool_mode": "merge", "use_class_token": True},
    "max": {"pool_mode": "max"},
    "grid": {"pool_mode": "avg", "pool_kernel_size": (3, 3), "pool_stride": (2, 2), "hvt_pool": [1, 2]},
}
pytestmark = pytest.mark.demo
of_each_kind = pytest.mark.parametrize("site", MODELS, indirect=True)
LABELS = ["ant", "bee", "cat"]
# From what a canvas holds to an image of this test, in the page.
PREPARE = """async ([address, picture, config]) => {
    const { frame, fromRgba, normalise } = await import(address);
    const rgba = { ...picture, data: Uint8ClampedArray.from(picture.data) };
    return Array.from(normalise(frame(fromRgba(rgba, picture.channels), config), config));
}"""
# The colour in the middle of each cell of a canvas.
CELLS = """(canvas, [lines, columns]) => {
    const context = canvas.getContext("2d");
    const [down, across] = [canvas.height / lines, canvas.width / columns];
    const cells = Array.from({ length: lines * columns }, (_, cell) => [Math.floor(cell / columns), cell % columns]);
    return cells.map(([line, column]) =>
        Array.from(context.getImageData((column + 0.5) * across, (line + 0.5) * down, 1, 1).data.slice(0, 3)));
}"""
DROP = """([bytes, name]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(bytes)], name));
    return transfer;
}"""


@dataclass
class Site:
    """An exported folder on a server of static files, and the model that it was made of."""

    folder: Path
    model: torch.nn.Module
    image_processor: HPoolViTImageProcessorPil
    url: str = ""
    statuses: dict[str, int] = field(default_factory=dict)  # of each path that was asked for

    def pixel_values(self, file: Path) -> torch.Tensor:
        return self.image_processor(str(file), return_tensors="pt").pixel_values

    @torch.no_grad()
    def probabilities(self, file: Path) -> dict[str, float]:
        logits = self.model(self.pixel_values(file)).logits
        return dict(zip(LABELS, logits.softmax(-1)[0].tolist(), strict=True))


@pytest.fixture(scope="session")
def make_site(tmp_path_factory):
    """Exports a model of `MODELS` and serves its page."""
    assert (runtime.cache_folder() / runtime.NAME).is_file(), "`make test-demo` downloads onnxruntime-web first"
    servers = []

    @functools.cache
    def make(kind: str) -> Site:
        folder = tmp_path_factory.mktemp(kind)
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
        model = tiny_model(image_size=48, **names, **MODELS[kind])
        model.save_pretrained(folder / "model")
        HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder / "model")
        words = ("export", folder / "model", "--output_dir", folder / "page", "--format", "web")
        command.main(list(map(str, words)))
        site = Site(folder / "page", model, HPoolViTImageProcessorPil.from_pretrained(folder / "model"))

        class Handler(SimpleHTTPRequestHandler):
            def log_request(self, code="-", size="-"):
                site.statuses[self.path] = int(code)

        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site.folder))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site.url = f"http://127.0.0.1:{server.server_port}/"
        return site

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(request, make_site) -> Site:
    """By default of the model that merges."""
    return make_site(getattr(request, "param", "merge"))


@pytest.fixture
def page(site, browser) -> Page:
    """The open page. After the test, checks that it asked no other machine for anything and logged no error."""
    page, asked, complaints = watched_page(browser, 1000, 900)
    page.goto(site.url)
    wait_for_answer(page)
    yield page
    page.close()
    assert all(url.startswith(site.url) for url in asked), asked
    assert {f"{site.url}{name}" for name in ("model.onnx", "worker.js", f"runtime/{runtime.FILES[1]}")} <= asked
    assert set(site.statuses.values()) <= {200, 304}, site.statuses
    assert not complaints


def wait_for_answer(page: Page):
    expect(page.locator("#time")).to_have_text(re.compile(r"^[\d.e+]+ ms$"))


def choose(page: Page, file: Path):
    page.locator("#file").set_input_files(file)
    wait_for_answer(page)


def shown_classes(page: Page) -> dict[str, float]:
    """The classes from the top, with their probabilities."""
    items = page.locator("#classes li").all()
    return {item.locator("span").first.inner_text(): float(item.get_attribute("data-probability")) for item in items}


def check_classes(page: Page, expected: dict[str, float], tolerance: float):
    shown = shown_classes(page)
    assert list(shown) == sorted(expected, key=expected.get, reverse=True)
    assert shown == pytest.approx(expected, abs=tolerance)


@of_each_kind
def test_the_page_opens_with_the_example_answered_as_pytorch_answers(page, site):
    check_classes(page, site.probabilities(site.folder / "example.png"), tolerance=1e-4)
    tokens = [site.model.config.patch_grid()[0] ** 2, *site.model.config.tokens_per_stage()[1:]]
    assert page.locator("#tokens").inner_text() == " → ".join(map(str, tokens))
    assert page.locator("#runs").inner_text() == "median of 5 runs, 1 thread"
    assert page.locator("#status").inner_text() == ""


def photo(name: str, folder: Path) -> Path:
    """A file as cameras and programs write them."""
    large = picture(5, (12, 9)).resize((1200, 900), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    opacity = picture(6, (9, 9)).convert("L").resize(large.size, Image.Resampling.BICUBIC)
    images = {
        "photo.png": (large, {}),
        "turned.jpg": (large, {"exif": turned, "quality": 95}),
        "transparent.png": (Image.merge("RGBA", (*large.split(), opacity)), {}),
        "palette.png": (large.convert("P"), {}),
        "grey.png": (large.convert("L"), {}),
        "tiny.webp": (picture(7, (7, 9)), {"lossless": True}),
    }
    image, options = images[name]
    image.save(folder / name, **options)
    return folder / name


def test_files_get_the_answers_of_pytorch(page, site, tmp_path):
    for name in ("photo.png", "turned.jpg", "transparent.png", "palette.png", "grey.png", "tiny.webp"):
        file = photo(name, tmp_path)
        choose(page, file)
        # The browser decodes JPEG a little differently, and rounds transparency.
        exact = name not in ("turned.jpg", "transparent.png")
        check_classes(page, site.probabilities(file), tolerance=1e-4 if exact else 1e-2)


@of_each_kind
def test_the_picture_shows_which_patches_each_token_stands_for(page, site, tmp_path):
    file = photo("photo.png", tmp_path)
    choose(page, file)
    trace = trace_pooling(site.model, site.pixel_values(file))
    config = {**site.image_processor.to_dict(), "do_rescale": False, "do_normalize": False}
    pixels = preprocess(Image.open(file), config).transpose(1, 2, 0)
    colours = patch_colours(pixels, trace.grid)
    canvases = page.locator("#figures canvas").all()
    assert len(canvases) == len(trace.stages[1:])
    for canvas, stage in zip(canvases, trace.stages[1:], strict=True):
        cells = token_cells(stage, 0, trace.grid)
        reached = stage.receptive_field[0].float()
        means = (reached / reached.sum(-1, keepdim=True)) @ colours
        drawn = np.array(canvas.evaluate(CELLS, list(cells.shape)))
        expected = np.where(cells.flatten()[:, None] >= 0, means[cells.flatten()], 0x1F)
        np.testing.assert_allclose(drawn, expected, atol=1)
        assert canvas.get_attribute("data-tokens") == str(stage.num_tokens)
    captions = page.locator("#figures figcaption").all_inner_texts()
    assert captions == [
        f"Block {stage.block}: {stage.num_tokens} tokens, up to {int(stage.sizes.max())} patches each"
        for stage in trace.stages[1:]
    ]


def test_pictures_are_prepared_to_the_pixel_as_pillow_and_numpy_prepare_them(page, site):
    settings = [
        {},
        {"size": {"height": 31, "width": 52}, "do_center_crop": False},
        {"crop_size": {"height": 60, "width": 44}},
        *({"resample": resample.value} for resample in Image.Resampling),
    ]
    for setting in settings:
        config = {**site.image_processor.to_dict(), **setting}
        for mode, size in (("RGB", (97, 64)), ("RGB", (21, 40)), ("L", (55, 120))):
            image = picture(9, size)
            rgba = np.asarray(image.convert("RGBA")).flatten().tolist()
            given = {"width": size[0], "height": size[1], "channels": len(mode), "data": rgba}
            own = {**config, "do_convert_rgb": mode == "RGB"}
            own |= {} if mode == "RGB" else {"image_mean": [0.4], "image_std": [0.3]}
            shown = page.evaluate(PREPARE, [f"{site.url}preprocessing.js", given, own])
            np.testing.assert_array_equal(np.float32(shown), preprocess(image.convert(mode), own).flatten(), str(own))


def test_a_file_can_be_dropped_and_the_example_chosen_with_the_keyboard(page, site, tmp_path):
    file = photo("photo.png", tmp_path)
    transfer = page.evaluate_handle(DROP, [list(file.read_bytes()), file.name])
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    wait_for_answer(page)
    check_classes(page, site.probabilities(file), tolerance=1e-4)
    page.keyboard.press("Tab")
    expect(page.locator("#file")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#example")).to_be_focused()
    page.keyboard.press("Enter")
    wait_for_answer(page)
    check_classes(page, site.probabilities(site.folder / "example.png"), tolerance=1e-4)


def test_a_wrong_file_gets_a_message_and_the_page_goes_on(page, site, tmp_path):
    for content, reason in (
        (b"no picture", "this browser cannot read it as a picture"),
        (encoded(picture(1, (200, 2))), "the picture is too long: 200 × 2 pixels"),
        (encoded(picture(1, (9, 1))), "the picture is too small: 9 × 1 pixels"),
    ):
        (tmp_path / "wrong.png").write_bytes(content)
        page.locator("#file").set_input_files(tmp_path / "wrong.png")
        expect(page.locator("#status")).to_have_text(f"No answer: {reason}.")
    file = photo("photo.png", tmp_path)
    choose(page, file)
    expect(page.locator("#status")).to_have_text("")
    check_classes(page, site.probabilities(file), tolerance=1e-4)


def test_the_page_fits_a_phone(page):
    page.set_viewport_size({"width": 340, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 340


def test_the_page_as_a_picture(page, site, tmp_path):
    """`HPOOL_VIT_PAGE_SCREENSHOT` names the file of the picture in `docs/deploy.md`."""
    file = Path(os.environ.get("HPOOL_VIT_PAGE_SCREENSHOT") or tmp_path / "page.png")
    page.screenshot(path=file, full_page=True)
    assert Image.open(file).width == 1000
