"""A classifier that reads only the class token: its last block computes no other one."""

import pytest
import torch
from helpers import tiny_model

from hpool_vit.configuration_hpool_vit import LN_ORDERS
from hpool_vit.toolkit import block_macs, model_stats


CLASS_TOKEN = {"use_class_token": True, "num_register_tokens": 2, "initializer_range": 0.3}
KINDS = {
    "windows": {},
    "merging": {"pool_mode": "merge", "merge_rule": "importance", "proportional_attention": True},
    "merging in the last block": {"pool_mode": "merge", "hvt_pool": [1, 3], "proportional_attention": True},
    "rotary positions": {"rope_theta": 100.0},
    "normed queries": {"use_qk_norm": True},
}


def tokens_of_the_last_block(model, *args, **kwargs) -> int:
    outputs = []
    handle = model.hpool_vit.layers[-1].register_forward_hook(lambda layer, args, output: outputs.append(output[0]))
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    return outputs[0].shape[1]


@pytest.mark.parametrize("ln_order", LN_ORDERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_and_gradients_are_those_of_all_tokens(kind, attention, ln_order, pixel_values):
    model = tiny_model(**{**CLASS_TOKEN, **KINDS[kind], "ln_order": ln_order}).eval()
    model.set_attn_implementation(attention)
    whole = model.classifier(model.hpool_vit(pixel_values).pooler_output)
    gradients = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    short = model(pixel_values).logits
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
    short.square().sum().backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert tokens_of_the_last_block(model, pixel_values) == 1


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_what_is_recorded_is_recorded_of_all_tokens(asked, pixel_values):
    model = tiny_model(**CLASS_TOKEN).eval()
    model.set_attn_implementation("eager")
    num_tokens = model.config.tokens_per_stage()[-1] + 3
    assert tokens_of_the_last_block(model, pixel_values, **asked) == num_tokens
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert outputs.hidden_states[-1].shape[1] == num_tokens
    assert outputs.attentions[-1].shape[2:] == (num_tokens, num_tokens)


def test_a_flag_of_the_configuration_records_too(pixel_values):
    model = tiny_model(**CLASS_TOKEN).eval()
    model.config.output_hidden_states = True
    assert tokens_of_the_last_block(model, pixel_values) > 1


@pytest.mark.parametrize("readout", ["mean", "class_token_and_mean", "attention"])
def test_a_readout_of_more_gets_more(readout, pixel_values):
    model = tiny_model(**CLASS_TOKEN, readout=readout).eval()
    assert tokens_of_the_last_block(model, pixel_values) == model.config.tokens_per_stage()[-1] + 3


def test_the_base_model_returns_all_tokens_unless_only_the_pooled_output_is_wanted(pixel_values):
    model = tiny_model(**CLASS_TOKEN).eval().hpool_vit
    whole, short = model(pixel_values), model(pixel_values, pooled_only=True)
    assert whole.last_hidden_state.shape[1] == model.config.tokens_per_stage()[-1] + 3
    assert short.last_hidden_state.shape[1] == 1
    torch.testing.assert_close(short.pooler_output, whole.pooler_output)


def test_the_counted_products_are_those_that_are_computed():
    config = tiny_model(**CLASS_TOKEN).config
    counted = sum(part["macs"] for part in model_stats(config)["parts"] if part.get("blocks"))
    assert sum(block_macs(config)) == counted < sum(block_macs(config, pooled_only=False))
