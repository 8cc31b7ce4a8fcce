"""HPoolViTBackbone in the heads of Transformers for segmentation, depth and detection."""

import json

import pytest
import torch
from helpers import run_python, tiny_config, tiny_model
from transformers import (
    AutoBackbone,
    DFineConfig,
    DFineForObjectDetection,
    DPTConfig,
    DPTForSemanticSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hpool_vit import HPoolViTBackbone, HPoolViTConfig, HPoolViTForSemanticSegmentation
from hpool_vit.toolkit import load_backbone


GRID = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
MERGE = {"pool_mode": "merge", "merge_ratio": 0.4, "proportional_attention": True}
PYRAMID = {**MERGE, "feature_pyramid_size": 24}
DETECTION = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32] * 3,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32] * 3,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_denoising": 0,
    "num_labels": 3,
}


def upernet():
    """Any maps of one resolution, here those of merged tokens."""
    backbone = tiny_config(**MERGE, out_indices=[1, 2, 3, 4])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, num_labels=3)
    return UperNetForSemanticSegmentation(config)


def mask2former():
    """The pyramid, because it wants maps of strides 4, 8, 16 and 32."""
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    sizes |= {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 32}
    config = Mask2FormerConfig(
        backbone_config=tiny_config(**PYRAMID), num_queries=5, train_num_points=16, num_labels=3, **sizes
    )
    return Mask2FormerForUniversalSegmentation(config)


def dpt():
    """DPT's hybrid form, whose own ViT continues from the backbone's last map."""
    config = DPTConfig(
        backbone_config=tiny_config(**PYRAMID, out_features=["p2", "p3", "p4"]),
        is_hybrid=True,
        backbone_featmap_shape=[1, 24, 8, 8],
        image_size=32,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[24, 24, 24, 24],
        fusion_hidden_size=16,
        num_labels=3,
    )
    return DPTForSemanticSegmentation(config)


def rt_detr():
    """The three resolutions of a pooled grid."""
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=tiny_config(**GRID), **DETECTION))


def d_fine():
    return DFineForObjectDetection(DFineConfig(backbone_config=tiny_config(**GRID), **DETECTION))


def masks() -> dict:
    return {"labels": torch.randint(0, 3, (2, 32, 32))}


def binary_masks() -> dict:
    return {
        "mask_labels": [torch.randint(0, 2, (2, 32, 32)).float() for _ in range(2)],
        "class_labels": [torch.tensor([0, 2]), torch.tensor([1, 1])],
    }


def boxes() -> dict:
    return {"labels": [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}] * 2}


HEADS = {
    "UperNet": (upernet, masks),
    "Mask2Former": (mask2former, binary_masks),
    "DPT": (dpt, masks),
    "RT-DETR": (rt_detr, boxes),
    "D-FINE": (d_fine, boxes),
}

# What a user without the package does; `backbone` is any saved HPool-ViT.
PROGRAM = """
import json, sys
import torch, transformers
from transformers import AutoBackbone, AutoConfig

backbone, *folders = sys.argv[1:]
try:
    transformers.AutoModelForSemanticSegmentation.from_pretrained(folders[0], trust_remote_code=True)
except Exception as error:
    print("REFUSED", " ".join(str(error).split()))
config = AutoConfig.from_pretrained(backbone, trust_remote_code=True)
AutoConfig.register("hpool_vit", type(config))
AutoBackbone.from_config(config, trust_remote_code=True)

for folder in folders:
    name = json.load(open(folder + "/config.json"))["architectures"][0]
    head = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = head(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
    print("RESULT", next(value for value in outputs.values() if value is not None).double().sum().item())
"""


def backbone_of(head) -> HPoolViTBackbone:
    [backbone] = [module for module in head.modules() if isinstance(module, HPoolViTBackbone)]
    return backbone


@pytest.fixture(scope="module")
def heads() -> dict:
    torch.manual_seed(0)
    return {name: build() for name, (build, _) in HEADS.items()}


@pytest.mark.parametrize("name", HEADS)
class TestHeads:
    def test_a_training_step_reaches_every_parameter_of_the_backbone(self, heads, name, pixel_values):
        head = heads[name].train()
        head.zero_grad(set_to_none=True)
        loss = head(pixel_values=pixel_values, **HEADS[name][1]()).loss
        loss.backward()
        assert torch.isfinite(loss)
        backbone = backbone_of(head)
        unused = [
            f"pyramid.levels.{level}."
            for level, stage in enumerate(backbone.stage_names)
            if backbone.pyramid and stage not in backbone.out_features
        ]
        untouched = [key for key, weight in backbone.named_parameters() if weight.grad is None]
        assert [key for key in untouched if not key.startswith(tuple(unused))] == []

    def test_with_the_package_imported_a_saved_head_answers_as_before(self, heads, name, pixel_values, tmp_path):
        head = heads[name].eval()
        head.save_pretrained(tmp_path)
        loaded = type(head).from_pretrained(tmp_path).eval()
        with torch.no_grad():
            before, after = head(pixel_values=pixel_values), loaded(pixel_values=pixel_values)
        key = next(key for key, value in before.items() if isinstance(value, torch.Tensor))
        torch.testing.assert_close(after[key], before[key])
        assert backbone_of(loaded).out_features == backbone_of(head).out_features

    def test_the_trunk_of_a_trained_classifier_loads_into_it(self, heads, name, tmp_path):
        pooling = GRID if backbone_of(heads[name]).config.pools_on_grid else MERGE
        classifier = tiny_model(seed=3, **pooling)
        classifier.save_pretrained(tmp_path)
        report = load_backbone(heads[name], tmp_path)
        trained = classifier.hpool_vit.state_dict()
        assert all(
            torch.equal(weight, trained[key])
            for key, weight in backbone_of(heads[name]).hpool_vit.state_dict().items()
        )
        assert report.left_over == [] and all(key.startswith("pyramid.") for key in report.missing)


