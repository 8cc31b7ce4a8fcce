"""
The kinds of models that can be converted, one row of a table each: what a library calls its tensors, and what these
do not tell.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)


Patterns = tuple[tuple[str, str], ...]


class Place(NamedTuple):
    """
    Where a file holds one of our parameters.

    Attributes:
        tensor: the file's name of the tensor.
        part: which part of the tensor the parameter is, along its first axis; None: all of it.
        parts: how many parts the tensor has.
    """

    tensor: str
    part: int | None = None
    parts: int = 1


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """`name` after each of the patterns is replaced, in order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


# ---------------------------------------------------------------- timm and the paper's code, from our names to theirs

TIMM_NAMES: Patterns = (
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^embeddings\.layernorm\.", "norm_pre."),
    (r"^layers\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.mlp\.layernorm\.", ".mlp.norm."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.scale$", r".ls\1.gamma"),
    (r"^readout\.probe", "attn_pool.latent"),
    (r"^readout\.q_proj\.", "attn_pool.q."),
    (r"^readout\.o_proj\.", "attn_pool.proj."),
    (r"^readout\.layernorm\.", "attn_pool.norm."),
    (r"^readout\.", "attn_pool."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)

# Other places of a parameter: the pattern of our name, theirs, and which part of that tensor it is. The first one that
# a file has counts, and the first one of all is named where a file has none.
TIMM_PLACES: tuple[tuple[str, str, int | None, int], ...] = (
    # One projection of queries, keys and values; EVA has separate biases, or separate projections.
    (r"layers\.(\d+)\.attention\.q_proj\.(\w+)", r"blocks.\1.attn.qkv.\2", 0, 3),
    (r"layers\.(\d+)\.attention\.k_proj\.(\w+)", r"blocks.\1.attn.qkv.\2", 1, 3),
    (r"layers\.(\d+)\.attention\.v_proj\.(\w+)", r"blocks.\1.attn.qkv.\2", 2, 3),
    (r"layers\.(\d+)\.attention\.([qv])_proj\.bias", r"blocks.\1.attn.\2_bias", None, 1),
    # A gated MLP in separate or packed projections, the gate first.
    (r"layers\.(\d+)\.mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.fc1_g.\2", None, 1),
    (r"layers\.(\d+)\.mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.fc1.\2", 0, 2),
    (r"layers\.(\d+)\.mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.w12.\2", 0, 2),
    (r"layers\.(\d+)\.mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.fc1_x.\2", None, 1),
    (r"layers\.(\d+)\.mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.fc1.\2", 1, 2),
    (r"layers\.(\d+)\.mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.w12.\2", 1, 2),
    (r"layers\.(\d+)\.mlp\.down_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2", None, 1),
    (r"layers\.(\d+)\.mlp\.down_proj\.(\w+)", r"blocks.\1.mlp.w3.\2", None, 1),
    (r"layers\.(\d+)\.layer_scale(\d)\.scale", r"blocks.\1.ls\2.gamma", None, 1),
    # The names of the original DeiT III and EVA.
    (r"layers\.(\d+)\.layer_scale(\d)\.scale", r"blocks.\1.gamma_\2", None, 1),
    (r"readout\.k_proj\.(\w+)", r"attn_pool.kv.\1", 0, 2),
    (r"readout\.v_proj\.(\w+)", r"attn_pool.kv.\1", 1, 2),
    # The final norm where it follows the mean over the tokens.
    (r"layernorm\.(\w+)", r"norm.\1", None, 1),
    (r"layernorm\.(\w+)", r"fc_norm.\1", None, 1),
)


@cache
def timm_places(name: str) -> tuple[Place, ...]:
    """Where timm's models may hold one of our parameters. The paper's code uses the same names."""
    places = [
        Place(re.sub(pattern, theirs, name), part, parts)
        for pattern, theirs, part, parts in TIMM_PLACES
        if re.fullmatch(pattern, name)
    ]
    return (*places, Place(rename(name, TIMM_NAMES)))


def hvt_name(name: str) -> Place:
    """
    Where the paper's code holds one of our parameters. The paper pools at the *output* of a block, an HPool-ViT at the
    input of the next.
    """
    if stage := re.fullmatch(r"pooling\.(\d+)\.position_embeddings", name):
        return Place(f"blocks.{int(stage[1]) - 1}.pos_embed")
    return timm_places(name)[0]


# ---------------------------------------------------------------- how images are prepared


def _squashed(mean: list[float], std: list[float], resample: PILImageResampling) -> dict[str, Any]:
    return {"do_center_crop": False, "image_mean": mean, "image_std": std, "resample": resample}


# The attributes of an image processor that resizes to the model's size without a crop, and of CLIP's.
SIGLIP_IMAGES = _squashed(IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling.BICUBIC)
SIGLIP2_IMAGES = _squashed(IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling.BILINEAR)
DINOV3_IMAGES = _squashed(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling.BILINEAR)
CLIP_IMAGES = {
    "do_center_crop": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
    "resample": PILImageResampling.BICUBIC,
}

# ---------------------------------------------------------------- Transformers, from its names to ours

# In every version 5.
VIT_NAMES: Patterns = (
    (r"^(vit|ijepa)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q)uery\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(k)ey\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
DEIT_NAMES: Patterns = ((r"^deit\.", ""), *VIT_NAMES, (r"^cls_classifier\.", "classifier."))
MAE_NAMES: Patterns = (
    *VIT_NAMES,
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
BLOCK_NAMES: Patterns = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.lambda1$", ".scale"),
)
DINOV2_NAMES: Patterns = (
    (r"^dinov2(_with_registers)?\.", ""),
    *VIT_NAMES,
    *BLOCK_NAMES,
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)
DINOV3_NAMES: Patterns = (
    (r"^(model\.)?layer\.", "layers."),
    *BLOCK_NAMES,
    (r"^norm\.", "layernorm."),
    (r"^embeddings\.patch_embeddings\.", "embeddings.patch_embeddings.projection."),
)
# CLIP and SigLIP.
TOWER_NAMES: Patterns = (
    (r"^vision_model\.", ""),
    (r"^encoder\.layers\.", "layers."),
    (r"\.self_attn\.", ".attention."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.layer_norm1\.", ".layernorm_before."),
    (r"\.layer_norm2\.", ".layernorm_after."),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^embeddings\.position_embedding\.weight$", "embeddings.position_embeddings"),
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^pre_layrnorm\.", "embeddings.layernorm."),
    (r"^post_layernorm\.", "layernorm."),
    (r"^head\.attention\.", "readout."),
    (r"^head\.", "readout."),
)

# Where a model's MLP is not gated, DINOv3 uses two of the names of one that is.
PLAIN_MLP_NAMES: Patterns = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))

# Tensors that hold several of our parameters, along their first axis.
PACKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^(readout)\.in_proj_(\w+)$", (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2")),
    (r"^(.*\.mlp)\.weights_in\.(\w+)$", (r"\1.gate_proj.\2", r"\1.up_proj.\2")),
)

