"""What the commands share on the command line: values of flags, missing packages, and errors of one line."""

import ast
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


class NotStartedError(ValueError):
    """Stops a command before it begins its work: the exit status is 2, as for a wrong flag, and not 1."""


class StoppedError(ValueError):
    """
    Stops a command in the middle of its work. It can happen in one of several processes alone, so each prints its own.
    """


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """
    Imports optional packages. If one is missing, the error is one line that says how to install it:

        with needs("export"):
            import onnxruntime

    Args:
        extra: the extra of `hpool-vit` that installs the packages.

    Raises:
        ModuleNotFoundError: if a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        message = f'The package {package} is missing: python -m pip install "hpool-vit[{extra}]"'
        # Caught again where one `needs` runs inside another, so that the error names the extra of the whole command.
        raise ModuleNotFoundError(message, name=package) from error


def quiet() -> None:
    """Silences what Transformers and the Hub client report while they work; errors are still raised."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging  # imported here because it takes a second

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def run(main: Callable[[], None]) -> None:
    """Runs the `main` of a script. Wrong input is one line on standard error and exit status 1, not a traceback."""
    quiet()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {one_line(error)}")


def one_line(text: Any) -> str:
    """
    `text` on one line that any terminal and file can take: control characters, line separators and halves of surrogate
    pairs become spaces.
    """
    visible = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", str(text))
    return " ".join(visible.split())


def command_line_names(parameters: Iterable[Any]) -> dict[str, str]:
    """For each of a command's parameters, what it is called on the command line: `--top_k` or `MODEL`."""
    names = {}
    for parameter in parameters:
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        names[parameter.name] = flags[0] if flags else parameter.metavar
    return names


def name_flags(message: str, names: dict[str, str]) -> str:
    """
    A message of the library in the words of the command line: `output_dir` becomes --output_dir, `top_k=0` becomes
    --top_k 0, and `hvt_pool=[1, 5, 9]` becomes --hvt_pool 1,5,9.

    Args:
        message: the message, with arguments in backticks.
        names: for each argument, what the command line calls it.
    """

    def rename(match: re.Match) -> str:
        name, value = names.get(match["name"]), match["value"]
        if name is None:
            return match[0]
        return name if value is None else f"{name} {_flag_text(value)}"

    return re.sub(r"`(?P<name>\w+)(=(?P<value>[^`]*))?`", rename, message)


def _flag_text(value: str) -> str:
    """A value as you write it after a flag, from what `repr` makes of it; other text stays as it is."""
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        parsed = value
    if not isinstance(parsed, list):
        return value.strip("'")
    if any(part is None or isinstance(part, list) for part in parsed):
        return ";".join(map(schedule_name, parsed))
    return schedule_name(parsed)


def check_at_least_one(**values: int | None) -> None:
    """Raises a `ValueError` that names the first argument below 1. None is one that was not given."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")


def schedule_name(schedule: Any) -> str:
    """A pooling schedule, or another list, as you write it on the command line: `1,5,9`, or `none`."""
    if isinstance(schedule, list | tuple):
        return ",".join(map(str, schedule)) or "none"
    return "none" if schedule is None else str(schedule)


def hub_id(name: str | None) -> str | None:
    """`name` if it can be an id on the Hub (`owner/name`) and is not a file or folder here; otherwise None."""
    if name is None or str(name).count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def parse_value(name: str, text: str) -> Any:
    """
    The value that a flag's text stands for.

    Args:
        name: the argument. `hvt_pool` is always a list, `hvt_pool_choices` a list of schedules.
        text: a number, a word, `true`, `false`, `none`, or a list such as `1,5,9` or `[1, 5, 9]`. Semicolons separate
            schedules: `none;6;1,5,9`.

    Raises:
        ValueError: if the text cannot be read.
    """
    if name == "hvt_pool_choices" and "[" not in text:
        return [parse_value("hvt_pool", part) for part in text.split(";")]
    if text.strip().lower() in ("none", "null", ""):
        return None
    try:
        value = yaml.safe_load(f"[{text}]" if "," in text and "[" not in text else text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}={text}` is not a value: give a number, a word, or a list such as 1,5,9.") from error
    if isinstance(value, str):
        # YAML reads 1e-6 as text.
        try:
            return float(value)
        except ValueError:
            return value
    # A single number where the configuration has a list.
    return [value] if name == "hvt_pool" and not isinstance(value, list) else value