@pytest.fixture(scope="module")
def without_the_package(heads, tmp_path_factory) -> tuple[list[str], list[float]]:
    """What a process without the package prints of saved heads, and the sums of their outputs here."""
    tmp_path = tmp_path_factory.mktemp("heads")
    tiny_model(**GRID).save_pretrained(tmp_path / "backbone")
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    expected = []
    for name, head in heads.items():
        head.save_pretrained(tmp_path / name)
        with torch.no_grad():
            outputs = head.eval()(pixel_values=images)
        expected.append(next(value for value in outputs.values() if value is not None).double().sum().item())
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folders = [tmp_path / name for name in heads]
    printed = run_python(program, tmp_path / "backbone", *folders, hide=("hpool_vit",)).stdout
    return printed.splitlines(), expected


def test_without_the_package_saved_heads_load_once_the_backbones_code_is_registered(without_the_package):
    lines, expected = without_the_package
    answers = [float(line.split()[1]) for line in lines if line.startswith("RESULT")]
    assert answers == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_without_the_package_transformers_does_not_know_a_heads_backbone_by_itself(without_the_package):
    """If this fails, a later Transformers can do it, and the documentation may say so."""
    [refused] = [line for line in without_the_package[0] if line.startswith("REFUSED")]
    assert "hpool_vit" in refused


class TestLoadBackbone:
    def test_it_reports_what_is_missing_and_what_is_left_over(self, tmp_path):
        tiny_model(**GRID).save_pretrained(tmp_path)
        merging = HPoolViTBackbone(tiny_config(**PYRAMID))
        report = load_backbone(merging, tmp_path)
        assert report.left_over == [f"pooling.{block}.position_embeddings" for block in (1, 3)]
        assert "pyramid.levels.p2.0.weight" in report.missing
        assert "Left over: pooling.1.position_embeddings" in str(report)
        tiny_model(hvt_pool=None).save_pretrained(tmp_path)
        report = load_backbone(HPoolViTBackbone(tiny_config(**GRID)), tmp_path)
        assert report.missing == [f"pooling.{block}.position_embeddings" for block in (1, 3)]

    def test_another_field_is_refused_by_its_name(self, tmp_path):
        tiny_model(**GRID, ln_order="pre").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="ln_order='pre' there and 'residual' here"):
            load_backbone(HPoolViTBackbone(tiny_config(**GRID)), tmp_path)

    def test_another_shape_is_refused_by_the_name_of_the_weight_and_nothing_is_loaded(self, tmp_path):
        tiny_model(**MERGE, image_size=48).save_pretrained(tmp_path)
        backbone = HPoolViTBackbone(tiny_config(**MERGE))
        before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
        with pytest.raises(ValueError, match=r"embeddings.position_embeddings has the shape \(1, 144, 32\) there"):
            load_backbone(backbone, tmp_path)
        assert all(torch.equal(weight, before[name]) for name, weight in backbone.state_dict().items())

    def test_our_own_segmenter_has_one(self, tmp_path):
        trained = tiny_model(**MERGE)
        trained.save_pretrained(tmp_path)
        segmenter = HPoolViTForSemanticSegmentation(tiny_config(**MERGE))
        assert load_backbone(segmenter, tmp_path).missing == ["decode_head.weight", "decode_head.bias"]
        weights = (model.hpool_vit.layers[0].mlp.fc1.weight for model in (trained, segmenter))
        torch.testing.assert_close(*weights)

    def test_a_model_without_such_a_backbone_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="Linear has 0 HPool-ViT backbones"):
            load_backbone(torch.nn.Linear(2, 2), tmp_path)


def test_auto_backbone_asks_the_hub_for_a_local_folder_and_its_own_class_does_not(tmp_path):
    """If this fails, a later Transformers can do it, and the documentation may say so."""
    HPoolViTBackbone(tiny_config(**GRID)).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"(?i)repo"):
        AutoBackbone.from_pretrained(str(tmp_path))
    assert HPoolViTBackbone.from_pretrained(tmp_path).out_features == ["stage1", "stage3", "stage4"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert HPoolViTConfig(**saved).out_features == ["stage1", "stage3", "stage4"]
