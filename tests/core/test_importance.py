"""Merging by importance: what the model looks at merges late and counts more."""

import itertools

import pytest
import torch
from helpers import tiny_config, tiny_model
from torch import nn

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.configuration_hpool_vit import LN_ORDERS
from hpool_vit.merging_hpool_vit import ImportanceRule, group, split_evenly
from hpool_vit.pooling_hpool_vit import HPoolViTMerging, Tokens


IMPORTANCE = {"pool_mode": "merge", "merge_rule": "importance", "merge_ratio": 0.3, "proportional_attention": True}


def plain_roots(tokens: torch.Tensor, weights: torch.Tensor, num_merged: int, num_rounds: int) -> list[int]:
    """The roots of one image's tokens, by loops over pairs."""
    centres, weights, roots = tokens.double().clone(), weights.double().clone(), list(range(len(tokens)))
    stays = set(range(1, len(tokens), 2))
    for number in split_evenly(num_merged, num_rounds):

        def loss(source: int, target: int) -> float:
            a, b = weights[source], weights[target]
            return float(a * b / (a + b) * (tokens[source] - centres[target]).square().sum())

        targets = range(0, len(tokens), 2)
        best = {source: min(targets, key=lambda target: loss(source, target)) for source in stays}
        joining = sorted(stays, key=lambda source: loss(source, best[source]))[:number]
        for target in targets:
            members = [target, *(source for source in joining if best[source] == target)]
            total = weights[members].sum()
            centres[target] = (
                weights[target] * centres[target] + sum(weights[m] * tokens[m] for m in members[1:])
            ) / total
            weights[target] = total
        for source in joining:
            roots[source] = best[source]
        stays -= set(joining)
    return roots


class TestRoots:
    @pytest.mark.parametrize(
        ("num_tokens", "num_merged"), [(2, 1), (3, 1), (5, 2), (16, 1), (16, 8), (17, 5), (40, 13)]
    )
    def test_the_cheapest_merges_happen_first_in_four_rounds(self, num_tokens, num_merged):
        torch.manual_seed(num_tokens)
        tokens, weights = torch.randn(3, num_tokens, 5), torch.rand(3, num_tokens) + 0.1
        roots = ImportanceRule().find_roots(tokens, weights, num_merged)
        expected = [plain_roots(*image, num_merged, 4) for image in zip(tokens, weights, strict=True)]
        assert roots.tolist() == expected

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
    def test_tokens_that_are_not_finite_merge_as_often(self, wrong):
        tokens = torch.randn(2, 16, 5)
        tokens[1, 5:] = wrong
        roots = ImportanceRule().find_roots(tokens, torch.ones(2, 16), 7)
        assert (roots != torch.arange(16)).sum(1).tolist() == [7, 7]

    def test_a_merge_with_an_important_token_costs_more(self):
        tokens = torch.tensor([0.0, 1.0, 10.0, 11.1])[None, :, None]
        rule = ImportanceRule()
        assert rule.find_roots(tokens, torch.ones(1, 4), 1).tolist() == [[0, 0, 2, 3]]
        assert rule.find_roots(tokens, torch.tensor([[9.0, 9.0, 1.0, 1.0]]), 1).tolist() == [[0, 1, 2, 2]]

    def test_parts_differ_by_at_most_one(self):
        for number, parts in itertools.product(range(12), range(1, 6)):
            split = split_evenly(number, parts)
            assert sum(split) == number and len(split) == min(parts, number)
            assert not split or max(split) - min(split) <= 1


class TestMeans:
    def test_a_merged_token_counts_patches_times_importance_and_is_as_long_as_its_members(self):
        stage = HPoolViTMerging(tiny_config(**IMPORTANCE | {"merge_ratio": 0.5}), block=1)
        states = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
        importance = torch.tensor([[0.0, 2.0]]).log_softmax(1)
        tokens = Tokens(states, sizes=torch.tensor([[2.0, 1.0]]), log_importance=importance)
        merged = stage(tokens)
        weights = torch.tensor([2.0, 1.0]) * importance[0].exp()
        weights = weights / weights.sum()
        mean, length = weights @ states[0], weights @ torch.tensor([3.0, 4.0])
        torch.testing.assert_close(merged.hidden_states[0, 0], mean / mean.norm() * length)
        assert merged.sizes.tolist() == [[3.0]] and merged.log_importance is None

    def test_groups_know_their_members_and_sums(self):
        groups = group(torch.tensor([[0, 2, 2, 3, 4, 0]]), num_merged=2)
        assert groups.staying.tolist() == [[0, 2, 3, 4]] and groups.moving.tolist() == [[1, 5]]
        assert groups.numbers.tolist() == [[0, 1, 1, 2, 3, 0]]
        assert groups.sum(torch.tensor([[1.0, 2, 4, 8, 16, 32]])).tolist() == [[33, 6, 8, 16]]

    def test_tokens_that_nobody_looks_at_do_not_divide_by_zero(self):
        stage = HPoolViTMerging(tiny_config(**IMPORTANCE | {"merge_ratio": 0.5}), block=1)
        importance = torch.tensor([[0.0, -1e4, -1e4, -1e4]])
        merged = stage(Tokens(torch.zeros(1, 4, 8), log_importance=importance))
        assert torch.equal(merged.hidden_states, torch.zeros(1, 2, 8))


