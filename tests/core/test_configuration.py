import json

import numpy as np
import pytest

from hpool_vit import HPoolViTConfig


ALIASES = {
    "d_model": ("hidden_size", 384),
    "num_encoder_blocks": ("num_hidden_layers", 11),
    "encoder_num_heads": ("num_attention_heads", 6),
    "encoder_mlp_d": ("intermediate_size", 99),
    "in_channels": ("num_channels", 1),
    "num_classes": ("num_labels", 7),
    "classifier_mlp_d": ("classifier_hidden_size", 64),
    "encoder_dropout": ("hidden_dropout_prob", 0.1),
    "encoder_attention_dropout": ("attention_probs_dropout_prob", 0.2),
    "encoder_projection_dropout": ("projection_dropout_prob", 0.3),
    "stochastic_depth_mp": ("drop_path_rate", 0.4),
    "layer_scale": ("layer_scale_init_value", 0.1),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_works_as_keyword_attribute_and_in_json(alias, tmp_path):
    field, value = ALIASES[alias]
    by_keyword = HPoolViTConfig(**{alias: value})
    assert getattr(by_keyword, field) == getattr(by_keyword, alias) == value

    by_attribute = HPoolViTConfig()
    setattr(by_attribute, alias, value)
    assert getattr(by_attribute, field) == value

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hpool_vit", alias: value}))
    assert getattr(HPoolViTConfig.from_pretrained(tmp_path), field) == value
    assert getattr(HPoolViTConfig.from_pretrained(tmp_path, **{alias: value}), field) == value


def test_the_short_names_alone_make_a_configuration():
    config = HPoolViTConfig(
        num_classes=1000,
        d_model=768,
        image_size=192,
        patch_size=16,
        classifier_mlp_d=2048,
        encoder_mlp_d=3072,
        encoder_num_heads=12,
        num_encoder_blocks=12,
    )
    assert (config.num_labels, config.hidden_size, config.classifier_hidden_size) == (1000, 768, 2048)
    assert config.tokens_per_stage() == [144, 71, 35, 17]


def test_two_names_for_one_field_with_different_values_are_refused():
    with pytest.raises(ValueError, match=r"hidden_size=384.*d_model=192"):
        HPoolViTConfig(hidden_size=384, d_model=192)


@pytest.mark.parametrize("off", [{"stochastic_depth": False}, {"stochastic_depth_mp": None}])
def test_stochastic_depth_can_be_switched_off_by_either_name(off):
    assert HPoolViTConfig(**{"stochastic_depth_mp": 0.1, **off}).drop_path_rate == 0
    config = HPoolViTConfig(drop_path_rate=0.1)
    for name, value in off.items():
        setattr(config, name, value)
    assert config.drop_path_rate == 0 and config.stochastic_depth is False


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": (192, 224), "patch_size": [16, 32]},
        {"hvt_pool": None},
        {"hvt_pool": []},
        {"hvt_pool": (2, 4)},
        {"layer_scale_init_value": None, "classifier_hidden_size": None},
        {"layer_scale_init_value": 1e-5, "classifier_hidden_size": 8},
        {"pool_mode": "merge", "merge_ratio": (0.1, 0.2, 0.3), "proportional_attention": True},
        {"use_class_token": True, "id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}},
    ],
)
def test_saving_and_loading_keeps_every_field(fields, tmp_path):
    config = HPoolViTConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = HPoolViTConfig.from_pretrained(tmp_path)
    rebuilt = HPoolViTConfig.from_dict(config.to_dict())
    for name in HPoolViTConfig().to_dict():
        if name not in ("transformers_version", "model_type"):
            assert getattr(loaded, name) == getattr(rebuilt, name) == getattr(config, name), name


