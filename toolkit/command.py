"""The command `hpool-vit`: one sub-command per job, imported only when it runs."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from hpool_vit import __version__

from .shared.console import NotStartedError, StoppedError, command_line_names, name_flags, one_line, quiet


# For each sub-command, the module of the toolkit whose function `command` it runs, and its line in `hpool-vit --help`.
# Such a module may also set COMMAND_SETTINGS, keywords of `Typer.command`, and COMMAND_FLAGS, the names of flags that
# the function parses itself.
COMMANDS = {
    "convert": ("conversion.convert", "Turn a trained ViT, or a checkpoint of the paper's code, into an HPool-ViT."),
    "speed-up": ("speed.speed_up", "Make a trained model faster, as your own images show it loses least."),
    "recover": ("recovery.recover", "Teach a pooled model the answers that it gave without pooling, without labels."),
    "train": ("training.train", "Train or fine-tune on your images, in any number of processes."),
    "predict": ("inference.predict", "Classify image files, folders of them, and web addresses."),
    "visualize": ("inspection.visualize", "Draw which patches each token stands for after each stage."),
    "stats": ("inspection.stats", "Count parameters, tokens and multiply-accumulates per stage."),
    "export": ("export.export", "Export to ONNX, torch.export or a page for browsers, and check the result."),
    "push": ("hub.push", "Write a repository with a model card, and upload it to the Hub."),
    "demo": ("demo.app", "Try models on a page in your browser, or write the page as a Space."),
}

TYPER_SETTINGS = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}

# Typer does not export the base class of its complaints about the command line.
UsageError = typer.BadParameter.__base__


class LazyGroup(TyperGroup):
    """Lists all sub-commands without importing any, and imports the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, *rest = args
        if name not in COMMANDS:
            similar = difflib.get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"There is no command {name!r}" + (f" (did you mean {similar[0]!r}?)" if similar else ""))
        return name, load_command(name), rest


class PlainUsageCommand(TyperCommand):
    """Writes `MODEL` in the usage line, where Typer writes `{MODEL}`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


def load_command(name: str) -> Any:
    """The sub-command `name`. Its flags are spelled like the arguments of its function: `--output_dir`."""
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    app = typer.Typer(**TYPER_SETTINGS)
    app.command(name, **{"cls": PlainUsageCommand, **getattr(module, "COMMAND_SETTINGS", {})})(module.command)
    command = typer.main.get_command(app)
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.metavar = (parameter.metavar or parameter.name).strip("[].").upper()
            continue
        parameter.opts = [_with_underscores(flag) for flag in parameter.opts]
        # `--no_…` only where it changes something.
        negative = parameter.secondary_opts if parameter.default is True else []
        parameter.secondary_opts = [_with_underscores(flag) for flag in negative]
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""  # a flag takes no value
    return command


def _with_underscores(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


app = typer.Typer(
    cls=LazyGroup,
    **TYPER_SETTINGS,
    help="Make a Vision Transformer faster by pooling its tokens. `hpool-vit COMMAND --help` explains a command.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hpool-vit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs `hpool-vit`. An error is one line on standard error. The exit status is 1 for wrong input, 2 for a wrong
    command line, and otherwise what the sub-command returns.

    Args:
        argv: the words after `hpool-vit`; by default those of the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        quiet()
        status = app(words, prog_name="hpool-vit", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "hpool-vit"
        stop(f"{error.format_message().rstrip('.')}. See {command} --help.", error.exit_code)
    except (ValueError, OSError, ImportError) as error:
        message, status = name_flags(str(error), known_names(words)), 2 if isinstance(error, NotStartedError) else 1
        stop(message, status, in_every_process=isinstance(error, StoppedError))
    if status:
        sys.exit(status)


def stop(message: str, status: int, *, in_every_process: bool = False) -> NoReturn:
    """
    Ends the process with one line. Of several processes, only the first one prints it: wrong input is the same in all.

    Args:
        message: the line.
        status: the exit status.
        in_every_process: whether the other processes print it too, because it can happen in one of them alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or in_every_process:
        process = "" if rank == "0" else f"[rank {rank}] "
        print(f"error: {process}{one_line(message)}", file=sys.stderr)
    sys.exit(status)


def known_names(words: list[str]) -> dict[str, str]:
    """For each argument of the sub-command in `words`, what it is called on the command line: `--top_k` or `MODEL`."""
    if not words or words[0] not in COMMANDS:
        return {}
    try:
        command = load_command(words[0])
    except ImportError:
        return {}
    module = importlib.import_module(f".{COMMANDS[words[0]][0]}", __package__)
    names = {name: f"--{name}" for name in getattr(module, "COMMAND_FLAGS", ())}
    return names | command_line_names(command.params)


if __name__ == "__main__":
    main()