Field = str | Callable[[Any], Any]

# Our fields of the configuration, and which of the source's fields they come from.
TOWER_FIELDS: dict[str, Field] = {
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "attention_probs_dropout_prob": "attention_dropout",
}
VIT_FIELDS: dict[str, Field] = TOWER_FIELDS | {
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    # Transformers' ViT applies one rate in all three places.
    "dropout": "hidden_dropout_prob",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "projection_dropout_prob": "hidden_dropout_prob",
}
DINOV2_FIELDS: dict[str, Field] = VIT_FIELDS | {
    "hidden_act": lambda config: "silu" if config.use_swiglu_ffn else config.hidden_act,
}
DINOV3_FIELDS: dict[str, Field] = TOWER_FIELDS | {"rope_theta": "rope_theta"}
SIGLIP2_FIELDS: dict[str, Field] = TOWER_FIELDS | {
    "image_size": lambda config: int(config.num_patches**0.5) * config.patch_size,
}


def as_tokens(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Tokens of shape `(1, num_tokens, hidden_size)`."""
    return tensor.reshape(1, -1, tensor.shape[-1])


def from_channels_last(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A convolution, from a Linear layer over patches whose channels come last."""
    patch = config.patch_size
    return tensor.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)


TOWER_SHAPES = {"embeddings.cls_token": as_tokens, "embeddings.position_embeddings": as_tokens}


