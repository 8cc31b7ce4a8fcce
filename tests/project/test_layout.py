"""What may import what: the core stands alone, the toolkit builds on it, and the examples build on both."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import CODE, EXAMPLES, ROOT, TOOLKIT


CORE = sorted([*CODE, "__init__.py"])
# What lies in a folder without `__init__.py` is copied elsewhere, as the page of a Space.
MODULES = sorted(path for path in TOOLKIT.rglob("*.py") if (path.parent / "__init__.py").is_file())
TOPICS = sorted(path.parent for path in TOOLKIT.glob("*/__init__.py"))
# Besides the standard library.
CORE_PACKAGES = {"torch", "transformers", "huggingface_hub", "PIL"}
MOST_MODULES = 10


def imported_names(source: str, package: str) -> Iterator[str]:
    """The full names of what a module of `package` imports, relative imports resolved: `hpool_vit.toolkit.data`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    folder = path.parent.relative_to(ROOT).parts
    return list(imported_names(path.read_text(encoding="utf-8"), ".".join(("hpool_vit", *folder))))


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_neither_the_toolkit_nor_packages_beyond_torch_and_transformers(module):
    for name in imports_of(ROOT / module):
        assert not is_inside(name, "hpool_vit.toolkit"), name
        package = name.partition(".")[0]
        assert package in CORE_PACKAGES | {"hpool_vit"} or package in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", sorted((TOOLKIT / "shared").rglob("*.py")), ids=named)
def test_what_the_toolkit_shares_imports_only_the_core(path):
    for name in imports_of(path):
        assert not is_inside(name, "hpool_vit.toolkit") or is_inside(name, "hpool_vit.toolkit.shared"), name


@pytest.mark.parametrize("path", [ROOT / name for name in CORE] + MODULES, ids=named)
def test_nothing_that_is_installed_imports_examples(path):
    examples = {file.stem for file in EXAMPLES.rglob("*.py")} | {"examples"}
    examples -= {file.stem for file in MODULES}  # imported absolutely, these would be other packages
    for name in imports_of(path):
        assert name.partition(".")[0] not in examples and not is_inside(name, "hpool_vit.examples"), name


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_modules_of_the_toolkit_import_each_other_relatively(path):
    """So that no module depends on the name under which the package is installed, except for the core's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [name for name in absolute if is_inside(name, "hpool_vit.toolkit")]


@pytest.mark.parametrize("folder", sorted({path.parent for path in TOOLKIT.rglob("*.py")}), ids=named)
def test_a_folder_of_the_toolkit_has_few_modules(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


@pytest.mark.parametrize("folder", [TOOLKIT, *TOPICS], ids=named)
def test_a_folder_of_the_toolkit_says_what_it_offers(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("source", "package", "names"),
    [
        ("import torch.nn as nn, os", "hpool_vit", ["torch.nn", "os"]),
        ("from . import toolkit", "hpool_vit", ["hpool_vit.toolkit"]),
        ("from ..shared import files", "hpool_vit.toolkit.hub", ["hpool_vit.toolkit.shared.files"]),
        ("from .x.y import z", "hpool_vit.toolkit", ["hpool_vit.toolkit.x.y.z"]),
        (
            "def f():\n    from hpool_vit.toolkit import a, b",
            "hpool_vit",
            ["hpool_vit.toolkit.a", "hpool_vit.toolkit.b"],
        ),
    ],
)
def test_imports_are_found_wherever_they_stand_and_under_their_full_name(source, package, names):
    assert list(imported_names(source, package)) == names


def test_the_files_of_tests_have_distinct_names():
    """Pytest imports them by name alone: of two files with one name, a process runs only the first."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
