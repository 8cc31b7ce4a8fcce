"""Random configurations: refused with a `ValueError` that names a field, or everything works."""

import re
import tempfile

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification


ODD = st.sampled_from([-1, 0, 0.5, 1.0, 7, float("nan"), "x", None, [1], [3, 1], [0.3]])


def words(error: Exception) -> set[str]:
    return set(re.findall(r"\w+", str(error)))


@st.composite
def configurations(draw) -> tuple[dict, str | None]:
    """Fields that fit each other, in every other example one of them replaced by an odd value; and which one."""
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
        "num_labels": draw(st.integers(1, 4)),
        "qkv_bias": draw(st.booleans()),
        "num_register_tokens": draw(st.integers(0, 2)),
        "readout": draw(st.sampled_from([None, "mean", "attention"])),
        "embedding_norm": draw(st.booleans()),
        "use_gated_mlp": draw(st.booleans()),
        "use_position_embeddings": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-12])),
    }
    replaced = draw(st.none() | st.sampled_from(sorted(values)))
    if replaced is not None:
        values[replaced] = draw(ODD)
    return values, replaced


@given(drawn=configurations())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_configuration_is_refused_by_name_or_trains_saves_and_loads(drawn):
    fields, replaced = drawn
    try:
        config = HPoolViTConfig(**fields)
    except ValueError as error:
        # Fields that fit each other can still be a schedule that runs out of tokens.
        assert "hvt_pool" in str(error) if replaced is None else {replaced, "hvt_pool"} & words(error), error
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
        assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
        # Not to the last bit: where the weights lie in memory decides how products of odd sizes are summed.
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-6)
        assert {name: getattr(loaded.config, name) for name in fields} == {n: getattr(config, n) for n in fields}
