"""Pooling by similarity: who joins whom, how tokens weigh, and what must stay as it was."""

import copy

import pytest
import torch
from helpers import tiny_config, tiny_model

from hpool_vit.configuration_hpool_vit import LN_ORDERS
from hpool_vit.merging_hpool_vit import DistanceRule, group
from hpool_vit.modeling_hpool_vit import HPoolViTAttention, HPoolViTModel
from hpool_vit.pooling_hpool_vit import (
    HPoolViTMaxPooling,
    HPoolViTMerging,
    Tokens,
    proportional_attention_mask,
)


def column(*values: float) -> torch.Tensor:
    """One sequence of tokens, `(1, num_tokens, 1)`, each of one number."""
    return torch.tensor(values)[None, :, None]


def merging(num_stages: int = 1, **overrides) -> HPoolViTMerging:
    """The first stage of a model that merges; how many tokens join follows from `merge_ratio`."""
    return HPoolViTMerging(tiny_config(pool_mode="merge", hvt_pool=list(range(num_stages)), **overrides), block=0)


def find_groups(tokens: torch.Tensor, num_merged: int) -> torch.Tensor:
    """The group of each token under the rule of version 0.1."""
    roots = DistanceRule().find_roots(tokens, torch.ones(tokens.shape[:2]), num_merged)
    return group(roots, num_merged).numbers


class TestGroups:
    @pytest.mark.parametrize(
        ("tokens", "num_merged", "groups"),
        [
            # Even positions hold 0, 10, 20; all odd tokens join, wherever their nearest one stands.
            ([0.0, 19.0, 10.0, 1.0, 20.0, 11.0], 3, [0, 2, 1, 0, 2, 1]),
            # Odd length: the last token is a target.
            ([0.0, 19.0, 10.0, 1.0, 20.0], 2, [0, 2, 1, 0, 2]),
            # All odd tokens may join one.
            ([0.0, 1.0, 50.0, 2.0, 90.0, 3.0], 3, [0, 0, 1, 0, 2, 0]),
            # Only the nearest join; the others stay where they stand.
            ([0.0, 4.0, 10.0, 11.0, 20.0, 23.0], 1, [0, 1, 2, 2, 3, 4]),
            ([0.0, 4.0, 10.0, 11.0, 20.0, 23.0], 2, [0, 1, 2, 2, 3, 3]),
            ([0.0, 4.0, 10.0, 11.0, 20.0], 1, [0, 1, 2, 2, 3]),
            # A token may join one that stands behind it, past tokens that stay.
            ([0.0, 20.5, 10.0, 14.0, 20.0], 1, [0, 3, 1, 2, 3]),
            ([5.0, 6.0], 1, [0, 0]),
        ],
    )
    def test_odd_tokens_join_the_nearest_even_token(self, tokens, num_merged, groups):
        assert find_groups(column(*tokens), num_merged).tolist() == [groups]

    def test_it_is_the_distance_that_counts_and_not_the_angle(self):
        tokens = torch.tensor([[[1.0, 0.0], [8.0, 1.0], [8.0, 3.0]]])
        assert find_groups(tokens, 1).tolist() == [[0, 1, 1]]

    @pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 64])
    @pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
    def test_every_group_has_exactly_one_even_token_or_is_an_odd_token_alone(self, num_tokens, share):
        num_merged = max(int(share * num_tokens), 1)
        groups = find_groups(torch.randn(3, num_tokens, 5), num_merged)
        num_groups = num_tokens - num_merged
        for row in groups:
            assert row.unique().tolist() == list(range(num_groups))
            assert len(row[::2].unique()) == len(row[::2])
            firsts = [position for position in range(num_tokens) if position % 2 == 0 or row[position] not in row[::2]]
            assert row[firsts].tolist() == list(range(num_groups))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_in_half_precision_too_those_at_the_smallest_distance_join(self, dtype):
        tokens = torch.randn(4, 196, 192)
        tokens[..., 0] += 32  # a large shared direction, as trained ViTs have
        tokens = tokens.to(dtype)
        distances = torch.cdist(tokens[:, 1::2].double(), tokens[:, ::2].double())
        nearest, match = distances.min(-1)
        joining = nearest.topk(37, largest=False).indices
        groups = find_groups(tokens, 37)
        joined = groups[:, ::2].gather(1, match.gather(1, joining))
        assert torch.equal(groups[:, 1::2].gather(1, joining), joined)

    def test_large_values_do_not_overflow_in_half_precision(self):
        tokens = (1000 * torch.randn(2, 16, 64)).half()
        merged = merging(merge_ratio=0.5)(Tokens(tokens))
        assert merged.hidden_states.dtype == torch.float16 and merged.hidden_states.isfinite().all()
        assert merged.sizes.dtype == torch.float32 and (merged.sizes.sum(1) == 16).all()


