"""ViTs of Transformers and timm become HPool-ViTs that start from their weights, and unpooled ones answer alike."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from hpool_vit.toolkit.conversion import sources
from hpool_vit.toolkit.conversion.checkpoint import ConversionError
from hpool_vit.toolkit.conversion.image_processor import image_processor_for
from hpool_vit.toolkit.conversion.sources import read_source
from hpool_vit.toolkit.conversion.vit import POOLING_DEFAULTS, convert_source, convert_vit


TIMM = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 5}
TRANSFORMERS = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
}


def randomize(model: nn.Module) -> nn.Module:
    """Weights that make every part count, LayerNorms included, which start as the identity."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def timm_model(name: str = "vit_tiny_patch16_224", **overrides) -> nn.Module:
    return randomize(timm.create_model(name, **{**TIMM, **overrides}))


def save(model: nn.Module, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return str(path)


def convert(model: nn.Module, tmp_path: Path, **overrides):
    """Converts a timm model by way of a file."""
    return convert_vit(save(model, tmp_path / "timm.pth"), num_attention_heads=2, **overrides)


def processor_of(folder: Path, **overrides):
    """The image processor of a model that is converted from a folder."""
    source = read_source(folder)
    return image_processor_for(source, convert_source(source, **overrides)[0].config)


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, pixel_values: torch.Tensor):
    expected = theirs(pixel_values)
    torch.testing.assert_close(ours(pixel_values).logits, getattr(expected, "logits", expected), rtol=0, atol=1e-5)


