"""HPool-ViT configuration."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from functools import wraps
from typing import Any, NamedTuple, Self, TypeVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


LN_ORDERS = ("pre", "post", "residual")
PATCHIFY_TECHNIQUES = ("linear", "convolutional")
MERGE_RULES = ("distance", "importance")
ROPE_COORDINATES = ("centered", "index", "index_from_one")

# What the pooled output may be, and how many times as wide as the tokens it is.
READOUTS = {"mean": 1, "class_token": 1, "class_token_and_mean": 2, "attention": 1}

# The models of the paper (Table 1 and Section 4): all share image size 224, patch 16, 12 blocks, head width 64.
PRESETS: dict[str, dict[str, Any]] = {
    "hvt-ti-1": {"hidden_size": 192, "hvt_pool": [1]},
    "hvt-s-0": {"hidden_size": 384, "hvt_pool": None},
    "hvt-s-1": {"hidden_size": 384, "hvt_pool": [1]},
    "hvt-s-2": {"hidden_size": 384, "hvt_pool": [1, 7]},
    "hvt-s-3": {"hidden_size": 384, "hvt_pool": [1, 5, 9]},
    "hvt-s-4": {"hidden_size": 384, "hvt_pool": [1, 4, 7, 10]},
    "scale-hvt-ti-4": {"hidden_size": 384, "hvt_pool": [1, 4, 7, 10]},
    # Ours, not the paper's: windows on the grid of patches give feature maps of strides 16, 32 and 64.
    "hpool-s-grid": {"hidden_size": 384, "hvt_pool": [3, 9], "pool_kernel_size": (2, 2), "pool_stride": (2, 2)},
}

# The feature maps of a pyramid, named by the logarithm of their strides.
PYRAMID = ("p2", "p3", "p4", "p5")

# What `hvt_pool` may be.
Schedule = list[int] | tuple[int, ...] | None

# Fields that decide where stages are, and how many axes they have.
RESHAPES_STAGES = {"hvt_pool", "hvt_pool_choices", "pool_kernel_size", "pool_stride"}

# How many tokens there are: `(num_tokens,)` in a row, or `(rows, columns)` on a grid.
Shape = tuple[int, ...]

Class = TypeVar("Class", bound=type)


def plain(value: Any) -> Any:
    """`value` without NumPy's and PyTorch's types, which JSON does not know: 3 instead of `np.int64(3)`."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    return value.tolist() if hasattr(value, "tolist") else value


def on_plain_values_with_value_errors(cls: Class) -> Class:
    """
    `@strict` refuses NumPy's numbers, and reports with exceptions of its own, although callers of a configuration
    catch `ValueError`. This makes the values plain and raises a `ValueError` with the message of the failed check.
    """

    def translate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
            except StrictDataclassError as error:
                # Of a field of several types, the message goes on with what each of them says.
                raise ValueError(str(error.__cause__).partition(" Errors: ")[0]) from error

        return wrapper

    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, translate(getattr(cls, name)))
    return cls


