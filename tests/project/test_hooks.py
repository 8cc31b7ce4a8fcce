"""The changelog and the hooks agree with the project."""

import re

import pytest
import yaml
from helpers import TESTS

import hpool_vit


ROOT = TESTS.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PRE_COMMIT = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
HOOKS = [hook for repository in PRE_COMMIT["repos"] for hook in repository["hooks"]]
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))


def test_the_changelog_begins_with_what_is_unreleased_and_then_the_version_of_the_package():
    headings = re.findall(r"^## (.*)$", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading).groups() for heading in headings[1:]]
    assert releases[0][0] == hpool_vit.__version__
    dates = [date for _, date in releases]
    assert dates == sorted(dates, reverse=True)


def test_the_version_is_written_in_one_place():
    assert hpool_vit.__version__ not in (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("hook", HOOKS, ids=[hook["id"] for hook in HOOKS])
def test_a_hook_runs_a_program_that_constraints_pin_or_a_target_of_make(hook):
    """So hooks and continuous integration check with the same versions."""
    program, *arguments = hook["entry"].split()
    if program.startswith(".venv/bin/"):
        assert program.removeprefix(".venv/bin/") in PINNED
    elif program == "make":
        assert set(arguments) <= MAKE_TARGETS
    else:
        assert program == "git" or hook["language"] == "fail"


def test_weights_are_refused_and_those_of_the_tests_are_not():
    (hook,) = [hook for hook in HOOKS if hook["id"] == "no-weights"]
    assert re.search(hook["files"], "outputs/model.safetensors") and re.search(hook["files"], "checkpoint.pth")
    assert not re.search(hook["files"], "toolkit/export/export.py")
    assert all(re.search(hook["exclude"], f"tests/data/{path.name}") for path in (TESTS / "data").iterdir())
