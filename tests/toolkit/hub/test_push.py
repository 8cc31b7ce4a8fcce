"""`hpool-vit push`: a trained folder becomes a repository that others can use, with nothing else in it."""

import base64
import json
import math
import os
import shutil
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from helpers import CODE, TESTS, run_command, run_python, tiny_model
from huggingface_hub import ModelCard
from image_files import encoded, picture
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.toolkit import command
from hpool_vit.toolkit.hub import push as push_module
from hpool_vit.toolkit.hub.card import write_model_card
from hpool_vit.toolkit.hub.earlier_card import split_sections, without_local_paths
from hpool_vit.toolkit.hub.repository import check_private, prepare_repository
from hpool_vit.toolkit.hub.results import read_results


SECRET = "/home/secret-user/projects"
MODEL_FILES = CODE | {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "LICENSE"}


@pytest.fixture(autouse=True)
def restored_logging():
    """The command silences Transformers, which it must not do for other tests."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def trained(saved_folder, tmp_path) -> Path:
    """A folder as a training leaves it, on the machine of a user with secrets."""
    folder = Path(shutil.copytree(saved_folder, tmp_path / "trained"))
    Image.new("RGB", (30, 20), "blue").save(folder / "curves.png")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "log.json", "bad_images.json"):
        (folder / name).write_text(f'"{SECRET}"')
    (folder / "training.yaml").write_text(
        f"recipe: {{ema_decay: 0.9, mixup_alpha: 0.8}}\ndata: {{train_dir: {SECRET}/insects}}\n"
        f"model: {{model_name_or_path: {SECRET}/start}}\n"
    )
    measured = {"eval_top1": 0.5, "eval_ema_top1": 0.9125, "eval_ema_loss": 0.25, "train_runtime": 61.0, "epoch": 3.0}
    (folder / "all_results.json").write_text(json.dumps(measured))
    shutil.copytree(folder, folder / "checkpoint-3")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1.secret-host").write_text(SECRET)
    return folder


def write_trainer_card(folder: Path) -> Path:
    return write_model_card(
        folder,
        model=tiny_model(),
        label_names=["ant", "bee", "cat"],
        recipe={"output_dir": f"{SECRET}/out", "learning_rate": 5e-4},
        data={"name": f"{SECRET}/insects", "split": "test", "num_train_images": 243},
        results={"top1": 0.9125, "loss": 0.25},
        hardware={"cpu": "AMD EPYC", "ram_gb": 25.3},
        training={"epochs": 3, "command": f"python {SECRET}/run.py --train_dir '{SECRET}/my insects' --bf16"},
        base_model="facebook/deit-tiny-patch16-224",
        pictures={"Curves": "curves.png"},
        bad_images=f"1 image skipped:\n  {SECRET}/insects/bee/7.jpg: truncated",
        license="cc-by-4.0",
    )


def push(*words):
    """Runs `hpool-vit push` in this process."""
    command.main(["push", *map(str, words)])


def prepare(folder: Path, *words, repo_id: str = "bees/hpool-vit-insects") -> Path:
    output_dir = folder.parent / "repository"
    push(folder, "--repo_id", repo_id, "--dry_run", "--output_dir", output_dir, *words)
    return output_dir


def error_of(call, capsys) -> str:
    """The line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


def repeated(flag: str, values: list) -> list:
    return [word for value in values for word in (flag, value)]


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_repository_of_a_dry_run_works_for_somebody_without_the_package(trained, tmp_path):
    write_trainer_card(trained)
    (tmp_path / "red_bee.png").write_bytes(encoded(picture(3)))
    repository = prepare(trained, "--examples", tmp_path / "red_bee.png")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    program = TESTS / "programs" / "use_saved_folder.py"
    result = run_python(program, repository, tmp_path / "copy", hide=("hpool_vit",), env=environment, cwd=tmp_path)
    used = json.loads(result.stdout.split("RESULT ")[1])
    assert {answer["label"] for answer in used["classes"]} == {"ant", "bee", "cat"}
    assert used["processors"]["None"] == "HPoolViTImageProcessor"
    before, after = (HPoolViTForImageClassification.from_pretrained(path) for path in (trained, repository))
    for name, tensor in before.state_dict().items():
        assert tensor.equal(after.state_dict()[name]), name