class TestMerging:
    def test_a_token_becomes_the_mean_of_its_group(self):
        merged = merging(merge_ratio=0.5)(Tokens(column(0.0, 19.0, 10.0, 1.0, 20.0, 12.0)))
        torch.testing.assert_close(merged.hidden_states, column(0.5, 11.0, 19.5))
        assert merged.sizes.tolist() == [[2, 2, 2]]

    def test_tokens_that_stay_keep_their_value_and_their_place(self):
        merged = merging(merge_ratio=1 / 6)(Tokens(column(0.0, 4.0, 10.0, 11.0, 20.0, 23.0)))
        assert merged.hidden_states.flatten().tolist() == [0.0, 4.0, 10.5, 20.0, 23.0]
        assert merged.sizes.tolist() == [[1, 1, 2, 1, 1]]

    def test_a_second_merge_weighs_tokens_by_their_patches(self):
        stage = merging(merge_ratio=0.5)
        once = stage(Tokens(column(0.0, 1.0, 30.0, 2.0, 33.0, 36.0, 40.0)))
        torch.testing.assert_close(once.hidden_states, column(1.0, 30.0, 34.5, 40.0))
        assert once.sizes.tolist() == [[3, 1, 2, 1]]
        merged = stage(once)
        # 30 joins 34.5, which stands for two patches, and 40 joins it too: (30 + 2 * 34.5 + 40) / 4.
        torch.testing.assert_close(merged.hidden_states, column(1.0, 34.75))
        assert merged.sizes.tolist() == [[3, 4]]

    def test_the_sizes_always_sum_to_the_patches_and_the_weighted_mean_stays(self):
        stage = merging(merge_ratio=0.3)
        tokens = Tokens(torch.randn(4, 23, 8))
        expected = tokens.hidden_states.mean(1)
        for _ in range(4):
            tokens = stage(tokens)
            assert (tokens.sizes.sum(1) == 23).all()
            torch.testing.assert_close((tokens.sizes.unsqueeze(-1) * tokens.hidden_states).sum(1) / 23, expected)

    def test_the_class_token_never_merges(self):
        stage = merging(merge_ratio=0.5, use_class_token=True)
        # The class token equals the second patch, and counts neither as odd nor as even.
        merged = stage(Tokens(column(1.0, 0.0, 1.0, 10.0, 12.0), num_prefix_tokens=1))
        torch.testing.assert_close(merged.hidden_states, column(1.0, 0.5, 11.0))
        assert merged.sizes.tolist() == [[2, 2]]

    def test_both_streams_merge_by_the_groups_of_the_first(self):
        first, second = column(0.0, 19.0, 10.0, 1.0, 20.0), column(1.0, 2.0, 3.0, 4.0, 5.0)
        merged = merging(merge_ratio=0.4, ln_order="residual")(Tokens(first, second))
        torch.testing.assert_close(merged.hidden_states, column(0.5, 10.0, 19.5))
        torch.testing.assert_close(merged.residual, column(2.5, 3.0, 3.5))
        assert merged.sizes.tolist() == [[2, 1, 2]]

    @pytest.mark.parametrize("merge_ratio", [0.2, 0.5])
    def test_images_of_a_batch_do_not_influence_each_other(self, merge_ratio, pixel_values):
        model = tiny_model(pool_mode="merge", merge_ratio=merge_ratio, proportional_attention=True)
        images = torch.randn(5, 3, 32, 32)
        order = torch.tensor([3, 0, 4, 1, 2])
        with torch.no_grad():
            logits, permuted = model(images).logits, model(images[order]).logits
            alone = torch.cat([model(image[None]).logits for image in images])
        torch.testing.assert_close(permuted, logits[order], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)

    def test_the_gradient_reaches_every_token_by_its_share(self):
        tokens = column(0.0, 1.0, 30.0, 2.0, 33.0).requires_grad_()
        merged = merging(merge_ratio=0.4)(Tokens(tokens)).hidden_states
        (merged * torch.tensor([1.0, 10.0, 100.0])[:, None]).sum().backward()
        torch.testing.assert_close(tokens.grad, column(1 / 3, 1 / 3, 10.0, 1 / 3, 100.0))


