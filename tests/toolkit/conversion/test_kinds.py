"""Every kind of source is converted or refused with a reason, and its image processor and names come along."""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from helpers import run_command
from PIL import Image
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hpool_vit import HPoolViTForImageClassification, HPoolViTImageProcessor
from hpool_vit.toolkit import compare_with_source, convert, convert_vit, read_source
from hpool_vit.toolkit.conversion.checkpoint import ConversionError
from hpool_vit.toolkit.conversion.kinds import REFUSED_MODEL_TYPES, TRANSFORMERS_KINDS


TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
# The release of Transformers whose model types the tables list.
LISTED_RELEASE = "5.24"


def image_model_types() -> set[str]:
    """The types with an image classifier or a tower for images."""
    towers = {name for name in CONFIG_MAPPING_NAMES if "vision" in name or name == "visual_bert"}
    return towers | set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


class TestModelTypes:
    def test_each_of_transformers_is_converted_or_refused_with_a_reason(self):
        unlisted = image_model_types() - TRANSFORMERS_KINDS.keys() - REFUSED_MODEL_TYPES.keys()
        if transformers.__version__.startswith(LISTED_RELEASE):
            assert unlisted == set()
        assert not TRANSFORMERS_KINDS.keys() & REFUSED_MODEL_TYPES.keys()

    def test_the_tables_list_only_what_there_is(self):
        if not transformers.__version__.startswith(LISTED_RELEASE):
            pytest.skip(f"the tables are for Transformers {LISTED_RELEASE}")
        assert CONFIG_MAPPING_NAMES.keys() >= TRANSFORMERS_KINDS.keys() | REFUSED_MODEL_TYPES.keys()

    @pytest.mark.parametrize("model_type", ["swin", "beit", "qwen2_vl_vision", "timm_wrapper"])
    def test_a_refusal_says_why(self, tmp_path, model_type):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ConversionError) as error:
            read_source(tmp_path)
        assert REFUSED_MODEL_TYPES[model_type] in str(error.value)


def save_clip(folder, **vision):
    torch.manual_seed(0)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER, **vision)).save_pretrained(folder)
    return folder


def save_siglip(folder):
    torch.manual_seed(0)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)).save_pretrained(folder)
    return folder


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def prepared(processor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


EXACT = {"height": 32, "width": 32}


class TestImageProcessors:
    @pytest.mark.parametrize(
        ("save", "theirs"),
        [
            (save_clip, transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=EXACT)),
            (save_siglip, transformers.SiglipImageProcessor(size=EXACT)),
        ],
        ids=["clip", "siglip"],
    )
    @pytest.mark.parametrize("is_saved", [True, False])
    def test_images_are_prepared_as_for_the_source(self, tmp_path, image, save, theirs, is_saved):
        folder = save(tmp_path / "source")
        if is_saved:
            theirs.save_pretrained(folder)
        _, ours, report = convert(folder, hvt_pool=None)
        torch.testing.assert_close(prepared(ours, image), prepared(theirs, image))
        assert ("assumed the one that is usual for its type" in str(report)) == (not is_saved)

    def test_dinov3s_come_along(self, tmp_path, image):
        folder = tmp_path / "source"
        transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TOWER)).save_pretrained(folder)
        theirs = transformers.DINOv3ViTImageProcessor(size=EXACT)
        theirs.save_pretrained(folder)
        _, ours, _ = convert(folder, hvt_pool=None)
        # DINOv3 resizes floating-point pixels, ours whole numbers.
        torch.testing.assert_close(prepared(ours, image), prepared(theirs, image), rtol=0, atol=0.02)

    def test_siglip_2_squashes_images_to_its_grid(self, tmp_path, image):
        folder = tmp_path / "source"
        fields = {name: value for name, value in TOWER.items() if name != "image_size"}
        config = transformers.Siglip2VisionConfig(**fields, num_patches=16)
        transformers.Siglip2VisionModel(config).save_pretrained(folder)
        transformers.Siglip2ImageProcessor().save_pretrained(folder)
        model, ours, report = convert(folder, hvt_pool=None)
        assert model.config.image_shape == (32, 32)
        assert prepared(ours, image).shape == (1, 3, 32, 32)
        assert not ours.do_center_crop
        assert list(ours.image_mean) == list(ours.image_std) == [0.5] * 3
        assert "NaFlex" in str(report)

    @pytest.mark.parametrize("crop_mode", ["center", "squash"])
    def test_timms_crop_modes(self, tmp_path, image, crop_mode):
        model = timm.create_model("vit_base_patch16_siglip_gap_224", **TIMM)
        data = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.8, "interpolation": "bicubic"}
        data |= {"crop_mode": crop_mode}
        timm.models.save_for_hf(model, tmp_path / "timm", model_args=TIMM, data_config=data)
        _, ours, _ = convert(tmp_path / "timm", hvt_pool=None)
        transform = timm.data.create_transform(**data, input_size=(3, 32, 32))
        # timm resizes with Pillow, ours with torchvision.
        torch.testing.assert_close(prepared(ours, image)[0], transform(image), rtol=0, atol=0.05)