def test_only_what_belongs_to_the_model_comes_along_and_no_local_path(trained, tmp_path, capsys):
    write_trainer_card(trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "_name_or_path": f"{SECRET}/start"}))
    repository = prepare(trained)
    assert files_of(repository) == MODEL_FILES | {"curves.png"}
    for name in files_of(repository):
        content = (repository / name).read_bytes()
        assert not any(
            word in content for word in (b"secret", str(tmp_path).encode(), os.fsencode(Path.home()) + b"/")
        )
    assert (repository / "LICENSE").read_bytes() == (TESTS.parent / "LICENSE").read_bytes()
    printed = capsys.readouterr().out
    assert all(f"  {name}\n" in printed for name in files_of(repository))
    assert (repository / "README.md").read_text() in printed and "Nothing was uploaded" in printed


def test_what_the_card_of_the_training_says_is_kept(trained):
    path = write_trainer_card(trained)
    path.write_text(path.read_text().replace("## Citation", "## Limits\n\nOnly *insects*.\n\n## Citation"))
    repository = prepare(trained)
    card = ModelCard.load(repository / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.base_model == "facebook/deit-tiny-patch16-224"
    assert card.data.model_name == "hpool-vit-insects"
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (0.9125, "insects", "test")
    assert list(split_sections(card.text)) == [
        "About", "How to use", "Results", "Training", "Data", "Hardware", "Pictures", "Limits", "License", "Citation",
    ]  # fmt: skip
    for line in (
        "# hpool-vit-insects",
        'name = "bees/hpool-vit-insects"  # the path of this folder, or its id on the Hub',
        "| Top-1 accuracy | 91.25% |",
        "Measured on: insects test.",
        "python run.py --train_dir 'my insects' --bf16",
        "output_dir: out",
        "  7.jpg: truncated",
        "| RAM (GB) | 25.3 |",
        "![Curves](curves.png)",
        "Only *insects*.",
        "The code (the `.py` files): Apache-2.0, see [LICENSE](LICENSE). The weights: `cc-by-4.0`.",
    ):
        assert line in card.text.splitlines(), line
    assert card.text.count("pan2021scalable") == 1 and "my-model" not in card.text


def test_a_prepared_repository_can_be_prepared_again(trained, tmp_path):
    write_trainer_card(trained)
    (tmp_path / "bee.png").write_bytes(encoded(picture(3)))
    first = prepare(trained, "--examples", tmp_path / "bee.png")
    first = first.rename(tmp_path / "first")
    second = prepare(first)
    without_examples = "## License"
    texts = [(folder / "README.md").read_text() for folder in (first, second)]
    assert texts[0].partition(without_examples)[2] == texts[1].partition(without_examples)[2]
    assert files_of(second) == files_of(first) - {"examples/bee.jpg"} and "widget" not in texts[1]


def test_without_a_card_the_records_of_the_training_are_read(trained):
    card = ModelCard.load(prepare(trained) / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("Top-1 accuracy, averaged weights", 0.9125)
    for line in (
        "| started from | start |",
        "| name | insects |",
        "  mixup_alpha: 0.8",
        "| time (h:mm:ss) | 0:01:01 |",
    ):
        assert line in card.text.splitlines(), line
    assert "0.5" not in card.text


def test_a_model_of_which_nothing_is_known_has_a_card_too(saved_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(saved_folder, tmp_path / "bare"))
    repository = prepare(folder)
    assert files_of(repository) == MODEL_FILES
    printed = capsys.readouterr().out
    for flag in ("--license is", "--examples are", "--results are"):
        assert f"note: {flag} missing" in printed


def test_new_results_stand_in_the_card_and_comparisons_below_them(trained, tmp_path):
    write_trainer_card(trained)
    metrics, rows = tmp_path / "metrics.json", tmp_path / "speed_on_cpu.json"
    metrics.write_text('{"eval_top1": 0.75}')
    rows.write_text('[{"model": "a|b", "images": {"per second": 12.5}, "log": [1, 2]}, {"model": "c"}]')
    comparison = TESTS.parent / "docs" / "results" / "training_digits.json"
    card = ModelCard.load(prepare(trained, *repeated("--results", [metrics, rows, comparison])) / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [0.75]
    results = split_sections(card.text)["Results"]
    assert "75.00%" in results and "91.25%" not in results
    assert "### speed on cpu\n\n| model | images per second |\n| --- | --- |\n| a\\|b | 12.5 |\n| c |  |" in results
    assert "### training digits" in results and "| pooled | 64, 31, 15 |" in results


def test_every_published_result_can_be_shown():
    files = sorted((TESTS.parent / "docs" / "results").glob("training_*.json"))
    assert read_results(files).tables.keys() == {file.stem.replace("_", " ") for file in files} != set()


# Examples.


def test_examples_are_copied_titled_and_answered_without_what_the_camera_wrote(trained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x8825] = {1: "N", 2: (48.0, 8.0, 0.0)}  # where it was taken
    exif[0xA430] = "secret owner"
    picture(1, (2000, 1000)).save(tmp_path / "Red_Admiral.jpg", exif=exif, comment=b"secret comment")
    (tmp_path / "x.png").write_bytes(encoded(picture(2)))
    examples = [tmp_path / "Red_Admiral.jpg", f"red admiral={tmp_path / 'x.png'}", f"Biene 狗={tmp_path / 'x.png'}"]
    repository = prepare(trained, *repeated("--examples", examples), "--license", "mit")
    widget = ModelCard.load(repository / "README.md").data.widget
    assert [(entry["example_title"], entry["src"]) for entry in widget] == [
        ("Red Admiral", "examples/red-admiral.jpg"),
        ("red admiral", "examples/red-admiral-2.jpg"),
        ("Biene 狗", "examples/biene.jpg"),
    ]
    for entry in widget:
        assert {answer["label"] for answer in entry["output"]} == {"ant", "bee", "cat"}
        assert sum(answer["score"] for answer in entry["output"]) == pytest.approx(1, abs=1e-3)
    first = Image.open(repository / "examples" / "red-admiral.jpg")
    assert first.size == (512, 1024) and not first.getexif()
    assert b"secret" not in (repository / "examples" / "red-admiral.jpg").read_bytes()
    assert "![Biene 狗](examples/biene.jpg)" in (repository / "README.md").read_text()


# What is refused.


def spoil(folder: Path, how: str):
    if how.endswith((".json", ".safetensors")):
        (folder / how).unlink()
    elif how == "not finite":
        model = tiny_model()
        model.hpool_vit.layernorm.weight.data[3] = math.inf
        model.save_pretrained(folder)
    elif how == "no classifier":
        tiny_model().hpool_vit.save_pretrained(folder)
    elif how == "a ViT":
        config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ViTForImageClassification(config).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    elif how == "a path in the configuration":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "notes": str(folder / "notes.txt")}))
    elif how == "a broken record":
        (folder / "training.yaml").write_text("recipe: [1")


