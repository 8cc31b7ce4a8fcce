"""Every code block of the README and of `docs/` runs; of what takes long, or needs GPUs, the arguments are checked."""

import argparse
import functools
import io
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import setuptools
import timm
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from documentation import PAGES, ROOT, Block, Command, read_blocks, record_commands, show
from helpers import EXAMPLES, TESTS
from huggingface_hub.cli.hf import app
from image_files import write_folder
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import (
    DeiTImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from hpool_vit.toolkit import command
from hpool_vit.toolkit.command import UsageError
from hpool_vit.toolkit.shared.console import NotStartedError
from hpool_vit.toolkit.training.arguments import parse_arguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
# Sub-commands that end within seconds on tiny models; of all others only the arguments are parsed.
QUICK = {"convert", "predict", "push", "stats", "visualize"}
# Sub-commands that take longer run on one page only.
ON_ONE_PAGE = {"export": "deploy.md"}
COMMAND_MODULE = "hpool_vit.toolkit.command"
LABELS = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def desk(tmp_path_factory, saved_folder) -> Path:
    """A folder with all that the pages take for granted: the examples, models, checkpoints and images."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "examples").symlink_to(EXAMPLES)
    for name in ("outputs/quickstart", "my-hpool-vit"):
        shutil.copytree(saved_folder, desk / name)
    for name in ("photos", "images", "validation"):
        write_folder(desk / name, LABELS[:2], per_class=10)
        for file in (desk / name).rglob("*.png"):
            with Image.open(file) as image:
                image.save(file.with_suffix(".jpg"))
            file.unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(desk / "digit.png")
    shutil.copy(desk / "photos/ant/1.jpg", desk / "photo.jpg")
    write_checkpoints(desk)
    return desk


def write_checkpoints(desk: Path):
    """ViTs as Transformers and timm save them, and a checkpoint of the paper's code."""
    sizes = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 12, "num_attention_heads": 2}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    vit = ViTForImageClassification(ViTConfig(hidden_size=32, intermediate_size=64, **sizes, **labels))
    for name in ("deit-tiny-patch16-224", "deit-small-patch16-224"):
        vit.save_pretrained(desk / "facebook" / name)
        square = {"height": 32, "width": 32}
        DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=square).save_pretrained(
            desk / "facebook" / name
        )
    sizes |= {"hidden_size": 32, "num_hidden_layers": 12}
    for name, kind, config in (
        ("facebook/dinov2-with-registers-base", Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**sizes)),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", DINOv3ViTModel, DINOv3ViTConfig(**sizes, intermediate_size=64)),
        ("google/siglip2-base-patch16-224", SiglipVisionModel, SiglipVisionConfig(**sizes, intermediate_size=64)),
    ):
        kind(config).save_pretrained(desk / name)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, num_heads=1, num_classes=3
    )
    save_file(model.state_dict(), desk / "deit_tiny.safetensors")
    (desk / "imagenet_classes.txt").write_text("\n".join(LABELS))
    tensors = load_file(TESTS / "data" / "hvt_tiny_reference.safetensors")
    paper = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    torch.save({"model": paper}, desk / "checkpoint.pth")
    save_file(paper, desk / "weights.safetensors")
    (desk / "classes.txt").write_text("\n".join("0123456789"))


class Parsed(Exception):
    """Thrown where a program has parsed its arguments, before it does anything."""