class TransformersKind(NamedTuple):
    """
    How one `model_type` of Transformers is read.

    Attributes:
        names: patterns of its tensor names and their replacements, which turn them into our names.
        fields: our fields of the configuration, and the names of the fields that tell them, or functions of the
            configuration.
        readout: what its pooled features are, a name in `READOUTS` of the configuration.
        features: our fields that only hold for these features.
        head_readout: what its image classification head reads; None: the same.
        head_features: our fields that only hold with such a head.
        fixed: our fields that are the same for every model of the type.
        shapes: our names of tensors that have another shape, and what brings them into ours.
        tower: the field of the configuration that describes the vision tower, if there are two towers.
        tower_class: the class of the vision tower, where `AutoModel` does not know it.
        image_processor: how it prepares images, for a folder that does not say.
        unneeded: the start of the names of tensors that a folder may lack.
        notes: what the user should know.
    """

    names: Patterns = VIT_NAMES
    fields: dict[str, Field] = VIT_FIELDS
    readout: str = "class_token"
    features: dict[str, Any] = {}
    head_readout: str | None = None
    head_features: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    shapes: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {}
    tower: str | None = None
    tower_class: str | None = None
    image_processor: dict[str, Any] | None = None
    unneeded: tuple[str, ...] = ("pooler.",)
    notes: tuple[str, ...] = ()


CLIP = TransformersKind(
    names=TOWER_NAMES,
    fields=TOWER_FIELDS,
    features={"norm_after_pooling": True},
    # `CLIPForImageClassification` takes the mean before the last norm.
    head_readout="mean",
    head_features={"use_final_norm": False},
    shapes=TOWER_SHAPES,
    image_processor=CLIP_IMAGES,
)
SIGLIP = TransformersKind(
    names=TOWER_NAMES,
    fields=TOWER_FIELDS,
    readout="attention",
    head_readout="mean",
    shapes=TOWER_SHAPES,
    image_processor=SIGLIP_IMAGES,
)
SIGLIP2 = SIGLIP._replace(
    fields=SIGLIP2_FIELDS,
    shapes={**TOWER_SHAPES, "embeddings.patch_embeddings.projection.weight": from_channels_last},
    image_processor=SIGLIP2_IMAGES,
    notes=(
        "Images have one size now and are squashed to it: the source's masks and aspect ratios (NaFlex) do not come "
        "along.",
    ),
)
DINOV2 = TransformersKind(names=DINOV2_NAMES, fields=DINOV2_FIELDS, head_readout="class_token_and_mean")

# By `model_type`.
TRANSFORMERS_KINDS = {
    "vit": TransformersKind(),
    "deit": TransformersKind(names=DEIT_NAMES),
    "vit_msn": TransformersKind(),
    "vit_mae": TransformersKind(names=MAE_NAMES, notes=("Kept the encoder of a masked autoencoder, without masks.",)),
    "ijepa": TransformersKind(readout="mean"),
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": TransformersKind(
        names=DINOV3_NAMES,
        fields=DINOV3_FIELDS,
        fixed={"use_position_embeddings": False, "rope_coordinates": "centered"},
        image_processor=DINOV3_IMAGES,
    ),
    "clip": CLIP._replace(tower="vision_config"),
    "clip_vision_model": CLIP,
    "metaclip_2": CLIP._replace(tower="vision_config", tower_class="MetaClip2VisionModel"),
    "metaclip_2_vision_model": CLIP._replace(tower_class="MetaClip2VisionModel"),
    "siglip": SIGLIP._replace(tower="vision_config"),
    "siglip_vision_model": SIGLIP,
    "siglip2": SIGLIP2._replace(tower="vision_config"),
    "siglip2_vision_model": SIGLIP2,
}

# ---------------------------------------------------------------- timm's architectures


class TimmKind(NamedTuple):
    """
    What the tensors of an architecture of timm do not tell. Attributes that are None are left to other rows.

    Attributes:
        fields: our fields of the configuration.
        readout: what its head reads if neither the folder nor the tensors tell.
        pools_prefix: whether its pooling reads class token and registers too.
        rotary_order: how it orders the channels of rotary positions, a name in `ROTARY_ORDERS`.
        refusal: why it cannot be converted.
    """

    fields: dict[str, Any] = {}
    readout: str | None = None
    pools_prefix: bool | None = None
    rotary_order: str | None = None
    refusal: str | None = None


def _rotary(order: str, coordinates: str, theta: float, grid: int | None = None, **fields: Any) -> TimmKind:
    rope = {"rope_coordinates": coordinates, "rope_theta": theta, "rope_grid": grid}
    return TimmKind({**rope, **fields}, rotary_order=order)


NO_POSITIONS = {"use_position_embeddings": False}