def attention_scores(model: HPoolViTForImageClassification, tokens: Tokens) -> torch.Tensor:
    """The logarithm of attention in block 0, (batch, heads, tokens, tokens)."""
    layer = model.hpool_vit.layers[0]
    positions = model.hpool_vit.attention_inputs(tokens)["position_embeddings"]
    model.set_attn_implementation("eager")
    return layer.attention(layer.attention_input(tokens.hidden_states), position_embeddings=positions)[1].log()


@pytest.mark.parametrize("ln_order", LN_ORDERS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_qk_norm": True}, {"rope_theta": 100.0}, {"qkv_bias": False, "num_register_tokens": 2}],
    ids=["plain", "qk-norm", "rotary", "registers"],
)
def test_the_importance_is_the_class_tokens_attention(ln_order, fields, pixel_values):
    model = tiny_model(**IMPORTANCE, **fields, ln_order=ln_order, use_class_token=True)
    tokens = model.hpool_vit.start(pixel_values, False)
    positions = model.hpool_vit.attention_inputs(tokens)["position_embeddings"]
    found = model.hpool_vit.layers[0].log_importance(tokens, positions)
    expected = attention_scores(model, tokens)[:, :, 0, tokens.num_prefix_tokens :].mean(1)
    torch.testing.assert_close(found - found.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True))


def test_without_a_class_token_all_patches_are_equally_important(pixel_values):
    model, given = tiny_model(**IMPORTANCE, hvt_pool=[1]), []
    stage = model.hpool_vit.pooling["1"]
    stage.register_forward_pre_hook(lambda stage, args: given.append(args[0]))
    model(pixel_values)
    [tokens] = given
    assert tokens.log_importance is None and not stage.needs_importance
    expected = ImportanceRule().find_roots(tokens.patch_tokens, torch.ones(2, 64), 19)
    assert torch.equal(stage.groups(tokens).numbers, group(expected, 19).numbers)


def test_an_adapter_on_the_keys_counts(pixel_values):
    class Doubled(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, states):
            return 2 * self.linear(states)

    model = tiny_model(**IMPORTANCE, use_class_token=True)
    tokens, layer = model.hpool_vit.start(pixel_values, False), model.hpool_vit.layers[0]
    found = layer.log_importance(tokens)
    layer.attention.k_proj = Doubled(layer.attention.k_proj)
    doubled = layer.log_importance(tokens)
    differences = [values - values.mean(1, keepdim=True) for values in (found, doubled)]
    torch.testing.assert_close(differences[1], 2 * differences[0])


class TestModel:
    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({}, marks=pytest.mark.slow, id="mean"),
            pytest.param({"use_class_token": True}, marks=pytest.mark.slow, id="class-token"),
            pytest.param({"use_class_token": True, "rope_theta": 100.0}, marks=pytest.mark.slow, id="rotary"),
        ],
    )
    def test_it_trains_saves_compiles_and_exports_with_any_batch_and_size(self, fields, pixel_values, tmp_path):
        model = tiny_model(**IMPORTANCE, **fields, ln_order="residual").train()
        model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        expected = model.eval()(pixel_values).logits
        model.save_pretrained(tmp_path)
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path).eval()
        assert loaded.config.merge_rule == "importance"
        assert torch.equal(loaded(pixel_values).logits, expected)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)
        inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": True}
        sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        shapes = {"pixel_values": sizes, "interpolate_pos_encoding": None}
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        more = {"pixel_values": torch.randn(3, 3, 24, 44), "interpolate_pos_encoding": True}
        torch.testing.assert_close(program(**more).logits, model(**more).logits, atol=1e-5, rtol=1e-5)

    def test_no_floating_point_number_is_scattered(self, pixel_values):
        model = tiny_model(**IMPORTANCE, use_class_token=True)
        with torch.no_grad():
            program = torch.export.export(model, (), {"pixel_values": pixel_values})
        scatters = [node for node in program.graph.nodes if "scatter" in str(node.target)]
        assert scatters and all(not node.meta["val"].is_floating_point() for node in scatters)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_and_autocast_stay_close(self, dtype, pixel_values):
        model = tiny_model(**IMPORTANCE | {"initializer_range": 0.05}, use_class_token=True)
        expected = model(pixel_values).logits
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(model(pixel_values).logits.float(), expected, atol=0.05, rtol=0.05)
        torch.testing.assert_close(
            model.to(dtype)(pixel_values.to(dtype)).logits.float(), expected, atol=0.05, rtol=0.05
        )

    def test_images_of_a_batch_do_not_influence_each_other(self):
        model = tiny_model(**IMPORTANCE, use_class_token=True)
        images = torch.randn(4, 3, 32, 32)
        alone = torch.cat([model(image[None]).logits for image in images])
        torch.testing.assert_close(model(images).logits, alone, atol=1e-5, rtol=1e-5)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="`merge_rule='random'` is unknown: choose one of distance, importance"):
        tiny_config(merge_rule="random")


def test_a_folder_without_the_field_keeps_the_rule_of_version_01():
    assert tiny_config(pool_mode="merge").merge_rule == "distance"
