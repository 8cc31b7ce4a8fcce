"""Measurements of models side by side."""

import torch
from helpers import tiny_model
from torch import nn

from hpool_vit.toolkit.shared.measuring import Logits, count_macs, format_table, time_in_turns


def test_logits_of_any_classifier_are_one_tensor():
    model, images = tiny_model(), torch.randn(2, 3, 48, 40)
    logits = Logits(model, interpolate_pos_encoding=True, return_dict=True)
    assert torch.equal(logits(images), model(images, interpolate_pos_encoding=True).logits)
    plain = nn.Linear(4, 3)
    assert torch.equal(Logits(plain)(torch.ones(1, 4)), plain(torch.ones(1, 4)))


def test_multiply_accumulates_are_those_of_matrix_products():
    assert count_macs(nn.Linear(4, 3, bias=False), torch.ones(1, 4)) == 12


def test_calls_take_turns_after_a_warm_up():
    calls = []
    rates = time_in_turns([lambda: calls.append("a"), lambda: calls.append("b")], num_images=8, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"] and all(rate > 0 for rate in rates)


def test_a_table_is_markdown():
    assert format_table(["model", "MACs"], [["tiny", "3"]]) == "| model | MACs |\n| --- | --- |\n| tiny | 3 |"