# By patterns of the architecture. All rows that match apply, the later ones over the earlier.
TIMM_KINDS: dict[str, TimmKind] = {
    r"_clip_|^beit3_": TimmKind({"layer_norm_eps": 1e-5}),
    r"^eva.*_clip_": TimmKind({"layer_norm_eps": 1e-6}),
    r"_quickgelu_": TimmKind({"hidden_act": "quick_gelu"}),
    r"base_patch32_siglip|large_patch16_siglip_(gap_)?512|giantopt_|so400m_patch16_siglip": TimmKind(
        {"hidden_act": "gelu_pytorch_tanh"}
    ),
    # Heads that are not 64 wide, or in a width of which other models have wider ones.
    r"giantopt_|vit_base_patch16_gap_224": TimmKind({"num_attention_heads": 16}),
    r"huge_plus": TimmKind({"num_attention_heads": 20}),
    r"_dinov3|_lingbot": _rotary("halves", "centered", 100.0, layer_norm_eps=1e-5, **NO_POSITIONS)._replace(
        readout="mean"
    ),
    r"_7b_": TimmKind({"num_attention_heads": 32}),
    r"_lingbot": TimmKind(readout="class_token"),
    r"^eva02_": _rotary("pairs", "index", 10000.0, 16),
    r"_rope_reg\d_gap": _rotary("pairs", "index", 10000.0, 16, **NO_POSITIONS),
    r"_rope_224": _rotary("columns_first_pairs", "index", 100.0, **NO_POSITIONS),
    r"_rope_ape_224": _rotary("columns_first_pairs", "index", 100.0),
    r"^vit_pe_": _rotary("columns_first_pairs", "index_from_one", 10000.0, 32, layer_norm_eps=1e-5),
    r"^vit_pe_(lang|spatial)_": TimmKind(readout="mean"),
    r"^vit_pe_core_": TimmKind({"readout_num_heads": 8, "rope_grid": 24}, pools_prefix=True),
    r"^vit_pe_core_base_": TimmKind({"rope_grid": 14}),
    r"^vit_pe_.*_gigantic_": TimmKind({"num_attention_heads": 16, "rope_coordinates": "index", "rope_grid": 32}),
    r"_rope_mixed_": TimmKind(refusal="it learns the frequencies of its rotary positions, one set for each block"),
    r"^eva02_enormous_|_rpn_": TimmKind(refusal="its blocks have the norm after each branch, as no `ln_order` has"),
    r"_(dwee|dlittle|dpwee)_": TimmKind(refusal="it subtracts two attentions from each other"),
    r"_sapiens2|^aimv2_|^test_vit4": TimmKind(refusal="it has RMSNorm where an HPool-ViT has LayerNorm"),
    r"_radio_": TimmKind(refusal="it puts tokens of several teachers before the patches"),
}

# The names of timm's architectures that are ViTs.
TIMM_VITS = r"(vit|deit3?|eva|eva02|flexivit|beit3|aimv2|test_vit\d?)(_|$)"

# The arguments of timm's models that change what the tensors do not tell, and our fields.
TIMM_ARGUMENTS = {
    "num_heads": "num_attention_heads",
    "rope_temperature": "rope_theta",
    "ref_feat_shape": "rope_grid",
    "attn_pool_num_heads": "readout_num_heads",
    "act_layer": "hidden_act",
}
TIMM_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}

# timm's `global_pool`, and our readout.
TIMM_POOLS = {"token": "class_token", "avg": "mean", "map": "attention"}

# Tensors of models whose other facts only the name of the architecture tells.
TIMM_NEEDS_ARCHITECTURE = {
    r"^norm_pre\.": "CLIP's and Perception Encoder's ViTs",
    r"^attn_pool\.": "SigLIP's and Perception Encoder's ViTs",
    r"\.attn\.(q_bias|q_proj\.)": "EVA and other models with rotary positions",
    r"\.mlp\.fc1_g\.": "EVA-02 and DINOv3",
}


def timm_kind(architecture: str) -> TimmKind:
    """What the name of an architecture tells, all rows of the table together."""
    merged = TimmKind()
    for pattern, kind in TIMM_KINDS.items():
        if re.search(pattern, architecture):
            given = {name: value for name, value in kind._asdict().items() if value is not None}
            merged = merged._replace(**{**given, "fields": {**merged.fields, **kind.fields}})
    return merged


def halves(half: int) -> torch.Tensor:
    return torch.arange(2 * half)


def pairs(half: int) -> torch.Tensor:
    # The angle k turns the channels 2k and 2k + 1.
    first = 2 * torch.arange(half)
    return torch.cat((first, first + 1))


