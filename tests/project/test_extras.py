"""The extras of the package: what a command needs beyond the base install is in the extra that its error names."""

import json
import re
import runpy

import pytest
import setuptools
from helpers import ROOT, TESTS, run_python


PROGRAM = TESTS / "programs" / "load_commands.py"
# Packages under another name than their distribution's.
IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}


@pytest.fixture(scope="module")
def extras() -> dict[str, set[str]]:
    """The packages of each extra, and of the base install as "", by the name under which they are imported."""
    declared = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", declared.update)
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    groups = {"": declared["install_requires"], **declared["extras_require"]}
    names = {extra: [re.match(r"[\w-]+", requirement)[0] for requirement in group] for extra, group in groups.items()}
    return {extra: {IMPORT_NAMES.get(name, name) for name in group} for extra, group in names.items()}


def optional(extras: dict[str, set[str]]) -> set[str]:
    """The packages that commands may need, beyond the base install."""
    return extras["examples"] | extras["all"]


def errors(without: set[str]) -> dict[str, str | None]:
    return json.loads(run_python(PROGRAM, *sorted(without)).stdout)


@pytest.fixture(scope="module")
def errors_without_extras(extras) -> dict[str, str | None]:
    return errors(optional(extras))


def test_without_extras_a_command_loads_or_names_one_extra_in_one_line(extras, errors_without_extras):
    for command, error in errors_without_extras.items():
        if error is not None:
            named = re.fullmatch(r'The package (\S+) is missing: python -m pip install "hpool-vit\[(\w+)\]"', error)
            assert named, (command, error)
            assert named[1] in extras[named[2]], (command, error)
    assert errors_without_extras["convert"] is errors_without_extras["stats"] is None


@pytest.mark.slow
def test_with_the_extra_that_its_error_names_a_command_loads(extras, errors_without_extras):
    for command, error in errors_without_extras.items():
        if error is not None:
            extra = re.search(r"\[(\w+)\]", error)[1]
            assert errors(optional(extras) - extras[extra])[command] is None, (command, extra)
