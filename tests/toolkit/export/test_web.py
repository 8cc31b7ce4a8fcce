"""
`hpool-vit export --format web`: a folder of static files with the model, the page and onnxruntime-web, for which a
package made here stands in. `browser/` opens the page.
"""

import base64
import hashlib
import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_with_processor, tiny_config, tiny_model
from huggingface_hub.repocard import metadata_load
from PIL import Image

from hpool_vit import HPoolViTForSemanticSegmentation, HPoolViTImageProcessor
from hpool_vit.toolkit import command, trace_pooling
from hpool_vit.toolkit.export import runtime, web
from hpool_vit.toolkit.export.export import export_model
from hpool_vit.toolkit.export.predict_onnx import open_model
from hpool_vit.toolkit.export.runtime import FILES, read_runtime


CONTENT = {name: f"the content of {name}".encode() for name in FILES}
# The first stage merges every other token, and the second merges none of the few that are left.
MERGING = {"pool_mode": "merge", "merge_ratio": [0.5, 0.01], "use_class_token": True}


def pack(content: dict[str, bytes]) -> bytes:
    """A package of npm."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as package:
        for name, data in content.items():
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(data)
            package.addfile(info, io.BytesIO(data))
    return archive.getvalue()


PACKAGE = pack(CONTENT)


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch) -> Path:
    """A small package in place of onnxruntime-web, and no other."""
    checksum = base64.b64encode(hashlib.sha512(PACKAGE).digest()).decode()
    monkeypatch.setattr(runtime, "INTEGRITY", f"sha512-{checksum}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    file = tmp_path / "package.tgz"
    file.write_bytes(PACKAGE)
    return file


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with the package; what it was asked for."""
    served = tmp_path / "registry" / "onnxruntime-web" / "-" / runtime.NAME
    served.parent.mkdir(parents=True)
    served.write_bytes(PACKAGE)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "registry"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    yield served, asked
    server.shutdown()
    server.server_close()


def save(folder: Path, **overrides):
    model = tiny_model(**{"num_hidden_layers": 2, "hvt_pool": [1], **overrides})
    save_with_processor(folder, model)
    return model


def refusal(capsys, *words) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main(["export", *map(str, words)])
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def test_the_folder_has_all_that_the_page_needs_and_the_model_says_what_merged(package, tmp_path, capsys):
    model = save(tmp_path / "model", hvt_pool=[0, 1], **MERGING)
    folder = tmp_path / "page"
    words = ("--output_dir", folder, "--format", "web", "--runtime", package)
    command.main(["export", *map(str, (tmp_path / "model", *words))])
    assert f"Look at it: python -m http.server --directory {folder}" in capsys.readouterr().out
    assert {name: (folder / "runtime" / name).read_bytes() for name in FILES} == CONTENT
    page = {file.name for file in web.WEB_FILES.iterdir()}
    made = {"model.onnx", "labels.json", "tokens.json", "preprocessor_config.json", "export.json", "example.png"}
    assert {path.name for path in folder.iterdir()} == page | made | {"runtime"}
    card = metadata_load(folder / "README.md")
    assert card["sdk"] == "static" and card["app_file"] == "index.html"
    assert len(card["short_description"]) <= 60  # or the Hub refuses it
    images = torch.randn(3, 3, 32, 32)
    trace = trace_pooling(model, images)
    logits, groups = open_model(folder / "model.onnx").run(["logits", "groups"], {"pixel_values": images.numpy()})
    np.testing.assert_allclose(logits, trace.logits, atol=1e-4)
    assert groups.dtype == np.int32  # JavaScript has no plain numbers of 64 bits
    np.testing.assert_array_equal(groups, torch.stack([stage.groups for stage in trace.stages[1:]], dim=1))
    tokens = json.loads((folder / "tokens.json").read_text())
    assert tokens["merges"] and tokens["grid"] == [8, 8] and tokens["channels"] == 3
    stages = [{"block": stage.block, "tokens": stage.num_tokens, "windows": None} for stage in trace.stages[1:]]
    assert tokens["stages"] == stages


@pytest.mark.parametrize("window", [{}, {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)}], ids=["row", "grid"])
def test_the_page_knows_the_windows_of_a_model_that_pools(window):
    model = tiny_model(hvt_pool=[1, 2], **window)
    tokens = web.describe_tokens(model)
    first, second = tokens["stages"]
    assert not tokens["merges"] and first["block"] == 1 and first["tokens"] == len(first["windows"])
    if window:
        assert first["windows"][:5] == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15], [16, 17, 24, 25]]
        assert second["windows"][0] == [row * 8 + column for row in range(4) for column in range(4)]
    else:
        assert first["windows"][:2] == [[0, 1, 2], [2, 3, 4]]
        assert second["windows"][1] == list(range(4, 11))