class TestTimm:
    @pytest.mark.parametrize("fc_norm", [True, False], ids=["norm after the mean", "norm before the mean"])
    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
    def test_without_class_token_and_with_average_pooling_the_logits_are_the_same(
        self, tmp_path, pixel_values, suffix, fc_norm
    ):
        theirs = timm_model(class_token=False, global_pool="avg", fc_norm=fc_norm)
        path = save(theirs, tmp_path / f"timm{suffix}")
        ours, report = convert_vit(path, hvt_pool=None, num_attention_heads=2)
        assert_same(ours, theirs, pixel_values)
        assert not ours.config.use_class_token
        assert report.dropped == report.initialised == []

    @pytest.mark.parametrize(
        ("name", "overrides"),
        [
            ("vit_tiny_patch16_224", {}),
            ("deit_tiny_patch16_224", {}),
            ("vit_tiny_patch16_224", {"no_embed_class": True, "init_values": 0.3}),
            ("vit_tiny_patch16_224", {"qkv_bias": False}),
            ("vit_tiny_patch16_224", {"num_classes": 0}),
            ("vit_tiny_patch16_224", {"mlp_ratio": 3, "in_chans": 1}),
            ("vit_tiny_patch16_224", {"qk_norm": True}),
            ("vit_tiny_patch16_224", {"scale_mlp_norm": True}),
            ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}),
            ("vit_tiny_patch16_224", {"reg_tokens": 3}),
            ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}),
        ],
        ids=[
            *("vit", "deit", "deit-3", "no bias", "no head", "other sizes", "qk norm", "mlp norm", "packed swiglu"),
            *("registers with positions", "registers without positions"),
        ],
    )
    def test_with_a_class_token_the_logits_are_the_same(self, tmp_path, name, overrides):
        theirs = timm_model(name, **overrides)
        ours, report = convert(theirs, tmp_path, hvt_pool=None)
        assert_same(ours, theirs, torch.randn(2, overrides.get("in_chans", 3), 32, 32))
        assert ours.config.use_class_token
        assert report.dropped == report.initialised == []

    def test_both_kinds_of_patch_embedding_are_the_same_function(self, tmp_path, pixel_values):
        theirs = timm_model()
        ours, _ = convert(theirs, tmp_path, hvt_pool=None, patchify_technique="linear")
        assert_same(ours, theirs, pixel_values)

    def test_a_rectangular_source_needs_its_image_size(self, tmp_path):
        theirs = timm_model(img_size=(32, 28))
        with pytest.raises(ConversionError, match="height and width of its images as `image_size`"):
            convert(theirs, tmp_path)
        ours, _ = convert(theirs, tmp_path, hvt_pool=None, image_size=(32, 28))
        assert_same(ours, theirs, torch.randn(2, 3, 32, 28))

    def test_the_report_says_when_the_patches_could_form_a_rectangle_or_a_square(self, tmp_path):
        theirs = timm_model(img_size=(32, 24))  # 8 × 6 patches and the class token, or 7 × 7 patches without it
        assert "`image_size`" in str(convert(theirs, tmp_path)[1])
        ours, report = convert(theirs, tmp_path, hvt_pool=None, image_size=(32, 24))
        assert report.notes == []
        assert_same(ours, theirs, torch.randn(2, 3, 32, 24))

    def test_the_distillation_token_is_dropped(self, tmp_path, pixel_values):
        theirs = timm_model("deit_tiny_distilled_patch16_224")
        ours, report = convert(theirs, tmp_path, hvt_pool=None)
        assert report.dropped == ["dist_token", "head_dist.weight", "head_dist.bias"]
        kept = {name: tensor for name, tensor in theirs.state_dict().items() if name not in report.dropped}
        kept["pos_embed"] = kept["pos_embed"][:, [0, *range(2, 66)]]
        undistilled = timm_model("deit_tiny_patch16_224")
        undistilled.load_state_dict(kept)
        assert_same(ours, undistilled, pixel_values)

    def test_without_the_class_token_the_rest_stays(self, tmp_path, pixel_values):
        theirs = timm_model()
        ours, report = convert(theirs, tmp_path, hvt_pool=None, use_class_token=False)
        assert report.dropped == ["cls_token"]
        assert "trained on the class token" in str(report)
        kept = {name: tensor for name, tensor in theirs.state_dict().items() if name != "cls_token"}
        kept["pos_embed"] = kept["pos_embed"][:, 1:]
        averaging = timm_model(class_token=False, global_pool="avg", fc_norm=False)
        averaging.load_state_dict(kept)
        assert_same(ours, averaging, pixel_values)

    def test_a_class_token_that_the_source_does_not_have_is_new(self, tmp_path):
        theirs = timm_model(class_token=False, global_pool="avg", fc_norm=False)
        ours, report = convert(theirs, tmp_path, use_class_token=True)
        assert "hpool_vit.embeddings.cls_token" in report.initialised
        embeddings = ours.hpool_vit.embeddings
        assert embeddings.cls_token.std() > 0
        assert embeddings.position_embeddings[:, 0].abs().max() == 0
        torch.testing.assert_close(embeddings.position_embeddings[:, 1:], theirs.pos_embed)

    @pytest.mark.parametrize("fc_norm", [True, False], ids=["norm after the mean", "norm before the mean"])
    def test_a_head_that_reads_the_mean_beside_a_class_token_computes_the_same_logits(
        self, tmp_path, pixel_values, fc_norm
    ):
        theirs = timm_model(global_pool="avg", fc_norm=fc_norm)
        timm.models.save_for_hf(theirs, tmp_path / "timm", model_args=TIMM)
        ours, report = convert_vit(str(tmp_path / "timm"), hvt_pool=None)
        assert_same(ours, theirs, pixel_values)
        assert (ours.config.use_class_token, ours.config.readout) == (True, "mean")
        assert ours.config.norm_after_pooling == fc_norm
        assert report.dropped == []

    def test_a_head_that_reads_the_mean_needs_no_class_token(self, tmp_path):
        theirs = timm_model(global_pool="avg")
        ours, report = convert(theirs, tmp_path, use_class_token=False)
        assert not ours.config.use_class_token
        assert ours.config.norm_after_pooling
        assert report.dropped == ["cls_token"]
        assert "train it" not in str(report)

    def test_the_names_of_the_original_deit_iii_are_understood(self, tmp_path, pixel_values):
        theirs = timm_model(no_embed_class=True, init_values=0.3)
        tensors = theirs.state_dict()
        tensors = {
            name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensors[name] for name in tensors
        }
        torch.save({"model": tensors}, tmp_path / "deit_3.pth")
        ours, _ = convert_vit(str(tmp_path / "deit_3.pth"), hvt_pool=None, num_attention_heads=2)
        assert_same(ours, theirs, pixel_values)

    def test_a_training_checkpoint_gives_its_moving_average_when_asked(self, tmp_path, pixel_values):
        theirs, raw = timm_model(), timm_model()
        checkpoint = {"state_dict": raw.state_dict(), "state_dict_ema": theirs.state_dict(), "epoch": 3}
        path = str(tmp_path / "model_best.pth.tar")
        torch.save(checkpoint, path)
        for use_ema, expected in ((False, raw), (True, theirs)):
            ours, _ = convert_vit(path, use_ema=use_ema, hvt_pool=None, num_attention_heads=2)
            assert_same(ours, expected, pixel_values)

    def test_half_precision_becomes_single(self, tmp_path):
        theirs = timm_model().half()
        ours, _ = convert(theirs, tmp_path)
        assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
        torch.testing.assert_close(ours.classifier.weight, theirs.head.weight.float())

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_folder_of_timm_tells_more_than_its_weights(self, tmp_path, pixel_values, safe):
        theirs = timm_model(global_pool="avg", fc_norm=False)
        data = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.4, 0.2), "crop_pct": 0.8, "interpolation": "bilinear"}
        timm.models.save_for_hf(theirs, tmp_path / "timm", safe_serialization=safe, data_config=data, model_args=TIMM)
        source = read_source(str(tmp_path / "timm"))
        ours, _ = convert_source(source, hvt_pool=None)
        assert ours.config.readout == "mean"  # its file alone would look like one that reads the class token
        assert_same(ours, theirs, pixel_values)
        assert ours.config.num_attention_heads == 2
        processor = image_processor_for(source, ours.config)
        assert list(processor.image_mean) == [0.5, 0.4, 0.3]
        assert processor.size == {"shortest_edge": 40}
        assert processor.crop_size == {"height": 32, "width": 32}
        assert processor.resample == Image.Resampling.BILINEAR


