"""Random configurations: refused with a `ValueError` that names a field, or everything works."""

import tempfile
from dataclasses import fields

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification


NAMES = [field.name for field in fields(HPoolViTConfig)]
ODD = st.sampled_from([-1, 0, 0.5, 1.0, 7, float("nan"), "x", None, [1], [3, 1], [0.3]])


@st.composite
def configurations(draw) -> dict:
    """Fields that fit each other, and in every other example one of them replaced by an odd value."""
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    patch = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    image = [size * draw(st.integers(1, 6)) for size in patch]
    pool = sorted(draw(st.sets(st.integers(0, layers - 1), max_size=3)))
    probability = st.sampled_from([0, 0.0, 0.1, 0.9])
    values = {
        "hidden_size": heads * draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 9)),
        "image_size": draw(st.sampled_from([tuple(image), image])),
        "patch_size": draw(st.sampled_from([patch, list(patch)])),
        "num_channels": draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu", "quick_gelu"])),
        "classifier_hidden_size": draw(st.none() | st.integers(1, 5)),
        "dropout": draw(probability),
        "hidden_dropout_prob": draw(probability),
        "attention_probs_dropout_prob": draw(probability),
        "projection_dropout_prob": draw(probability),
        "drop_path_rate": draw(probability),
        "patchify_technique": draw(st.sampled_from(["linear", "convolutional"])),
        "layer_scale_init_value": draw(st.none() | st.sampled_from([0.1, 1e-5, 1])),
        "ln_order": draw(st.sampled_from(["pre", "post", "residual"])),
        "hvt_pool": draw(st.sampled_from([pool, pool or None, tuple(pool)])),
        "pool_mode": draw(st.sampled_from(["max", "avg", "merge"])),
        "pool_kernel_size": draw(st.integers(1, 3)),
        "pool_stride": draw(st.integers(1, 3)),
        "merge_ratio": draw(st.sampled_from([0.5, 0.25, 0.01]) | st.just([0.3] * len(pool))),
        "proportional_attention": draw(st.booleans()),
        "use_class_token": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-12])),
    }
    if draw(st.booleans()):
        values[draw(st.sampled_from(sorted(values)))] = draw(ODD)
    return values


@given(fields=configurations())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_configuration_is_refused_by_name_or_trains_saves_and_loads(fields):
    try:
        config = HPoolViTConfig(**fields)
    except ValueError as error:
        assert any(name in str(error) for name in NAMES), error
        return
    model = HPoolViTForImageClassification(config).train()
    pixel_values = torch.randn(2, config.num_channels, *config.image_shape)
    logits = model(pixel_values).logits
    logits.sum().backward()
    assert logits.shape == (2, config.num_labels)
    assert all(parameter.grad is not None for parameter in model.base_model.parameters())

    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = HPoolViTForImageClassification.from_pretrained(folder)
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=0)
        assert {name: getattr(loaded.config, name) for name in fields} == {n: getattr(config, n) for n in fields}
