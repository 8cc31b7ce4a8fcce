"""The comparison of finished training runs."""

import json
from pathlib import Path

import pytest
from compare_runs import group_runs, main
from helpers import tiny_model
from PIL import Image


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Two seeds of a model that pools, whose weights were averaged, and one run of a model that does not."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "pooled-seed0", [1, 3], top1=0.5, ema_top1=0.75)
    write_run(root / "pooled-seed7", [1, 3], top1=0.5, ema_top1=0.25)
    write_run(root / "unpooled", None, top1=0.9)
    return [str(folder) for folder in sorted(root.iterdir())]


def write_run(folder: Path, hvt_pool: list[int] | None, top1: float, ema_top1: float | None = None):
    tiny_model(hvt_pool=hvt_pool).save_pretrained(folder)
    results = {"eval_top1": top1, "train_runtime": 60.0}
    if ema_top1 is not None:
        results["eval_ema_top1"] = ema_top1
    (folder / "all_results.json").write_text(json.dumps(results))
    scores = {name: value for name, value in results.items() if name.startswith("eval_")}
    log = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.0}, {"epoch": 1.0, **scores}]
    (folder / "log.json").write_text(json.dumps(log))


def compare(runs: list[str], output: Path, *flags: str):
    main([*runs, "--output", str(output), "--batch_size", "2", "--rounds", "1", *flags])


def test_folders_that_differ_in_their_seed_are_runs_of_one_model(runs):
    models = group_runs(list(map(Path, runs)))
    assert {name: list(model["runs"]) for name, model in models.items()} == {"pooled": ["0", "7"], "unpooled": ["0"]}
    # The saved weights are the averaged ones, if there are any.
    assert [run["accuracy"] for run in models["pooled"]["runs"].values()] == [75, 25]
    assert models["unpooled"]["runs"]["0"] == {
        "accuracy": 90,
        "epochs": 1,
        "train_seconds": 60,
        "loss": [(0.5, 2.0), (1.0, 1.0)],
        "top1": [(1.0, 90.0)],
    }


def test_the_comparison_is_a_table_numbers_and_curves(runs, tmp_path, capsys):
    compare(runs, tmp_path / "digits", "--reference", "unpooled")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    header, _, pooled, unpooled = table
    pooled, unpooled = (dict(zip(header, row, strict=True)) for row in (pooled, unpooled))
    assert (pooled["model"], pooled["tokens"], pooled["top-1 %"], pooled["per seed"]) == (
        *("pooled", "64, 31, 15", "50.0"),
        "75.0, 25.0",
    )
    assert (unpooled["fewer"], unpooled["faster"], unpooled["trained in"]) == ("1.00 ×", "1.00 ×", "1.0 min")
    saved = json.loads((tmp_path / "digits.json").read_text())
    assert saved["unpooled"]["macs"] > saved["pooled"]["macs"] > 0 and saved["pooled"]["images_per_second"] > 0
    with Image.open(tmp_path / "digits.png") as picture:
        picture.verify()


def test_an_unknown_reference_and_an_unfinished_run_are_named(runs, tmp_path):
    with pytest.raises(SystemExit, match="--reference none is not one of the runs: pooled, unpooled"):
        compare(runs, tmp_path / "digits", "--reference", "none")
    with pytest.raises(SystemExit, match="is not a finished training run"):
        compare([str(tmp_path)], tmp_path / "digits", "--reference", "none")
