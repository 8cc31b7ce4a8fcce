"""What other Vision Transformers have beside the paper's: registers, readouts, rotary positions, gated MLPs, norms."""

import math

import pytest
import torch
from helpers import tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTModel
from hpool_vit.configuration_hpool_vit import LN_ORDERS, POOL_MODES
from hpool_vit.modeling_hpool_vit import (
    HPoolViTAttentionReadout,
    HPoolViTGatedMLP,
    HPoolViTMLP,
    HPoolViTRotaryEmbedding,
    rotate,
)
from hpool_vit.pooling_hpool_vit import HPoolViTAvgPooling, HPoolViTMerging, Tokens


# Everything at once, as far as it goes together.
ROTARY = {"rope_theta": 100.0, "use_position_embeddings": False}
FEATURES = {
    "num_register_tokens": 2,
    "use_class_token": True,
    "embedding_norm": True,
    "patch_bias": False,
    "use_gated_mlp": True,
    "hidden_act": "silu",
    "mlp_norm": True,
    "key_bias": False,
    "use_qk_norm": True,
    "layer_scale_init_value": 0.5,
    **ROTARY,
}


def randomised(module: nn.Module) -> nn.Module:
    """Random norms and biases too, so that a forgotten one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.7 if parameter.ndim == 1 else 0))
    return module.eval()


def mode(pool_mode: str) -> dict:
    return {"pool_mode": pool_mode, "merge_ratio": 0.3, "proportional_attention": pool_mode == "merge"}


class TestPrefix:
    def test_class_token_registers_and_patches_stand_in_this_order_and_registers_have_no_positions(self, pixel_values):
        embeddings = randomised(tiny_model(num_register_tokens=2, use_class_token=True)).hpool_vit.embeddings
        tokens = embeddings(pixel_values)
        assert embeddings.position_embeddings.shape == (1, 65, 32)
        positions = embeddings.position_embeddings[0]
        torch.testing.assert_close(tokens[1, 0], embeddings.cls_token[0, 0] + positions[0])
        torch.testing.assert_close(tokens[1, 1:3], embeddings.register_tokens[0])
        torch.testing.assert_close(tokens[:, 3:], embeddings.patch_embeddings(pixel_values) + positions[1:])

    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_the_prefix_is_never_pooled(self, pool_mode, pixel_values):
        model = tiny_model(num_register_tokens=3, use_class_token=True, **mode(pool_mode)).hpool_vit
        seen = []
        for stage in model.pooling.values():
            stage.register_forward_hook(lambda stage, args, output: seen.append((args[0], output)))
        states = model(pixel_values, output_hidden_states=True).hidden_states
        tokens = model.config.tokens_per_stage()
        assert [state.shape[1] - 4 for state in states] == [tokens[stage] for stage in (0, 0, 1, 1, 2)]
        for before, after in seen:
            assert torch.equal(before.hidden_states[:, :4], after.hidden_states[:, :4])
        assert pool_mode != "merge" or (seen[-1][1].sizes.sum(1) == 64).all()

    def test_registers_do_not_count_in_the_mean(self, pixel_values):
        model = tiny_model(num_register_tokens=2, **mode("merge")).hpool_vit
        sizes = []
        model.pooling["3"].register_forward_hook(lambda stage, args, output: sizes.append(output.sizes))
        outputs = model(pixel_values)
        expected = torch.einsum("bn,bnd->bd", sizes[0] / 64, outputs.last_hidden_state[:, 2:])
        torch.testing.assert_close(outputs.pooler_output, expected)

    def test_a_norm_before_the_first_block_normalises_every_token(self, pixel_values):
        plain = tiny_model(num_register_tokens=2, use_class_token=True)
        normed = tiny_model(num_register_tokens=2, use_class_token=True, embedding_norm=True)
        normed.load_state_dict(plain.state_dict(), strict=False)
        embedded = plain.hpool_vit.embeddings(pixel_values)
        torch.testing.assert_close(normed.hpool_vit.embeddings(pixel_values), F.layer_norm(embedded, (32,), eps=1e-6))


class TestReadout:
    @pytest.mark.parametrize("readout", ["mean", "class_token", "class_token_and_mean"])
    def test_the_pooled_output_is_what_the_field_says(self, readout, pixel_values):
        model = tiny_model(use_class_token=True, num_register_tokens=1, readout=readout)
        outputs = model.hpool_vit(pixel_values)
        token, mean = outputs.last_hidden_state[:, 0], outputs.last_hidden_state[:, 2:].mean(1)
        expected = {"mean": mean, "class_token": token, "class_token_and_mean": torch.cat((token, mean), 1)}[readout]
        torch.testing.assert_close(outputs.pooler_output, expected)
        assert model.classifier.in_features == model.config.pooled_size == expected.shape[1]

    def test_attention_reads_like_pytorchs_own_with_a_learned_query(self):
        readout = randomised(HPoolViTAttentionReadout(tiny_config(readout="attention", readout_num_heads=4)))
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
        projections = (readout.q_proj, readout.k_proj, readout.v_proj)
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat([projection.weight for projection in projections]),
                "in_proj_bias": torch.cat([projection.bias for projection in projections]),
                "out_proj.weight": readout.o_proj.weight,
                "out_proj.bias": readout.o_proj.bias,
            }
        )
        tokens = torch.randn(2, 9, 32)
        read = attention(readout.probe.expand(2, -1, -1), tokens, tokens)[0][:, 0]
        torch.testing.assert_close(readout(Tokens(tokens)), read + readout.mlp(readout.layernorm(read)))

    def test_attention_reads_a_merged_token_as_often_as_it_has_patches(self):
        readout = randomised(HPoolViTAttentionReadout(tiny_config(readout="attention")))
        tokens = torch.randn(1, 4, 32)
        merged = Tokens(tokens, num_prefix_tokens=1, sizes=torch.tensor([[2.0, 1.0, 3.0]]))
        torch.testing.assert_close(readout(merged), readout(Tokens(tokens[:, [0, 1, 1, 2, 3, 3, 3]])))

    def test_the_final_norm_can_follow_the_class_token(self, pixel_values):
        model = randomised(tiny_model(ln_order="pre", use_class_token=True, norm_after_pooling=True)).hpool_vit
        outputs = model(pixel_values)
        torch.testing.assert_close(outputs.pooler_output, model.layernorm(outputs.last_hidden_state[:, 0]))

    def test_the_final_norm_can_be_left_out(self, pixel_values):
        model = tiny_model(ln_order="pre", use_final_norm=False).hpool_vit
        outputs = model(pixel_values, output_hidden_states=True)
        assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
        assert not [name for name in model.state_dict() if name.startswith("layernorm")]


class TestRotaryPositions:
    @pytest.mark.parametrize(
        ("fields", "rows", "columns"),
        [
            ({}, [-math.pi, math.pi], [-4 / 3 * math.pi, 0, 4 / 3 * math.pi]),
            ({"rope_coordinates": "index"}, [0, 1], [0, 1, 2]),
            ({"rope_coordinates": "index", "rope_grid": 6}, [0, 3], [0, 2, 4]),
            ({"rope_coordinates": "index_from_one", "rope_grid": (4, 3)}, [2, 4], [1, 2, 3]),
        ],
        ids=["centered", "index", "stretched", "from-one"],
    )
    def test_the_coordinates_are_counted_as_the_field_says(self, fields, rows, columns):
        rotary = HPoolViTRotaryEmbedding(tiny_config(rope_theta=10.0, **fields), 10.0)
        coordinates = rotary.coordinates(torch.zeros(5, 3, 8, 12))
        expected = [[row, column] for row in rows for column in columns]
        torch.testing.assert_close(coordinates, torch.tensor([expected], dtype=torch.float32))

    def test_pairs_of_channels_turn_as_complex_numbers_by_row_and_column(self):
        rotary = HPoolViTRotaryEmbedding(tiny_config(rope_theta=100.0), 100.0)
        coordinates, states = torch.randn(1, 5, 2), torch.randn(2, 3, 7, 16)
        turned = rotate(states, *rotary(coordinates, 2, torch.float32))
        assert torch.equal(turned[:, :, :2], states[:, :, :2])
        for token in range(5):
            angles = [coordinates[0, token, axis] * 100.0 ** (-i / 4) for axis in (0, 1) for i in range(4)]
            for pair, angle in enumerate(angles):
                before, after = (torch.complex(x[..., pair], x[..., pair + 8]) for x in (states, turned))
                expected = before[:, :, token + 2] * torch.exp(1j * angle)
                torch.testing.assert_close(after[:, :, token + 2], expected)

    def test_only_differences_of_coordinates_count_among_patches(self):
        rotary = HPoolViTRotaryEmbedding(tiny_config(rope_theta=100.0), 100.0)
        query, key, coordinates = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 5, 2)

        def scores(shift: float) -> torch.Tensor:
            turned = rotary(coordinates + shift, 0, torch.float32)
            return rotate(query, *turned) @ rotate(key, *turned).transpose(2, 3)

        torch.testing.assert_close(scores(0.0), scores(1.5), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(scores(0.0), query @ key.transpose(2, 3), atol=0.1)

    def test_a_merged_token_stands_at_the_mean_of_its_patches(self):
        stage = HPoolViTMerging(tiny_config(pool_mode="merge", merge_ratio=0.4), block=1)
        states = torch.tensor([0.0, 19.0, 10.0, 1.0, 20.0])[None, :, None].expand(-1, -1, 2)
        coordinates = torch.tensor([[[0.0, 0], [0, 1], [0, 2], [3, 0], [4, 4]]])
        merged = stage(Tokens(states, sizes=torch.tensor([[2.0, 1, 1, 1, 3]]), coordinates=coordinates))
        torch.testing.assert_close(merged.coordinates, torch.tensor([[[1.0, 0], [0, 2], [3, 3.25]]]))

    def test_a_pooled_token_stands_at_the_mean_of_its_window(self):
        stage = HPoolViTAvgPooling(tiny_config(**ROTARY), block=1)
        coordinates = torch.tensor([[[0.0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]])
        pooled = stage(Tokens(torch.randn(1, 5, 32), coordinates=coordinates))
        torch.testing.assert_close(pooled.coordinates, torch.tensor([[[0.0, 1], [2 / 3, 1]]]))
        assert not list(stage.parameters())

    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    def test_images_of_any_size_need_no_resizing(self, pool_mode):
        model = tiny_model(**ROTARY, **mode(pool_mode))
        images = torch.randn(2, 3, 24, 44)
        logits = model(images).logits
        assert torch.equal(model(images, interpolate_pos_encoding=True).logits, logits)
        assert not [name for name in model.state_dict() if "position" in name]

    def test_where_a_patch_is_counts(self, pixel_values):
        model = tiny_model(**ROTARY, hvt_pool=None)
        turned = model(pixel_values.flip(3)).logits
        unturned = tiny_model(use_position_embeddings=False, hvt_pool=None)
        unturned.load_state_dict(model.state_dict())
        patches = pixel_values.unflatten(3, (8, 4)).flip(3).flatten(3)
        torch.testing.assert_close(unturned(pixel_values).logits, unturned(patches).logits)
        assert not torch.allclose(model(pixel_values).logits, model(patches).logits, atol=1e-3)
        assert not torch.allclose(model(pixel_values).logits, turned, atol=1e-3)


class TestBlocks:
    def test_a_gated_mlp_multiplies_two_projections(self):
        mlp = randomised(HPoolViTGatedMLP(tiny_config(use_gated_mlp=True, hidden_act="silu", mlp_norm=True)))
        tokens = torch.randn(2, 5, 32)
        product = F.silu(mlp.gate_proj(tokens)) * mlp.up_proj(tokens)
        normed = F.layer_norm(product, (64,), mlp.layernorm.weight, mlp.layernorm.bias, eps=1e-6)
        torch.testing.assert_close(mlp(tokens), mlp.down_proj(normed))

    def test_a_plain_mlp_can_have_a_norm_too(self):
        mlp = randomised(HPoolViTMLP(tiny_config(mlp_norm=True)))
        tokens = torch.randn(2, 5, 32)
        normed = F.layer_norm(F.gelu(mlp.fc1(tokens)), (64,), mlp.layernorm.weight, mlp.layernorm.bias, eps=1e-6)
        torch.testing.assert_close(mlp(tokens), mlp.fc2(normed))

    def test_queries_and_keys_are_normalised_head_by_head(self):
        attention = randomised(tiny_model(use_qk_norm=True)).hpool_vit.layers[0].attention
        tokens = torch.randn(2, 5, 32)
        query, key, value = (
            projection(tokens).reshape(2, 5, 2, 16).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = attention.q_norm(query), attention.k_norm(key)
        mixed = (query @ key.transpose(2, 3) / 4).softmax(-1) @ value
        expected = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(tokens)[0], expected, atol=1e-5, rtol=1e-5)

    def test_biases_can_be_left_out(self):
        names = tiny_model(patch_bias=False, key_bias=False).state_dict().keys()
        assert "hpool_vit.embeddings.patch_embeddings.projection.bias" not in names
        assert "hpool_vit.layers.0.attention.k_proj.bias" not in names
        assert "hpool_vit.layers.0.attention.q_proj.bias" in names


@pytest.mark.parametrize("pool_mode", POOL_MODES)
class TestEverythingAtOnce:
    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    @pytest.mark.parametrize("readout", ["class_token_and_mean", "attention"])
    def test_every_parameter_learns(self, ln_order, readout, pool_mode, pixel_values):
        model = tiny_model(**FEATURES, **mode(pool_mode), ln_order=ln_order, readout=readout).train()
        model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert still == []

    def test_a_saved_folder_gives_the_same_logits(self, pool_mode, pixel_values, tmp_path):
        model = randomised(tiny_model(**FEATURES, **mode(pool_mode), readout="attention", rope_grid=[4, 4]))
        model.save_pretrained(tmp_path)
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path).eval()
        assert loaded.config.rope_grid == (4, 4)
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_the_attention_implementations_agree(self, implementation, pool_mode, pixel_values):
        model = tiny_model(**FEATURES, **mode(pool_mode))
        expected = model(pixel_values).logits
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_half_precision_stays_close(self, dtype, pool_mode, pixel_values):
        features = FEATURES | {"initializer_range": 0.05}
        model = tiny_model(**features, **mode(pool_mode), readout="attention")
        expected = model(pixel_values).logits
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(model(pixel_values).logits.float(), expected, atol=0.05, rtol=0.05)
        half = model.to(dtype)(pixel_values.to(dtype)).logits
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)

    def test_gradient_checkpointing_changes_nothing(self, pool_mode, pixel_values):
        gradients = []
        for checkpointed in (False, True):
            model = tiny_model(**FEATURES, **mode(pool_mode), ln_order="residual").train()
            if checkpointed:
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(map(torch.equal, *gradients))


# Seconds each: the slow tests have the others.
@pytest.mark.parametrize(
    "pool_mode", ["max", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avg", "merge"))]
)
def test_it_compiles_and_exports_as_one_graph(pool_mode, pixel_values):
    model = tiny_model(**FEATURES, **mode(pool_mode), readout="attention")
    expected = model(pixel_values).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)
    sizes = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)}
    program = torch.export.export(model, (), {"pixel_values": pixel_values}, dynamic_shapes=sizes).module()
    more = torch.randn(3, 3, 24, 44)
    torch.testing.assert_close(program(pixel_values=more).logits, model(more).logits, atol=1e-5, rtol=1e-5)


def test_the_defaults_add_no_parameter():
    model = tiny_model(use_class_token=True)
    first = model.hpool_vit.embeddings.state_dict().keys()
    assert first == {
        "cls_token",
        "position_embeddings",
        "patch_embeddings.projection.weight",
        "patch_embeddings.projection.bias",
    }
    assert not [name for name in model.state_dict() if "readout" in name or "rotary" in name or "_norm" in name]
    config = HPoolViTConfig()
    assert config.num_prefix_tokens == 0 and config.resolved_readout == "mean" and config.pooled_size == 768


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_register_tokens": -1}, "`num_register_tokens=-1` must be at least 0"),
        ({"readout": "max"}, "`readout='max'` is unknown: choose one of None, mean, class_token"),
        ({"readout": "class_token_and_mean"}, "needs `use_class_token=True`"),
        ({"readout_num_heads": 5}, "`readout_num_heads=5`"),
        ({"readout_num_heads": 0}, "`readout_num_heads=0` must be at least 1"),
        ({"rope_theta": 0}, "`rope_theta=0` must be a finite number above 0"),
        ({"rope_theta": 10.0, "num_attention_heads": 16}, "divisible by 4"),
        ({"rope_coordinates": "polar"}, "`rope_coordinates='polar'` is unknown"),
        ({"rope_grid": (0, 4)}, "`rope_grid=(0, 4)` must be"),
        ({"rope_grid": 0}, "`rope_grid=0` must be"),
        ({"norm_after_pooling": True, "ln_order": "pre", "use_final_norm": False}, "needs `use_final_norm=True`"),
        (
            {
                "norm_after_pooling": True,
                "ln_order": "pre",
                "use_class_token": True,
                "readout": "class_token_and_mean",
            },
            "wider than the norm",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    assert message in str(error.value)


def test_the_configuration_can_be_changed_before_the_model_is_built(pixel_values):
    config = tiny_config()
    config.num_register_tokens = 2
    assert HPoolViTModel(config)(pixel_values).last_hidden_state.shape == (2, 17, 32)
