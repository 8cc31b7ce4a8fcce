"""What SECURITY.md says of the code that a saved folder carries: what it imports, calls and does."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import CODE, EXAMPLES, TESTS, TOOLKIT, run_python


ROOT = TESTS.parent
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")

# The code of saved folders may import nothing else, and relatively each other.
ALLOWED_IMPORTS = {"base64", "binascii", "collections", "copy", "dataclasses", "functools", "io.BytesIO", "math"}
ALLOWED_IMPORTS |= {"os.PathLike", "os.path.isfile", "typing", "warnings"}
ALLOWED_IMPORTS |= {"PIL.Image", "PIL.ImageOps", "huggingface_hub", "torch", "transformers"}
FORBIDDEN_NAMES = {"__builtins__", "__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open"}
# Methods and functions of modules by which allowed packages could run code, read pickles, or reach files and network.
FORBIDDEN_ATTRIBUTES = {"cpp_extension", "hf_hub_download", "hub", "import_module", "load", "load_library", "popen"}
FORBIDDEN_ATTRIBUTES |= {"requests", "save", "snapshot_download", "system", "urlopen", "write_bytes", "write_text"}


def forbidden_parts(source: str) -> list[str]:
    """What of a module's source goes beyond what SECURITY.md allows."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if not is_allowed(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if not is_allowed(name) or name.split(".")[-1] in FORBIDDEN_ATTRIBUTES]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            found.append(f".{node.attr}")
    return found


def is_allowed(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in ALLOWED_IMPORTS for length in range(1, len(parts) + 1))


@pytest.mark.parametrize("module", sorted(CODE | {"__init__.py"}))
def test_the_code_neither_imports_nor_calls_what_could_reach_files_network_or_processes(module):
    assert forbidden_parts((ROOT / module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os", ["os"]),
        ("from os import PathLike, system", ["os.system"]),
        ("import torch\nimport pickle", ["pickle"]),
        ("from urllib.request import urlopen", ["urllib.request.urlopen"]),
        ("import subprocess as copy", ["subprocess"]),
        ("def f():\n    import socket", ["socket"]),
        ("run = eval", ["eval"]),
        ("with open('x') as file:\n    pass", ["open"]),
        ("torch.load('x')", [".load"]),
        ("from torch.hub import load", ["torch.hub.load"]),
        ("from huggingface_hub import hf_hub_download", ["huggingface_hub.hf_hub_download"]),
        ("__import__('os').system('ls')", [".system", "__import__"]),
        ("model.eval()\nfrom .pooling import f\nfrom collections.abc import Callable", []),
    ],
)
def test_what_is_forbidden_is_found(source, found):
    assert sorted(forbidden_parts(source)) == sorted(found)


def test_security_md_lists_the_imports_that_are_allowed():
    listed = SECURITY.split("<!-- imports -->")[1]
    assert set(listed.replace("`", "").replace(",", " ").split()) == ALLOWED_IMPORTS


def audit(model: Path, folder: Path) -> dict[str, list[str]]:
    """What a process does that loads, runs and saves a model without the package, with a cache of its own."""
    # Not offline: nothing shall be asked of the Hub even where it could be.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_HOME": str(folder / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    program = TESTS / "programs" / "audit_saved_folder.py"
    result = run_python(program, model, folder / "copy", hide=("hpool_vit",), env=variables, cwd=folder)
    return json.loads(result.stdout.split("EVENTS ")[1])


@pytest.fixture(scope="module")
def audited(saved_folder, tmp_path_factory) -> tuple[dict[str, list[str]], Path]:
    folder = tmp_path_factory.mktemp("audit")
    return audit(saved_folder, folder), folder


def test_loading_running_and_saving_opens_no_connection_no_process_and_no_pickle(audited):
    events, _ = audited
    assert events["network"] == events["processes"] == events["pickles"] == []


def test_files_are_written_to_the_target_and_to_the_cache_of_code_alone(audited):
    events, folder = audited
    written = {Path(name) for name in events["files"]}
    target, cache = folder / "copy", folder / "home" / "modules"
    assert target / "config.json" in written
    assert any(path.is_relative_to(cache) for path in written)
    strangers = {path for path in written if not path.is_relative_to(target) and not path.is_relative_to(cache)}
    assert strangers <= {folder / "home"}


@pytest.mark.slow
def test_code_that_does_more_would_be_seen(saved_folder, tmp_path):
    shutil.copytree(saved_folder, tmp_path / "model")
    with open(tmp_path / "model" / "configuration_hpool_vit.py", "a") as module:
        module.write(
            "\nimport pathlib, pickle, socket, subprocess\n"
            f"pathlib.Path({str(tmp_path)!r}, 'trace').write_text('')\n"
            "socket.socket().close()\n"
            "subprocess.run(['true'])\n"
            "pickle.loads(pickle.dumps(print))\n"
        )
    events = audit(tmp_path / "model", tmp_path)
    assert str(tmp_path / "trace") in events["files"]
    assert events["network"] and events["processes"] and "builtins.print" in events["pickles"]


@pytest.mark.parametrize(
    "program",
    sorted([*TOOLKIT.rglob("*.py"), *EXAMPLES.rglob("*.py")]),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_programs_read_only_the_tensors_of_a_pickle(program):
    calls = [node for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name not in ("pickle.load", "pickle.loads", "pandas.read_pickle", "joblib.load", "eval", "exec")
        if name == "torch.load":
            assert "weights_only=True" in map(ast.unparse, call.keywords)


def test_with_the_package_imported_the_code_of_a_folder_is_not_run_even_if_it_is_trusted(saved_folder, tmp_path):
    shutil.copytree(saved_folder, tmp_path / "model")
    for name in CODE:
        (tmp_path / "model" / name).write_text("raise SystemExit('the code of this folder was run')\n")
    program = tmp_path / "load.py"
    program.write_text(
        "import sys\n"
        "from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification\n"
        "import hpool_vit\n"
        "for cls in (AutoImageProcessor, AutoModel, AutoModelForImageClassification):\n"
        "    loaded = cls.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "    assert type(loaded).__module__.startswith('hpool_vit.')\n"
    )
    run_python(program, tmp_path / "model")
