"""`hpool-vit predict`: files, folders and addresses get answers, bad ones a reason, in one process or several."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from accelerate.state import PartialState
from helpers import run_python, tiny_model
from image_files import BAD_FILES, CONVERTED_FILES, encoded, picture, write_folder
from PIL import Image
from transformers import pipeline

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit import command
from hpool_vit.toolkit.inference import inputs, writing
from hpool_vit.toolkit.inference.predict import predict
from hpool_vit.toolkit.shared import images


COMMAND = "hpool_vit.toolkit.command"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", COMMAND, "predict"]


@pytest.fixture(autouse=True)
def fresh_process_state():
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that tells pictures apart; one of its labels is not plain."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    names = ["ant", '<b>bee</b>, "é"', "cat"]
    model = tiny_model(id2label=dict(enumerate(names)), label2id={name: label for label, name in enumerate(names)})
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Nine sound images of three classes."""
    return write_folder(tmp_path / "photos", per_class=3)


def run(model: Path, *words, **flags) -> int:
    """The exit status of the command in this process."""
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return status_of("predict", model, *words, "--disable_tqdm", *options)


def status_of(*words) -> int:
    try:
        command.main(list(map(str, words)))
    except SystemExit as stop:
        return stop.code
    return 0


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers_of(model: Path, files: list[Path]) -> list[list[dict]]:
    classifier = pipeline("image-classification", model=str(model))
    return [
        [
            {"label": answer["label"], "score": pytest.approx(answer["score"], abs=1e-5)}
            for answer in classifier(str(file))
        ]
        for file in files
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_each_file_gets_the_answers_of_the_pipeline_in_the_order_of_the_names(batch_size, model, photos, tmp_path):
    broken = photos / "bee" / "1b.png"
    broken.write_bytes(b"no picture")
    output = tmp_path / "answers.jsonl"
    status = run(model, photos / "cat" / "2.png", photos, batch_size=batch_size, output=output)
    files = [photos / "cat" / "2.png", *(path for path in sorted(photos.rglob("*.png")))]
    files.pop()
    lines = read_lines(output)
    assert status == 1 and [line["file"] for line in lines] == list(map(str, files))
    sound = [line for line in lines if "answers" in line]
    assert [line["answers"] for line in sound] == answers_of(model, [file for file in files if file != broken])
    assert [line for line in lines if "error" in line] == [
        {"file": str(broken), "error": "unreadable: not an image that Pillow knows"}
    ]


def give(monkeypatch, content: bytes):
    """What the program reads as standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_names_come_from_standard_input_too_and_a_bar_goes_to_standard_error(model, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    give(monkeypatch, b"photos/ant/1.png\n\nphotos/bee\r\n")
    assert status_of("predict", model, "-", "--top_k", 1, "photos/cat/0.png", "--format", "csv") == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    names = ["ant/1", "bee/0", "bee/1", "bee/2", "cat/0"]
    assert [row["file"] for row in rows] == [f"photos/{name}.png" for name in names]
    assert list(rows[0]) == ["file", "label", "score", "error"]
    assert "classifying: 100%" in printed.err and "5 of 5 files classified" in printed.err


def test_names_between_zero_bytes_may_hold_line_ends():
    content = b"one\nname.png\0second.png\0"
    assert inputs.read_names(io.BytesIO(content)) == ["one\nname.png", "second.png"]


def test_a_csv_row_has_the_answers_side_by_side_or_the_error(model, photos, tmp_path):
    output = tmp_path / "answers.csv"
    assert run(model, photos / "ant" / "0.png", "lost, too.png", top_k=2, output=output) == 1
    header, sound, lost = csv.reader(output.read_text(encoding="utf-8").splitlines())
    assert header == ["file", "label", "score", "label_2", "score_2", "error"]
    assert float(sound[2]) >= float(sound[4]) > 0 and sound[5] == ""
    assert lost == ["lost, too.png", "", "", "", "", "unreadable: No such file or directory"]


def test_a_table_is_for_reading(model, photos, capsys):
    (photos / "a\x1b[31m\nred.png").write_bytes(encoded(picture()))
    long = photos / f"{'x' * 100}.png"
    long.write_bytes(b"")
    assert run(model, photos, top_k=2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all(line.isprintable() for line in lines)
    assert lines[1].startswith("…") and "xxx.png  bad: unreadable" in lines[1]
    assert len({line.index("%") for line in lines if "%" in line}) == 1


def test_more_answers_than_classes_are_as_many_as_classes(model, photos, tmp_path):
    output = tmp_path / "answers.csv"
    assert run(model, photos / "ant", top_k=50, output=output) == 0
    assert output.read_text().splitlines()[0].count("label") == 3


def test_bad_files_are_named_with_the_reason_and_counted(model, photos, tmp_path, capsys):
    for name, (content, _) in {**BAD_FILES, **CONVERTED_FILES}.items():
        (photos / name).write_bytes(content)
    (photos / "thin.png").write_bytes(encoded(picture(1, (2, 500))))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    others = [tmp_path / "empty", tmp_path / "pipe.png", tmp_path / "lost.png", "s3://bucket/a.png"]
    assert run(model, photos, *others, output=tmp_path / "answers.jsonl") == 1
    errors = {Path(line["file"]).name: line.get("error", "") for line in read_lines(tmp_path / "answers.jsonl")}
    expected = {name: reason for name, (_, reason) in BAD_FILES.items()} | {
        "thin.png": "too long: 2 × 500 pixels",
        "empty": "a folder without images",
        "pipe.png": "not a regular file",
        "lost.png": "No such file",
        "a.png": "only addresses that begin with http:// or https://",
    }
    assert {name for name, error in errors.items() if error} == expected.keys()
    assert all(reason in errors[name] for name, reason in expected.items())
    printed = capsys.readouterr().err
    assert f"11 of {11 + len(expected)} files classified" in printed and f"{len(expected)} images skipped" in printed
    assert "CMYK to RGB" in printed


def test_a_name_given_twice_is_classified_once(model, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(model, "photos/bee/0.png", "./photos/../photos/bee/0.png", photos, output="answers.jsonl") == 0
    files = [line["file"] for line in read_lines(Path("answers.jsonl"))]
    assert len(files) == 9 and files[0] == "photos/bee/0.png"
    assert "2 of the files were named again" in capsys.readouterr().err


def test_of_a_folder_each_real_visible_image_is_taken_once_and_the_rest_is_noted(photos, tmp_path):
    (photos / "notes.txt").write_text("x")
    (photos / "ant" / "._0.png").write_bytes(b"x")
    (photos / "__MACOSX").mkdir()
    (photos / "__MACOSX" / "0.png").write_bytes(b"x")
    (photos / "bee" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "SHOUTED.PNG").write_bytes(b"x")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    files, notes = inputs.list_files([str(photos)])
    names = [f"{label}/{number}.png" for label in ("ant", "bee", "cat") for number in range(3)]
    assert files == [f"{photos}/{name}" for name in [*names, "linked/SHOUTED.PNG"]]
    assert notes == [
        f"note: {photos}: 1 file with other endings was left out: .txt",
        f"note: {photos}: 1 link to files that are listed elsewhere was left out: bee/up",
    ]
    again, notes = inputs.list_files([str(photos / "cat"), str(photos), str(tmp_path / "elsewhere")])
    assert sorted(again) == files and notes[-1] == "note: 4 of the files were named again; each is classified once."


def test_files_with_other_endings_are_counted_and_named_before_the_answers(model, photos, capsys):
    for number in range(20):
        (photos / "bee" / f"{number}.xyz").touch()
    assert run(model, photos) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(f"note: {photos}: 20 files with other endings were left out: .xyz\n")
    assert len(printed.out.splitlines()) == 9


def test_a_name_that_is_not_utf8_is_kept_in_json(model, photos, tmp_path):
    name = os.fsencode(photos) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(encoded(picture()))
    assert run(model, os.fsdecode(name), output=tmp_path / "answers.jsonl", contact_sheet=tmp_path / "s.html") == 0
    (line,) = read_lines(tmp_path / "answers.jsonl")
    assert os.fsencode(line["file"]) == name


def test_a_program_gets_the_predictions_while_it_iterates(model, photos):
    (photos / "text.png").write_bytes(b"no picture")
    predictions = predict(str(model), [photos / "ant", photos / "text.png"], top_k=2, num_thumbnails=1)
    assert len(predictions) == 4 and predictions.num_answers == 2 and predictions.notes == []
    *sound, bad = predictions
    assert [prediction.file for prediction in [*sound, bad]] == predictions.files
    assert all(len(prediction.answers) == 2 and prediction.thumbnail for prediction in sound)
    assert bad.answers == [] and bad.reason == "unreadable: not an image that Pillow knows"
    with pytest.raises(ValueError, match="`top_k=0` must be at least 1"):
        predict(str(model), [photos], top_k=0)
    with pytest.raises(ValueError, match=r"photos has no config\.json"):
        predict(str(photos), [photos])


# Addresses.


class Handler(BaseHTTPRequestHandler):
    """`/sound.png`, `/moved.png`, `/text.png`, `/short.png`, `/drip.png`, `/wait.png`; others are not there."""

    def do_GET(self):
        content = encoded(picture(100))
        name = self.path.partition("?")[0]
        if name == "/wait.png":
            self.server.asked.set()
            self.server.go_on.wait(60)
        if name == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/sound.png")
            return self.end_headers()
        if name not in ("/sound.png", "/text.png", "/short.png", "/drip.png", "/wait.png"):
            return self.send_error(404)
        content = b"<html>" if name == "/text.png" else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) * (2 if name == "/short.png" else 1)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(content), 10 if name == "/drip.png" else len(content)):
                self.wfile.write(content[start : start + (10 if name == "/drip.png" else len(content))])
                self.server.go_on.wait(0.2 if name == "/drip.png" else 0)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.go_on = threading.Event(), threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_fetched_and_those_that_fail_are_bad_files(server, model, photos, tmp_path):
    names = ["sound.png?size=é", "moved.png", "lost.png", "text.png", "short.png", "drip.png", "wait.png"]
    closed = "http://127.0.0.1:1/sound.png"
    output = tmp_path / "answers.jsonl"
    addresses = [f"{server.address}/{name}" for name in names]
    assert run(model, *addresses, closed, photos / "ant" / "0.png", timeout=1, output=output) == 1
    *fetched, last = read_lines(output)
    assert [line["file"] for line in fetched] == [*addresses, closed] and "answers" in last
    assert fetched[0]["answers"] == fetched[1]["answers"]
    reasons = [
        "HTTP 404",
        "not an image",
        "",
        "not complete after 1 s",
        "no answer in 1 s",
        "the download failed",
    ]
    for line, reason in zip(fetched[2:], reasons, strict=True):
        assert reason in line["error"], line


def test_an_address_that_gives_too_much_is_left(server, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="too large"):
        inputs.read_image(f"{server.address}/sound.png", timeout=5)


# Contact sheets.


class Page(HTMLParser):
    """Tags, sources of pictures and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_an_html_sheet_is_one_file_in_which_every_name_is_text(model, photos, tmp_path):
    (photos / "<script>alert(1)<'\"&.png").write_bytes(encoded(picture(5, (900, 700))))
    (photos / "<img src=x onerror=alert(2)>.png").write_bytes(b"")
    sheet = tmp_path / "sheet.html"
    assert run(model, photos, top_k=2, contact_sheet=sheet) == 1
    page = Page(sheet.read_text(encoding="utf-8"))
    assert page.tags.count("figure") == 11 and page.tags.count("img") == 10 and page.tags.count("meter") == 20
    assert not {"script", "b", "link"} & set(page.tags)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert f"{photos}/<script>alert(1)<'\"&.png" in page.text and '<b>bee</b>, "é"' in page.text
    assert f"{photos}/<img src=x onerror=alert(2)>.png" in page.text
    assert "unreadable: not an image that Pillow knows" in page.text and "10 of 11 files classified" in page.text
    assert sheet.stat().st_size < 100_000


def test_a_png_sheet_shows_each_picture_in_its_tile(model, photos, tmp_path):
    (photos / "bad.png").write_bytes(b"")
    Image.new("RGB", (64, 64), (250, 0, 0)).save(photos / "red.png")
    assert run(model, photos / "bad.png", photos / "red.png", contact_sheet=tmp_path / "sheet.png") == 1
    sheet = Image.open(tmp_path / "sheet.png")
    reds = [x for x in range(sheet.width) if sheet.getpixel((x, 130))[0] > 240 > 20 > sheet.getpixel((x, 130))[2]]
    assert len(reds) == 192 and reds[0] > sheet.width / 4


def test_a_sheet_shows_the_first_files_and_says_so(model, photos, tmp_path):
    sheet = tmp_path / "sheet.html"
    assert run(model, photos, contact_sheet=sheet, max_contact_sheet=2) == 0
    page = Page(sheet.read_text())
    assert page.tags.count("figure") == 2 and "9 of 9 files classified; the first 2 are shown" in page.text


# What ends the program.


def test_nothing_to_classify_is_exit_status_1(model, monkeypatch, capsys):
    give(monkeypatch, b"\n")
    assert run(model, "-") == 1
    assert "0 of 0 files classified" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"top_k": 0}, "--top_k 0 must be at least 1"),
        ({"batch_size": "many"}, "'--batch_size': Input should be a valid integer"),
        ({"timeout": "nan"}, "--timeout nan must be more than 0"),
        ({"output": "answers.xlsx"}, "--output answers.xlsx ends in none of .csv, .jsonl"),
        ({"output": "no/such/answers.csv"}, "create it first"),
        ({"output": "/dev/null", "format": "csv"}, "is not a file that can be replaced"),
        ({"contact_sheet": "sheet.pdf"}, "must end in .html, .htm, .png"),
        ({"output": "a.html", "format": "csv", "contact_sheet": "a.html"}, "give two names"),
        ({"contact_sheet": "photos/ant/0.png"}, "would be overwritten"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ({"hvt_pool": "1,99"}, "hvt_pool"),
        ({"hvt_pool": "often"}, "hvt_pool"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_status_2(flags, message, model, photos, capsys, monkeypatch):
    monkeypatch.chdir(photos.parent)
    assert run(model, "photos", **flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err
    assert printed.out == "" and os.listdir() == ["photos"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("no/such/folder", "error: no/such/folder is neither a folder here nor an id on the Hub."),
        ("photos", "error: photos has no config.json"),
    ],
)
def test_a_name_without_a_model_is_one_line_and_exit_status_2(name, message, photos, capsys, monkeypatch):
    monkeypatch.chdir(photos.parent)
    assert run(Path(name), "photos") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.count("\n") == 1


def damage(folder: Path, how: str):
    if how == "no classifier":
        tiny_model().hpool_vit.save_pretrained(folder)
    elif how == "no classes":
        tiny_model(num_labels=0).save_pretrained(folder)
    elif how == "not finite":
        model = tiny_model()
        model.classifier.bias.data[0] = math.nan
        model.save_pretrained(folder)
    elif how == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "another size":
        tiny_model(image_size=64, hvt_pool=None).save_pretrained(folder)


@pytest.mark.parametrize(
    "how, message",
    [
        ("no classifier", "has no weights for classifier.bias and 1 more"),
        ("no classes", "has no classes"),
        ("not finite", "the weights classifier.bias are not finite"),
        ("truncated", "cannot be loaded"),
        ("another size", "do not fit the model"),
    ],
)
def test_a_model_that_would_give_nonsense_is_refused(how, message, saved_folder, photos, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(saved_folder, folder)
    damage(folder, how)
    capsys.readouterr()
    assert run(folder, photos) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_another_schedule_gives_other_answers_and_a_note_if_it_was_not_trained(model, photos, tmp_path, capsys):
    outputs = [tmp_path / "usual.csv", tmp_path / "other.csv", tmp_path / "same.csv"]
    for output, flags in zip(outputs, ({}, {"hvt_pool": "1"}, {"hvt_pool": "1,3"}), strict=True):
        assert run(model, photos, output=output, **flags) == 0
        assert ("was not trained for hvt_pool=1, only for 1,3: " in capsys.readouterr().err) == (output == outputs[1])
    usual, other, same = (output.read_text() for output in outputs)
    assert usual == same != other


def test_a_run_that_breaks_off_leaves_the_earlier_result_as_it_was(model, photos, tmp_path, capsys, monkeypatch):
    output = tmp_path / "answers.csv"
    output.write_text("earlier")

    def break_off(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_sheet", break_off)
    assert run(model, photos, output=output, contact_sheet=tmp_path / "sheet.html") == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert output.read_text() == "earlier" and sorted(os.listdir(tmp_path)) == ["answers.csv", "photos"]


# Several processes.


@pytest.mark.slow
def test_two_processes_share_the_files_and_write_one_result(model, tmp_path):
    photos = write_folder(tmp_path / "photos", per_class=12)
    (photos / "cat" / "zz.png").write_bytes(b"the last file of the second process")
    flags = ["--batch_size", "1", "--top_k", "2"]
    outputs = [tmp_path / "two.csv", tmp_path / "one.csv"]
    # Only one of them can read what the launcher was given.
    result = run_python(*TORCHRUN, model, "-", *flags, "--output", outputs[0], check=False, input=f"{photos}\n")
    assert result.returncode == 1 and "classifying: 100%" in result.stderr, result.stderr
    assert "36 of 37 files classified" in result.stderr and "zz.png: unreadable" in result.stderr
    assert result.stderr.count("images skipped") + result.stderr.count("image skipped") == 1
    assert run(model, photos, batch_size=1, top_k=2, output=outputs[1]) == 1
    two, one = (list(csv.DictReader(output.open())) for output in outputs)
    assert [row["file"] for row in two] == [row["file"] for row in one]
    for first, second in zip(two, one, strict=True):
        assert first["label"] == second["label"] and first["error"] == second["error"]
        assert first["error"] or float(first["score"]) == pytest.approx(float(second["score"]), abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "two.csv", "one.csv"}


@pytest.mark.slow
def test_when_a_process_is_killed_no_result_looks_complete(server, model, photos, tmp_path):
    # The second process has this file, and waits for it.
    names = [photos, f"{server.address}/wait.png"]
    flags = ["--output", tmp_path / "answers.csv", "--timeout", "60"]
    words = [sys.executable, *TORCHRUN, model, *names, *flags]
    launcher = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.asked.wait(120)
    workers = [child for child in psutil.Process(launcher.pid).children() if COMMAND in child.cmdline()]
    (second,) = [worker for worker in workers if worker.environ()["RANK"] == "1"]
    second.send_signal(signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, printed
    assert "answers.csv" not in os.listdir(tmp_path)
