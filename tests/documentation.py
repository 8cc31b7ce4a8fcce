"""The code blocks of the documentation, and the commands that its shell blocks would run."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from helpers import TESTS


ROOT = TESTS.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)

# Programs of the shell blocks. Each is replaced by a function that only records how it is called.
RECORDED = ("accelerate", "find", "hf", "hpool-vit", "make", "pip", "python", "sbatch", "torchrun")
RECORDER = """
set -eu
PATH=
start=$PWD
drain() { while read -r _; do :; done; }
record() { printf '%s\\0' "$#" "$PWD" "$block" "$@" >> "$start/.commands"; }
"""


@dataclass
class Block:
    """A fenced code block; `line` is that of its first fence, counted from 1."""

    language: str
    text: str
    line: int


@dataclass
class Command:
    """A command of the shell block number `block`, with the folder in which it would run."""

    words: list[str]
    folder: Path
    block: int


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m["language"], m["text"], text.count("\n", 0, m.start()) + 1) for m in FENCED.finditer(text)]


def without_code(page: Path) -> str:
    """The prose of a page."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text(encoding="utf-8")))


def record_commands(blocks: list[Block], folder: Path) -> list[Command]:
    """
    The commands of the shell blocks of a page, as bash itself reads them: variables, quotes and patterns are resolved,
    and variables live on in later blocks. `…`, which stands for more of the same, is left out.

    Raises:
        AssertionError: for what is no shell, and for a program that is not in `RECORDED`.
    """
    script = [RECORDER, *(f'{name}() {{ record {name} "$@"; }}' for name in RECORDED)]
    # What reads a pipe comes after what writes into it.
    script.append('hpool-vit() { case " $* " in *" - "*) drain ;; esac; record hpool-vit "$@"; }')
    for number, block in enumerate(blocks):
        if block.language == "bash":
            script += [f"block={number}", 'cd "$start"', block.text]
    result = subprocess.run(["/bin/bash", "-c", "\n".join(script)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = folder / ".commands"
    words = iter(record.read_text().split("\0")[:-1] if record.exists() else [])
    commands = []
    for count in words:
        place, block = Path(next(words)), int(next(words))
        given = [next(words) for _ in range(int(count))]
        commands.append(Command([word for word in given if word != "…"], place, block))
    return commands


def show(command: Command) -> str:
    return shlex.join(command.words)