REFUSED = {
    "image_size=225": {"image_size": 225},
    "image_size=(224, 100)": {"image_size": (224, 100)},
    "'image_size' with value (1, 2, 3)": {"image_size": [1, 2, 3]},
    "image_size=0": {"image_size": 0},
    "patch_size=-16": {"patch_size": -16},
    "hidden_size=100": {"hidden_size": 100},
    "hidden_size=0": {"hidden_size": 0},
    "num_hidden_layers=0": {"num_hidden_layers": 0},
    "num_channels=0": {"num_channels": 0},
    "classifier_hidden_size=0": {"classifier_hidden_size": 0},
    "ln_order='sandwich'": {"ln_order": "sandwich"},
    "patchify_technique='fourier'": {"patchify_technique": "fourier"},
    "pool_mode='min'": {"pool_mode": "min"},
    "hidden_act='tanhh'": {"hidden_act": "tanhh"},
    "names block 12": {"hvt_pool": [1, 12]},
    "names block -1": {"hvt_pool": [-1]},
    "hvt_pool=[1, 1]": {"hvt_pool": [1, 1]},
    "hvt_pool=[5, 1]": {"hvt_pool": [5, 1]},
    "runs out of tokens at block 7: 2 left": {"hvt_pool": [1, 2, 3, 4, 5, 6, 7]},
    "pool_stride=0": {"pool_stride": 0},
    "pool_kernel_size=0": {"pool_kernel_size": 0},
    "merge_ratio=0.6": {"merge_ratio": 0.6},
    "merge_ratio=0": {"merge_ratio": 0.0},
    "has 2 entries for the 3 blocks": {"pool_mode": "merge", "merge_ratio": [0.1, 0.2]},
    "dropout=1.0": {"dropout": 1.0},
    "drop_path_rate=-0.1": {"drop_path_rate": -0.1},
    "hidden_dropout_prob=nan": {"hidden_dropout_prob": float("nan")},
    "layer_norm_eps=0": {"layer_norm_eps": 0.0},
    "initializer_range=inf": {"initializer_range": float("inf")},
    "layer_scale_init_value=inf": {"layer_scale_init_value": float("inf")},
    "'hidden_size' expected int, got str": {"hidden_size": "wide"},
    "'hidden_size' expected int, got float": {"d_model": 384.0},
    "'hvt_pool'": {"hvt_pool": "1,5,9"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_configuration_is_refused_with_field_and_value(message):
    with pytest.raises(ValueError) as error:
        HPoolViTConfig(**REFUSED[message])
    assert message in str(error.value).replace("`", "")


def test_a_wrong_type_is_refused_on_assignment_too_under_either_name():
    config = HPoolViTConfig()
    for name in ("hidden_size", "d_model"):
        with pytest.raises(ValueError, match="hidden_size"):
            setattr(config, name, "wide")
    assert config.hidden_size == 768


def test_a_fraction_as_merge_ratio_merges_that_many_tokens():
    for merged in range(1, 99):
        config = HPoolViTConfig(pool_mode="merge", hvt_pool=[3], merge_ratio=merged / 196)
        assert config.tokens_per_stage() == [196, 196 - merged]


def test_numpys_numbers_and_arrays_are_taken_as_plain_ones(tmp_path):
    given = {"num_labels": np.int64(3), "merge_ratio": np.float64(0.3), "hidden_size": np.int32(96)}
    given |= {"hvt_pool": np.array([1, 2]), "image_size": (np.int64(32), np.int64(64)), "dropout": np.float32(0.5)}
    config = HPoolViTConfig(**given, num_attention_heads=3)
    plain = HPoolViTConfig(
        num_labels=3, merge_ratio=0.3, hidden_size=96, hvt_pool=[1, 2], image_size=(32, 64), dropout=0.5,
        num_attention_heads=3,
    )  # fmt: skip
    assert config == plain and config.to_json_string() == plain.to_json_string()
    config.hidden_size = np.int64(48)
    assert type(config.hidden_size) is int
    with pytest.raises(ValueError, match="'hidden_size' expected int, got float"):
        HPoolViTConfig(hidden_size=np.float64(96.0))


def test_a_class_of_a_model_without_classes_is_refused_with_the_remedy(tmp_path):
    config = HPoolViTConfig(num_labels=0)
    assert config.id2label == {}
    with pytest.raises(ValueError, match=r"no class 0: .*`num_labels=0`.*image-feature-extraction"):
        config.id2label[0]
    config.save_pretrained(tmp_path)
    assert HPoolViTConfig.from_pretrained(tmp_path).num_labels == 0


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"hvt-x.*hvt-s-3"):
        HPoolViTConfig.from_preset("hvt-x")


def test_a_preset_takes_overrides_under_either_name():
    config = HPoolViTConfig.from_preset("hvt-s-3", d_model=192, encoder_num_heads=3, num_classes=5, hvt_pool=None)
    assert (config.hidden_size, config.num_attention_heads, config.num_labels) == (192, 3, 5)
    assert config.hvt_pool is None and config.ln_order == "pre" and config.patchify_technique == "convolutional"


def test_a_configuration_keeps_its_own_copy_of_the_schedule():
    HPoolViTConfig.from_preset("hvt-s-1").hvt_pool.append(3)
    assert HPoolViTConfig.from_preset("hvt-s-1").hvt_pool == [1]
    schedule = [1, 2]
    config = HPoolViTConfig(hvt_pool=schedule)
    schedule.append(50)
    assert config.hvt_pool == [1, 2]


@pytest.mark.parametrize("value", [-1, 2.5, "x"])
@pytest.mark.parametrize("name", ["num_labels", "num_classes"])
def test_a_number_of_labels_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match="num_labels="):
        HPoolViTConfig(**{name: value})


def test_no_number_of_labels_means_the_default():
    assert HPoolViTConfig(num_classes=None).num_labels == HPoolViTConfig(num_labels=None).num_labels == 2


def test_overrides_that_do_not_fit_the_saved_fields_are_refused_when_loading(tmp_path):
    HPoolViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_size=97"):
        HPoolViTConfig.from_pretrained(tmp_path, hidden_size=97)
    assert HPoolViTConfig.from_pretrained(tmp_path, hvt_pool=None).hvt_pool is None