def columns_first_pairs(half: int) -> torch.Tensor:
    # As `pairs`, with the angles of the columns before those of the rows.
    first = 2 * torch.arange(half).roll(half // 2)
    return torch.cat((first, first + 1))


# For each of our channels of a head, which of the source's it is, from half the width of a head.
ROTARY_ORDERS: dict[str, Callable[[int], torch.Tensor]] = {
    "halves": halves,
    "pairs": pairs,
    "columns_first_pairs": columns_first_pairs,
}

# ---------------------------------------------------------------- what cannot be converted

_MULTIMODAL = "a tower for images that comes as a part of a multimodal model"
_REFUSED_BECAUSE_OF = {
    "convolutions instead of attention": (
        "align_vision_model bit convnext convnextv2 efficientnet hgnet_v2 mobilenet_v1 mobilenet_v2 pp_lcnet regnet "
        "resnet textnet"
    ),
    "pooling or convolutions between its blocks": (
        "cvt levit mobilevit mobilevitv2 poolformer pvt pvt_v2 segformer swiftformer"
    ),
    "attention in windows, or tokens that become fewer and wider": (
        "dinat donut-swin florence_vision focalnet hiera swin swinv2"
    ),
    "relative positions": "beit data2vec-vision",
    "windows and relative positions": (
        "deepseek_ocr2_sam_vision_model edgetam_vision_model got_ocr2_vision pp_formulanet_vision sam2_vision_model "
        "sam3_vision_model sam_hq_vision_model sam_vision_model slanext_vision unlimited_ocr_sam_vision_model "
        "pp_chart2table_vision"
    ),
    "RMSNorm where an HPool-ViT has LayerNorm": "aimv2_vision_model pix2struct_vision_model",
    "rotary positions for its class token too": "mlcd_vision_model",
    "tokens that are not patches of an image": "imagegpt perceiver",
    "attention over the frames of a video": "videoprism_vision_model xclip_vision_model",
    "two class tokens": "tipsv2_vision_model",
    "a model of timm inside: pass the folder or id of the timm model": "timm_wrapper",
    "a language model that reads images": "shieldgemma2 visual_bert",
    "two whole models inside: pass the one for images": "vision-encoder-decoder vision-text-dual-encoder",
    _MULTIMODAL: (
        "altclip_vision_model apertus1p5_vision_tokenizer aya_vision blip_2_vision_model blip_vision_model "
        "bridgetower_vision_model chinese_clip_vision_model clipseg_vision_model cohere2_vision "
        "cohere_compass_vision cosmos3_edge_vision deepseek_ocr2_vision dots3_note_vision_encoder "
        "ernie4_5_vl_moe_vision exaone4_5_vision gemma3n_vision gemma4_unified_vision gemma4_vision git_vision_model "
        "glm4v_moe_vision glm4v_vision glm5_next_vision glm_image_vision glm_ocr_vision granite4_vision "
        "granite4_vision_text granite_docling_vision groupvit_vision_model hunyuan_vl_vision hy_v4_vl_vision "
        "hyperclovax_vision_v2 idefics2_vision idefics3_vision idefics_vision inkling2_vision inkling_vision "
        "instructblip_vision_model instructblipvideo_vision_model internvl_vision janus_vision_model kimi_k25_vision "
        "kosmos_2_5_vision_model kosmos_2_vision_model lfm3_vl_vision llama4_vision_model llava_onevision "
        "minicpm_ocr_vision minicpmv4_6_vision minicpmv4_7_vision minimax_m3_vl_vision mllama_vision_model "
        "molmo2_vision muse_glimmer_vision muse_spark_vision ovis2_vision owlv2_vision_model owlvit_vision_model "
        "paddleocr_vl_vision phi4_multimodal_vision qianfan_ocr_vision qwen2_5_omni_vision_encoder qwen2_5_vl_vision "
        "qwen2_vl_vision qwen3_5_moe_vision qwen3_5_vision qwen3_omni_moe_vision_encoder qwen3_vl_moe_vision "
        "qwen3_vl_vision qwen4_exp_vision smolvlm_vision step3p5_vision unlimited_ocr_vision "
        "unlimited_ocr_vision_encoder video_llama_3_vision"
    ),
}
# By `model_type` of Transformers, what it has that an HPool-ViT has not.
REFUSED_MODEL_TYPES = {name: reason for reason, names in _REFUSED_BECAUSE_OF.items() for name in names.split()}