class TestTransformers:
    @pytest.mark.parametrize(
        ("config", "model_class"),
        [
            (ViTConfig(**TRANSFORMERS), ViTForImageClassification),
            (ViTConfig(**TRANSFORMERS, qkv_bias=False, hidden_act="gelu_new"), ViTForImageClassification),
            (ViTMSNConfig(**TRANSFORMERS), ViTMSNForImageClassification),
        ],
        ids=["vit", "other vit", "msn"],
    )
    def test_with_the_class_token_the_logits_are_the_same(self, tmp_path, pixel_values, config, model_class):
        theirs = randomize(model_class(config))
        theirs.save_pretrained(tmp_path / "source")
        ours, report = convert_vit(str(tmp_path / "source"), hvt_pool=None)
        assert_same(ours, theirs, pixel_values)
        assert report.dropped == report.initialised == report.notes == []

    @pytest.mark.parametrize(
        ("theirs", "dropped"),
        [
            (ViTModel(ViTConfig(**TRANSFORMERS)), ["pooler.dense.weight", "pooler.dense.bias"]),
            (Dinov2Model(Dinov2Config(**TRANSFORMERS, mlp_ratio=2)), ["embeddings.mask_token"]),
        ],
        ids=["vit", "dinov2"],
    )
    def test_without_a_head_the_features_are_the_same(self, tmp_path, pixel_values, theirs, dropped):
        randomize(theirs).save_pretrained(tmp_path / "source")
        ours, report = convert_vit(str(tmp_path / "source"), hvt_pool=None)
        with torch.no_grad():
            expected = theirs(pixel_values).last_hidden_state
            torch.testing.assert_close(ours.hpool_vit(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours(pixel_values).logits, expected[:, 0], rtol=0, atol=1e-5)
        assert report.dropped == dropped

    @pytest.mark.parametrize("model_class", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
    def test_deit_loses_only_its_distillation_token(self, tmp_path, pixel_values, model_class):
        theirs = randomize(model_class(DeiTConfig(**TRANSFORMERS)))
        theirs.save_pretrained(tmp_path / "source")
        ours, report = convert_vit(str(tmp_path / "source"), hvt_pool=None)
        assert "embeddings.distillation_token" in report.dropped
        # The same model, whose embeddings lose the second of the tokens on their way to the blocks.
        theirs.deit.embeddings.register_forward_hook(lambda module, inputs, tokens: tokens[:, [0, *range(2, 66)]])
        with torch.no_grad():
            outputs = theirs(pixel_values)
            logits = outputs.cls_logits if "cls_logits" in outputs else outputs.logits
            torch.testing.assert_close(ours(pixel_values).logits, logits, rtol=0, atol=1e-5)

    def test_a_head_that_reads_more_than_the_class_token_is_kept(self, tmp_path):
        theirs = randomize(Dinov2ForImageClassification(Dinov2Config(**TRANSFORMERS, mlp_ratio=2)))
        theirs.save_pretrained(tmp_path / "source")
        ours, report = convert_vit(str(tmp_path / "source"))
        assert ours.config.num_labels == 5
        torch.testing.assert_close(ours.classifier.weight, theirs.classifier.weight)
        assert report.dropped == ["embeddings.mask_token"]

    def test_such_a_head_is_new_where_the_model_reads_less(self, tmp_path):
        theirs = Dinov2ForImageClassification(Dinov2Config(**TRANSFORMERS, mlp_ratio=2))
        theirs.save_pretrained(tmp_path / "source")
        ours, report = convert_vit(str(tmp_path / "source"), readout="class_token")
        assert ours.config.num_labels == 5
        assert {"classifier.weight", "classifier.bias"} <= set(report.dropped) & set(report.initialised)
        assert "The head is new: train it." in str(report)

    def test_a_pretraining_decoder_is_dropped(self, tmp_path):
        ViTForMaskedImageModeling(ViTConfig(**TRANSFORMERS, encoder_stride=4)).save_pretrained(tmp_path / "source")
        _, report = convert_vit(str(tmp_path / "source"))
        assert {"decoder.0.weight", "decoder.0.bias", "embeddings.mask_token"} == set(report.dropped)

    def test_the_settings_are_kept(self, tmp_path):
        config = ViTConfig(
            **{**TRANSFORMERS, "num_labels": 2},
            layer_norm_eps=1e-3,
            hidden_act="relu",
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.2,
            id2label={0: "ant", 1: "bee"},
            label2id={"ant": 0, "bee": 1},
        )
        ViTForImageClassification(config).save_pretrained(tmp_path / "source")
        ours = convert_vit(str(tmp_path / "source"))[0].config
        assert (ours.layer_norm_eps, ours.hidden_act, ours.id2label) == (1e-3, "relu", {0: "ant", 1: "bee"})
        assert ours.dropout == ours.hidden_dropout_prob == ours.projection_dropout_prob == 0.1
        assert ours.attention_probs_dropout_prob == 0.2

    def test_the_image_processor_prepares_images_as_the_source_does(self, tmp_path):
        ViTForImageClassification(ViTConfig(**TRANSFORMERS)).save_pretrained(tmp_path / "source")
        theirs = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        theirs.save_pretrained(tmp_path / "source")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
        expected = theirs(image, return_tensors="pt")["pixel_values"]

        ours = processor_of(tmp_path / "source")
        torch.testing.assert_close(ours(image, return_tensors="pt")["pixel_values"], expected)

        larger = processor_of(tmp_path / "source", image_size=48)
        assert larger.crop_size == {"height": 48, "width": 48}
        assert list(larger.image_mean) == [0.5] * 3


class TestPooling:
    def test_stages_start_without_positions_by_default(self, tmp_path):
        ours, report = convert(timm_model(), tmp_path, hvt_pool=[1, 2])
        stages = ours.hpool_vit.pooling
        assert [stages[block].position_embeddings.abs().max() for block in ("1", "2")] == [0, 0]
        assert report.initialised == [f"hpool_vit.pooling.{block}.position_embeddings (zero)" for block in (1, 2)]

    @pytest.mark.parametrize("class_token", [True, False])
    def test_stages_can_start_from_the_pooled_first_positions(self, tmp_path, class_token):
        theirs = timm_model()
        ours, _ = convert(
            theirs, tmp_path, hvt_pool=[1, 2], pool_mode="avg", stage_positions="pooled", use_class_token=class_token
        )
        expected = theirs.pos_embed[:, 1:].transpose(1, 2)
        for block in ("1", "2"):
            expected = nn.functional.avg_pool1d(expected, 3, 2)
            torch.testing.assert_close(ours.hpool_vit.pooling[block].position_embeddings.transpose(1, 2), expected)

    def test_stages_on_the_grid_can_start_from_pooled_positions_too(self, tmp_path):
        theirs = timm_model()
        window = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
        ours, _ = convert(theirs, tmp_path, hvt_pool=[2], pool_mode="avg", stage_positions="pooled", **window)
        grid = theirs.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        expected = nn.functional.avg_pool2d(grid, 2).flatten(2)
        torch.testing.assert_close(ours.hpool_vit.pooling["2"].position_embeddings.transpose(1, 2), expected)

    @pytest.mark.parametrize("stage_positions", ["zero", "pooled"])
    def test_each_schedule_of_several_gets_its_stages(self, tmp_path, stage_positions):
        theirs = timm_model()
        pooling = {"hvt_pool": [1, 2], "hvt_pool_choices": [None, [2], [1, 2], [0]]}
        ours, report = convert(theirs, tmp_path, stage_positions=stage_positions, **pooling)
        assert set(ours.hpool_vit.pooling) == {"0", "1", "2"}
        # A block of the model's own schedule has the positions of that one, and another block those of its own.
        for block, schedule in (("1", [1, 2]), ("2", [1, 2]), ("0", [0])):
            alone, _ = convert(theirs, tmp_path, hvt_pool=schedule, stage_positions=stage_positions)
            expected = alone.hpool_vit.pooling[block].position_embeddings
            torch.testing.assert_close(ours.hpool_vit.pooling[block].position_embeddings, expected)
        assert sum("pooling" in name for name in report.initialised) == 3

    def test_the_default_schedule_is_the_papers_scaled_to_the_depth(self, tmp_path):
        assert convert(timm_model(depth=12), tmp_path)[0].config.hvt_pool == [1, 5, 9]
        assert convert(timm_model(), tmp_path)[0].config.hvt_pool == [1, 2, 3]
        assert convert(timm_model(depth=2), tmp_path)[0].config.hvt_pool == [1]

    def test_merging_has_defaults_of_its_own(self, tmp_path):
        config = convert(timm_model(depth=12), tmp_path, pool_mode="merge")[0].config
        assert {name: getattr(config, name) for name in POOLING_DEFAULTS["merge"]} == POOLING_DEFAULTS["merge"]
        ours, report = convert(timm_model(), tmp_path, pool_mode="merge", hvt_pool=[1, 3])
        assert ours.config.hvt_pool == [1, 3]
        assert 0 < ours.config.merge_ratio <= 0.5
        assert report.initialised == report.dropped == []

    @pytest.mark.parametrize("proportional_attention", [True, False])
    def test_merging_nothing_changes_nothing(self, tmp_path, pixel_values, proportional_attention):
        theirs = timm_model()
        ours, _ = convert(
            theirs,
            tmp_path,
            pool_mode="merge",
            hvt_pool=[1, 2],
            merge_ratio=1e-3,
            proportional_attention=proportional_attention,
        )
        assert_same(ours, theirs, pixel_values)

    def test_another_image_size_resizes_the_positions(self, tmp_path):
        theirs = timm_model()
        ours, report = convert(theirs, tmp_path, hvt_pool=None, image_size=(48, 40))
        assert "from 8 × 8 to 12 × 10 patches" in str(report)
        unresized, _ = convert(theirs, tmp_path, hvt_pool=None)
        pixel_values = torch.randn(2, 3, 48, 40)
        with torch.no_grad():
            expected = unresized(pixel_values, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(ours(pixel_values).logits, expected, rtol=0, atol=1e-5)


class TestLabels:
    def test_another_number_of_labels_makes_a_new_head(self, tmp_path):
        ours, report = convert(timm_model(), tmp_path, num_labels=3)
        assert ours.classifier.weight.shape == (3, 64)
        assert ours.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert {"head.weight", "head.bias"} <= set(report.dropped)
        assert {"classifier.weight", "classifier.bias"} <= set(report.initialised)

    def test_the_same_number_keeps_the_head(self, tmp_path):
        theirs = timm_model()
        ours, _ = convert(theirs, tmp_path, num_labels=5)
        torch.testing.assert_close(ours.classifier.weight, theirs.head.weight)

    def test_names_for_the_same_number_keep_the_head(self, tmp_path):
        theirs = timm_model()
        ours, _ = convert(theirs, tmp_path, id2label=dict(enumerate("abcde")))
        assert ours.config.id2label[4] == "e"
        torch.testing.assert_close(ours.classifier.weight, theirs.head.weight)

    def test_names_and_number_must_agree(self, tmp_path):
        with pytest.raises(ConversionError, match="3 classes and 2 class names"):
            convert(timm_model(), tmp_path, num_labels=3, id2label={0: "a", 1: "b"})

    def test_an_mlp_head_is_new(self, tmp_path):
        ours, report = convert(timm_model(), tmp_path, classifier_hidden_size=16)
        assert ours.classifier.dense.weight.std() > 0
        assert "classifier.out_proj.weight" in report.initialised


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ({"reg_tokens": 2, "pos_embed": "none"}, "`reg_token` belongs to models with rotary positions alone"),
            (
                {"scale_attn_norm": True},
                "`blocks.0.attn.norm.weight` cannot be converted: it belongs to a norm inside",
            ),
            ({"pre_norm": True}, "`norm_pre.weight` belongs to CLIP's"),
            ({"global_pool": "map"}, "`attn_pool."),
            ({"mlp_layer": timm.layers.SwiGLU}, "`blocks.0.mlp.fc1_g.weight`"),
            ({"norm_layer": timm.layers.RmsNorm}, "`blocks.0.norm1.bias` is missing"),
            ({"pos_embed": "none"}, "`pos_embed` is missing"),
        ],
        ids=["registers", "attention norm", "clip", "map", "swiglu", "rms norm", "no positions"],
    )
    def test_a_vit_of_another_kind_is_refused_by_the_name_of_a_tensor(self, tmp_path, overrides, expected):
        with pytest.raises(ConversionError) as error:
            convert(timm_model(**overrides), tmp_path)
        assert expected in str(error.value)

    def test_each_missing_tensor_of_a_file_is_named(self, tmp_path):
        tensors = timm_model(depth=2).state_dict()
        # Without its class token it would be another, complete model; without the head's weight the bias is left over.
        for name in tensors.keys() - {"cls_token"}:
            save_file({key: tensors[key] for key in tensors if key != name}, tmp_path / "incomplete.safetensors")
            with pytest.raises(ConversionError) as error:
                convert_vit(str(tmp_path / "incomplete.safetensors"), num_attention_heads=2)
            assert f"`{name.replace('head.weight', 'head.bias')}`" in str(error.value)

    def test_a_missing_tensor_of_a_folder_is_named(self, tmp_path):
        ViTForImageClassification(ViTConfig(**TRANSFORMERS)).save_pretrained(tmp_path / "source")
        tensors = load_file(tmp_path / "source" / "model.safetensors")
        del tensors["vit.layernorm.weight"]
        save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=r"`vit\.layernorm\.weight` is missing"):
            convert_vit(str(tmp_path / "source"))

    def test_a_truncated_folder(self, tmp_path):
        ViTForImageClassification(ViTConfig(**TRANSFORMERS)).save_pretrained(tmp_path / "source")
        path = tmp_path / "source" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ConversionError, match="cannot be read"):
            convert_vit(str(tmp_path / "source"))

    def test_a_checkpoint_of_the_papers_code_is_for_convert_hvt(self, tmp_path):
        tensors = timm_model(class_token=False, global_pool="avg", fc_norm=False).state_dict()
        save_file({**tensors, "blocks.0.pos_embed": torch.zeros(1, 31, 64)}, tmp_path / "hvt.safetensors")
        with pytest.raises(ConversionError, match=r"`blocks\.0\.pos_embed` .* `convert_hvt` takes"):
            convert_vit(str(tmp_path / "hvt.safetensors"))

    @pytest.mark.parametrize("config", [{"model_type": "swin"}, {}])
    def test_another_model_type(self, tmp_path, config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match="can be converted: vit, deit"):
            convert_vit(str(tmp_path))

    @pytest.mark.parametrize("overrides", [{"hidden_size": 32}, {"ln_order": "residual"}, {"num_hidden_layers": 2}])
    def test_what_the_source_decides_cannot_be_chosen(self, tmp_path, overrides):
        with pytest.raises(ConversionError, match="cannot be chosen"):
            convert(timm_model(), tmp_path, **overrides)

    def test_the_number_of_heads_cannot_be_chosen_where_the_source_tells_it(self, tmp_path):
        ViTForImageClassification(ViTConfig(**TRANSFORMERS)).save_pretrained(tmp_path)
        with pytest.raises(ConversionError, match="`num_attention_heads=4` cannot be chosen: the source has 2"):
            convert_vit(tmp_path, num_attention_heads=4)

    def test_a_moving_average_cannot_be_taken_from_a_folder(self, tmp_path):
        ViTForImageClassification(ViTConfig(**TRANSFORMERS)).save_pretrained(tmp_path)
        with pytest.raises(ConversionError, match="`use_ema` is for a training checkpoint"):
            convert_vit(tmp_path, use_ema=True)

    @pytest.mark.parametrize("name", ["nothing", "no/such/place", "-/-"])
    def test_a_name_that_can_be_nothing_is_refused_without_asking_the_hub(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sources, "cached_file", pytest.fail)
        with pytest.raises(ConversionError, match="neither a file nor a folder"):
            read_source(name)

    def test_a_folder_without_a_configuration_is_refused(self, tmp_path):
        with pytest.raises(ConversionError, match=r"has no config\.json"):
            read_source(tmp_path)

    def test_a_pickled_object_is_not_executed(self, tmp_path):
        class Touch:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({**timm_model().state_dict(), "x": Touch()}, tmp_path / "evil.pth")
        with pytest.raises(ConversionError, match="was not executed"):
            convert_vit(tmp_path / "evil.pth")
        assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_a_misspelt_field_is_refused(tmp_path):
    path = save(timm_model(), tmp_path / "timm.safetensors")
    with pytest.raises(ValueError, match="`poolmode` is not a field"):
        convert_vit(path, poolmode="merge", num_attention_heads=2)
