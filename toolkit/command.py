"""The command `hpool-vit`: one sub-command per job, whose module is imported only when it runs."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .shared.console import name_flags


# Name of the sub-command: the module of the toolkit whose function `command` it is, and what the overview says of it.
COMMANDS = {
    "convert": ("conversion.convert", "Turn a trained ViT, or a checkpoint of the paper's code, into an HPool-ViT."),
    "train": ("training.train", "Train or fine-tune on your images, on any number of processes."),
    "predict": ("inference.predict", "Classify files, folders and addresses."),
    "visualize": ("inspection.visualize", "Draw which patches each token stands for after each stage."),
    "stats": ("inspection.stats", "Count parameters, tokens and multiply-accumulates per stage."),
    "export": ("export.export", "Export to ONNX or torch.export, in float32 or int8, and check the result."),
    "push": ("hub.push", "Prepare a repository with a model card, look at it, and upload it to the Hub."),
    "demo": ("demo.app", "Serve a page in your browser, or write it as a Space."),
}


class LazyGroup(TyperGroup):
    """Lists every sub-command without importing any; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(name), rest


def load_command(name: str) -> Any:
    """The sub-command `name`, with flags spelled like the arguments of its function: `--output_dir`."""
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, **getattr(module, "COMMAND_SETTINGS", {}))(module.command)
    command = typer.main.get_command(app)
    for parameter in command.params:
        parameter.opts = [_with_underscores(flag) for flag in parameter.opts]
        parameter.secondary_opts = [_with_underscores(flag) for flag in parameter.secondary_opts]
    return command


def _with_underscores(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="A faster Vision Transformer from the one you have. `hpool-vit COMMAND --help` explains each command.",
)


@app.callback()
def _options() -> None:
    """Without a callback, Typer would take the group for one command."""


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs `hpool-vit`. What is wrong with the input is one line on standard error and exit status 1; what is wrong with
    the command line itself is status 2.

    Args:
        argv: the words after `hpool-vit`; by default those of the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        app(words, prog_name="hpool-vit")
    except (ValueError, OSError, ImportError) as error:
        flags = command_flags(words[0]) if words and words[0] in COMMANDS else []
        # With several processes, one line is enough.
        sys.exit(f"error: {name_flags(str(error), flags)}" if os.environ.get("RANK", "0") == "0" else 1)


def command_flags(name: str) -> list[str]:
    """The flags of a sub-command, without their dashes."""
    return [flag[2:] for parameter in load_command(name).params for flag in parameter.opts if flag.startswith("--")]


if __name__ == "__main__":
    main()