class TestTowers:
    def test_the_text_tower_is_dropped_and_said_so(self, tmp_path):
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        text |= {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = transformers.CLIPConfig(vision_config=TOWER, text_config=text)
        transformers.CLIPModel(config).save_pretrained(tmp_path / "source")
        _, report = convert_vit(tmp_path / "source")
        assert "Dropped the text tower and the projections (23 tensors)" in str(report)
        assert report.dropped == []

    def test_a_tower_without_a_pooling_head_gives_the_mean(self, tmp_path):
        config = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
        transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "source")
        model, report = convert_vit(tmp_path / "source", hvt_pool=None)
        assert model.config.resolved_readout == "mean"
        assert "no pooled features" in str(report)

    def test_a_classifier_loses_what_its_head_does_not_read(self, tmp_path):
        config = transformers.SiglipConfig(vision_config=TOWER, num_labels=5)
        theirs = transformers.SiglipForImageClassification(config)
        theirs.save_pretrained(tmp_path / "source")
        model, report = convert_vit(tmp_path / "source", hvt_pool=None)
        assert "readout.probe" in report.dropped
        torch.testing.assert_close(model.classifier.weight, theirs.classifier.weight)

    def test_the_readout_can_be_chosen(self, tmp_path):
        folder = save_siglip(tmp_path / "source")
        model, report = convert_vit(folder, readout="mean", num_labels=4)
        assert model.config.resolved_readout == "mean"
        assert "readout.probe" in report.dropped
        assert "The head is new: train it." in report.notes
        model, report = convert_vit(save_clip(tmp_path / "clip"), readout="attention")
        assert "hpool_vit.readout.probe" in report.initialised


class TestArchitectures:
    @pytest.fixture
    def file(self, tmp_path) -> str:
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch32_clip_quickgelu_224", **TIMM)
        save_file(model.state_dict(), tmp_path / "clip.safetensors")
        return str(tmp_path / "clip.safetensors")

    def test_a_file_that_its_tensors_do_not_tell_asks_for_its_architecture(self, file):
        with pytest.raises(ConversionError, match=r"`norm_pre\.\w+` .* as `architecture`"):
            convert_vit(file, num_attention_heads=2)

    @pytest.mark.parametrize(
        "name", ["vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_clip_quickgelu_224.openai"]
    )
    def test_its_name_tells_the_rest(self, file, name):
        model, _ = convert_vit(file, architecture=name, num_attention_heads=2)
        assert (model.config.hidden_act, model.config.layer_norm_eps) == ("quick_gelu", 1e-5)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("resnet50", "is not a ViT of timm"),
            ("vit_small_patch16_rope_mixed_224", "learns the frequencies"),
            ("eva02_enormous_patch14_clip_224", "the norm after each branch"),
            ("vit_base_patch16_sapiens2", "RMSNorm"),
        ],
    )
    def test_one_that_cannot_be_converted_is_refused_with_the_reason(self, file, name, reason):
        with pytest.raises(ConversionError, match=reason):
            convert_vit(file, architecture=name)

    @pytest.mark.parametrize(
        ("name", "overrides", "reason"),
        [
            (
                "eva02_base_patch16_clip_224",
                {"ref_feat_shape": (4, 4)},
                r"attn\.norm\.weight` cannot .* a norm inside",
            ),
            ("vit_small_patch16_18x2_224", {}, "parallel branches"),
            ("aimv2_large_patch14_224", {}, "RMSNorm"),
            ("vit_so150m_patch16_reg4_map_256", {"reg_tokens": 2}, "reads only patches"),
            (
                "vit_base_patch16_reg4_gap_256",
                {"pool_include_prefix": True, "reg_tokens": 2},
                "registers and class token",
            ),
        ],
    )
    def test_a_folder_too(self, tmp_path, name, overrides, reason):
        arguments = {**TIMM, **overrides}
        timm.models.save_for_hf(timm.create_model(name, **arguments), tmp_path / "timm", model_args=arguments)
        with pytest.raises(ConversionError, match=reason):
            convert_vit(tmp_path / "timm")

    def test_a_folder_of_transformers_has_none(self, tmp_path):
        with pytest.raises(ConversionError, match="`architecture` is for a file of tensors"):
            convert_vit(save_clip(tmp_path / "clip"), architecture="vit_base_patch32_clip_224")

    def test_what_the_architecture_decides_cannot_be_chosen(self, tmp_path):
        arguments = {**TIMM, "ref_feat_shape": (4, 4)}
        timm.models.save_for_hf(
            timm.create_model("eva02_tiny_patch14_224", **arguments), tmp_path / "timm", model_args=arguments
        )
        with pytest.raises(ConversionError, match=r"`rope_theta=5\.0` cannot be chosen"):
            convert_vit(tmp_path / "timm", rope_theta=5.0)

    def test_a_model_without_positions_says_which_size_it_assumes(self, tmp_path):
        model = timm.create_model("vit_base_patch16_rope_reg1_gap_256", **TIMM)
        save_file(model.state_dict(), tmp_path / "rope.safetensors")
        options = {"architecture": "vit_base_patch16_rope_reg1_gap_256", "num_attention_heads": 2}
        ours, report = convert_vit(tmp_path / "rope.safetensors", **options)
        assert ours.config.image_shape == (224, 224)
        assert "Assumed images of 224 × 224 pixels" in str(report)
        ours, report = convert_vit(tmp_path / "rope.safetensors", image_size=48, **options)
        assert ours.config.image_shape == (48, 48)
        assert "Assumed images" not in str(report)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(6):
        pixels = random.integers(0, 255, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


class TestComparison:
    def test_it_is_the_similarity_of_pooled_and_unpooled_features(self, tmp_path, images):
        folder = save_clip(tmp_path / "clip")
        options = {"pool_mode": "merge", "hvt_pool": [1], "merge_ratio": 0.3}
        model, processor, report = convert(folder, compare=images, **options)
        unpooled, _ = convert_vit(folder, hvt_pool=None)
        batch = torch.cat([prepared(processor, Image.open(images / f"{index}.png")) for index in range(6)])
        with torch.no_grad():
            similarity = torch.cosine_similarity(model(batch).logits, unpooled(batch).logits)
        assert report.comparison.num_images == 6
        assert report.comparison.mean_similarity == pytest.approx(similarity.mean().item(), abs=1e-5)
        assert report.comparison.low_similarity == pytest.approx(torch.quantile(similarity, 0.05).item(), abs=1e-5)
        assert report.comparison.agreement is None
        assert "cosine similarity" in str(report)
        assert model.config.hvt_pool == [1]

    def test_without_pooling_nothing_differs(self, tmp_path, images):
        model, processor, _ = convert(save_siglip(tmp_path / "source"), hvt_pool=None)
        assert compare_with_source(model, processor, images).mean_similarity == pytest.approx(1)

    def test_with_a_trained_head_the_answers_are_compared(self, tmp_path, images):
        config = transformers.ViTConfig(**TOWER, num_labels=5)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        _, _, report = convert(tmp_path / "vit", hvt_pool=[1], compare=images)
        assert 0 <= report.comparison.agreement <= 1
        assert "top class agrees" in str(report)
        _, _, report = convert(tmp_path / "vit", hvt_pool=[1], compare=images, num_labels=7)
        assert report.comparison.agreement is None

    def test_at_most_so_many_images_are_compared(self, tmp_path, images):
        model, processor, _ = convert(save_clip(tmp_path / "clip"), hvt_pool=[1])
        assert compare_with_source(model, processor, images, num_images=3).num_images == 3
        with pytest.raises(ValueError, match="`compare_images=0` must be at least 1"):
            compare_with_source(model, processor, images, num_images=0)

    def test_a_folder_without_images_is_refused(self, tmp_path):
        folder = save_clip(tmp_path / "clip")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConversionError, match="holds no image"):
            convert(folder, compare=tmp_path / "empty")
        with pytest.raises(ConversionError, match="is not a folder"):
            convert(folder, compare=tmp_path / "nothing")


