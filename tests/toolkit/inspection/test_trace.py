"""The numbers behind the pictures of pooling, on cases whose answer is known by hand and on every kind of model."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hpool_vit import HPoolViTModel
from hpool_vit.configuration_hpool_vit import LN_ORDERS, POOL_MODES
from hpool_vit.toolkit.inspection.stats import model_stats
from hpool_vit.toolkit.inspection.trace import PoolingTrace, block_macs, trace_pooling


# What each patch of seven weighs in the one token that two average poolings leave, in ninths.
NINTHS = torch.tensor([1.0, 1, 2, 1, 2, 1, 1])


@torch.no_grad()
def idle_model(width: int, image_size: tuple[int, int], **overrides):
    """A model whose patches are single pixels, whose attention is uniform and whose branches add nothing."""
    model = tiny_model(
        image_size=image_size,
        patch_size=1,
        num_channels=width,
        hidden_size=width,
        num_attention_heads=1,
        **{"num_hidden_layers": 2, "ln_order": "pre", **overrides},
    )
    base = model.hpool_vit
    base.embeddings.patch_embeddings.projection.weight.copy_(torch.eye(width))
    for layer in base.layers:
        layer.attention.q_proj.weight.zero_()
        for branch in (layer.attention.o_proj, layer.mlp.fc2):
            branch.weight.zero_()
            branch.bias.zero_()
    for name, parameter in base.named_parameters():
        if name.endswith(("position_embeddings", "q_proj.bias")):
            parameter.zero_()
    return model


def trace_row(*channels: list[float], **overrides) -> PoolingTrace:
    """The trace of one row of pixels, which are the tokens of an idle model."""
    row = torch.tensor(channels, dtype=torch.float32)
    return trace_pooling(idle_model(len(row), (1, row.shape[1]), **overrides), row[None, :, None])


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float32))


def random_images(model, batch_size: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    return torch.randn(batch_size, model.config.num_channels, *(size or model.config.image_shape))


class TestKnownByHand:
    def test_max_pooling_shares_a_token_among_the_patches_that_won_its_channels(self):
        trace = trace_row([5, 1, 2, 3, 9, 0, 1], [1, 2, 3, 0, 0, 8, 4], hvt_pool=[0])
        shares = [[1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]]
        close(trace.stages[1].share[0], torch.tensor(shares) / 2)
        close(trace.stages[1].patch_share[0], torch.tensor([1, 0, 2, 0, 2, 1, 0]) / 6)

    def test_max_pooling_is_traced_channel_by_channel_through_all_stages(self):
        trace = trace_row([5, 1, 2, 3, 9, 0, 1], [1, 2, 3, 0, 0, 8, 4], hvt_pool=[0, 1])
        close(trace.stages[2].share[0], [[0, 0, 0, 0, 0.5, 0.5, 0]])
        assert trace.stages[2].receptive_field.all()

    def test_of_equal_values_the_first_wins(self):
        trace = trace_row([1.0] * 5, hvt_pool=[0])
        close(trace.stages[1].share[0], [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]])

    def test_the_two_streams_of_residual_order_count_alike(self):
        # Before the norm the second patch wins both channels; after it the first and the last win one each.
        row = ([5, 7, 0], [1, 6, 4])
        trace = trace_row(*row, hvt_pool=[1], ln_order="residual", layer_norm_eps=0.1)
        close(trace.stages[1].share[0], [[0.25, 0.5, 0.25]])

    def test_average_pooling_multiplies_its_weights(self):
        trace = trace_row([5, 1, 2, 3, 9, 0, 1], hvt_pool=[0, 1], pool_mode="avg")
        close(trace.stages[1].share[0, 1], torch.tensor([0, 0, 1, 1, 1, 0, 0]) / 3)
        close(trace.stages[2].share[0], NINTHS[None] / 9)
        assert trace.stages[1].groups is None

    @pytest.mark.parametrize("pool_mode", ["max", "avg"])
    def test_a_token_stands_for_the_patches_in_its_windows(self, pool_mode):
        trace = trace_row([3, 1, 4, 1, 5, 9, 2, 6], hvt_pool=[0], pool_mode=pool_mode)
        windows = [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0]]
        assert trace.stages[1].receptive_field[0].int().tolist() == windows
        assert trace.stages[1].sizes.tolist() == [[3, 3, 3]]
        assert trace.stages[1].share[0, :, 7].sum() == 0  # the last patch fills no window

    def test_windows_may_leave_gaps(self):
        trace = trace_row([3, 1, 4, 1, 5], hvt_pool=[0], pool_kernel_size=2, pool_stride=3)
        assert trace.stages[1].receptive_field[0].int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
        close(trace.stages[1].share[0], [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])

    def test_merging_joins_the_nearest_tokens(self):
        trace = trace_row([0, 10, 10.5, 0.1, 3], hvt_pool=[0, 1], pool_mode="merge", merge_ratio=0.4)
        _, first, second = trace.stages
        assert first.groups.tolist() == [[0, 1, 1, 0, 2]]
        assert first.sizes.tolist() == [[2, 2, 1]]
        close(first.share[0], [[0.5, 0, 0, 0.5, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1]])
        assert second.groups.tolist() == [[0, 1, 1, 0, 1]]
        close(second.share[0], [[1 / 2, 0, 0, 1 / 2, 0], [0, 1 / 3, 1 / 3, 0, 1 / 3]])
        close(second.patch_share[0], [0.2] * 5)

    def test_rollout_of_uniform_attention_is_uniform(self):
        close(trace_row([3, 1, 4, 1], hvt_pool=None).rollout, [[0.25] * 4])

    def test_rollout_passes_through_average_pooling(self):
        # Half of the first block spreads evenly, the other half reaches the patches by their weights.
        trace = trace_row([5, 1, 2, 3, 9, 0, 1], hvt_pool=[1], pool_mode="avg")
        close(trace.rollout[0], 1 / 14 + NINTHS / 18)

    def test_rollout_passes_through_the_winners_of_max_pooling(self):
        trace = trace_row([5, 1, 2, 3, 9, 0, 1], [1, 2, 3, 0, 0, 8, 4], hvt_pool=[1])
        close(trace.rollout[0], 1 / 14 + torch.tensor([1, 0, 2, 0, 2, 1, 0]) / 12)

    def test_rollout_weighs_merged_tokens_by_their_patches(self):
        trace = trace_row([0, 10, 10.5, 0.1, 3], hvt_pool=[1], pool_mode="merge", merge_ratio=0.4)
        pair, single = 0.1 + (1 / 6 + 2 / 10) / 4, 0.1 + (1 / 6 + 1 / 10) / 2
        close(trace.rollout[0], [pair, pair, pair, pair, single])

    def test_rollout_of_a_class_token_leaves_out_its_attention_to_itself(self):
        row = [5, 1, 2, 3, 9, 0, 1]
        trace = trace_row(row, hvt_pool=[1], pool_mode="avg", use_class_token=True)
        expected = 1 / 16 + NINTHS / 48
        close(trace.rollout[0], expected / expected.sum())

    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    @pytest.mark.parametrize("use_class_token", [False, True])
    def test_the_shares_rebuild_the_tokens_that_the_model_computed(self, pool_mode, use_class_token):
        model = idle_model(1, (6, 9), hvt_pool=[0, 1], pool_mode=pool_mode, use_class_token=use_class_token)
        model.hpool_vit.layernorm = nn.Identity()
        images = random_images(model, batch_size=3)
        tokens = model.hpool_vit(images).last_hidden_state[:, int(use_class_token) :]
        share = trace_pooling(model, images).stages[-1].share
        torch.testing.assert_close(share @ images.flatten(2).transpose(1, 2), tokens.detach())


def reached(trace: PoolingTrace, hvt_pool: list[int] | None) -> torch.Tensor:
    first = trace.stages[1 if hvt_pool and hvt_pool[0] == 0 else 0]
    return first.patch_share > 0


def check(trace: PoolingTrace, model, images: torch.Tensor):
    """What holds for the trace of any model."""
    config = model.config
    num_patches = trace.grid[0] * trace.grid[1]
    assert [stage.num_tokens for stage in trace.stages] == config.tokens_per_stage(num_patches)
    assert [stage.block for stage in trace.stages] == [None, *(config.hvt_pool or [])]
    for stage in trace.stages:
        assert stage.share.shape == stage.receptive_field.shape == (len(images), stage.num_tokens, num_patches)
        assert not stage.share[~stage.receptive_field].any()
        close(stage.share.sum(-1), torch.ones(len(images), stage.num_tokens))
        close(stage.patch_share.sum(-1), torch.ones(len(images)))
        if config.pool_mode == "merge":
            members = nn.functional.one_hot(stage.groups, stage.num_tokens).transpose(1, 2)
            assert torch.equal(members.bool(), stage.receptive_field)
            close(stage.patch_share, torch.full((len(images), num_patches), 1 / num_patches))
    close(trace.rollout.sum(-1), torch.ones(len(images)))
    # Attention reaches every patch, unless no window of a pooling before the first block does.
    assert torch.equal(trace.rollout > 0, reached(trace, config.hvt_pool))
    assert {tensor.device.type for tensor in trace.tensors().values()} == {"cpu"}


class TestEveryModel:
    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    @pytest.mark.parametrize("use_class_token", [False, True])
    @pytest.mark.parametrize("hvt_pool", [None, [0], [1, 3], [0, 1, 2]])
    def test_the_trace_is_that_of_the_model(self, ln_order, pool_mode, use_class_token, hvt_pool, pixel_values):
        model = tiny_model(
            ln_order=ln_order,
            pool_mode=pool_mode,
            use_class_token=use_class_token,
            hvt_pool=hvt_pool,
            merge_ratio=0.3,
            proportional_attention=pool_mode == "merge",
        )
        trace = trace_pooling(model, pixel_values)
        check(trace, model, pixel_values)
        outputs = model(pixel_values, output_hidden_states=True)
        close(trace.logits, outputs.logits.detach())
        tokens = [state.shape[1] - use_class_token for state in outputs.hidden_states[1:]]
        assert trace.tokens_per_block == tokens

    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    @pytest.mark.parametrize("size", [(24, 40), (35, 50)])
    def test_patches_and_images_need_not_be_square(self, pool_mode, size):
        model = tiny_model(image_size=(24, 40), patch_size=(4, 8), hvt_pool=[1], pool_mode=pool_mode)
        images = random_images(model, size=size)
        trace = trace_pooling(model, images, interpolate_pos_encoding=True)
        assert trace.grid == (size[0] // 4, size[1] // 8)
        check(trace, model, images)

    def test_every_merge_ratio_counts_at_its_own_stage(self, pixel_values):
        model = tiny_model(pool_mode="merge", merge_ratio=[0.01, 0.5], use_class_token=True)
        trace = trace_pooling(model, pixel_values)
        assert [stage.num_tokens for stage in trace.stages] == [64, 64, 32]
        check(trace, model, pixel_values)

    def test_a_changed_schedule_is_the_one_that_is_traced(self, pixel_values):
        model = tiny_model()
        model.set_hvt_pool([2])
        check(trace_pooling(model, pixel_values), model, pixel_values)

    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_images_are_traced_one_by_one_as_they_would_be_alone(self, pool_mode, pixel_values):
        model, seen = tiny_model(pool_mode=pool_mode), []
        batch = torch.cat((pixel_values, pixel_values.flip(-1)))
        model.base_model.embeddings.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        whole = trace_pooling(model, batch).tensors()
        assert seen == [1] * len(batch)
        for index, image in enumerate(batch.split(1)):
            for name, tensor in trace_pooling(model, image).tensors().items():
                is_shared = name in ("grid", "tokens_per_block") or name.endswith(".block")
                torch.testing.assert_close(whole[name] if is_shared else whole[name][index : index + 1], tensor)

    def test_a_model_without_classifier_has_no_logits(self, pixel_values):
        assert trace_pooling(tiny_model().hpool_vit, pixel_values).logits is None
        assert trace_pooling(tiny_model(num_labels=0), pixel_values).logits is None

    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_half_precision_and_autocast_keep_the_sums(self, pool_mode, pixel_values):
        model = tiny_model(pool_mode=pool_mode)
        with torch.autocast("cpu", torch.bfloat16):
            check(trace_pooling(model, pixel_values), model, pixel_values)
        check(trace_pooling(model.bfloat16(), pixel_values), model, pixel_values)

    def test_the_code_that_a_folder_carries_is_traced_too(self, tmp_path, pixel_values):
        model = tiny_model(pool_mode="merge")
        model.save_pretrained(tmp_path / "model")
        carried = get_class_from_dynamic_module("modeling_hpool_vit.HPoolViTModel", str(tmp_path / "model"))
        assert not issubclass(carried, HPoolViTModel)
        trace = trace_pooling(carried.from_pretrained(tmp_path / "model"), pixel_values)
        assert torch.equal(trace.stages[-1].groups, trace_pooling(model, pixel_values).stages[-1].groups)

    def test_the_tensors_can_be_saved_and_read_again(self, tmp_path, pixel_values):
        tensors = trace_pooling(tiny_model(pool_mode="merge"), pixel_values).tensors()
        save_file(tensors, tmp_path / "trace.safetensors")
        again = load_file(tmp_path / "trace.safetensors")
        assert again.keys() == tensors.keys() >= {"rollout", "logits", "stages.1.groups", "stages.2.share"}
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def state(model: nn.Module) -> tuple:
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return modules, model.config._attn_implementation, model.config.to_dict(), torch.get_rng_state().tolist()


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize("mode", ["training", "evaluation"])
    def test_mode_hooks_attention_and_random_numbers_stay(self, mode, pixel_values):
        model = tiny_model(hidden_dropout_prob=0.1).train(mode == "training")
        model.hpool_vit.layers[1].eval()
        weights, before = copy.deepcopy(model.state_dict()), state(model)
        trace_pooling(model, pixel_values)
        assert state(model) == before
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    def test_also_when_an_image_is_refused(self):
        model = tiny_model().train()
        before = state(model)
        with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
            trace_pooling(model, torch.zeros(1, 3, 20, 20))
        assert state(model) == before

    def test_a_model_in_training_is_traced_as_in_evaluation(self, pixel_values):
        model = tiny_model(hidden_dropout_prob=0.5, drop_path_rate=0.5)
        expected = trace_pooling(model, pixel_values).rollout
        assert torch.equal(trace_pooling(model.train(), pixel_values).rollout, expected)

    def test_threads_trace_one_model_at_a_time_without_mixing_their_images(self):
        model = tiny_model(pool_mode="merge")
        images = [random_images(model, 1) for _ in range(4)]
        expected = [trace_pooling(model, image).rollout for image in images]
        with ThreadPoolExecutor(4) as pool:
            traces = list(pool.map(lambda image: trace_pooling(model, image), images))
        for trace, rollout in zip(traces, expected, strict=True):
            close(trace.rollout, rollout)


def test_another_kind_of_model_is_refused(pixel_values):
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32))
    with pytest.raises(ValueError, match="`model` is a ViTModel, not an HPool-ViT"):
        trace_pooling(vit, pixel_values)


def test_values_that_are_not_finite_are_refused(pixel_values):
    pixel_values[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite: check `pixel_values`"):
        trace_pooling(tiny_model(), pixel_values)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_class_token": True, "num_register_tokens": 2},
        {"use_gated_mlp": True, "mlp_norm": True},
        {"use_qk_norm": True},
        {"rope_theta": 100.0},
        {"rope_theta": 100.0, "use_class_token": True, "readout": "class_token_and_mean"},
    ],
    ids=["plain", "prefix", "gated", "qk-norm", "rotary", "rotary-class-token"],
)
def test_the_macs_of_merging_by_importance_are_those_counted_by_pytorch(fields):
    fields = {"pool_mode": "merge", "merge_rule": "importance", "hvt_pool": [0, 1, 3], "merge_ratio": 0.3, **fields}
    config = tiny_config(**fields, image_size=(28, 36), ln_order="residual")
    macs, stats = block_macs(config), model_stats(config)
    counted = [part for part in stats["parts"] if part.get("blocks")]
    assert [sum(macs[block] for block in part["blocks"]) for part in counted] == [part["macs"] for part in counted]
    assert stats["parts"][-1]["macs"] == config.pooled_size * config.num_labels


@pytest.mark.parametrize("pool_mode", POOL_MODES)
@pytest.mark.parametrize("ln_order", LN_ORDERS)
def test_the_macs_of_the_blocks_add_up_to_those_counted_by_pytorch(pool_mode, ln_order):
    overrides = {"pool_mode": pool_mode, "ln_order": ln_order, "use_class_token": ln_order == "post"}
    config = tiny_config(**overrides, hvt_pool=[0, 1, 3], merge_ratio=0.3, image_size=(28, 36))
    macs = block_macs(config)
    counted = [part for part in model_stats(config)["parts"] if part.get("blocks")]
    assert [sum(macs[block] for block in part["blocks"]) for part in counted] == [part["macs"] for part in counted]
    assert block_macs(tiny_config(**overrides, hvt_pool=[0, 1, 3], merge_ratio=0.3), 63) == macs