@pytest.mark.parametrize("pooling", [{"hvt_pool": None, "pool_mode": "merge"}, {"hvt_pool": [1]}])
def test_a_model_that_merges_nothing_gives_the_logits_alone(pooling):
    model, images = tiny_model(**pooling), torch.randn(2, 3, 32, 32)
    assert torch.equal(web.with_groups(model)(images), model(images).logits)
    assert len(web.describe_tokens(model)["stages"]) == len(pooling["hvt_pool"] or [])


def test_the_model_is_as_before_once_its_groups_were_read():
    model = tiny_model(pool_mode="merge")
    web.with_groups(model)(torch.randn(1, 3, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("labels", [list("0123456789"), ["ant", "bee"]], ids=["digits", "others"])
def test_the_example_fits_the_model(labels, tmp_path):
    web.describe(tiny_model(num_labels=len(labels), id2label=dict(enumerate(labels))), tmp_path)
    with Image.open(tmp_path / "example.png") as example:
        colours = np.asarray(example).reshape(-1, 3)
    is_grey = (colours == colours[:, :1]).all()
    assert is_grey == (labels[0] == "0") and colours.std() > 30


def test_the_runtime_is_downloaded_once(registry):
    _, asked = registry
    assert read_runtime() == CONTENT == read_runtime()
    assert asked == [f"/onnxruntime-web/-/{runtime.NAME}"]


def test_a_damaged_file_in_the_cache_is_replaced(registry):
    read_runtime()
    (runtime.cache_folder() / runtime.NAME).write_bytes(PACKAGE[:-9])
    assert read_runtime() == CONTENT and len(registry[1]) == 2


def test_a_package_with_another_checksum_is_neither_used_nor_kept(registry):
    registry[0].write_bytes(pack({**CONTENT, FILES[0]: b"something else"}))
    with pytest.raises(ValueError, match=r"its checksum is another.*npm pack onnxruntime-web@"):
        read_runtime()
    assert not runtime.cache_folder().exists()


@pytest.mark.parametrize("place", ["", "dist", "package/dist", "node_modules/onnxruntime-web/dist"])
def test_the_runtime_comes_from_a_folder_wherever_npm_puts_it(place, tmp_path):
    (tmp_path / "mine" / place).mkdir(parents=True)
    for name, content in CONTENT.items():
        (tmp_path / "mine" / place / name).write_bytes(content)
    assert read_runtime(tmp_path / "mine") == CONTENT


def test_what_a_page_cannot_be_made_of_is_refused_in_one_line_before_the_work(package, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    save(model)
    config = tiny_config(num_hidden_layers=2, hvt_pool=None)
    HPoolViTForSemanticSegmentation(config).save_pretrained(tmp_path / "segments")
    HPoolViTImageProcessor.for_config(config).save_pretrained(tmp_path / "segments")
    (tmp_path / "other.tgz").write_bytes(b"no package")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("hpool_vit.toolkit.export.export.write_model", lambda *_: pytest.fail("it was traced"))
    out, remedy = ("--output_dir", tmp_path / "page", "--format", "web"), "pass it as --runtime"
    for words, parts in (
        ((model, *out), ("http://127.0.0.1:9/onnxruntime-web/-/", "cannot be downloaded", remedy)),
        ((model, *out, "--runtime", tmp_path / "gone"), ("gone is neither a file nor a folder", remedy)),
        (
            (model, *out, "--runtime", tmp_path / "other.tgz"),
            ("other.tgz is not the package", runtime.VERSION, remedy),
        ),
        ((model, *out, "--runtime", tmp_path / "empty"), (f"empty does not have {FILES[0]}", remedy)),
        (
            (model, *out, "--dynamic_image_size"),
            ("--dynamic_image_size needs --format onnx, torch_export or aot, not web",),
        ),
        ((model, *out, "--int8", "dynamic"), ("--int8 dynamic needs --format onnx, not web",)),
        ((model, *out[:2], "--runtime", package), ("needs --format web, not onnx",)),
        ((tmp_path / "segments", *out, "--runtime", package), ("segments gives each pixel a class",)),
    ):
        message = refusal(capsys, *words)
        assert all(part in message for part in parts), message
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    assert "file:///etc is not a web address" in refusal(capsys, model, *out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_a_browser_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="images of 5 channels"):
        web.with_groups(tiny_model(num_channels=5))
    monkeypatch.setattr(web, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="too much for a browser"):
        web.with_groups(tiny_model())


@pytest.mark.slow
def test_a_model_of_greyscale_images_becomes_a_page_too(package, tmp_path):
    model = tiny_model(num_channels=1, num_hidden_layers=2, hvt_pool=[1])
    model.save_pretrained(tmp_path / "model")
    grey = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    HPoolViTImageProcessor.for_config(model.config, **grey).save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "page", format="web", runtime=package)
    assert json.loads((tmp_path / "page" / "tokens.json").read_text())["channels"] == 1
