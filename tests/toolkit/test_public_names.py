"""`hpool_vit.toolkit`: its public functions, imported when they are used."""

import inspect

import pytest
from helpers import run_python

from hpool_vit import toolkit


def test_every_public_name_is_there_and_documented():
    for name in toolkit.__all__:
        value = getattr(toolkit, name)
        assert value.__name__ == name and inspect.getdoc(value), name
    assert set(toolkit.__all__) <= set(dir(toolkit))


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'convert_cnn'"):
        toolkit.convert_cnn  # noqa: B018


def test_importing_the_toolkit_imports_nothing_of_it():
    program = "import sys, hpool_vit.toolkit; print(*(n for n in sys.modules if n.startswith('hpool_vit.tool')))"
    assert run_python("-c", program).stdout.split() == ["hpool_vit.toolkit"]
