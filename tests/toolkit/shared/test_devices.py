"""Which device computes, and how precisely."""

import pytest
import torch

from hpool_vit.toolkit.shared.devices import choose_device, has_bfloat16, mixed_precision


CPU = torch.device("cpu")


def test_a_device_that_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="`device=toaster` cannot be used: "):
        choose_device("toaster")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_units_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) == expected
    with mixed_precision(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected else torch.float32)


def test_a_pytorch_that_does_not_tell_what_the_cpu_can_do_stays_precise(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16(CPU)


def test_other_devices_stay_precise():
    assert not has_bfloat16(torch.device("mps"))
