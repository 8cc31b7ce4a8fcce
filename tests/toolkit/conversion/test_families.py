"""Each family of ViTs converts to a model that computes the same features and logits, and that pools and trains."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification
from hpool_vit.toolkit import export_model
from hpool_vit.toolkit.conversion.building import ConversionReport, parameter_shapes
from hpool_vit.toolkit.conversion.checkpoint import Checkpoint, refuse
from hpool_vit.toolkit.conversion.convert import convert
from hpool_vit.toolkit.conversion.kinds import TIMM_POOLS, timm_kind, timm_places
from hpool_vit.toolkit.conversion.positions import split_positions
from hpool_vit.toolkit.conversion.sources import Source, timm_source, transformers_source
from hpool_vit.toolkit.conversion.vit import DROPPABLE, STRANGERS, build_config, convert_vit
from hpool_vit.toolkit.shared.measuring import count_macs


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
    """

    make: Callable[[], nn.Module]
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    save: Callable[[nn.Module, Path], Any] = lambda model, folder: model.save_pretrained(folder)
    sizes: tuple[tuple[int, int], ...] = ()


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
    "vit with registers and map": timm_family(
        "vit_so150m_patch16_reg4_map_256", reg_tokens=4, pool_include_prefix=True
    ),
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


POOLINGS = {
    "merge": {"pool_mode": "merge", "hvt_pool": [1, 2], "merge_ratio": 0.25, "proportional_attention": True},
    "max": {"pool_mode": "max", "hvt_pool": [1, 2], "pool_kernel_size": 2},
}


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=list(POOLINGS))
@pytest.mark.parametrize("name", TRUNKS)
def test_with_pooling_it_trains_and_is_saved(name, pooling, tmp_path):
    family = ALL[name]
    family.save(randomize(family.make()), tmp_path / "source")
    model, _ = convert_vit(tmp_path / "source", num_labels=3, **pooling)
    pixel_values = torch.randn(2, 3, 32, 32)
    model.train()
    model(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    without_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without_gradient == []
    before = model.classifier.weight.clone()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert not torch.equal(before, model.classifier.weight)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = HPoolViTForImageClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(answers(loaded, pixel_values), answers(model, pixel_values))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "siglip"])
def test_with_merging_it_is_exported(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    family = ALL[name]
    family.save(randomize(family.make()), tmp_path / "source")
    model, processor, _ = convert(str(tmp_path / "source"), num_labels=3, seed=0, **POOLINGS["merge"])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "exported")
    session = onnxruntime.InferenceSession(next((tmp_path / "exported").glob("*.onnx")))
    pixel_values = torch.randn(2, 3, 32, 32)
    exported = session.run(None, {session.get_inputs()[0].name: pixel_values.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(exported), answers(model, pixel_values), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", TRUNKS)
def test_merging_hardly_anything_changes_hardly_anything(name, tmp_path):
    family = ALL[name]
    family.save(randomize(family.make()), tmp_path / "source")
    options = {"pool_mode": "merge", "hvt_pool": [1], "merge_ratio": 1e-3, "proportional_attention": True}
    pixel_values = torch.randn(2, 3, 32, 32)
    merging, unpooled = (convert_vit(tmp_path / "source", **given)[0] for given in (options, {"hvt_pool": None}))
    torch.testing.assert_close(answers(merging, pixel_values), answers(unpooled, pixel_values), rtol=0, atol=1e-5)


GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "image_size": 224, "patch_size": 14}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}
DINOV3_PLUS = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
    "use_gated_mlp": True,
    "hidden_act": "silu",
    "num_register_tokens": 4,
}
# Published sizes, and parameters of the source that the converted model does without.
FULL_SIZES = {
    "openai/clip-vit-base-patch32": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig()), ()),
    "google/siglip2-so400m-patch16-384": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SO400M)),
        (),
    ),
    "facebook/dinov2-with-registers-giant": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**GIANT, use_swiglu_ffn=True)
        ),
        ("embeddings.mask_token",),
    ),
    "facebook/dinov3-vith16plus": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**DINOV3_PLUS)),
        ("embeddings.mask_token",),
    ),
    **{
        f"timm/{name}": (lambda name=name: timm.create_model(name), ())
        for name in (
            "vit_base_patch16_reg4_gap_256",
            "vit_large_patch14_clip_quickgelu_336",
            "vit_so400m_patch14_siglip_378",
            "vit_giant_patch14_dinov2",
            "eva02_tiny_patch14_224",
            "eva02_large_patch14_448",
            "vit_pe_core_large_patch14_336",
            "vit_pe_spatial_gigantic_patch14_448",
            "vit_huge_plus_patch16_dinov3",
            "vit_7b_patch16_dinov3",
        )
    },
}