@pytest.mark.parametrize(
    "how, message",
    [
        ("config.json", "has no configuration"),
        ("model.safetensors", "has no weights"),
        ("preprocessor_config.json", "has no image processor"),
        ("not finite", "the weights hpool_vit.layernorm.weight are not finite"),
        ("no classifier", "has no weights for classifier.bias and 1 more"),
        ("a ViT", "holds a ViTForImageClassification, not an HPool-ViT"),
        ("a path in the configuration", "config.json would name the local folder"),
        ("a broken record", "training.yaml is not valid YAML"),
    ],
)
def test_a_folder_that_cannot_be_shared_is_refused_and_nothing_is_left(how, message, trained, capsys):
    spoil(trained, how)
    assert message in error_of(lambda: prepare(trained), capsys)
    assert os.listdir(trained.parent) == ["trained"]


@pytest.mark.parametrize(
    "text, is_private",
    [
        ('"model": "me/model"', False),
        ("https://huggingface.co/me/model", False),
        ("../model and ~/model and me-/model", False),
        ("/models and /model-2", False),
        ('"model": "/model"', True),
        ("(/model/notes.txt)", True),
        ("--output_dir=/model", True),
        ("file:///model", True),
        ('"notes": "first\\n/model"', True),
    ],
)
def test_a_local_folder_is_found_as_a_path_and_not_at_the_end_of_an_id(text, is_private, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="local folder /model:") if is_private else nullcontext():
        check_private(tmp_path, Path("/model"))


