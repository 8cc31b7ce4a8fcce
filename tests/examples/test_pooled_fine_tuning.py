"""The comparison of pooled models after fine-tuning, with and without a recovery first."""

import json
import shlex
from pathlib import Path

import pooled_fine_tuning
import pytest
import training_runs

from hpool_vit import HPoolViTConfig
from hpool_vit.toolkit.inspection.stats import model_stats
from hpool_vit.toolkit.shared.console import parse_value


FLAGS = ["--vit", "vit.safetensors", "--train_dir", "train", "--validation_dir", "test", "--output_dir"]


def config(name: str) -> HPoolViTConfig:
    fields = {key: parse_value(key, value) for key, value in pooled_fine_tuning.MODELS[name].items()}
    return HPoolViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, **fields)


def plan(capsys, output_dir: Path, *words: str, further: list[str] | None = None) -> list[list[str]]:
    pooled_fine_tuning.main([*FLAGS, str(output_dir), *words, "--dry_run", *(["--", *further] if further else [])])
    return [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", pooled_fine_tuning.MODELS)
def test_each_name_says_how_many_times_fewer_macs(name):
    times = model_stats(config("unpooled"))["macs"] / model_stats(config(name))["macs"]
    expected = 1 if name == "unpooled" else float(name.rsplit("-", 1)[1])
    assert times == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("speed", pooled_fine_tuning.MERGE)
def test_merging_leaves_as_many_tokens_as_the_table_says(speed):
    assert tuple(config(f"merge-{speed}").tokens_per_stage()) == pooled_fine_tuning.MERGE[speed]["tokens"]


def test_every_pooled_model_is_trained_with_and_without_a_recovery(tmp_path, capsys):
    words = ["--models", "unpooled", "max-row-3", "max-row-3-recovered", "--seeds", "0", "1"]
    *steps, comparison = plan(capsys, tmp_path, *words, further=["--bf16", "true"])
    assert [step[2] for step in steps] == ["convert", "convert", "recover", *["train"] * 6]
    starts = tmp_path / "starts"
    assert " ".join(steps[2][3:]) == (
        f"{starts}/max-row-3 --teacher vit.safetensors --images train --effort 6 "
        f"--output_dir {starts}/max-row-3-recovered"
    )
    names = ["unpooled", "max-row-3", "max-row-3-recovered"]
    assert [Path(step[-1]).name for step in steps[3:]] == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    assert all("train --bf16 true --recipe" in " ".join(step) for step in steps[3:])
    assert [str(tmp_path / f"{name}-seed1") for name in names] == comparison[4:7]


def test_a_model_that_is_only_trained_after_its_recovery(tmp_path, capsys):
    steps = plan(capsys, tmp_path, "--models", "avg-grid-3-recovered", "--seeds", "0", "--effort", "20m")
    assert [step[2] for step in steps[:-1]] == ["convert", "recover", "train"]
    assert "--effort 20m" in " ".join(steps[1]) and "--bf16" not in steps[2]


def test_all_models_are_trained_by_default(tmp_path, capsys):
    *steps, _ = plan(capsys, tmp_path)
    counts = {kind: [step[2] for step in steps].count(kind) for kind in ("convert", "recover", "train")}
    assert counts == {"convert": 11, "recover": 10, "train": 63}


def test_what_is_finished_is_not_repeated(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(training_runs.subprocess, "run", lambda command, check: ran.append(command))
    (tmp_path / "starts" / "unpooled").mkdir(parents=True)
    (tmp_path / "starts" / "unpooled" / "config.json").write_text(json.dumps({}))
    pooled_fine_tuning.main([*FLAGS, str(tmp_path), "--models", "unpooled", "--seeds", "0"])
    assert [Path(command[1]).name if command[1] != "-m" else command[3] for command in ran] == [
        "train",
        "compare_runs.py",
    ]
