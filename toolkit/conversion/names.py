"""What other libraries call the tensors of a ViT, and what an HPool-ViT calls them."""

import re
from collections.abc import Iterable


Patterns = tuple[tuple[str, str], ...]

# From our names to timm's; `timm_name` adds the fused projection of query, key and value.
TIMM_NAMES: Patterns = (
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^layers\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.scale$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)

# From the names that the original DeiT III uses to timm's.
DEIT_III_NAMES: Patterns = ((r"\.gamma_(\d)$", r".ls\1.gamma"),)

# From the names of Transformers' ViTs, in every version 5, to ours.
VIT_NAMES: Patterns = (
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q)uery\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(k)ey\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
DEIT_NAMES: Patterns = ((r"^deit\.", ""), *VIT_NAMES, (r"^cls_classifier\.", "classifier."))
DINOV2_NAMES: Patterns = (
    (r"^dinov2\.", ""),
    *VIT_NAMES,
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.lambda1$", ".scale"),
)


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """`name` after each of the patterns is replaced, in order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def timm_name(name: str) -> tuple[str, int | None]:
    """
    timm's name of one of our parameters, and which third of that tensor the parameter is (None: all of it). The
    paper's code uses the same names.
    """
    if fused := re.fullmatch(r"layers\.(\d+)\.attention\.([qkv])_proj\.(\w+)", name):
        block, projection, parameter = fused.groups()
        return f"blocks.{block}.attn.qkv.{parameter}", "qkv".index(projection)
    return rename(name, TIMM_NAMES), None


def fc_norm_name(name: str) -> tuple[str, int | None]:
    """As [`timm_name`], for a model whose final norm follows the mean over the tokens."""
    name, part = timm_name(name)
    return re.sub(r"^norm\.", "fc_norm.", name), part


def hvt_name(name: str) -> tuple[str, int | None]:
    """
    The paper's name of one of our parameters, as [`timm_name`]. The paper pools at the *output* of a block, an
    HPool-ViT at the input of the next.
    """
    if stage := re.fullmatch(r"pooling\.(\d+)\.position_embeddings", name):
        return f"blocks.{int(stage[1]) - 1}.pos_embed", None
    return timm_name(name)
