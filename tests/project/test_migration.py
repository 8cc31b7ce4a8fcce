"""The migration tables of the documentation name what there is."""

import re
from argparse import Namespace

import pytest
import torch
import transformers
from documentation import ROOT
from helpers import TESTS, tiny_model
from safetensors.torch import load_file
from transformers import ViTConfig, ViTImageProcessor

import hpool_vit
from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.toolkit.command import COMMANDS, load_command
from hpool_vit.toolkit.conversion.hvt import convert_hvt, hvt_name


SECTIONS = re.split(r"^## ", (ROOT / "docs/migration.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
CLASS, PAPER, VIT, PROGRAMS = SECTIONS[1:]


def rows(section: str) -> list[tuple[list[str], list[str], str]]:
    """The names on both sides of each row of the tables, and the right side as it stands."""
    cells = re.findall(r"^\| (.+?) \| (.+) \|$", section, flags=re.MULTILINE)
    return [(names(left), names(right), right) for left, right in cells if names(left) + names(right)]


def names(cell: str) -> list[str]:
    return [re.split(r"[=(]", name)[0] for name in re.findall(r"`([^`\s]+)`", cell)]


def test_the_table_of_the_class_has_every_other_name_of_a_field():
    table = {old: new[0] for left, new, right in rows(CLASS) for old in left if right.startswith("`")}
    assert HPoolViTConfig.attribute_map.items() <= table.items()
    same = [name for left, _, right in rows(CLASS) if right == "the same" for name in left]
    assert set(same) <= set(HPoolViTConfig.__annotations__)
    assert callable(HPoolViTForImageClassification.updateStochasticDepthRate)


def test_the_table_of_the_papers_tensors_agrees_with_the_converter():
    parameters = dict(tiny_model(ln_order="pre").named_parameters())
    checked = 0
    for old, new, _ in rows(PAPER):
        for name in new if "." in "".join(old) or old == ["pos_embed"] else []:
            assert hvt_name(name)[0] == old[0]
            assert f"hpool_vit.{name}" in parameters or name in parameters
            checked += 1
    assert checked == 13


def test_the_table_of_the_papers_arguments_agrees_with_the_converter(tmp_path):
    tensors = load_file(TESTS / "data" / "hvt_tiny_reference.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    args = {"input_size": 64, "patch_size": 8, "num_blocks": 4, "num_heads": 2, "head_dim": 64, "nb_classes": 10}
    args |= {"pool_kernel_size": 3, "pool_stride": 7, "pool_block_width": 2, "drop": 0.2, "drop_path": 0.1}
    torch.save({"model": weights, "args": Namespace(**args)}, tmp_path / "checkpoint.pth")
    config = convert_hvt(tmp_path / "checkpoint.pth")[0].config
    expected = {"head_dim": 128, "pool_stride": 2, "pool_block_width": [1, 3]}
    table = {old[0]: set(new) - {"head_dim", "num_heads"} for old, new, _ in rows(PAPER) if old}
    for argument, value in args.items():
        for name in table[argument]:
            assert getattr(config, name) == expected.get(argument, value), (argument, name)


@pytest.mark.parametrize("old, new, right", rows(VIT), ids=lambda value: str(value)[:40])
def test_each_row_of_the_table_of_vit_names_what_there_is(old, new, right):
    theirs, ours = ViTConfig(), HPoolViTConfig()
    if old and old[0].startswith("ViT"):
        assert hasattr(transformers, old[0])
        assert right == "none" or hasattr(hpool_vit, new[0])
        return
    assert all(hasattr(theirs, name) for name in old)
    for name in old if right.startswith("the same") else new:
        assert hasattr(ours, name) or name in ("None", '"pre"', '"residual"', "True", "False", "[1,")


def test_the_image_processors_differ_as_the_table_says():
    theirs, ours = ViTImageProcessor(), HPoolViTImageProcessor()
    assert theirs.size == {"height": 224, "width": 224} and ours.size["shortest_edge"] == 256
    assert list(theirs.image_mean) == [0.5] * 3 and list(ours.image_mean) == [0.485, 0.456, 0.406]
    assert ours.do_center_crop and ours.do_convert_rgb and not theirs.do_convert_rgb


def test_the_table_of_programs_names_commands_and_flags_that_exist():
    commands = re.findall(r"`hpool-vit (\w+)(.*?)`", PROGRAMS)
    # These replace no program of version 0.1.
    assert {name for name, _ in commands} == set(COMMANDS) - {"speed-up", "recover"}
    for name, words in commands:
        flags = {flag for parameter in load_command(name).params for flag in parameter.opts}
        assert set(re.findall(r"--\w+", words)) <= flags, name