def test_a_repository_id_may_end_like_a_local_folder(trained, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/insects"))
    repository = prepare(trained, repo_id="bees/insects")
    assert "bees/insects" in (repository / "README.md").read_text()


@pytest.mark.parametrize(
    "repo_id", ["insects", "a/b/c", "bees/", "/insects", "be es/x", "bees/x--y", "bees/x.git", "b/" + "x" * 97]
)
def test_a_name_that_the_hub_would_not_take_is_refused(repo_id, trained, capsys):
    error = error_of(lambda: prepare(trained, repo_id=repo_id), capsys)
    assert error.startswith(f"error: --repo_id {repo_id} must be of the form owner/name: ")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--license", "Apache 2.0"], "--license Apache 2.0 is not an identifier"),
        (["--examples", "lost.png"], "--examples lost.png cannot be used: unreadable: No such file"),
        (["--results", "setup.py"], "setup.py"),
        (["--results", "lost.json"], "lost.json"),
        (["--output_dir", "tests"], "tests exists and is not empty"),
    ],
)
def test_wrong_flags_are_refused_by_name(words, message, trained, monkeypatch, capsys):
    monkeypatch.chdir(TESTS.parent)
    assert message in error_of(lambda: prepare(trained, *words), capsys)


def test_a_model_that_is_not_a_folder_is_refused(tmp_path, capsys):
    assert "bees/insects is not a folder" in error_of(lambda: prepare(Path("bees/insects")), capsys)
    with pytest.raises(ValueError, match=r"^bees/insects is not a folder"):
        prepare_repository("bees/insects", "bees/insects", tmp_path / "repository")


@pytest.mark.parametrize("content", ["[]", "[1, 2]", '"text"', '{"a": "b"}', "{}"])
def test_a_file_without_results_is_refused(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="holds neither metrics nor rows"):
        read_results([tmp_path / "results.json"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("python /home/me/run.py --data=/data/x", "python run.py --data=x"),
        ("'/home/me/my photos/train' \"~/a b/c\"", "'train' \"c\""),
        ("~/cats.jpg and C:\\Users\\me\\x, D:/y/z", "cats.jpg and x, z"),
        ("file:///home/me/a.png `/tmp/b`", "a.png `b`"),
        ("| data | /home/me/my\\_photos |", "| data | my\\_photos |"),
        ("- /home/me/a\n- /b/c/", "- a\n- c"),
        (
            "[x](https://arxiv.org/abs/2103) 1/2 and/or </b> 5 / 6 a/b.png",
            "[x](https://arxiv.org/abs/2103) 1/2 and/or </b> 5 / 6 a/b.png",
        ),
    ],
)
def test_local_paths_are_reduced_to_their_last_names(text, expected):
    assert without_local_paths(text) == expected


