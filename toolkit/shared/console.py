"""What the commands share on the command line: one-line errors, and the values of flags."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def run(main: Callable[[], None]):
    """Runs a program: what is wrong with the input is one line on stderr and exit code 1, not a traceback."""
    from transformers.utils import logging  # here, because it takes a second and the other functions do without

    # The program's own report says what is new.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def one_line(text: Any) -> str:
    """`text` on one line and encodable: without control characters, line separators and halves of surrogate pairs."""
    visible = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", str(text))
    return " ".join(visible.split())


def hub_id(name: str | None) -> str | None:
    """`name` if it can be an id on the Hub, `owner/name`, and is no file or folder here; otherwise None."""
    if name is None or str(name).count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def name_flags(message: str, flags: list[str]) -> str:
    """A message of the library, which names arguments (`output_dir`, `top_k=0`), with flags instead (--output_dir)."""
    for flag in flags:
        message = re.sub(rf"`{flag}`", f"--{flag}", message)
        message = re.sub(rf"`{flag}=([^`]*)`", lambda match, flag=flag: f"--{flag} {match[1].strip(chr(39))}", message)
    return message


def parse_value(name: str, text: str) -> Any:
    """A number, a list (`1,5,9` or `[1, 5, 9]`), a word, true, false or none; `none;6;1,5,9` lists schedules."""
    if name == "hvt_pool_choices" and "[" not in text:
        return [parse_value("hvt_pool", part) for part in text.split(";")]
    if text.strip().lower() in ("none", "null", ""):
        return None
    try:
        value = yaml.safe_load(f"[{text}]" if "," in text and "[" not in text else text)
    except yaml.YAMLError as error:
        raise ValueError(f"--{name} {text!r} is no value: give a number, a word, or a list such as 1,5,9.") from error
    if isinstance(value, str):
        # YAML reads 1e-6 as a text.
        try:
            return float(value)
        except ValueError:
            return value
    # A single number where the configuration has a list.
    return [value] if name == "hvt_pool" and not isinstance(value, list) else value
