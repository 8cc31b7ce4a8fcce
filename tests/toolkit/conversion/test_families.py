"""Each family of ViTs converts to a model that computes the same features and logits, and that pools and trains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.toolkit.conversion.vit import convert_vit


# A tiny tower of Transformers: 4 × 4 patches of 8 pixels.
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
DINOV2 = {name: value for name, value in TOWER.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
SIGLIP2 = {name: value for name, value in TOWER.items() if name != "image_size"} | {"num_patches": 16}
# A tiny model of timm, with the names of its arguments.
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
EVA = {**TIMM, "ref_feat_shape": (4, 4)}


@dataclass
class Family:
    """
    A tiny model of a family.

    Args:
        make: makes the source.
        features: the pooled features of the source for images.
        save: saves the source into a folder.
        sizes: other image sizes that the source takes and interpolates positions to as an HPool-ViT does.
        changes: the same images as the source takes them, with what else it wants.
    """

    make: Callable[[], nn.Module]
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    save: Callable[[nn.Module, Path], Any] = lambda model, folder: model.save_pretrained(folder)
    sizes: tuple[tuple[int, int], ...] = ()
    expected: dict[str, Any] = field(default_factory=dict)


def pooled(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values, **interpolation(model, pixel_values)).pooler_output


def logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values, **interpolation(model, pixel_values)).logits


def first_token(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values).last_hidden_state[:, 0]


def interpolation(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, bool]:
    """DINOv2 and DINOv3 do not ask."""
    resized = tuple(pixel_values.shape[2:]) != (32, 32) and "dino" not in model.config.model_type
    return {"interpolate_pos_encoding": True} if resized else {}


def of_image_tower(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return pooled(model.vision_model, pixel_values)


def patches_of(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images as SigLIP 2 takes them: rows of patches whose channels come last."""
    patches = pixel_values.unfold(2, 8, 8).unfold(3, 8, 8)  # (batch, channels, rows, columns, 8, 8)
    rows, columns = patches.shape[2:4]
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[rows, columns]] * len(patches))
    mask = torch.ones(patches.shape[:2], dtype=torch.long)
    return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def siglip2_pooled(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return getattr(model, "vision_model", model)(**patches_of(pixel_values)).pooler_output


def siglip2_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(**patches_of(pixel_values)).logits


def unmasked(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values, noise=torch.arange(16.0).expand(len(pixel_values), -1)).last_hidden_state[:, 0]


def two_towers(kind: str, vision: dict, class_name: str) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{kind}Config")
    return lambda: getattr(transformers, class_name)(config(vision_config=vision, text_config=TEXT, num_labels=5))


def one_model(class_name: str, config_name: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, class_name)(getattr(transformers, config_name)(**fields))


def with_labels(**fields: Any) -> dict[str, Any]:
    return {**fields, "num_labels": 5}


RECTANGLE = ((48, 40),)
SQUARE = ((48, 48),)

FAMILIES = {
    "clip": Family(two_towers("CLIP", TOWER, "CLIPModel"), of_image_tower, sizes=RECTANGLE),
    "clip classifier": Family(two_towers("CLIP", TOWER, "CLIPForImageClassification"), logits, sizes=RECTANGLE),
    "clip tower": Family(one_model("CLIPVisionModel", "CLIPVisionConfig", **TOWER), pooled, sizes=RECTANGLE),
    "clip tower with projection": Family(
        one_model("CLIPVisionModelWithProjection", "CLIPVisionConfig", **TOWER), of_image_tower
    ),
    "metaclip 2": Family(two_towers("MetaClip2", TOWER, "MetaClip2Model"), of_image_tower),
    "metaclip 2 classifier": Family(two_towers("MetaClip2", TOWER, "MetaClip2ForImageClassification"), logits),
    "siglip": Family(two_towers("Siglip", TOWER, "SiglipModel"), of_image_tower, sizes=RECTANGLE),
    "siglip classifier": Family(two_towers("Siglip", TOWER, "SiglipForImageClassification"), logits, sizes=RECTANGLE),
    "siglip tower": Family(one_model("SiglipVisionModel", "SiglipVisionConfig", **TOWER), pooled, sizes=RECTANGLE),
    "siglip 2": Family(two_towers("Siglip2", SIGLIP2, "Siglip2Model"), siglip2_pooled),
    "siglip 2 classifier": Family(two_towers("Siglip2", SIGLIP2, "Siglip2ForImageClassification"), siglip2_logits),
    "siglip 2 tower": Family(one_model("Siglip2VisionModel", "Siglip2VisionConfig", **SIGLIP2), siglip2_pooled),
    "dinov2": Family(one_model("Dinov2Model", "Dinov2Config", **DINOV2), pooled, sizes=SQUARE),
    "dinov2 classifier": Family(
        one_model("Dinov2ForImageClassification", "Dinov2Config", **with_labels(**DINOV2)), logits, sizes=SQUARE
    ),
    "dinov2 giant": Family(
        one_model("Dinov2ForImageClassification", "Dinov2Config", **with_labels(**DINOV2), use_swiglu_ffn=True), logits
    ),
    "dinov2 with registers": Family(
        one_model("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **DINOV2, num_register_tokens=3), pooled
    ),
    "dinov2 with registers classifier": Family(
        one_model(
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            **with_labels(**DINOV2),
            use_swiglu_ffn=True,
        ),
        logits,
    ),
    "dinov3": Family(
        one_model("DINOv3ViTModel", "DINOv3ViTConfig", **TOWER, num_register_tokens=4), pooled, sizes=RECTANGLE
    ),
    "dinov3 plus": Family(
        one_model(
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            **TOWER,
            num_register_tokens=2,
            use_gated_mlp=True,
            hidden_act="silu",
            key_bias=True,
            rope_theta=50.0,
        ),
        pooled,
        sizes=RECTANGLE,
    ),
    "dinov3 without registers": Family(one_model("DINOv3ViTModel", "DINOv3ViTConfig", **TOWER), pooled),
    "mae": Family(one_model("ViTMAEModel", "ViTMAEConfig", **TOWER, mask_ratio=0.0), unmasked),
    "i-jepa": Family(
        one_model("IJepaForImageClassification", "IJepaConfig", **with_labels(**TOWER)), logits, sizes=RECTANGLE
    ),
}


def timm_family(architecture: str, sizes: tuple[tuple[int, int], ...] = (), **overrides: Any) -> Family:
    """A family of timm, saved as a folder that names its architecture."""
    arguments = {**TIMM, **overrides}

    def save(model: nn.Module, folder: Path) -> None:
        timm.models.save_for_hf(model, folder, model_args=arguments)

    def answer(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values)

    return Family(lambda: timm.create_model(architecture, **arguments), answer, save, sizes)


WITH_ANY_SIZE = {"sizes": RECTANGLE, "dynamic_img_size": True}

TIMM_FAMILIES = {
    "vit with registers": timm_family("vit_base_patch16_reg4_gap_256", reg_tokens=4),
    "vit without class token": timm_family("vit_base_patch16_siglip_gap_224"),
    "deit iii": timm_family("deit3_small_patch16_224"),
    "dinov2 of timm": timm_family("vit_small_patch14_reg4_dinov2", reg_tokens=4),
    "dinov2 giant of timm": timm_family("vit_giant_patch14_dinov2", mlp_ratio=2),
    "clip of timm": timm_family("vit_base_patch32_clip_224"),
    "openai's clip of timm": timm_family("vit_base_patch32_clip_quickgelu_224"),
    "siglip of timm": timm_family("vit_base_patch16_siglip_224"),
    "siglip 2 of timm": timm_family("vit_so400m_patch16_siglip_256", mlp_ratio=2),
    "vit with registers and map": timm_family("vit_so150m_patch16_reg4_map_256", reg_tokens=4),
    "eva": timm_family("eva_giant_patch14_224", mlp_ratio=2),
    "eva-02 tiny": timm_family("eva02_tiny_patch14_224", ref_feat_shape=(4, 4)),
    "eva-02 base": timm_family("eva02_base_patch14_224", ref_feat_shape=(7, 5)),
    "eva-02 reading the class token": timm_family("eva02_base_patch14_224", global_pool="token"),
    "rotary with registers": timm_family("vit_base_patch16_rope_reg1_gap_256", **WITH_ANY_SIZE),
    "rotary without bias": timm_family("vit_mediumd_patch16_rope_reg1_gap_256"),
    "rotary of naver": timm_family("vit_small_patch16_rope_224", **WITH_ANY_SIZE),
    "rotary of naver with positions": timm_family("vit_small_patch16_rope_ape_224"),
    "perception encoder core": timm_family("vit_pe_core_base_patch16_224", attn_pool_num_heads=4),
    "perception encoder spatial": timm_family("vit_pe_spatial_base_patch16_512"),
    "perception encoder lang": timm_family("vit_pe_lang_large_patch14_448"),
    "perception encoder lang gigantic": timm_family("vit_pe_lang_gigantic_patch14_448", ref_feat_shape=(5, 5)),
    "dinov3 of timm": timm_family("vit_base_patch16_dinov3", **WITH_ANY_SIZE),
    "dinov3 of timm with bias": timm_family("vit_small_patch16_dinov3_qkvb", global_pool="token"),
    "dinov3 plus of timm": timm_family("vit_small_plus_patch16_dinov3", swiglu_align_to=8, **WITH_ANY_SIZE),
}
ALL = FAMILIES | TIMM_FAMILIES
# One of each kind of trunk; the rest differ in what is the same function elsewhere.
TRUNKS = [
    *("clip classifier", "siglip", "siglip 2", "dinov2 with registers classifier", "dinov3", "dinov3 plus"),
    *("eva-02 base", "perception encoder core", "rotary with registers", "vit with registers"),
]


def randomize(model: nn.Module) -> nn.Module:
    """Biases, norms, scales and positions that make every feature count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.8 if parameter.ndim == 1 else 0))
    return model.eval()


@pytest.fixture(scope="module", params=list(ALL))
def family(request, tmp_path_factory) -> tuple[Family, nn.Module, str]:
    """A family, its source, and the folder where the source is saved."""
    family = ALL[request.param]
    source = randomize(family.make())
    folder = tmp_path_factory.mktemp("sources") / "source"
    family.save(source, folder)
    return family, source, str(folder)


def answers(model: HPoolViTForImageClassification, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(pixel_values, **kwargs).logits


@torch.no_grad()
def test_features_and_logits_are_the_sources(family):
    description, source, folder = family
    ours, _ = convert_vit(folder, hvt_pool=None)
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = description.features(source, pixel_values)
    assert expected.std() > 0.05
    torch.testing.assert_close(answers(ours, pixel_values), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_they_are_the_same_for_images_of_another_size(family):
    description, source, folder = family
    if not description.sizes:
        pytest.skip("the source takes one size, or resizes its positions in another way")
    ours, _ = convert_vit(folder, hvt_pool=None)
    for size in description.sizes:
        pixel_values = torch.randn(2, 3, *size)
        expected = description.features(source, pixel_values)
        actual = answers(ours, pixel_values, interpolate_pos_encoding=True)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
