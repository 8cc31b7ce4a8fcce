"""The speeds that a model offers, each a way to pool."""

import pytest
import torch
from helpers import run_python, tiny_config, tiny_model

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification


SPEEDS = {1.5: {"hvt_pool": [2], "merge_ratio": [0.4]}, 2: {"hvt_pool": [1, 3], "merge_ratio": [0.3, 0.5]}}
MERGE = {"pool_mode": "merge", "merge_ratio": [0.4], "hvt_pool": [2], "speeds": SPEEDS}


def tokens(model) -> list[int]:
    return model.config.tokens_per_stage()


def test_a_model_changes_its_speed_and_back(pixel_values):
    model = tiny_model(**MERGE)
    first = model(pixel_values).logits
    assert tokens(model) == [64, 39]
    model.set_speed(2)
    assert tokens(model) == [64, 45, 23]
    assert not torch.equal(model(pixel_values).logits, first)
    model.set_speed(1)
    assert tokens(model) == [64]
    model.set_speed(1.5)
    assert torch.equal(model(pixel_values).logits, first)


def test_a_saved_folder_keeps_the_speeds_and_loads_at_any_of_them(tmp_path, pixel_values):
    model = tiny_model(**MERGE)
    model.save_pretrained(tmp_path)
    loaded = HPoolViTForImageClassification.from_pretrained(tmp_path, speed=2).eval()
    model.set_speed(2)
    assert loaded.config.speeds == model.config.speeds == {1.5: SPEEDS[1.5], 2.0: SPEEDS[2]}
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
    assert HPoolViTConfig.from_pretrained(tmp_path, speed=1).hvt_pool is None
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from transformers import AutoModelForImageClassification\n"
        "model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True, speed=2)\n"
        "print(model.config.tokens_per_stage())\n"
    )
    assert run_python(program, tmp_path, hide=("hpool_vit",)).stdout.strip() == "[64, 45, 23]"


def test_a_pooled_model_has_the_stages_of_every_speed(tmp_path, pixel_values):
    speeds = {2.0: {"hvt_pool": [1]}, 3.0: {"hvt_pool": [0, 2]}}
    model = tiny_model(hvt_pool=[1], speeds=speeds)
    assert model.hpool_vit.pooling.keys() == {"0", "1", "2"}
    model.set_speed(3)
    logits = model(pixel_values).logits
    model.set_speed(2)
    model.save_pretrained(tmp_path)
    loaded = HPoolViTForImageClassification.from_pretrained(tmp_path, speed=3).eval()
    assert torch.equal(loaded(pixel_values).logits, logits)


@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        ({"fast": {"hvt_pool": [1]}}, "`speeds` has 'fast', which must be a number above 1"),
        ({1: {"hvt_pool": [1]}}, "`speeds` has 1.0, which must be a number above 1"),
        ({2: {"merge_ratio": 0.3}}, "must have `hvt_pool`"),
        ({2: {"hvt_pool": [1], "pool_mode": "max"}}, "must have `hvt_pool`, and may have `merge_ratio`"),
        ({2: {"hvt_pool": [9], "merge_ratio": 0.3}}, "`speeds` has 2.0: `hvt_pool=[9]` names block 9"),
        ({2: {"hvt_pool": [1]}}, "`speeds` has 2.0: {'hvt_pool': [1]}, which must have `merge_ratio` too"),
        ({2: {"hvt_pool": [1], "merge_ratio": 0.9}}, "`speeds` has 2.0: `merge_ratio=0.9`"),
    ],
    ids=["text", "one", "no-schedule", "other-field", "no-block", "no-ratio", "ratio"],
)
def test_speeds_that_no_model_can_have_are_refused(speeds, message):
    with pytest.raises(ValueError) as error:
        tiny_config(pool_mode="merge", speeds=speeds)
    assert message in str(error.value)


def test_a_speed_that_is_not_offered_is_refused_with_those_that_are(tmp_path):
    model = tiny_model(**MERGE)
    with pytest.raises(ValueError, match=r"`speed=3` is not offered: choose one of 1, 1\.5, 2"):
        model.set_speed(3)
    assert tokens(model) == [64, 39]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`speed=2` and `hvt_pool` exclude each other"):
        HPoolViTConfig.from_pretrained(tmp_path, speed=2, hvt_pool=[1])
