"""The presets are the paper's models: as many parameters and multiply-accumulates as its tables say."""

import json

import pytest
import torch
from helpers import TOOLKIT, run_python, tiny_config

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification
from hpool_vit.toolkit.inspection.stats import format_stats, load_config, main, model_stats


# Parameters in millions, multiply-accumulates in 10⁹ (paper, Tables 1 and 4).
PAPER = {
    "hvt-ti-1": (5.74, 0.64),
    "hvt-s-0": (22.05, 4.57),
    "hvt-s-1": (22.09, 2.40),
    "hvt-s-2": (22.11, 1.94),
    "hvt-s-3": (22.11, 1.62),
    "hvt-s-4": (22.12, 1.39),
    "scale-hvt-ti-4": (22.12, 1.39),
}


@pytest.mark.parametrize("preset", PAPER)
def test_a_preset_has_the_papers_parameters_and_macs(preset):
    parameters, macs = PAPER[preset]
    stats = model_stats(HPoolViTConfig.from_preset(preset))
    assert stats["parameters"] / 1e6 == pytest.approx(parameters, abs=0.01)
    assert stats["macs"] / 1e9 == pytest.approx(macs, abs=0.02)


def test_the_parts_add_up_and_follow_the_schedule():
    stats = model_stats(HPoolViTConfig.from_preset("hvt-s-3"))
    stages = [part for part in stats["parts"] if part["name"].startswith("stage")]
    assert [part["tokens"] for part in stages] == [196, 97, 48, 23]
    assert [part["blocks"] for part in stages] == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert sum(part["macs"] for part in stats["parts"]) == stats["macs"]
    assert sum(part["share"] for part in stats["parts"]) == pytest.approx(1)
    # A block of width C on L tokens: 4 C² L for the projections, 2 C L² for attention, 8 C² L for the MLP.
    assert stages[0]["macs"] == 12 * 384**2 * 196 + 2 * 384 * 196**2


@pytest.mark.parametrize("pool_mode", ["avg", "merge"])
def test_the_stats_count_what_the_built_model_has(pool_mode):
    config = tiny_config(pool_mode=pool_mode, use_class_token=True, proportional_attention=True)
    stats = model_stats(config)
    assert stats["parameters"] == sum(
        parameter.numel() for parameter in HPoolViTForImageClassification(config).parameters()
    )
    assert next(part for part in stats["parts"] if part["name"] == "stage 1")["macs"] > 0


def test_counting_leaves_the_configuration_as_it_was():
    config = tiny_config()
    before = config.to_dict()
    model_stats(config)
    assert config.to_dict() == before
    assert HPoolViTForImageClassification(config).device == torch.device("cpu")


def test_the_program_prints_presets_and_saved_folders(saved_folder):
    printed = run_python(TOOLKIT / "inspection/stats.py", "hvt-s-1", saved_folder).stdout
    assert "hvt-s-1: 22.09 M parameters, 2.40 G MACs" in printed
    assert printed.count("stage 0") == 2
    assert format_stats(str(saved_folder), model_stats(load_config(str(saved_folder)))) in printed


def test_the_program_prints_json_of_all_presets_by_default(capsys, monkeypatch):
    main(["--json"])
    stats = json.loads(capsys.readouterr().out)
    assert set(stats) == set(PAPER)
    assert stats["hvt-s-1"] == model_stats(HPoolViTConfig.from_preset("hvt-s-1"))


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="'vit', not an HPool-ViT"):
        load_config(str(tmp_path))
