"""The comparison of windows on the grid with windows along the row of tokens."""

import json
import shlex

import grid_against_sequence
import pytest
import training_runs
import yaml
from helpers import EXAMPLES

from hpool_vit import HPoolViTConfig
from hpool_vit.toolkit.inspection.stats import model_stats
from hpool_vit.toolkit.shared.console import parse_value


TRUNKS = {
    "cifar10": {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
    },
    "flowers": {"hidden_size": 192, "num_attention_heads": 3},
}


def stats(data: str, name: str) -> dict:
    fields = {key: parse_value(key, value) for key, value in grid_against_sequence.models(data)[name].items()}
    trunk = TRUNKS[data]
    return model_stats(HPoolViTConfig(**trunk, intermediate_size=2 * trunk["hidden_size"], **fields))


@pytest.mark.parametrize("data", TRUNKS)
def test_windows_of_both_kinds_cost_the_same_and_the_papers_a_tenth_more_at_most(data):
    row, grid, paper = (stats(data, f"max-{kind}") for kind in ("row", "grid", "paper"))
    assert row["macs"] == grid["macs"]
    assert [part.get("tokens") for part in row["parts"]] == [part.get("tokens") for part in grid["parts"]]
    assert 0.95 * row["macs"] < paper["macs"] < 1.1 * row["macs"]


def test_it_trains_every_model_with_every_seed_once_and_compares_them(tmp_path, capsys, monkeypatch):
    flags = ["cifar10", "--train_files", "train.parquet", "--validation_files", "test.parquet", "--output_dir"]
    grid_against_sequence.main([*flags, str(tmp_path), "--dry_run"])
    *trainings, comparison = map(shlex.split, capsys.readouterr().out.splitlines())
    assert len(trainings) == 18 and comparison.count("--reference") == 1
    first = " ".join(trainings[0])
    assert "--pool_mode max --pool_kernel_size 4 --pool_stride 4 --hvt_pool 1 --seed 0" in first
    finished = tmp_path / "avg-grid-seed2"
    finished.mkdir()
    (finished / "all_results.json").write_text(json.dumps({}))
    ran = []
    monkeypatch.setattr(training_runs.subprocess, "run", lambda command, check: ran.append(command))
    grid_against_sequence.main([*flags, str(tmp_path)])
    assert len(ran) == 18 and not any(str(finished) in command for command in ran[:-1])


def test_flowers_need_a_trained_model(tmp_path, capsys):
    flags = ["flowers", "--train_files", "a", "--validation_files", "b", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        grid_against_sequence.main(flags)
    assert "flowers needs --model_name_or_path" in capsys.readouterr().err


def test_the_configuration_of_cifar10_has_the_blocks_that_are_compared():
    settings = yaml.safe_load((EXAMPLES / "configs" / "cifar10.yaml").read_text())
    assert {key: settings[key] for key in TRUNKS["cifar10"]} == TRUNKS["cifar10"]
