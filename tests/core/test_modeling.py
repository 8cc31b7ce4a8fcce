import itertools
import math

import pytest
import torch
from accelerate import cpu_offload
from helpers import tiny_config, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import Trainer
from transformers.utils import output_capturing

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTModel
from hpool_vit.configuration_hpool_vit import LN_ORDERS, POOL_MODES
from hpool_vit.pooling_hpool_vit import HPoolViTMerging, Tokens


MERGE = {"pool_mode": "merge", "merge_ratio": 0.3}
PROPORTIONAL = {"proportional_attention": True}


def plain_attention(
    weights: dict[str, torch.Tensor], prefix: str, x: torch.Tensor, heads: int, bias: torch.Tensor | float
) -> torch.Tensor:
    def project(name, y):
        return y @ weights[f"{prefix}.{name}.weight"].T + weights[f"{prefix}.{name}.bias"]

    batch_size, tokens, width = x.shape
    q, k, v = (
        project(name, x).reshape(batch_size, tokens, heads, width // heads).permute(0, 2, 1, 3)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(width // heads) + bias
    mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
    return project("o_proj", mixed.permute(0, 2, 1, 3).reshape(batch_size, tokens, width))


def plain_norm(weights: dict[str, torch.Tensor], prefix: str, x: torch.Tensor) -> torch.Tensor:
    variance = x.var(-1, keepdim=True, unbiased=False)
    normalised = (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    return normalised * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def plain_pool(x: torch.Tensor, mode: str) -> torch.Tensor:
    windows = [x[:, start : start + 3] for start in range(0, x.shape[1] - 2, 2)]
    return torch.stack([w.max(1).values if mode == "max" else w.mean(1) for w in windows], dim=1)


def plain_merge(x: torch.Tensor, r: torch.Tensor, sizes: torch.Tensor, ratio: float) -> tuple[torch.Tensor, ...]:
    """For one image: tokens of shape `(num_tokens, width)` of both streams, and patches per token."""
    distances = (x[:, None] - x[None]).square().sum(-1)
    targets = range(0, len(x), 2)
    nearest = {odd: min(targets, key=lambda even: distances[odd, even].item()) for odd in range(1, len(x), 2)}
    joining = sorted(nearest, key=lambda odd: distances[odd, nearest[odd]].item())[: math.floor(ratio * len(x))]
    groups = [[i] + [odd for odd in joining if nearest[odd] == i] for i in range(len(x)) if i not in joining]
    x, r = (torch.stack([(y[g] * sizes[g, None]).sum(0) / sizes[g].sum() for g in groups]) for y in (x, r))
    return x, r, torch.stack([sizes[g].sum() for g in groups])


def plain_forward(model: HPoolViTForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """The logits, written down once more from the equations: no modules, one line per formula."""
    config = model.config
    weights = {name.removeprefix("hpool_vit."): value for name, value in model.state_dict().items()}
    rows = [
        pixel_values[:, :, top : top + 4, left : left + 4].reshape(len(pixel_values), -1)
        for top, left in itertools.product(range(0, 32, 4), range(0, 32, 4))
    ]
    kernel = weights["embeddings.patch_embeddings.projection.weight"].reshape(config.hidden_size, -1)
    x = torch.stack(rows, 1) @ kernel.T + weights["embeddings.patch_embeddings.projection.bias"]
    first = int(config.use_class_token)
    if first:
        x = torch.cat([weights["embeddings.cls_token"].repeat(len(x), 1, 1), x], 1)
    x = r = x + weights["embeddings.position_embeddings"]
    sizes, bias = torch.ones(len(x), x.shape[1] - first), 0.0
    for index in range(config.num_hidden_layers):
        if index in (config.hvt_pool or []):
            prefixes, bodies = [y[:, :first] for y in (x, r)], [y[:, first:] for y in (x, r)]
            if config.pool_mode == "merge":
                images = [plain_merge(*image, config.merge_ratio) for image in zip(*bodies, sizes, strict=True)]
                *bodies, sizes = (torch.stack(parts) for parts in zip(*images, strict=True))
                if config.proportional_attention:
                    bias = torch.cat([torch.zeros(len(x), first), sizes.log()], 1)[:, None, None]
            else:
                positions = weights[f"pooling.{index}.position_embeddings"]
                bodies = [plain_pool(body, config.pool_mode) + positions for body in bodies]
                sizes = torch.ones(len(x), positions.shape[1])  # each token counts alike
            x, r = (torch.cat(parts, 1) for parts in zip(prefixes, bodies, strict=True))
        block = f"layers.{index}"
        scale1, scale2 = (weights.get(f"{block}.layer_scale{i}.scale", 1.0) for i in (1, 2))

        def attention(y, block=block, scale=scale1, bias=bias):
            return scale * plain_attention(weights, f"{block}.attention", y, config.num_attention_heads, bias)

        def mlp(y, block=block, scale=scale2):
            y = F.gelu(y @ weights[f"{block}.mlp.fc1.weight"].T + weights[f"{block}.mlp.fc1.bias"])
            return scale * (y @ weights[f"{block}.mlp.fc2.weight"].T + weights[f"{block}.mlp.fc2.bias"])

        def norm1(y, block=block):
            return plain_norm(weights, f"{block}.layernorm_before", y)

        def norm2(y, block=block):
            return plain_norm(weights, f"{block}.layernorm_after", y)

        if config.ln_order == "pre":
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        elif config.ln_order == "post":
            x = norm1(x + attention(x))
            x = norm2(x + mlp(x))
        else:
            a = attention(x)
            r, x = r + a, norm1(x + a)
            m = mlp(x)
            r, x = r + m, norm2(x + m)
    if config.ln_order == "pre":
        x = plain_norm(weights, "layernorm", x)
    elif config.ln_order == "residual":
        x = x + plain_norm(weights, "layernorm", r)
    pooled = x[:, 0] if first else torch.einsum("bn,bnd->bd", sizes / sizes.sum(1, keepdim=True), x)
    return pooled @ weights["classifier.weight"].T + weights["classifier.bias"]


def randomise(model: nn.Module) -> nn.Module:
    """Random norms and biases too, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.7)
    return model


@pytest.mark.parametrize("ln_order", LN_ORDERS)
@pytest.mark.parametrize("pooling", [{"pool_mode": "max"}, {"pool_mode": "avg"}, MERGE, MERGE | PROPORTIONAL], ids=str)
@pytest.mark.parametrize("use_class_token", [False, True])
@pytest.mark.parametrize("patchify_technique", ["linear", "convolutional"])
def test_the_model_computes_the_equations(ln_order, pooling, use_class_token, patchify_technique, pixel_values):
    model = randomise(
        tiny_model(
            ln_order=ln_order,
            **pooling,
            use_class_token=use_class_token,
            patchify_technique=patchify_technique,
            layer_scale_init_value=0.5,
            hvt_pool=[0, 2],
        )
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(pixel_values).logits, plain_forward(model, pixel_values), atol=2e-4, rtol=1e-4
        )


def test_linear_and_convolutional_patches_are_the_same_function_after_reshaping(pixel_values):
    convolutional = tiny_model(patchify_technique="convolutional")
    linear = tiny_model(seed=1, patchify_technique="linear")
    name = "hpool_vit.embeddings.patch_embeddings.projection.weight"
    weights = convolutional.state_dict()
    weights[name] = weights[name].flatten(1)
    linear.load_state_dict(weights)
    torch.testing.assert_close(linear(pixel_values).logits, convolutional(pixel_values).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_class_token", [False, True])
def test_pooling_halves_the_tokens_at_each_listed_block(use_class_token, pixel_values):
    model = tiny_model(hvt_pool=[0, 2], use_class_token=use_class_token)
    outputs = model(pixel_values, output_hidden_states=True)
    lengths = [state.shape[1] - use_class_token for state in outputs.hidden_states]
    assert lengths == [64, 31, 31, 15, 15]


def test_the_first_hidden_states_are_the_embeddings_and_the_others_each_blocks_output(pixel_values):
    model = tiny_model(hvt_pool=[0]).hpool_vit
    recorded = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: recorded.append(output[0]))
    outputs = model(pixel_values, output_hidden_states=True)
    expected = [model.embeddings(pixel_values), *recorded]
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    for state, other in zip(outputs.hidden_states, expected, strict=True):
        torch.testing.assert_close(state, other)


@pytest.mark.skipif(
    not hasattr(output_capturing, "selected_hidden_states"), reason="this Transformers returns all hidden states"
)
@pytest.mark.parametrize(("wanted", "given"), [(2, [2]), (-1, [4]), ([0, 2], [0, 2]), ([-1, 1], [1, 4])], ids=str)
def test_single_hidden_states_can_be_asked_for(wanted, given, pixel_values):
    model = tiny_model()
    every = model(pixel_values, output_hidden_states=True).hidden_states
    states = model(pixel_values, output_hidden_states=wanted).hidden_states
    assert [index for index, state in enumerate(states) if state is not None] == given
    assert all(torch.equal(states[index], every[index]) for index in given)


def test_attentions_are_probabilities_over_the_remaining_tokens(pixel_values):
    model = tiny_model()
    model.set_attn_implementation("eager")
    attentions = model(pixel_values, output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(2, 2, n, n) for n in (64, 31, 31, 15)]
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


@pytest.mark.parametrize("ln_order", LN_ORDERS)
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(ln_order, implementation, pixel_values):
    model = tiny_model(ln_order=ln_order, num_hidden_layers=2, hvt_pool=[1])
    logits = {}
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(pixel_values).logits
    torch.testing.assert_close(logits[implementation], logits["eager"], atol=1e-4, rtol=1e-4)


VARIANTS = [
    dict(zip(("ln_order", "pool_mode", "use_class_token", "patchify_technique"), values, strict=True))
    for values in itertools.product(LN_ORDERS, ("max", "avg", "merge"), (False, True), ("linear", "convolutional"))
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_every_parameter_of_every_variant_gets_a_gradient(variant, pixel_values):
    heads = {"classifier_hidden_size": 16, "layer_scale_init_value": 0.1, "proportional_attention": True}
    model = tiny_model(**variant, **heads).train()
    model(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []


@pytest.mark.parametrize("pool_mode", ["max", "avg", "merge"])
@pytest.mark.parametrize("use_class_token", [False, True])
def test_interpolation_changes_nothing_at_the_models_own_size(pool_mode, use_class_token, pixel_values):
    model = tiny_model(pool_mode=pool_mode, use_class_token=use_class_token)
    plain, interpolated = (model(pixel_values, interpolate_pos_encoding=flag).logits for flag in (False, True))
    torch.testing.assert_close(interpolated, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (24, 40), (33, 47), (12, 200)])
@pytest.mark.parametrize("patchify_technique", ["linear", "convolutional"])
def test_interpolation_takes_images_of_any_size(size, patchify_technique):
    model = tiny_model(patchify_technique=patchify_technique).hpool_vit
    outputs = model(torch.randn(1, 3, *size), interpolate_pos_encoding=True, output_hidden_states=True)
    expected = model.config.tokens_per_stage((size[0] // 4) * (size[1] // 4))
    assert [state.shape[1] for state in outputs.hidden_states] == [expected[i] for i in (0, 0, 1, 1, 2)]


def test_interpolation_resizes_the_grid_in_two_dimensions_and_later_stages_along_the_tokens():
    model = tiny_model().hpool_vit
    grid = torch.linspace(0, 1, 8)
    with torch.no_grad():  # the first positions hold their row, those of the second stage their number
        model.embeddings.position_embeddings.copy_(grid.repeat_interleave(8)[None, :, None].expand(1, 64, 32))
        model.pooling["1"].position_embeddings.copy_(torch.linspace(0, 1, 31)[None, :, None].expand(1, 31, 32))
        model.embeddings.patch_embeddings.projection.weight.zero_()
        model.embeddings.patch_embeddings.projection.bias.zero_()
    rows = model.embeddings(torch.zeros(1, 3, 64, 64), interpolate_pos_encoding=True)[0, :, 0].reshape(16, 16)
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, 16))
    assert (rows[:, 0].diff()[2:-2] > 0).all()
    pooled = model.pooling["1"](Tokens(torch.zeros(1, 127, 32)), interpolate_pos_encoding=True).hidden_states
    assert pooled.shape == (1, 63, 32) and (pooled[0, :, 0].diff()[1:-1] > 0).all()


def test_an_image_too_small_for_the_schedule_is_refused_with_the_block():
    with pytest.raises(ValueError, match="runs out of tokens at block 3: 1 left"):
        tiny_model()(torch.randn(1, 3, 8, 8), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "`pixel_values` is missing"),
        ([[0.5]], "not a tensor .list."),
        (torch.randn(1, 1, 32, 32), r"shape \(1, 1, 32, 32\).*num_channels=3"),
        (torch.randn(3, 32, 32), r"expected \(batch_size, 3, height, width\)"),
        (torch.randn(1, 3, 32, 36), "32 × 36 pixels.*interpolate_pos_encoding=True"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8.*floating-point"),
    ],
)
def test_a_wrong_input_is_refused_with_the_remedy(images, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(images)


def test_labels_give_the_loss_of_their_problem_type(pixel_values):
    single, multi, regression = (tiny_model(num_labels=n) for n in (3, 3, 1))
    classes = torch.tensor([2, 0])
    output = single(pixel_values, labels=classes)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, classes))
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    output = multi(pixel_values, labels=several)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, several))
    values = torch.tensor([0.3, -1.2])
    output = regression(pixel_values, labels=values)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], values))
    assert [m.config.problem_type for m in (single, multi, regression)] == [
        "single_label_classification",
        "multi_label_classification",
        "regression",
    ]


def test_a_subclass_of_any_name_gets_the_loss_of_its_problem_type(pixel_values):
    class Birds(HPoolViTForImageClassification):
        pass

    classes = torch.tensor([2, 0])
    output = Birds(tiny_config())(pixel_values, labels=classes)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, classes))


def test_labels_for_a_model_without_classes_are_refused(pixel_values):
    with pytest.raises(ValueError, match=r"`labels` need a classifier.*num_labels=0"):
        tiny_model(num_labels=0)(pixel_values, labels=torch.tensor([0, 1]))
    assert tiny_model(num_labels=0)(pixel_values).logits.shape == (2, 32)


@pytest.mark.parametrize("pool_mode", POOL_MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_old_onnx_exporter_is_refused_with_the_remedy(pool_mode, pixel_values, tmp_path):
    with pytest.raises(ValueError, match="dynamo=True"):
        torch.onnx.export(tiny_model(pool_mode=pool_mode), (pixel_values,), tmp_path / "model.onnx", dynamo=False)


def test_a_configuration_that_asks_for_tuples_gets_them(pixel_values):
    model = tiny_model()
    expected = model(pixel_values).logits
    model.config.return_dict = False
    torch.testing.assert_close(model(pixel_values)[0], expected)


def test_an_attention_mask_is_refused_in_one_sentence(pixel_values):
    with pytest.raises(ValueError, match="takes no `attention_mask`"):
        tiny_model()(pixel_values, attention_mask=torch.ones(2, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_merges_the_same_tokens_without_rounding_them(dtype):
    merging = HPoolViTMerging(tiny_config(pool_mode="merge", merge_ratio=0.3), block=1)
    # Large common offsets and norms are what trained residual streams have.
    tokens = torch.randn(4, 64, 32) * 3 + 40 * torch.eye(32)[0]
    expected = merging(Tokens(tokens))
    with torch.autocast("cpu", dtype=dtype):
        merged = merging(Tokens(tokens))
    assert merged.hidden_states.dtype == torch.float32
    assert torch.equal(merged.sizes, expected.sizes)
    assert torch.equal(merged.hidden_states, expected.hidden_states)


def test_a_tuple_is_returned_on_request_with_the_same_content(pixel_values):
    model = tiny_model()
    as_tuple = model(pixel_values, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], model(pixel_values).logits)


def test_drop_path_drops_whole_samples_with_the_probability_of_their_block():
    model = tiny_model(drop_path_rate=0.6)
    for layer, probability in zip(model.hpool_vit.layers, (0.0, 0.2, 0.4, 0.6), strict=True):
        drop_path = layer.drop_path.train()
        assert drop_path.drop_prob == pytest.approx(probability)
        out = drop_path(torch.ones(4000, 3, 2))
        per_sample = out.flatten(1)
        kept = per_sample[:, 0] > 0
        assert (per_sample == per_sample[:, :1]).all()
        assert kept.float().mean().item() == pytest.approx(1 - probability, abs=0.04)
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - probability)))
        assert (drop_path.eval()(torch.ones(8, 3, 2)) == 1).all()


@pytest.mark.parametrize("name", ["updateStochasticDepthRate", "update_stochastic_depth_rate"])
def test_the_stochastic_depth_rate_grows_per_block_and_survives_saving(name, tmp_path):
    model = tiny_model(drop_path_rate=0.3)
    getattr(model, name)(0.15)
    grown = [0.3 * i / 3 + i * 0.15 / 3 for i in range(4)]
    assert [layer.drop_path.drop_prob for layer in model.hpool_vit.layers] == pytest.approx(grown)
    model.save_pretrained(tmp_path)
    loaded = HPoolViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.drop_path_rate == pytest.approx(0.45)
    assert [layer.drop_path.drop_prob for layer in loaded.hpool_vit.layers] == pytest.approx(grown)


def test_the_stochastic_depth_rate_comes_back_to_zero_without_rounding_below_it():
    model = tiny_model(drop_path_rate=0.3)
    model.update_stochastic_depth_rate(-0.1)
    model.update_stochastic_depth_rate(-0.2)
    assert model.config.drop_path_rate == 0


def test_a_stochastic_depth_rate_of_one_is_refused_and_changes_nothing():
    model = tiny_model(drop_path_rate=0.9)
    with pytest.raises(ValueError, match=r"k=0.2.*drop_path_rate=0.9"):
        model.update_stochastic_depth_rate(0.2)
    assert model.config.drop_path_rate == 0.9 and model.hpool_vit.layers[3].drop_path.drop_prob == 0.9


@pytest.mark.parametrize(
    "field", ["dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "projection_dropout_prob"]
)
def test_each_dropout_acts_in_training_and_only_there(field, pixel_values):
    model = tiny_model(**{field: 0.5})
    torch.testing.assert_close(model(pixel_values).logits, model(pixel_values).logits, atol=0, rtol=0)
    model.train()
    assert not torch.equal(model(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("ln_order", LN_ORDERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("pool_mode", ["max", "merge"])
def test_activation_checkpointing_changes_no_gradient(ln_order, use_reentrant, pool_mode, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(ln_order=ln_order, pool_mode=pool_mode, proportional_attention=True).train()
        if checkpointing:
            # The name before Transformers 5.23.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
        model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("ln_order", LN_ORDERS)
@pytest.mark.parametrize("pool_mode", ["max", "merge"])
def test_the_model_compiles_to_one_graph_with_the_same_result(ln_order, pool_mode, pixel_values, fresh_compiler):
    model = tiny_model(
        ln_order=ln_order,
        pool_mode=pool_mode,
        merge_ratio=0.3,
        proportional_attention=True,
        use_class_token=pool_mode == "merge",
        num_hidden_layers=2,
        hvt_pool=[1],
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool_mode", ["max", "merge"])
def test_one_compiled_graph_serves_every_batch_size(pool_mode, fresh_compiler):
    model = tiny_model(pool_mode=pool_mode, merge_ratio=0.3, proportional_attention=True, use_class_token=True)
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for batch_size in (4, 7, 9, 3):
        images = torch.randn(batch_size, 3, 32, 32)
        torch._dynamo.mark_dynamic(images, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images).logits, model(images).logits)
    assert graphs.frame_count == 1


def test_a_growing_stochastic_depth_rate_does_not_compile_anew_each_time(pixel_values, fresh_compiler):
    model = tiny_model(drop_path_rate=0.1, num_hidden_layers=2, hvt_pool=[1]).train()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for _ in range(10):
        compiled(pixel_values)
        model.update_stochastic_depth_rate(0.05)
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("pool_mode", ["max", "avg", "merge"])
@pytest.mark.parametrize("use_class_token", [False, True])
def test_the_model_exports_with_a_dynamic_batch(pool_mode, use_class_token):
    model = tiny_model(pool_mode=pool_mode, use_class_token=use_class_token)
    images = torch.randn(2, 3, 32, 32)
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic, strict=False)
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(more).logits, model(more).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool_mode", ["max", "avg", "merge"])
@pytest.mark.parametrize("ln_order", LN_ORDERS)
def test_half_precision_stays_close_to_single(dtype, pool_mode, ln_order, pixel_values):
    model = tiny_model(pool_mode=pool_mode, ln_order=ln_order, initializer_range=0.02)
    expected = model(pixel_values).logits
    output = model.to(dtype)(pixel_values)
    assert output.logits.dtype == dtype
    torch.testing.assert_close(output.logits.float(), expected, atol=0.05, rtol=0.05)


def test_new_weights_are_drawn_as_documented():
    model = HPoolViTForImageClassification(
        tiny_config(hidden_size=256, num_attention_heads=4, initializer_range=0.01, layer_scale_init_value=0.3)
    )
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name
        elif name.endswith("scale"):
            assert (parameter == 0.3).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.15), name


def test_trainer_and_recipes_can_tell_what_gets_no_weight_decay():
    model = HPoolViTForImageClassification(tiny_config(layer_scale_init_value=0.1, use_class_token=True))
    decayed = set(Trainer.get_decay_parameter_names(None, model)) - model.no_weight_decay()
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1 and "embeddings" not in name} | {
        "hpool_vit.embeddings.patch_embeddings.projection.weight"
    }


@pytest.mark.parametrize("patchify_technique", ["linear", "convolutional"])
@pytest.mark.parametrize("ln_order", LN_ORDERS)
def test_the_units_that_stay_whole_are_modules_of_the_model_and_not_nested(ln_order, patchify_technique):
    model = tiny_model(ln_order=ln_order, patchify_technique=patchify_technique)
    units = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    assert [name.removeprefix("hpool_vit.") for name in units] == ["embeddings", *(f"layers.{i}" for i in range(4))]
    assert model.get_input_embeddings() is model.hpool_vit.embeddings


# The class token's attention is computed outside the block, where the weights of an offloaded one are not there.
OFFLOADED = {
    "max": {},
    "importance": {"pool_mode": "merge", "merge_rule": "importance", "proportional_attention": True},
    "rotary": {"pool_mode": "merge", "merge_rule": "importance", "rope_theta": 100.0},
}


@pytest.mark.parametrize("fields", OFFLOADED.values(), ids=OFFLOADED)
def test_device_map_spreads_the_blocks_and_gives_the_same_logits(tmp_path, pixel_values, fields):
    plain = tiny_model(use_class_token=True, layer_scale_init_value=0.5, **fields)
    plain.save_pretrained(tmp_path)
    mapped = HPoolViTForImageClassification.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "offload"
    )
    assert {"cpu", "disk"} <= set(mapped.hf_device_map.values())
    with torch.no_grad():
        torch.testing.assert_close(mapped(pixel_values).logits, plain(pixel_values).logits)


@pytest.mark.parametrize("fields", OFFLOADED.values(), ids=OFFLOADED)
@torch.no_grad()
def test_offloaded_weights_give_the_same_logits(pixel_values, fields):
    model = tiny_model(use_class_token=True, **fields)
    expected = model(pixel_values).logits
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(pixel_values).logits, expected)


@torch.no_grad()
def test_offloaded_weights_take_new_stages_without_weights_and_no_others(pixel_values):
    merging, pooling = tiny_model(**OFFLOADED["importance"], use_class_token=True), tiny_model()
    expected = pooling(pixel_values).logits
    for model in (merging, pooling):
        cpu_offload(model, torch.device("cpu"))
    merging.set_hvt_pool([2])
    assert merging(pixel_values).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"`hvt_pool=\[2\]` needs a new stage, which has no place"):
        pooling.set_hvt_pool([2])
    torch.testing.assert_close(pooling(pixel_values).logits, expected)


def test_a_field_changed_to_nonsense_after_the_configuration_was_made_is_refused_by_the_model():
    config = tiny_config()
    config.hvt_pool = [1, 99]
    with pytest.raises(ValueError, match="names block 99"):
        HPoolViTModel(config)


def test_zero_labels_give_the_pooled_output_itself(pixel_values):
    model = tiny_model(num_labels=0)
    torch.testing.assert_close(model(pixel_values).logits, model.hpool_vit(pixel_values).pooler_output)


def test_rectangular_images_and_patches_work():
    config = HPoolViTConfig(
        hidden_size=32,
        num_attention_heads=2,
        image_size=(24, 40),
        patch_size=(4, 8),
        hvt_pool=[1],
        num_hidden_layers=2,
    )
    outputs = HPoolViTModel(config)(torch.randn(1, 3, 24, 40))
    assert outputs.last_hidden_state.shape == (1, 14, 32)
