"""Folders that version 0.1 saved: they load, they give the same logits, and saved again they stay so."""

import json

import pytest
import torch
from helpers import TESTS
from safetensors.torch import load_file

from hpool_vit import HPoolViTForImageClassification, HPoolViTModel


FOLDERS = sorted((TESTS / "data" / "saved_by_0.1").iterdir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def check(model, expected):
    with torch.no_grad():
        logits = model.eval()(expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-6)


def test_they_give_the_same_logits_now_and_after_saving_again(folder, tmp_path):
    expected = load_file(folder / "expected.safetensors")
    model, report = HPoolViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    check(model, expected)
    model.save_pretrained(tmp_path)
    check(HPoolViTForImageClassification.from_pretrained(tmp_path), expected)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_without_the_head_they_give_the_same_features(folder):
    expected = load_file(folder / "expected.safetensors")
    model = HPoolViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = model(expected["pixel_values"]).pooler_output
    torch.testing.assert_close(pooled, expected["pooler_output"], rtol=1e-5, atol=1e-6)


def test_their_weights_load_into_a_model_as_a_trainer_loads_them(folder):
    model = HPoolViTForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    check(model, load_file(folder / "expected.safetensors"))


def test_every_schedule_finds_its_stages():
    folder = TESTS / "data" / "saved_by_0.1" / "choices"
    # The first schedule in the list that pools at block 3 pools nowhere else: 31 of 64 tokens are left.
    assert json.loads((folder / "config.json").read_text())["hvt_pool_choices"] == [[3], [1, 3], None]
    for hvt_pool in ([3], [1, 3], None, [1]):
        model, report = HPoolViTForImageClassification.from_pretrained(
            folder, hvt_pool=hvt_pool, output_loading_info=True
        )
        assert not any(report.values()), report
        assert model.config.stages == {1: 31, 3: 31}


def test_the_final_norm_has_one_name_wherever_it_stands():
    folder = TESTS / "data" / "saved_by_0.1" / "norm_after_pooling"
    assert "hpool_vit.pooled_layernorm.weight" in load_file(folder / "model.safetensors")
    names = HPoolViTForImageClassification.from_pretrained(folder).state_dict()
    assert "hpool_vit.layernorm.weight" in names and not any("pooled_layernorm" in name for name in names)