def test_headings_in_code_do_not_begin_a_section():
    text = "# x\n\nHello\n## A\n````python\n```\n## no section\n````\n## B\n## A\nmore"
    assert split_sections(text) == {"About": "Hello", "A": "````python\n```\n## no section\n````\nmore", "B": ""}


# Uploading.


class FakeHub(BaseHTTPRequestHandler):
    """The part of the Hub that an upload needs. It records what it gets in `server.requests`."""

    def answer(self, content: dict):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append((self.path, None))
        self.answer({"id": "bees/insects", "private": True, "siblings": [], "tags": []})

    def do_POST(self):
        body = self.read_body()
        self.server.requests.append((self.path, body))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.send_error(401)
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            self.answer(
                {
                    "commitUrl": f"{self.server.address}/bees/insects/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        else:
            self.answer({"url": f"{self.server.address}/bees/insects", "id": "1", "errors": [], "warnings": []})

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    server.requests, server.address = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_command_uploads_exactly_the_repository(hub, trained, tmp_path):
    write_trainer_card(trained)
    environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home")}
    environment |= {"PATH": "/usr/bin:/bin", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    flags = ["--repo_id", "bees/insects", "--private"]
    result = run_command("push", trained, *flags, env=environment, cwd=tmp_path)
    assert f"uploaded: {hub.address}/bees/insects" in result.stdout
    bodies = {path.partition("?")[0]: body for path, body in hub.requests}
    made = json.loads(bodies["/api/repos/create"])
    assert made["name"] == "insects" and made["organization"] == "bees"
    # The field's name depends on the version of huggingface_hub.
    assert made.get("private") is True or made.get("visibility") == "private"
    commit = [json.loads(line) for line in bodies["/api/models/bees/insects/commit/main"].splitlines()]
    files = {entry["value"]["path"]: entry["value"]["content"] for entry in commit if entry["key"] == "file"}
    assert files.keys() == MODEL_FILES | {"curves.png"}
    assert base64.b64decode(files["LICENSE"]) == (TESTS.parent / "LICENSE").read_bytes()
    assert b"secret" not in b"".join(map(base64.b64decode, files.values()))
    # The repository was prepared in a temporary folder.
    assert {path.name for path in tmp_path.iterdir()} <= {"trained", "home"}


class Api:
    """Stands for `HfApi`, with a public repository; it raises `failure` instead of creating one."""

    failure = None
    uploads = []

    def create_repo(self, repo_id, private, exist_ok):
        if self.failure:
            raise self.failure
        return f"https://hub/{repo_id}"

    def model_info(self, repo_id):
        return type("Info", (), {"private": False})

    def upload_folder(self, **kwargs):
        self.uploads.append(kwargs)


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(push_module, "HfApi", Api)
    monkeypatch.setattr(push_module, "get_token", lambda: "hf_test")
    monkeypatch.setattr(Api, "uploads", [])
    return Api


def test_a_private_upload_to_a_public_repository_is_refused(trained, api, capsys):
    error = error_of(lambda: push(trained, "--repo_id", "bees/insects", "--private"), capsys)
    assert "--private is requested, but bees/insects exists and is public" in error
    assert api.uploads == []
    push(trained, "--repo_id", "bees/insects")
    assert len(api.uploads) == 1


def test_a_failed_upload_is_one_line(trained, api, monkeypatch, capsys):
    monkeypatch.setattr(api, "failure", RuntimeError("403 Forbidden\n\nYou may not."))
    error = error_of(lambda: push(trained, "--repo_id", "bees/insects"), capsys)
    assert error == "error: bees/insects was not uploaded: 403 Forbidden You may not."


def test_a_missing_token_is_reported_before_any_work(trained, monkeypatch, capsys):
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    error = error_of(lambda: push(trained, "--repo_id", "bees/insects"), capsys)
    assert error == "error: There is no token for the Hub: run `hf auth login`, set HF_TOKEN, or use --dry_run."