def _as_number(text: Any) -> Any:
    """JSON has text for the keys of a dictionary."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _as_recorded(shapes: dict[int, Shape]) -> dict[int, int | Shape]:
    """The shapes of stages by block, as `stages` holds them: a number for tokens in a row."""
    return {block: shape[0] if len(shape) == 1 else shape for block, shape in shapes.items()}


def _each_once(schedules: Iterable[Any]) -> list[Any]:
    """Schedules as lists, each once, and None for those that never pool; anything else is left to the type check."""
    unique = []
    for schedule in schedules:
        schedule = (list(schedule) or None) if isinstance(schedule, list | tuple) else schedule
        if schedule not in unique:
            unique.append(schedule)
    return unique


class NoLabels(dict[int, str]):
    """The names of no classes: looking for one says why it is not there."""

    def __missing__(self, label: int) -> str:
        raise ValueError(
            f"There is no class {label!r}: the model has no classifier (`num_labels=0`) and returns features. Load it "
            "with AutoModel or the pipeline 'image-feature-extraction', or give it classes and train it."
        )


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    # The fields have no lists any more: they became tuples on assignment.
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], size)


def windows_shape(config: "HPoolViTConfig", shape: Shape, stage: int) -> Shape:
    """The windows along a row of tokens (paper Section 3.2) or on a grid; below 1 where not even one fits."""
    kernel, stride = config.pool_window
    if len(kernel) == 1:
        shape = (math.prod(shape),)
    elif len(shape) == 1:
        raise ValueError(f"`pool_kernel_size={config.pool_kernel_size}` needs the rows and columns of patches.")
    return tuple((size - k) // s + 1 for size, k, s in zip(shape, kernel, stride, strict=True))


def merged_shape(config: "HPoolViTConfig", shape: Shape, stage: int) -> Shape:
    """What is left of the tokens at the merging stage `stage`, counted from 0."""
    num_tokens = math.prod(shape)
    return (num_tokens - config.num_merged(num_tokens, stage),)


class PoolMode(NamedTuple):
    """
    What the configuration knows about a pooling mode; `pooling_hpool_vit.POOLINGS` has the class that computes it.

    Attributes:
        shape: the shape of the tokens after a stage, from the configuration, the shape before it, and which entry of
            `hvt_pool` the stage is.
        has_positions: whether a stage has position embeddings of its own.
    """

    shape: Callable[["HPoolViTConfig", Shape, int], Shape]
    has_positions: bool


POOL_MODES = {
    "max": PoolMode(windows_shape, has_positions=True),
    "avg": PoolMode(windows_shape, has_positions=True),
    "merge": PoolMode(merged_shape, has_positions=False),
}


@on_plain_values_with_value_errors
@strict
class HPoolViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of an [`HPoolViTModel`], the Vision Transformer that pools its tokens between blocks ("Scalable
    Vision Transformers with Hierarchical Pooling", arXiv 2103.10619). The names in brackets are accepted too, as
    keyword, attribute and in JSON.

    Args:
        hidden_size (`int`, defaults to 768):
            Width of the tokens (`d_model`).
        num_hidden_layers (`int`, defaults to 12):
            Number of blocks (`num_encoder_blocks`).
        num_attention_heads (`int`, defaults to 12):
            Number of attention heads (`encoder_num_heads`); divides `hidden_size`.
        intermediate_size (`int`, defaults to 3072):
            Width of a block's MLP (`encoder_mlp_d`).
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the MLP, a name in `transformers.activations.ACT2FN`.
        image_size (`int` or `tuple[int, int]`, defaults to 224):
            Size of the input in pixels, one number or (height, width); divisible by `patch_size`.
        patch_size (`int` or `tuple[int, int]`, defaults to 16):
            Size of a patch in pixels, one number or (height, width).
        num_channels (`int`, defaults to 3):
            Channels of the input (`in_channels`).
        classifier_hidden_size (`int`, *optional*):
            None: the classifier is one Linear, as in the paper. A number: Linear to this width, Tanh, Dropout, Linear
            (`classifier_mlp_d`).
        dropout (`float`, defaults to 0.0):
            Dropout on the patch embeddings and in the classifier.
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout inside a block's MLP (`encoder_dropout`).
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on the attention probabilities (`encoder_attention_dropout`).
        projection_dropout_prob (`float`, defaults to 0.0):
            Dropout after attention's output projection (`encoder_projection_dropout`).
        patchify_technique (`str`, defaults to `"linear"`):
            `"linear"`: unfold, then Linear. `"convolutional"`: Conv2d with stride `patch_size`. The same function; the
            weights convert by reshaping.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth per sample: 0 at the first block, rising linearly to this at the last
            (`stochastic_depth_mp`; None, or `stochastic_depth=False`, means 0).
        layer_scale_init_value (`float`, *optional*):
            Initial value of a learned scale per channel on each branch (`layer_scale`); None: no scale.
        ln_order (`str`, defaults to `"residual"`):
            `"pre"`: x += A(LN(x)). `"post"`: x = LN(x + A(x)). `"residual"`: ResiDual (arXiv 2304.14802).
        hvt_pool (`list[int]`, *optional*, defaults to `[1, 5, 9]`):
            The blocks at whose input the tokens are pooled, counted from 0, in rising order; None or []: no pooling.
            Change it in a trained model with `model.set_hvt_pool([1])` or `from_pretrained(…, hvt_pool=[1])`.
        hvt_pool_choices (`list[list[int] | None]`, *optional*):
            The schedules to train for and to offer, in any order; None: only `hvt_pool`. If you pass it to
            `from_pretrained`, the model drops the stages that neither these schedules nor `hvt_pool` need.
        speeds (`dict[float, dict]`, *optional*):
            Ways to pool that the model offers: how many times fewer multiply-accumulates than without pooling (or how
            much less time), and the fields that save them: `{2.0: {"hvt_pool": [1, 5], "merge_ratio": [0.3, 0.4]}}`.
            `model.set_speed(2)` or `from_pretrained(…, speed=2)` picks one; 1 is always there and means no pooling.
        stages (`dict[int, int]`, *optional*):
            Which blocks have a pooling stage with weights, and the number of position embeddings of each (on a grid,
            their rows and columns); they are resized where a schedule leaves another number of tokens. You rarely set
            it: it records what a trained model has. None: the stages of `hvt_pool`, one position embedding per token.
        pool_mode (`str`, defaults to `"max"`):
            `"max"` or `"avg"`: pooling in windows (paper Section 3.2). `"merge"`: the most similar tokens join (after
            ToMe, arXiv 2210.09461).
        pool_kernel_size, pool_stride (`int` or `tuple[int, int]`, defaults to 3 and 2):
            Window and step of `"max"` and `"avg"`. Numbers: along the row of all tokens, as in the paper. Pairs: on
            the grid of patches, (rows, columns).
        merge_ratio (`float` or `list[float]`, defaults to 0.5):
            Share of the tokens that `"merge"` removes at each block in `hvt_pool`, in (0, 0.5]; one number, or one per
            entry.
        merge_rule (`str`, defaults to `"distance"`):
            Which tokens `"merge"` joins: `"distance"`: those that are nearest to each other, as in version 0.1.
            `"importance"`: also by what the class token looks at, if the pooled output comes from it, and in rounds,
            which keeps more of a trained model; the converter chooses it.
        proportional_attention (`bool`, defaults to `False`):
            Whether attention weighs a merged token by the number of patches it stands for.
        use_class_token (`bool`, defaults to `False`):
            Whether a class token, never pooled, stands before the patches. It is the pooled output instead of the
            mean over the tokens, unless `readout` says otherwise.
        num_register_tokens (`int`, defaults to 0):
            Number of register tokens (arXiv 2309.16588), which stand before the patches, after a class token, and are
            never pooled either. They have no position embeddings.
        readout (`str`, *optional*):
            The pooled output: `"mean"` over the patch tokens, `"class_token"`, `"class_token_and_mean"` (side by side,
            as DINOv2's linear heads read them), or `"attention"` (a learned query attends to all tokens, as in SigLIP,
            arXiv 2303.15343). None: `"class_token"` if `use_class_token`, otherwise `"mean"`.
        readout_num_heads (`int`, *optional*):
            Attention heads of `readout="attention"`; None: `num_attention_heads`.
        use_final_norm (`bool`, defaults to `True`):
            Whether a LayerNorm follows the last block, where `ln_order` has one.
        norm_after_pooling (`bool`, defaults to `False`):
            Whether that LayerNorm of `ln_order="pre"` follows the readout instead of preceding it, as in timm's models
            with `fc_norm` and in CLIP; `last_hidden_state` is without norm then.
        embedding_norm (`bool`, defaults to `False`):
            Whether a LayerNorm precedes the first block, as in CLIP.
        patch_bias (`bool`, defaults to `True`):
            Whether the projection of the patches has a bias.
        use_position_embeddings (`bool`, defaults to `True`):
            Whether patches, class token and pooling stages have learned position embeddings. Without them the model
            takes images of any size.
        rope_theta (`float`, *optional*):
            Base period of two-dimensional rotary positions (arXiv 2104.09864), which turn queries and keys by angles
            that grow with the rows and columns of the patches; None: no rotary positions. A pooled or merged token
            stands at the mean of its patches.
        rope_coordinates (`str`, defaults to `"centered"`):
            How rows and columns are counted: `"centered"`: patch centres from -1 to 1, times 2 pi (DINOv3, arXiv
            2508.10104). `"index"`: from 0 (EVA-02, arXiv 2303.11331). `"index_from_one"`: from 1 (Perception Encoder,
            arXiv 2504.13181).
        rope_grid (`int` or `tuple[int, int]`, *optional*):
            Rows and columns that `"index"` and `"index_from_one"` stretch every image to; None: the image's own.
        use_gated_mlp (`bool`, defaults to `False`):
            Whether a block's MLP multiplies two projections, one of them through `hidden_act` (arXiv 2002.05202);
            SwiGLU is `hidden_act="silu"`.
        mlp_norm (`bool`, defaults to `False`):
            Whether a LayerNorm precedes the last projection of a block's MLP, as in EVA-02.
        qkv_bias (`bool`, defaults to `True`):
            Whether the query, key and value projections have a bias.
        key_bias (`bool`, defaults to `True`):
            Whether the key projection has one too, if `qkv_bias`.
        use_qk_norm (`bool`, defaults to `False`):
            Whether a LayerNorm over each head follows the query and key projections (arXiv 2302.05442).
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of every LayerNorm.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the truncated normal that initialises weights and position embeddings.
        feature_pyramid_size (`int`, *optional*):
            Of [`HPoolViTBackbone`]: a number makes its outputs a pyramid of four feature maps with that many channels
            and the strides 4, 8, 16 and 32 for patches of 16 (`p2` to `p5`, after ViTDet, arXiv 2203.16527).
        out_features, out_indices (`list[str]`, `list[int]`, *optional*):
            Of [`HPoolViTBackbone`]: the feature maps to return, `"stem"` or 0 for the embeddings and `"stage<n>"` or n
            for the output of the n-th block. None: the last one before each stage of a grid, and the last of all.

    Raises:
        ValueError: for a value that no model can be built from; it names the field, the value and the remedy.

    Example:

    ```python
    >>> from hpool_vit import HPoolViTConfig

    >>> config = HPoolViTConfig.from_preset("hvt-s-3", num_labels=10)
    >>> config.tokens_per_stage()
    [196, 97, 48, 23]
    ```"""

    model_type = "hpool_vit"
    attribute_map = {
        "d_model": "hidden_size",
        "num_encoder_blocks": "num_hidden_layers",
        "encoder_num_heads": "num_attention_heads",
        "encoder_mlp_d": "intermediate_size",
        "in_channels": "num_channels",
        "num_classes": "num_labels",
        "classifier_mlp_d": "classifier_hidden_size",
        "encoder_dropout": "hidden_dropout_prob",
        "encoder_attention_dropout": "attention_probs_dropout_prob",
        "encoder_projection_dropout": "projection_dropout_prob",
        "stochastic_depth_mp": "drop_path_rate",
        "layer_scale": "layer_scale_init_value",
    }
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    classifier_hidden_size: int | None = None
    dropout: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    projection_dropout_prob: float | int = 0.0
    patchify_technique: str = "linear"
    drop_path_rate: float | int | None = 0.0
    layer_scale_init_value: float | int | None = None
    ln_order: str = "residual"
    hvt_pool: Schedule = field(default_factory=lambda: [1, 5, 9])
    hvt_pool_choices: list[Schedule] | tuple[Schedule, ...] | None = None
    speeds: dict[Any, dict[str, Any]] | None = None
    stages: dict[int, Any] | dict[str, Any] | None = None
    pool_mode: str = "max"
    pool_kernel_size: int | list[int] | tuple[int, int] = 3
    pool_stride: int | list[int] | tuple[int, int] = 2
    merge_ratio: float | int | list[float] | tuple[float, ...] = 0.5
    merge_rule: str = "distance"
    proportional_attention: bool = False
    use_class_token: bool = False
    num_register_tokens: int = 0
    readout: str | None = None
    readout_num_heads: int | None = None
    use_final_norm: bool = True
    norm_after_pooling: bool = False
    embedding_norm: bool = False
    patch_bias: bool = True
    use_position_embeddings: bool = True
    rope_theta: float | int | None = None
    rope_coordinates: str = "centered"
    rope_grid: int | list[int] | tuple[int, int] | None = None
    use_gated_mlp: bool = False
    mlp_norm: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    use_qk_norm: bool = False
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    feature_pyramid_size: int | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for alias, name in self.attribute_map.items():
            if alias not in kwargs:
                continue
            value = kwargs.pop(alias)
            given = kwargs.get(name, value) if name == "num_labels" else getattr(self, name)
            if given not in (value, defaults.get(name)):
                raise ValueError(f"`{name}={given!r}` and `{alias}={value!r}` name the same field: give only one.")
            if name == "num_labels":
                kwargs[name] = value
            else:
                setattr(self, name, value)
        if kwargs.get("num_labels", 0) is None:
            del kwargs["num_labels"]
        num_labels = kwargs.get("num_labels", 0)
        if type(num_labels) is not int or num_labels < 0:
            raise ValueError(f"`num_labels={num_labels!r}` must be a whole number, at least 0 (no classifier).")
        # Last, whatever the order of the keywords: switching stochastic depth off wins over its rate.
        if kwargs.pop("stochastic_depth", True) is False:
            self.drop_path_rate = 0.0
        outputs = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        super().__post_init__(**kwargs)
        if any(value is not None for value in outputs.values()):
            self.set_output_features_output_indices(**outputs)
        if not self.num_labels:
            self.id2label = NoLabels()

    def __setattr__(self, key: str, value: Any) -> None:
        # Resolved here, because `@strict` checks the type of an assignment by the field's own name only.
        key = self.attribute_map.get(key, key)
        # One type per field, so that a configuration equals the one read back from its JSON.
        if key in ("image_size", "patch_size", "rope_grid", "pool_kernel_size", "pool_stride") and isinstance(
            value, list
        ):
            value = tuple(value)
        elif key in ("hvt_pool", "merge_ratio") and isinstance(value, list | tuple):
            value = list(value)  # also a copy, which nobody else can change
        elif key == "hvt_pool_choices" and isinstance(value, list | tuple):
            value = _each_once(value)
        elif key == "speeds" and isinstance(value, dict):
            value = {_as_number(speed): dict(fields) for speed, fields in value.items()}
        elif key == "stages" and isinstance(value, dict):
            # JSON has text for keys and lists for tuples.
            value = {
                int(block) if str(block).isdecimal() else block: tuple(number) if isinstance(number, list) else number
                for block, number in value.items()
            }
        elif key == "drop_path_rate" and value is None:
            value = 0.0
        super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        if config_dict.get("hvt_pool_choices") and config_dict.get("stages") is None:
            config_dict = {**config_dict, "stages": cls._stages_before_they_were_recorded(config_dict)}
        if (speed := kwargs.pop("speed", None)) is not None:
            if given := {"hvt_pool", "merge_ratio"} & kwargs.keys():
                raise ValueError(f"`speed={speed}` and `{min(given)}` exclude each other: give only one.")
            kwargs |= cls(**config_dict).fields_of_speed(speed)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if kwargs.keys() & RESHAPES_STAGES and "stages" not in kwargs:
            saved = cls(**config_dict)
            if len(saved.pool_window[0]) != len(config.pool_window[0]):
                config.stages = None  # weights of stages along the row do not fit a grid
            elif kwargs.keys() & {"hvt_pool", "hvt_pool_choices"}:
                # The weights are those of the saved configuration, and the model needs a place for them.
                config.stages = config._stages_to_keep(saved, drop_unneeded="hvt_pool_choices" in kwargs)
        # The overrides in `kwargs` were assigned one by one, and must fit each other.
        config.validate()
        return result

    @classmethod
    def _stages_before_they_were_recorded(cls, config_dict: dict[str, Any]) -> dict[int, Any] | None:
        """In version 0.1, the first schedule in the list that pools at a block decided its position embeddings."""
        config = cls(**{**config_dict, "hvt_pool_choices": None})
        if not config.has_stage_positions:
            return None
        stages: dict[int, Any] = {}
        for schedule in [*config_dict["hvt_pool_choices"], config.hvt_pool]:
            stages = config.with_schedule(schedule)._own_stages() | stages
        return _as_recorded(stages)

    def _stages_to_keep(self, saved: "HPoolViTConfig", drop_unneeded: bool) -> dict[int, Any] | None:
        if not (saved.has_stage_positions and self.has_stage_positions):
            return None
        shapes = saved.stage_shapes()
        stages = _as_recorded({block: shape for block, shape in shapes.items() if block < self.num_hidden_layers})
        needed = {block for schedule in self.schedules for block in schedule}
        # A new stage starts from the nearest one, so none is dropped then.
        if drop_unneeded and needed <= stages.keys():
            return {block: n for block, n in stages.items() if block in needed}
        return stages

    @property
    def stochastic_depth(self) -> bool:
        """Whether any block is ever dropped; assigning False sets `drop_path_rate` to 0."""
        return (self.drop_path_rate or 0) > 0

    @stochastic_depth.setter
    def stochastic_depth(self, value: bool) -> None:
        if not value:
            self.drop_path_rate = 0.0

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.patch_size)

    def patch_grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of whole patches in an image of `height` × `width` pixels (default: `image_size`)."""
        if height is None or width is None:
            height, width = self.image_shape
        return height // self.patch_shape[0], width // self.patch_shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: a class token and registers."""
        return int(self.use_class_token) + self.num_register_tokens

    @property
    def resolved_readout(self) -> str:
        """What the pooled output is, a name in `READOUTS`."""
        return self.readout or ("class_token" if self.use_class_token else "mean")

    @property
    def reads_class_token(self) -> bool:
        """Whether the pooled output comes from the class token."""
        return self.resolved_readout.startswith("class_token")

    @property
    def num_tokens_read(self) -> int | None:
        """How many of the last block's tokens, from the first on, the pooled output comes from; None: all."""
        return 1 if self.resolved_readout == "class_token" else None

    @property
    def needs_importance(self) -> bool:
        """Whether merging asks how much the class token attends to each token."""
        return self.pool_mode == "merge" and self.merge_rule == "importance" and self.reads_class_token

    @property
    def importance_needs_keys(self) -> bool:
        """Whether that takes more than one product with each token."""
        return self.use_qk_norm or self.rope_theta is not None

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output, which the classifier reads."""
        return self.hidden_size * READOUTS[self.resolved_readout]

    @property
    def rope_shape(self) -> tuple[int, int] | None:
        """Rows and columns of `rope_grid`."""
        return None if self.rope_grid is None else _pair(self.rope_grid)

    @property
    def has_stage_positions(self) -> bool:
        """Whether each pooling stage has position embeddings of its own."""
        return self.use_position_embeddings and POOL_MODES[self.pool_mode].has_positions

    @property
    def pool_window(self) -> tuple[Shape, Shape]:
        """Window and step of pooling along each axis of the tokens: one axis for a row of them, two for a grid."""
        if isinstance(self.pool_kernel_size, int) and isinstance(self.pool_stride, int):
            return (self.pool_kernel_size,), (self.pool_stride,)
        return _pair(self.pool_kernel_size), _pair(self.pool_stride)

    @property
    def pools_on_grid(self) -> bool:
        """Whether the stages keep a grid of tokens."""
        return POOL_MODES[self.pool_mode].shape is windows_shape and len(self.pool_window[0]) == 2

    @property
    def stage_names(self) -> list[str]:
        """The feature maps that the backbone can return."""
        if self.feature_pyramid_size is not None:
            return list(PYRAMID)
        return ["stem", *(f"stage{block + 1}" for block in range(self.num_hidden_layers))]

    def tokens_per_stage(self, num_patches: int | Shape | None = None) -> list[int]:
        """
        Number of patch tokens, without class token and registers, at the start and after the pooling of each block
        in `hvt_pool`: 196, 97, 48, 23 for the defaults.

        Args:
            num_patches (`int` or `tuple[int, int]`, *optional*):
                Patches of the image, or their rows and columns; by default those of `image_size`.

        Raises:
            ValueError: if the tokens run out; it names the block and the number of tokens left.
        """
        return [math.prod(shape) for shape in self.shapes_per_stage(num_patches)]

    def shapes_per_stage(self, num_patches: int | Shape | None = None) -> list[Shape]:
        """As [`tokens_per_stage`], with rows and columns where the tokens form a grid."""
        num_patches = self.patch_grid() if num_patches is None else num_patches
        shapes: list[Shape] = [(num_patches,) if isinstance(num_patches, int) else num_patches]
        if min(shapes[0]) < 1:
            raise ValueError(
                f"The image is smaller than one patch of `patch_size={self.patch_size}` pixels: enlarge it."
            )
        for stage, block in enumerate(self.hvt_pool or []):
            shapes.append(POOL_MODES[self.pool_mode].shape(self, shapes[-1], stage))
            if min(shapes[-1]) < 1:
                left = " × ".join(map(str, shapes[-2])) if self.pools_on_grid else math.prod(shapes[-2])
                raise ValueError(
                    f"`hvt_pool={self.hvt_pool}` runs out of tokens at block {block}: {left} left, and a "
                    f"window takes `pool_kernel_size={self.pool_kernel_size}`. Pool at fewer blocks, or use larger "
                    "images, smaller patches or a smaller kernel."
                )
        return shapes

    def num_merged(self, num_tokens: int, stage: int) -> int:
        """Number of the `num_tokens` patch tokens that join another at the merging stage `stage`, counted from 0."""
        ratio = self.merge_ratio[stage] if isinstance(self.merge_ratio, (list, tuple)) else self.merge_ratio
        # A ratio written as a fraction (48 / 196) must give that many tokens in spite of its rounding. In integers,
        # because exported programs with a free image size know no floor of a float.
        return (num_tokens * round(ratio * 10**12) + 10**6) // 10**12

    @property
    def schedules(self) -> list[list[int]]:
        """The schedules that the model is meant for: `hvt_pool_choices`, and `hvt_pool` itself; []: no pooling."""
        return [schedule or [] for schedule in _each_once([*(self.hvt_pool_choices or []), self.hvt_pool or []])]

    def stage_positions(self) -> dict[int, int]:
        """
        How many position embeddings the stage at each block has, by block: those of the recorded `stages`; for other
        blocks one per token under `hvt_pool` or, if only other schedules pool there, under the one of them that
        leaves the most. Empty if stages have no position embeddings.
        """
        return {block: math.prod(shape) for block, shape in self.stage_shapes().items()}

    def stage_shapes(self) -> dict[int, Shape]:
        """As [`stage_positions`], with rows and columns where they form a grid."""
        if not self.has_stage_positions:
            return {}
        shapes: dict[int, Shape] = {}
        offered = [fields["hvt_pool"] for fields in (self.speeds or {}).values()]
        for schedule in [*(self.hvt_pool_choices or []), *offered]:
            for block, shape in self.with_schedule(schedule)._own_stages().items():
                shapes[block] = max(shape, shapes.get(block, shape), key=math.prod)
        shapes |= self._own_stages() | self._recorded_stages()
        return dict(sorted(shapes.items()))

    def _recorded_stages(self) -> dict[int, Shape]:
        # The keys are integers: `__setattr__` has converted those of JSON.
        stages = cast(dict[int, int | Shape], self.stages or {})
        return {block: (shape,) if isinstance(shape, int) else shape for block, shape in stages.items()}

    def _own_stages(self) -> dict[int, Shape]:
        """The tokens after each stage of `hvt_pool`, by block."""
        return dict(zip(self.hvt_pool or [], self.shapes_per_stage()[1:], strict=True))

    def new_stages(self) -> list[int]:
        """The blocks whose stages are newer than the recorded `stages`, so that saved weights lack them."""
        return [] if self.stages is None else [block for block in self.stage_shapes() if block not in self.stages]

    def with_schedule(self, hvt_pool: Schedule, merge_ratio: Any = None) -> "HPoolViTConfig":
        """A copy with the schedule `hvt_pool` and no other, and `merge_ratio` if it is given; it is not validated."""
        config = copy.copy(self)
        config.hvt_pool_choices = config.speeds = None
        config.hvt_pool = hvt_pool
        config.merge_ratio = self.merge_ratio if merge_ratio is None else merge_ratio
        return config

    def change_schedule(self, hvt_pool: Schedule, merge_ratio: Any = None) -> None:
        """
        Assigns `hvt_pool`, and `merge_ratio` if it is given, and records the stages that the model has had so far in
        `stages`.

        Raises:
            ValueError: for a schedule that no model can be built with; nothing changes then.
        """
        config = self.with_schedule(hvt_pool, merge_ratio)
        config._check_schedule()
        self.record_stages()
        self.hvt_pool, self.merge_ratio = config.hvt_pool, config.merge_ratio

    def fields_of_speed(self, speed: float) -> dict[str, Any]:
        """
        The fields that give one of the `speeds`.

        Raises:
            ValueError: for a speed that the model does not offer; it lists those that it does.
        """
        speeds = {1.0: {"hvt_pool": None}} | {float(known): fields for known, fields in (self.speeds or {}).items()}
        if speed not in speeds:
            known = ", ".join(f"{known:g}" for known in sorted(speeds))
            raise ValueError(f"`speed={speed}` is not offered: choose one of {known}, or search for it.")
        return dict(speeds[speed])

    def record_stages(self) -> None:
        """Writes into `stages` which stages the model has, so that a saved folder tells it."""
        if self.has_stage_positions:
            self.stages = _as_recorded(self.stage_shapes())

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "HPoolViTConfig":
        """
        The configuration of one of the paper's models or of ours, with 1000 labels.

        Args:
            name (`str`):
                `hvt-ti-1`, `hvt-s-0` … `hvt-s-4` or `scale-hvt-ti-4`, or `hpool-s-grid`, which is not the paper's.
            overrides: fields that replace those of the preset.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"`name={name!r}` is not a preset: choose one of {', '.join(PRESETS)}.")
        width = PRESETS[name]["hidden_size"]
        preset = {
            **PRESETS[name],
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
            "ln_order": "pre",
            "patchify_technique": "convolutional",
        }
        overrides = {cls.attribute_map.get(key, key): value for key, value in overrides.items()}
        if not {"num_labels", "id2label"} & overrides.keys():
            preset["num_labels"] = 1000
        return cls(**{**preset, **overrides})

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation; the later checks rely on the earlier ones."""
        super().validate_architecture()
        self._check_choices()
        self._check_numbers()
        self._check_sizes()
        self._check_rope()
        self._check_pooling()
        if self.stages is None and self.hvt_pool_choices:
            # A folder without them is read as one of version 0.1; see `_stages_before_they_were_recorded`.
            self.record_stages()

    def _check_sizes(self) -> None:
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"]
        optional = ("classifier_hidden_size", "readout_num_heads", "feature_pyramid_size")
        names += [name for name in optional if getattr(self, name) is not None]
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")
        for name, axes in (
            ("image_size", "(height, width), each at least 1 pixel"),
            ("patch_size", "(height, width), each at least 1 pixel"),
            ("pool_kernel_size", "(rows, columns), each at least 1"),
            ("pool_stride", "(rows, columns), each at least 1"),
            ("rope_grid", "(rows, columns), each at least 1"),
        ):
            value = getattr(self, name)
            if value is not None and (len(_pair(value)) != 2 or min(_pair(value)) < 1):
                raise ValueError(f"`{name}={value}` must be one number or {axes}.")
        if isinstance(self.pool_kernel_size, int) != isinstance(self.pool_stride, int):
            raise ValueError(
                f"`pool_kernel_size={self.pool_kernel_size}` and `pool_stride={self.pool_stride}` must both be "
                "numbers (windows along all tokens) or both pairs (windows on the grid of patches)."
            )
        if self.num_register_tokens < 0:
            raise ValueError(f"`num_register_tokens={self.num_register_tokens}` must be at least 0.")
        if any(size % patch for size, patch in zip(self.image_shape, self.patch_shape, strict=True)):
            raise ValueError(
                f"`image_size={self.image_size}` is not divisible by `patch_size={self.patch_size}`: choose a "
                "multiple of the patch."
            )
        for name in ("num_attention_heads", "readout_num_heads"):
            if self.hidden_size % (getattr(self, name) or 1):
                raise ValueError(
                    f"`hidden_size={self.hidden_size}` is not divisible by `{name}={getattr(self, name)}`: choose a "
                    "number of heads that divides the width."
                )

    def _check_choices(self) -> None:
        for name, choices in (
            ("ln_order", LN_ORDERS),
            ("patchify_technique", PATCHIFY_TECHNIQUES),
            ("pool_mode", POOL_MODES),
            ("merge_rule", MERGE_RULES),
            ("hidden_act", ACT2FN),
            ("rope_coordinates", ROPE_COORDINATES),
            ("readout", (None, *READOUTS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is unknown: choose one of {', '.join(map(str, choices))}."
                )
        if self.reads_class_token and not self.use_class_token:
            raise ValueError(f"`readout={self.readout!r}` needs `use_class_token=True`.")
        if self.norm_after_pooling:
            self._check_norm_after_pooling()

    def _check_norm_after_pooling(self) -> None:
        if self.ln_order != "pre":
            raise ValueError(f"`norm_after_pooling=True` needs `ln_order='pre'`, not {self.ln_order!r}.")
        if not self.use_final_norm:
            raise ValueError("`norm_after_pooling=True` needs `use_final_norm=True`.")
        if self.pooled_size != self.hidden_size:
            raise ValueError(
                f"`norm_after_pooling=True` does not go with `readout={self.readout!r}`, which is wider than the norm."
            )

    def _check_numbers(self) -> None:
        probabilities = ["dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "projection_dropout_prob"]
        for name in [*probabilities, "drop_path_rate"]:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be a probability in [0, 1).")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}={getattr(self, name)}` must be a finite number above 0.")
        if self.layer_scale_init_value is not None and not math.isfinite(self.layer_scale_init_value):
            raise ValueError(f"`layer_scale_init_value={self.layer_scale_init_value}` must be finite, or None.")

    def _check_rope(self) -> None:
        if self.rope_theta is None:
            return
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"`rope_theta={self.rope_theta}` must be a finite number above 0, or None.")
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim % 4:
            raise ValueError(
                f"`rope_theta={self.rope_theta}` needs heads whose width is divisible by 4, and that of "
                f"`num_attention_heads={self.num_attention_heads}` is {head_dim}: choose another number of heads."
            )

    def _check_pooling(self) -> None:
        self._check_schedule()
        choices = self.hvt_pool_choices or []
        for choice in choices:
            try:
                self.with_schedule(choice)._check_schedule()
            except ValueError as error:
                raise ValueError(f"`hvt_pool_choices={choices}`: {error}") from None
        self._check_stages()
        self._check_speeds()

    def _check_speeds(self) -> None:
        for speed, chosen in (self.speeds or {}).items():
            if not isinstance(speed, int | float) or not 1 < speed < math.inf:
                raise ValueError(f"`speeds` has {speed!r}, which must be a number above 1, such as 2.0.")
            if "hvt_pool" not in chosen or chosen.keys() - {"hvt_pool", "merge_ratio"}:
                raise ValueError(
                    f"`speeds` has {speed}: {chosen}, which must have `hvt_pool`, and may have `merge_ratio`."
                )
            # Otherwise it would depend on the speed before.
            if self.pool_mode == "merge" and chosen["hvt_pool"] and chosen.get("merge_ratio") is None:
                raise ValueError(f"`speeds` has {speed}: {chosen}, which must have `merge_ratio` too.")
            try:
                self.with_schedule(**chosen)._check_schedule()
            except ValueError as error:
                raise ValueError(f"`speeds` has {speed}: {error}") from None

    def _check_stages(self) -> None:
        for block, recorded in (self.stages or {}).items():
            shape = (recorded,) if isinstance(recorded, int) else recorded
            fits = isinstance(shape, tuple) and all(isinstance(number, int) for number in shape)
            if block not in range(self.num_hidden_layers) or not fits or min(shape) < 1:
                raise ValueError(
                    f"`stages={self.stages}` must map blocks from 0 to {self.num_hidden_layers - 1} to numbers of "
                    f"position embeddings, each at least 1; {block}: {recorded} does not fit."
                )
            if self.has_stage_positions and len(shape) != len(self.pool_window[0]):
                raise ValueError(
                    f"`stages={self.stages}` does not fit `pool_kernel_size={self.pool_kernel_size}`: stages on a "
                    "grid have (rows, columns), others one number. For new stages, set `stages=None`."
                )

    def _check_schedule(self) -> None:
        blocks = self.hvt_pool or []
        for block in blocks:
            if not 0 <= block < self.num_hidden_layers:
                raise ValueError(
                    f"`hvt_pool={blocks}` names block {block}, and there are only the blocks 0 to "
                    f"{self.num_hidden_layers - 1} (`num_hidden_layers={self.num_hidden_layers}`)."
                )
        if blocks != sorted(set(blocks)):
            raise ValueError(f"`hvt_pool={blocks}` must name each block once, rising: {sorted(set(blocks))}.")
        ratios = self.merge_ratio if isinstance(self.merge_ratio, (list, tuple)) else [self.merge_ratio]
        if not all(0 < ratio <= 0.5 for ratio in ratios) or (self.merge_ratio == [] and blocks):
            raise ValueError(f"`merge_ratio={self.merge_ratio}` must lie in (0, 0.5].")
        if self.pool_mode == "merge" and blocks and isinstance(self.merge_ratio, list) and len(ratios) != len(blocks):
            raise ValueError(
                f"`merge_ratio={self.merge_ratio}` has {len(ratios)} entries for the {len(blocks)} blocks of "
                f"`hvt_pool={blocks}`: give one number, or one per block."
            )
        self.tokens_per_stage()


HPoolViTConfig.register_for_auto_class()

__all__ = ["HPoolViTConfig"]