class TestModel:
    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    @pytest.mark.parametrize("use_class_token", [False, True])
    @pytest.mark.parametrize("proportional_attention", [False, True])
    def test_a_ratio_too_small_to_merge_gives_the_unpooled_logits_exactly(
        self, ln_order, use_class_token, proportional_attention, pixel_values
    ):
        shared = {"ln_order": ln_order, "use_class_token": use_class_token}
        unpooled = tiny_model(hvt_pool=None, **shared)
        merging = tiny_model(
            pool_mode="merge", merge_ratio=1e-3, proportional_attention=proportional_attention, **shared
        )
        assert merging.state_dict().keys() == unpooled.state_dict().keys()
        merging.load_state_dict(unpooled.state_dict())
        assert torch.equal(merging(pixel_values).logits, unpooled(pixel_values).logits)

    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    def test_the_output_is_the_mean_weighted_by_patches(self, ln_order, pixel_values):
        model = tiny_model(pool_mode="merge", merge_ratio=0.3, ln_order=ln_order).hpool_vit
        sizes = []
        for stage in model.pooling.values():
            stage.register_forward_hook(lambda module, args, output: sizes.append(output.sizes))
        outputs = model(pixel_values)
        assert [size.shape[1] for size in sizes] == model.config.tokens_per_stage()[1:] == [45, 32]
        assert (sizes[-1].sum(1) == 64).all() and (sizes[-1] > 1).any()
        weights = sizes[-1] / 64
        expected = torch.einsum("bl,blc->bc", weights, outputs.last_hidden_state)
        torch.testing.assert_close(outputs.pooler_output, expected)
        assert not torch.allclose(outputs.last_hidden_state.mean(1), expected, atol=1e-3)

    @pytest.mark.parametrize("use_class_token", [False, True])
    def test_interpolation_merges_the_share_of_the_tokens_that_there_are(self, use_class_token):
        model = tiny_model(pool_mode="merge", merge_ratio=[0.25, 0.5], use_class_token=use_class_token).hpool_vit
        outputs = model(torch.randn(1, 3, 24, 44), interpolate_pos_encoding=True, output_hidden_states=True)
        expected = [66, 66, 50, 50, 25]  # of 6 × 11 patches a quarter, then half
        assert [state.shape[1] - use_class_token for state in outputs.hidden_states] == expected


class TestProportionalAttention:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("use_class_token", [False, True])
    def test_a_token_of_several_patches_counts_as_that_many_equal_tokens(self, implementation, use_class_token):
        config = tiny_config(
            pool_mode="merge", proportional_attention=True, use_class_token=use_class_token, initializer_range=0.2
        )
        config._attn_implementation = implementation
        model = HPoolViTModel(config).eval()
        attention = model.layers[0].attention
        assert isinstance(attention, HPoolViTAttention)
        sizes = torch.tensor([[2.0, 1.0, 3.0], [1.0, 4.0, 1.0]])
        hidden_states = torch.randn(2, 3 + use_class_token, 32)
        tokens = Tokens(hidden_states, num_prefix_tokens=int(use_class_token), sizes=sizes)
        mask = proportional_attention_mask(model.config, tokens)
        weighted = attention(hidden_states, attention_mask=mask)[0]
        for tokens, size, result in zip(hidden_states, sizes.int(), weighted, strict=True):
            repeats = torch.cat((torch.ones(int(use_class_token), dtype=torch.int), size))
            repeated = attention(tokens.repeat_interleave(repeats, dim=0)[None])[0][0]
            firsts = repeats.cumsum(0) - repeats
            torch.testing.assert_close(result, repeated[firsts])

    def test_equal_tokens_merge_without_changing_the_output(self):
        merging = tiny_model(
            pool_mode="merge", hvt_pool=[1], merge_ratio=0.5, proportional_attention=True, use_class_token=True
        )
        with torch.no_grad():
            merging.hpool_vit.embeddings.position_embeddings.zero_()
        unpooled = tiny_model(hvt_pool=None, use_class_token=True)
        unpooled.load_state_dict(merging.state_dict())
        patches = torch.randn(2, 3, 8, 4, 4, 4).repeat_interleave(2, dim=3)  # two equal ones beside each other
        pixel_values = patches.transpose(3, 4).reshape(2, 3, 32, 32)
        torch.testing.assert_close(merging(pixel_values).logits, unpooled(pixel_values).logits, atol=1e-4, rtol=1e-4)

    def test_it_matters_for_tokens_of_several_patches(self, pixel_values):
        with_sizes = tiny_model(pool_mode="merge", proportional_attention=True)
        without = copy.deepcopy(with_sizes)
        without.config.proportional_attention = False
        assert not torch.allclose(with_sizes(pixel_values).logits, without(pixel_values).logits, atol=1e-3)

    @pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
    def test_an_implementation_without_a_mask_of_scores_is_refused(self, implementation, pixel_values):
        # Merging at the first block, so that no attention has run before.
        model = tiny_model(pool_mode="merge", hvt_pool=[0], proportional_attention=True)
        # As after loading with `attn_implementation`, which for flash needs a package and a GPU.
        model.config._attn_implementation = implementation
        with pytest.raises(ValueError, match=f"{implementation}.*on cpu: use 'sdpa'"):
            model(pixel_values)


def test_merging_has_no_parameters_and_the_other_poolings_keep_the_sizes_they_are_given():
    assert list(merging().parameters()) == []
    tokens = HPoolViTMaxPooling(tiny_config(), block=1)(Tokens(torch.randn(1, 64, 32), sizes=torch.ones(1, 7)))
    assert tokens.hidden_states.shape == (1, 31, 32) and torch.equal(tokens.sizes, torch.ones(1, 7))
