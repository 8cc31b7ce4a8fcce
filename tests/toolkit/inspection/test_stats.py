"""`hpool-vit stats` and its functions count parameters, tokens and multiply-accumulates."""

import json

import pytest
import torch
from helpers import call_command, tiny_config

from hpool_vit import (
    HPoolViTBackbone,
    HPoolViTConfig,
    HPoolViTForImageClassification,
    HPoolViTForSemanticSegmentation,
)
from hpool_vit.configuration_hpool_vit import PRESETS
from hpool_vit.toolkit.command import main
from hpool_vit.toolkit.inspection import stats as stats_module
from hpool_vit.toolkit.inspection.stats import format_macs, format_stats, load_config, model_stats


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


def saved_config(model, folder) -> HPoolViTConfig:
    model.save_pretrained(folder)
    return load_config(str(folder))


def test_of_a_segmentation_model_its_own_head_is_counted(tmp_path):
    config = tiny_config(hvt_pool=None, image_size=(24, 32), out_indices=[2, 4])
    saved = saved_config(HPoolViTForSemanticSegmentation(config), tmp_path)
    before = saved.to_dict()
    stats = model_stats(saved)
    assert saved.to_dict() == before
    # Per patch, 3 classes from two maps of width 32.
    assert stats["parts"][-1]["macs"] == 6 * 8 * 2 * 32 * 3
    assert stats["parameters"] == HPoolViTForSemanticSegmentation(config).num_parameters()


def test_of_a_backbone_the_blocks_after_the_last_map_cost_nothing(tmp_path):
    fields = {"pool_mode": "merge", "merge_rule": "importance", "use_class_token": True}
    saved = saved_config(HPoolViTBackbone(tiny_config(**fields, out_indices=[3])), tmp_path)
    stats = model_stats(saved)
    assert [part["macs"] > 0 for part in stats["parts"]] == [True, True, True, False, False]
    classifier = model_stats(tiny_config(**fields))
    assert stats["parts"][:3] == [
        {**part, "share": pytest.approx(part["macs"] / stats["macs"])} for part in classifier["parts"][:3]
    ]


def test_counting_leaves_the_configuration_as_it_was():
    config = tiny_config()
    before = config.to_dict()
    model_stats(config)
    assert config.to_dict() == before
    assert HPoolViTForImageClassification(config).device == torch.device("cpu")


def test_numbers_of_macs_are_readable():
    assert [format_macs(macs) for macs in (1_624_000_000, 23_400_000)] == ["1.62 G", "23.4 M"]


def test_the_command_prints_presets_and_saved_folders(saved_folder, capsys):
    result = call_command(capsys, "stats", "hvt-s-1", saved_folder)
    assert result.returncode == 0
    assert "hvt-s-1: 22.09 M parameters, 2.40 G MACs" in result.stdout
    assert result.stdout.count("stage 0") == 2
    assert format_stats(str(saved_folder), model_stats(load_config(str(saved_folder)))) in result.stdout
    assert result.stderr == ""


def test_the_command_prints_json_of_all_presets_by_default(capsys):
    main(["stats", "--json"])
    stats = json.loads(capsys.readouterr().out)
    assert set(stats) == set(PRESETS)
    assert stats["hvt-s-1"] == model_stats(HPoolViTConfig.from_preset("hvt-s-1"))


def test_the_command_counts_one_of_the_speeds_of_a_model(tmp_path, capsys):
    fields = {"pool_mode": "merge", "speeds": {2.0: {"hvt_pool": [1], "merge_ratio": 0.5}}}
    config = tiny_config(**fields, hvt_pool=None)
    config.save_pretrained(tmp_path / "model")
    main(["stats", str(tmp_path / "model"), "--speed", "2", "--json"])
    expected = model_stats(tiny_config(**fields, hvt_pool=[1], merge_ratio=0.5))
    assert json.loads(capsys.readouterr().out)[str(tmp_path / "model")] == expected
    with pytest.raises(SystemExit):
        main(["stats", str(tmp_path / "model"), "--speed", "3"])
    assert "--speed 3" in capsys.readouterr().err


class TestRefusals:
    @pytest.fixture
    def refusal(self, tmp_path, monkeypatch, capsys):
        """Runs the command beside some folders, and returns its one line."""
        monkeypatch.chdir(tmp_path)
        for name, content in (("vit", '{"model_type": "vit"}'), ("broken", "{"), ("unknown", "{}")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(content)
        (tmp_path / "empty").mkdir()

        def run(name: str) -> str:
            with pytest.raises(SystemExit) as stopped:
                main(["stats", name])
            assert stopped.value.code == 1
            [line] = capsys.readouterr().err.strip().splitlines()
            return line

        return run

    @pytest.mark.parametrize("name", ["hvt-s-9", "no/such/folder", "a b/c"])
    def test_a_name_that_can_be_nothing_is_refused_without_asking_the_hub(self, refusal, monkeypatch, name):
        monkeypatch.setattr(stats_module.AutoConfig, "from_pretrained", pytest.fail)
        line = refusal(name)
        assert line.startswith(f"error: {name} is neither a folder here nor an id on the Hub nor a preset.")
        assert all(preset in line for preset in PRESETS)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("vit", "vit is a model of the type 'vit', not an HPool-ViT."),
            ("empty", "empty has no config.json"),
            ("broken", "The configuration of broken cannot be loaded: "),
            ("unknown", "The configuration of unknown cannot be loaded: "),
            ("owner/name", "The configuration of owner/name cannot be loaded: "),
        ],
    )
    def test_a_place_without_an_hpool_vit_is_named(self, refusal, name, message):
        assert refusal(name).startswith(f"error: {message}")