class Reader:
    """
    Someone who follows a page from top to bottom.

    Args:
        page: its name.
        folder: where it is done; the working directory.
        patch: pytest's `monkeypatch`.
        capsys: pytest's.
    """

    def __init__(self, page: str, folder: Path, patch: pytest.MonkeyPatch, capsys):
        self.page, self.folder, self.patch, self.capsys = page, folder, patch, capsys
        self.names = {"__name__": "__main__"}
        self.printed, self.piped = "", ""
        # What stands in for the results of commands elsewhere, and gives way to the results of those on the page.
        self.stand_ins = {folder / name for name in ("outputs/quickstart", "my-hpool-vit")}

    def read(self, block: Block, commands: list[Command]):
        if block.language == "python":
            exec(compile(block.text, f"line {block.line}", "exec"), self.names)
        elif block.language == "bash":
            assert commands, "the block has no command"
            for own in commands:
                self.follow(own)
        elif block.language == "text":
            self.compare(block.text)
        else:
            pytest.fail(f"No rule says how to check a block in {block.language!r}: add one.")

    def follow(self, given: Command):
        """Runs or checks a command by the rule for its program."""
        self.capsys.readouterr()
        self.patch.chdir(given.folder)
        program, *args = given.words
        getattr(self, program.replace("-", "_"))(args)
        self.printed = self.capsys.readouterr().out
        self.patch.chdir(self.folder)

    def compare(self, text: str):
        """What the command before printed, or a tree of folders."""
        if "├" not in text:
            assert text.strip() == self.printed.strip()
            return
        for name in (line.strip("│├└─ ") for line in text.splitlines()):
            assert name == "…" or list(self.folder.rglob(name)), name

    def hpool_vit(self, args: list[str], alone: bool = True):
        """Follows `hpool-vit ARGS`; not `alone`, it would run in several processes."""
        name, *rest = args
        if name == "train":
            self.train(rest, alone)
        elif alone and self.is_quick(name, rest):
            self.run(command.main, args)
        else:
            subcommand = command.load_command(name)
            subcommand.make_context(name, rest)

    def is_quick(self, name: str, args: list[str]) -> bool:
        # `demo` serves a page until it is stopped, or writes it into a folder.
        return name in QUICK or ON_ONE_PAGE.get(name) == self.page or (name == "demo" and "--output_dir" in args)

    def run(self, main: Callable[[list[str]], None], args: list[str]):
        output_dir = self.folder / args[args.index("--output_dir") + 1] if "--output_dir" in args else None
        if output_dir in self.stand_ins:
            shutil.rmtree(output_dir)
            self.stand_ins.remove(output_dir)
        with self.patch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(self.piped.encode())))
            assert not main(args)

    def train(self, args: list[str], alone: bool):
        """Photos are trained on for one step; of longer runs the tiny model takes the place of the result."""
        if not args:  # `train …`
            return
        parsed = parse_arguments([*args, "--use_cpu"])
        output_dir = Path(parsed.training.output_dir)
        if parsed.data.train_dir and alone:
            one_step = "--max_steps 1 --per_device_train_batch_size 2 --report_to none --use_cpu --disable_tqdm true"
            command.main(["train", *args, *one_step.split()])
        elif not output_dir.is_absolute() and not output_dir.exists():
            shutil.copytree(self.folder / "outputs/quickstart", output_dir)

    def python(self, args: list[str]):
        """Runs the programs in exported folders; of all others only the arguments are parsed."""
        if args[0] == "-m":
            program, args = functools.partial(runpy.run_module, args[1]), args[1:]
        else:
            assert Path(args[0]).is_file(), f"there is no {args[0]}"
            program = functools.partial(runpy.run_path, args[0])
        with self.patch.context() as patch:
            patch.setattr(sys, "argv", list(args))
            patch.syspath_prepend(Path(args[0]).parent)
            if Path(args[0]).name == "predict_onnx.py":
                program(run_name="__main__")
            elif Path(args[0]).name == "app.py":
                compile(Path(args[0]).read_text(), args[0], "exec")
            else:
                self.parse(patch, program)

    def parse(self, patch: pytest.MonkeyPatch, program: Callable):
        def stop_after(parse_args):
            def parse(parser, *given):
                parse_args(parser, *given)
                raise Parsed

            return parse

        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
        with pytest.raises(Parsed):
            program(run_name="__main__")

    def launched(self, args: list[str]):
        """What a launcher starts in several processes: `-m hpool_vit.toolkit.command ARGS`."""
        assert args[0] == COMMAND_MODULE, args
        self.hpool_vit(args[1:], alone=False)

    def accelerate(self, args: list[str]):
        subcommand, *args = args
        assert subcommand == "launch"
        parsed = launch_command_parser().parse_args(args)
        assert parsed.config_file is None or Path(parsed.config_file).is_file(), parsed.config_file
        assert parsed.module
        self.launched([parsed.training_script, *parsed.training_script_args])

    def torchrun(self, args: list[str]):
        parsed = torchrun_parser().parse_args(args)
        assert parsed.module
        self.launched([parsed.training_script, *parsed.training_script_args])

    def sbatch(self, args: list[str]):
        script, flag, *args = args
        subprocess.run(["bash", "-n", script], check=True)
        assert flag == "-m"
        self.launched(args)

    def make(self, args: list[str]):
        for target in args:
            subprocess.run(["make", "--dry-run", "--directory", ROOT, target], check=True, capture_output=True)

    def pip(self, args: list[str]):
        assert args.pop(0) == "install"
        with self.patch.context() as patch:
            declared = {}
            patch.setattr(setuptools, "setup", declared.update)
            patch.chdir(ROOT)
            runpy.run_path("setup.py")
        for name in (arg for arg in args if arg != "-e"):
            extras = Requirement(name.replace(".", "hpool-vit", 1)).extras
            assert extras <= declared["extras_require"].keys(), name

    def hf(self, args: list[str]):
        # A Typer application in older versions.
        group = app if hasattr(app, "make_context") else typer.main.get_command(app)
        name, subcommand, rest = group.resolve_command(group.make_context("hf", list(args)), args)
        given = subcommand.make_context(name, list(rest)).params
        assert Path(given["local_path"]).is_dir()

    def find(self, args: list[str]):
        self.piped = subprocess.run(["find", *args], check=True, capture_output=True, text=True).stdout
        assert self.piped


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, desk, tmp_path, monkeypatch, capsys):
    blocks = read_blocks(page)
    fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(blocks), "a block is not closed, or indented"
    folder = tmp_path / "desk"
    shutil.copytree(desk, folder, symlinks=True)
    monkeypatch.chdir(folder)
    # Downloaded only by `make test-demo`.
    monkeypatch.setattr("hpool_vit.toolkit.export.web.read_runtime", lambda source: {})
    reader = Reader(page.name, folder, monkeypatch, capsys)
    commands = record_commands(blocks, folder)
    for number, block in enumerate(blocks):
        own = [given for given in commands if given.block == number]
        try:
            reader.read(block, own)
        except BaseException as error:
            error.add_note(f"in the block at line {block.line} of {page}: {'; '.join(map(show, own))}")
            raise