@pytest.mark.slow
class TestCommand:
    def test_clip_with_a_comparison(self, tmp_path, images):
        save_clip(tmp_path / "clip")
        result = run_command(
            *("convert", tmp_path / "clip", "--output_dir", tmp_path / "out", "--pool_mode", "merge"),
            *("--hvt_pool", "1", "--num_labels", "3", "--compare", images, "--compare_images", "4"),
        )
        assert "Pooled features of 4 images, with and without pooling: cosine similarity 0." in result.stdout
        assert "LOAD REPORT" not in result.stdout + result.stderr
        model = HPoolViTForImageClassification.from_pretrained(tmp_path / "out")
        assert model.config.embedding_norm
        assert HPoolViTImageProcessor.from_pretrained(tmp_path / "out").crop_size == EXACT

    def test_dinov3_of_transformers(self, tmp_path):
        config = transformers.DINOv3ViTConfig(**TOWER, num_register_tokens=4)
        transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "dinov3")
        result = run_command("convert", tmp_path / "dinov3", "--output_dir", tmp_path / "out", "--num_labels", "3")
        assert "The head is new: train it." in result.stdout
        assert HPoolViTForImageClassification.from_pretrained(tmp_path / "out").config.rope_theta == 100.0

    def test_a_file_with_its_architecture(self, tmp_path):
        model = timm.create_model("eva02_base_patch14_224", **TIMM)
        save_file(model.state_dict(), tmp_path / "eva.safetensors")
        arguments = ("convert", tmp_path / "eva.safetensors", "--output_dir", tmp_path / "out")
        arguments += ("--num_attention_heads", "2")
        refused = run_command(*arguments, check=False)
        assert "--architecture" in refused.stderr
        assert not (tmp_path / "out").exists()
        run_command(*arguments, "--architecture", "eva02_base_patch14_224", "--hvt_pool", "none")
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path / "out")
        assert (loaded.config.rope_grid, loaded.config.mlp_norm) == (16, True)
