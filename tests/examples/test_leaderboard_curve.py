"""The picture of the leaderboard, drawn from the published results."""

import sys

import pytest
from helpers import EXAMPLES, ROOT
from PIL import Image

from hpool_vit.toolkit.shared.files import read_json, write_json


sys.path.insert(0, str(EXAMPLES / "research" / "leaderboard"))

import curve


RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return [read_json(RESULTS / f"merging_{name}.json") for name in ("leaderboard", "recovery")]


def test_every_published_figure_is_a_point_of_its_line(results):
    leaderboard, recovery = results
    drawn = curve.draw(leaderboard, recovery)
    for axes, measure in zip(drawn.axes, curve.PANELS, strict=True):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for family in ("ToMe", "DiffRate", "ours"):
            published = [[row["fewer_macs"], row[measure]] for row in leaderboard["rows"] if row["family"] == family]
            assert lines[curve.LINES[family][0]] == sorted(published)
        recovered = [row for row in recovery["rows"] if row["model"].startswith("merged_recovered, speed 2")]
        assert lines[curve.LINES[curve.RECOVERED][0]] == [[row["fewer_macs"], row[measure]] for row in recovered]


def test_a_family_without_a_colour_is_named(results):
    leaderboard, recovery = results
    unknown = {"family": "something new", "fewer_macs": 2.0, "divergence": 0.1, "top1": 70.0}
    with pytest.raises(ValueError, match=r"'something new'.*add a line"):
        curve.draw({"rows": [*leaderboard["rows"], unknown]}, recovery)


def test_the_program_writes_the_picture(results, tmp_path):
    for name, content in zip(("leaderboard", "recovery"), results, strict=True):
        write_json(tmp_path / f"merging_{name}.json", content)
    curve.main(["--results_dir", str(tmp_path), "--output", str(tmp_path / "new" / "curve.png")])
    assert Image.open(tmp_path / "new" / "curve.png").width > 800