@pytest.mark.parametrize(
    "text, reason",
    [
        ("unknown_program --flag", "unknown_program"),
        ("echo 'an open quote", "unexpected EOF"),
        ("$UNSET hvt-s-1", "UNSET"),
    ],
)
def test_what_is_no_known_command_of_the_shell_is_noticed(text, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        record_commands([Block("bash", text, 1)], tmp_path)


def test_the_shell_blocks_are_read_as_the_shell_does(tmp_path):
    blocks = [
        Block("bash", 'R="python a.py"\nFAST=1 $R --x "1;2" … \\\n    b  # a comment\n', 1),
        Block("text", "", 5),
        Block("bash", "mkdir() { :; }; cd .. && $R | hpool-vit predict -\n", 6),
    ]
    commands = record_commands(blocks, tmp_path)
    assert commands[0].words == ["python", "a.py", "--x", "1;2", "b"]
    assert [given.words for given in commands[1:]] == [["python", "a.py"], ["hpool-vit", "predict", "-"]]
    assert [(given.block, given.folder) for given in commands[::2]] == [(0, tmp_path), (2, tmp_path.parent)]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("hpool-vit export model --modle x", UsageError),
        ("hpool-vit predict model --modle x", SystemExit),
        ("hpool-vit train --modle x", NotStartedError),
        ("accelerate launch -m hpool_vit.toolkit.command train --modle x", NotStartedError),
        ("python examples/benchmark/benchmark.py --modle x", SystemExit),
    ],
)
def test_a_flag_that_a_program_does_not_have_is_noticed(words, error, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    reader = Reader("page.md", tmp_path, monkeypatch, capsys)
    with pytest.raises(error):
        reader.follow(Command(words.split(), tmp_path, 0))
