"""Loads every sub-command of `hpool-vit` and prints JSON: for each, None, or the error that it ends with.

python load_commands.py [MODULE...]       MODULE: what cannot be imported, as if it were not installed
"""

import json
import sys


sys.modules.update(dict.fromkeys(sys.argv[1:]))

from hpool_vit.toolkit.command import COMMANDS, load_command  # noqa: E402 - after the packages are hidden


def error_of(command: str) -> str | None:
    try:
        load_command(command)
    except ImportError as error:
        return str(error)
    return None


print(json.dumps({command: error_of(command) for command in COMMANDS}))