def as_source(model: nn.Module) -> Source:
    """What the converter reads from a folder of this model, without writing one."""
    if isinstance(model, transformers.PreTrainedModel):
        return transformers_source(model.state_dict(), model.config, has_head=False)
    config = {"global_pool": model.global_pool, "pretrained_cfg": model.pretrained_cfg}
    checkpoint = Checkpoint(dict(model.state_dict()), timm_places)
    return timm_source(checkpoint, {**config, "architecture": model.pretrained_cfg["architecture"]})


def config_of(source: Source) -> HPoolViTConfig:
    report = ConversionReport()
    return build_config(source, split_positions(source, None, report), {"hvt_pool": None}, report)


@pytest.fixture
def unfused_attention(monkeypatch):
    """The counter sees products, and not what a kernel does."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


def macs(model: nn.Module, config: HPoolViTConfig) -> int:
    pixel_values = torch.zeros(1, 3, *config.image_shape, device="meta")
    # The counter follows gradients, which there are none of.
    return count_macs(model.eval().requires_grad_(False), pixel_values)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FULL_SIZES))
def test_a_model_of_full_size_has_as_many_parameters_and_multiplications_as_its_source(name, unfused_attention):
    make, unneeded = FULL_SIZES[name]
    with torch.device("meta"):
        source = make()
        config = config_of(as_source(source))
        ours = HPoolViTForImageClassification._from_config(config, attn_implementation="eager")
    if isinstance(source, transformers.PreTrainedModel):
        source.set_attn_implementation("eager")
    dropped = sum(source.get_parameter(name).numel() for name in unneeded)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in source.parameters()) - dropped
    # With hidden states, the last block computes all tokens, as in the source.
    ours.config.output_hidden_states = True
    assert macs(ours, config) == macs(source, config)


def is_refused(architecture: str) -> bool:
    return bool(timm_kind(architecture).refusal)


def timm_architectures() -> list[str]:
    """The ViTs of timm, but not the ones that are only for its tests."""
    names = [name for module in ("vision_transformer", "eva", "deit") for name in timm.list_models(module=module)]
    return [name for name in names if not name.startswith("test_") and not is_refused(name)]


@pytest.mark.slow
def test_the_table_has_the_facts_of_each_architecture_of_timm():
    """What the converter makes of each architecture's tensors and name is what the model of timm has."""
    seen, refused = [], {}
    for name in timm_architectures():
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        try:
            source = as_source(model)
            refuse(source.checkpoint, STRANGERS)
            config = config_of(source)
            take_everything(source.checkpoint, config)
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert facts_of(config) == facts_of_timm(model), name
        seen.append(name)
    assert len(seen) > 150
    # Blocks with parallel branches or a norm inside attention, an attention pooling that leaves out the registers, and
    # one whose MLP is wider or narrower than that of the blocks.
    assert {name.partition("_patch")[0] for name in refused} <= {
        *("vit_base", "vit_small", "vit_large", "vit_huge", "vit_pwee", "vit_so150m", "eva02_base", "eva02_large"),
        *("beit3_base", "beit3_large", "beit3_giant", "vit_pe_core_gigantic"),
    }
    assert all(
        re.search(r"parallel|inside attention|reads only patches|attn_pool\.mlp", reason)
        for reason in refused.values()
    ), refused


def take_everything(checkpoint: Checkpoint, config: HPoolViTConfig) -> None:
    """Each parameter has its tensor, in its shape, and no tensor is left over."""
    for name, shape in parameter_shapes(config).items():
        if not name.endswith("position_embeddings"):
            checkpoint.take(name.removeprefix("hpool_vit."), shape)
    checkpoint.drop(DROPPABLE)
    assert checkpoint.unread() == []


ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def facts_of(config: HPoolViTConfig) -> dict[str, Any]:
    names = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rope_theta")
    facts = {name: getattr(config, name) for name in names} | {"readout": config.resolved_readout}
    if config.rope_theta:
        facts |= {"rope_coordinates": config.rope_coordinates, "rope_grid": config.rope_shape}
    return facts


def facts_of_timm(model: nn.Module) -> dict[str, Any]:
    block = model.blocks[0]
    facts = {
        "hidden_act": ACTIVATIONS[type(block.mlp.act).__name__],
        "layer_norm_eps": block.norm1.eps,
        "num_attention_heads": block.attn.num_heads,
        "rope_theta": None,
        "readout": TIMM_POOLS[model.global_pool],
    }
    if (rope := getattr(model, "rope", None)) is not None:
        centered = type(rope).__name__ == "RotaryEmbeddingDinoV3"
        index = "index_from_one" if rope.grid_offset else "index"
        grid = getattr(rope, "ref_feat_shape", None)
        facts |= {
            "rope_theta": rope.temperature,
            "rope_coordinates": "centered" if centered else index,
            "rope_grid": None if grid is None else tuple(grid),
        }
    return facts
