"""
An extension of Griffe, which reads the docstrings for the API reference: makes of Transformers' style, in which types
are Markdown and names of classes stand in [`brackets`], what the Google style expects.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from griffe import Class, Docstring, Extension, GriffeLoader, Object


API = Path(__file__).resolve().parents[1] / "api.md"
# What the reference documents: the last part of its name, and all of it.
DOCUMENTED = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)$", API.read_text(), re.MULTILINE)}
PARSER_OPTIONS = {
    "warn_unknown_params": False,  # fields of a dataclass
    "warn_missing_types": False,
    "returns_multiple_items": False,
    "returns_named_value": False,
}


def link(match: re.Match) -> str:
    """A cross-reference where there is something to lead to."""
    name = match[1]
    return f"[`{name}`][{DOCUMENTED[name]}]" if name in DOCUMENTED else f"`{name}`"


def head_parameters(text: str) -> str:
    """Docstrings of `forward` list the parameters without the heading, which Transformers adds when it runs."""
    if not re.match(r"\w+ \(`", text):
        return text
    return "Args:\n" + "\n".join(f"    {line}" for line in text.splitlines())


def introduction(cls: Class) -> Docstring | None:
    """What the decorator `@auto_docstring(custom_intro=…)` of a model says, which is its docstring when it runs."""
    for decorator in cls.decorators:
        for argument in getattr(decorator.value, "arguments", []):
            if getattr(argument, "name", None) == "custom_intro":
                text = inspect.cleandoc(ast.literal_eval(str(argument.value)))
                return Docstring(text, parent=cls, lineno=decorator.lineno)
    return None


def split_default(item: Any):
    """`*optional*, defaults to 3` is a part of the type in Transformers' style, and a column of its own here."""
    kind, _, default = re.sub(r"[`*]", "", item.annotation).partition(", defaults to ")
    item.annotation = kind.removesuffix(", optional")
    if item.value is None and (default or item.annotation != kind):
        item.value = default or "None"


def keep_prose(item: Any, parent: Object):
    """What stands before the colon of a description of a result is prose, and no type: that is in the signature."""
    if isinstance(item.annotation, str):
        item.description = f"{item.annotation}: {item.description}"
        item.annotation = getattr(parent, "returns", None)


class TransformersStyle(Extension):
    def on_object(self, *, obj: Object, loader: GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is None and obj.is_class:
            obj.docstring = introduction(obj)
        docstring = obj.docstring
        if docstring is None or "parsed" in vars(docstring):
            return
        text = re.sub(r"\[`([\w.]+)`\](?![(\[])", link, docstring.value)
        docstring.value = head_parameters(text)
        # The cached sections are what mkdocstrings renders.
        docstring.__dict__["parsed"] = self.parse(docstring)

    def parse(self, docstring: Docstring) -> list:
        sections = docstring.parse("google", **PARSER_OPTIONS)
        for section in sections:
            if section.kind.value == "returns":
                for item in section.value:
                    keep_prose(item, docstring.parent)
            if section.kind.value in ("parameters", "attributes"):
                for item in section.value:
                    if isinstance(item.annotation, str):
                        split_default(item)
        return sections
