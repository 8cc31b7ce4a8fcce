"""Every code block of the README and of `docs/` runs; of what takes long, or needs GPUs, the arguments are checked."""

import argparse
import importlib
import io
import runpy
import shutil
import subprocess
import sys
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
from transformers import DeiTImageProcessor, ViTConfig, ViTForImageClassification

from hpool_vit.toolkit.training.arguments import parse_arguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
# Programs that end within seconds on tiny models; the arguments of all others are parsed.
QUICK = {"convert_hvt_checkpoint", "convert_vit_checkpoint", "model_stats", "visualize_pooling"}
QUICK |= {"predict", "predict_onnx", "push_to_hub", "make_space"}
# Programs that take longer run on one page only.
ON_ONE_PAGE = {"export": "deploy.md"}
TRAINING = {"run_image_classification", "run_image_classification_no_trainer"}
LABELS = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def desk(tmp_path_factory, saved_folder) -> Path:
    """A folder with all that the pages take for granted: the programs, models, checkpoints and images."""
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
            for command in commands:
                self.follow(command)
        elif block.language == "text":
            self.compare(block.text)
        else:
            pytest.fail(f"No rule says how to check a block in {block.language!r}: add one.")

    def follow(self, command: Command):
        """Runs or checks a command by the rule for its program."""
        self.capsys.readouterr()
        self.patch.chdir(command.folder)
        program, *args = command.words
        getattr(self, program)(args)
        self.printed = self.capsys.readouterr().out
        self.patch.chdir(self.folder)

    def compare(self, text: str):
        """What the command before printed, or a tree of folders."""
        if "├" not in text:
            assert text.strip() == self.printed.strip()
            return
        for name in (line.strip("│├└─ ") for line in text.splitlines()):
            assert name == "…" or list(self.folder.rglob(name)), name

    def python(self, args: list[str], alone: bool = True):
        script, *args = args
        assert Path(script).is_file(), f"there is no {script}"
        name = Path(script).stem
        if name in TRAINING:
            self.train(name, args)
        elif alone and (name in QUICK or ON_ONE_PAGE.get(name) == self.page):
            self.run(name, args)
        else:
            self.parse(name, args)

    def run(self, name: str, args: list[str]):
        output_dir = self.folder / args[args.index("--output_dir") + 1] if "--output_dir" in args else None
        if output_dir in self.stand_ins:
            shutil.rmtree(output_dir)
            self.stand_ins.remove(output_dir)
        module = importlib.import_module(name)
        with self.patch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *args])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(self.piped.encode())))
            assert not module.main()

    def parse(self, name: str, args: list[str]):
        def stop_after(parse_args):
            def parse(parser, *given):
                parse_args(parser, *given)
                raise Parsed

            return parse

        with self.patch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *args])
            for method in ("parse_args", "parse_intermixed_args"):
                parse_args = getattr(argparse.ArgumentParser, method)
                patch.setattr(argparse.ArgumentParser, method, stop_after(parse_args))
            with pytest.raises(Parsed):
                importlib.import_module(name).main()

    def train(self, name: str, args: list[str]):
        """Photos are trained on for one step; of longer runs the tiny model takes the place of the result."""
        parsed = parse_arguments([*args, "--use_cpu"])
        output_dir = Path(parsed.training.output_dir)
        if parsed.data.train_dir and name == "run_image_classification":
            one_step = "--max_steps 1 --per_device_train_batch_size 2 --report_to none --use_cpu --disable_tqdm true"
            importlib.import_module(name).main([*args, *one_step.split()])
        elif not output_dir.is_absolute() and not output_dir.exists():
            shutil.copytree(self.folder / "outputs/quickstart", output_dir)

    def accelerate(self, args: list[str]):
        subcommand, *args = args
        assert subcommand == "launch"
        parsed = launch_command_parser().parse_args(args)
        assert parsed.config_file is None or Path(parsed.config_file).is_file(), parsed.config_file
        self.python([parsed.training_script, *parsed.training_script_args], alone=False)

    def torchrun(self, args: list[str]):
        parsed = torchrun_parser().parse_args(args)
        self.python([parsed.training_script, *parsed.training_script_args], alone=False)

    def sbatch(self, args: list[str]):
        script, *args = args
        subprocess.run(["bash", "-n", script], check=True)
        self.python(args, alone=False)

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
    reader = Reader(page.name, folder, monkeypatch, capsys)
    commands = record_commands(blocks, folder)
    for number, block in enumerate(blocks):
        own = [command for command in commands if command.block == number]
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
        ("$UNSET examples/model_stats.py", "UNSET"),
    ],
)
def test_what_is_no_known_command_of_the_shell_is_noticed(text, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        record_commands([Block("bash", text, 1)], tmp_path)


def test_the_shell_blocks_are_read_as_the_shell_does(tmp_path):
    blocks = [
        Block("bash", 'R="python a.py"\nFAST=1 $R --x "1;2" … \\\n    b  # a comment\n', 1),
        Block("text", "", 5),
        Block("bash", "mkdir() { :; }; cd .. && $R | python -\n", 6),
    ]
    commands = record_commands(blocks, tmp_path)
    assert commands[0].words == ["python", "a.py", "--x", "1;2", "b"]
    assert [command.words for command in commands[1:]] == [["python", "a.py"], ["python", "-"]]
    assert [(command.block, command.folder) for command in commands[::2]] == [(0, tmp_path), (2, tmp_path.parent)]


def test_a_flag_that_a_program_does_not_have_is_noticed(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    reader = Reader("page.md", tmp_path, monkeypatch, capsys)
    for words in ("python examples/app.py --modle x", "python examples/run_image_classification.py --modle x"):
        with pytest.raises(SystemExit):
            reader.follow(Command(words.split(), tmp_path, 0))
