"""HPool-ViT configuration."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from functools import wraps
from typing import Any, Self, TypeVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


LN_ORDERS = ("pre", "post", "residual")
PATCHIFY_TECHNIQUES = ("linear", "convolutional")
POOL_MODES = ("max", "avg", "merge")

# The models of the paper (Table 1 and Section 4): all share image size 224, patch 16, 12 blocks, head width 64.
PRESETS: dict[str, dict[str, Any]] = {
    "hvt-ti-1": {"hidden_size": 192, "hvt_pool": [1]},
    "hvt-s-0": {"hidden_size": 384, "hvt_pool": None},
    "hvt-s-1": {"hidden_size": 384, "hvt_pool": [1]},
    "hvt-s-2": {"hidden_size": 384, "hvt_pool": [1, 7]},
    "hvt-s-3": {"hidden_size": 384, "hvt_pool": [1, 5, 9]},
    "hvt-s-4": {"hidden_size": 384, "hvt_pool": [1, 4, 7, 10]},
    "scale-hvt-ti-4": {"hidden_size": 384, "hvt_pool": [1, 4, 7, 10]},
}


# What `hvt_pool` may be.
Schedule = list[int] | tuple[int, ...] | None

Class = TypeVar("Class", bound=type)


def refuse_with_value_error(cls: Class) -> Class:
    """`@strict` reports with exceptions of its own that are no `ValueError`, the type that callers of a configuration
    catch. This raises the `ValueError` instead, with the message of the check that failed."""

    def translate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                # Of a field of several types, the message goes on with what each of them says.
                raise ValueError(str(error.__cause__).partition(" Errors: ")[0]) from error

        return wrapper

    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, translate(getattr(cls, name)))
    return cls


def _each_once(schedules: Iterable[Any]) -> list[Any]:
    """Schedules as lists, each once, and None for those that never pool; anything else is left to the type check."""
    unique = []
    for schedule in schedules:
        schedule = (list(schedule) or None) if isinstance(schedule, list | tuple) else schedule
        if schedule not in unique:
            unique.append(schedule)
    return unique


def _still_needed(stored: list[list[int]], wanted: list[list[int]]) -> list[list[int]]:
    """
    The `stored` schedules without which the `wanted` ones could not take over their stages: those for whose number of
    tokens a wanted stage was made, or all of them, where a new stage is to start from the nearest trained one.
    """
    blocks = set(itertools.chain.from_iterable(wanted))
    if not blocks <= set(itertools.chain.from_iterable(stored)):
        return stored
    makers = [next(schedule for schedule in stored if block in schedule) for block in blocks]
    return [schedule for schedule in stored if schedule in wanted or schedule in makers]


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    # The fields have no lists any more: they became tuples on assignment.
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], size)


@refuse_with_value_error
@strict
class HPoolViTConfig(PreTrainedConfig):
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
            Blocks, counted from 0, at whose input the tokens are pooled, rising; None or []: never. Changes in a
            trained model with `model.set_hvt_pool([1])` or `from_pretrained(…, hvt_pool=[1])`.
        hvt_pool_choices (`list[list[int] | None]`, *optional*):
            The schedules that the model has stages for, `hvt_pool` among them; None: only that one. A block has as
            many position embeddings as tokens under the first schedule that pools there, and resizes them for others.
            Given to `from_pretrained` beside `hvt_pool`, a trained model loses the stages that none of them needs.
        pool_mode (`str`, defaults to `"max"`):
            `"max"` or `"avg"`: 1-D pooling along the token axis (paper Section 3.2). `"merge"`: the most similar
            tokens join (after ToMe, arXiv 2210.09461).
        pool_kernel_size, pool_stride (`int`, defaults to 3 and 2):
            Window and step, in tokens, of `"max"` and `"avg"`.
        merge_ratio (`float` or `list[float]`, defaults to 0.5):
            Share of the tokens that `"merge"` removes at each block in `hvt_pool`, in (0, 0.5]; one number, or one per
            entry.
        proportional_attention (`bool`, defaults to `False`):
            Whether attention weighs a merged token by the number of patches it stands for.
        use_class_token (`bool`, defaults to `False`):
            Whether a class token, never pooled, is the pooled output instead of the mean over the tokens.
        norm_after_pooling (`bool`, defaults to `False`):
            Whether the final LayerNorm of `ln_order="pre"` follows the mean over the tokens instead of preceding it,
            as in timm's models with `fc_norm`; `last_hidden_state` is without norm then.
        qkv_bias (`bool`, defaults to `True`):
            Whether the query, key and value projections have a bias.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of every LayerNorm.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the truncated normal that initialises weights and position embeddings.

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
    pool_mode: str = "max"
    pool_kernel_size: int = 3
    pool_stride: int = 2
    merge_ratio: float | int | list[float] | tuple[float, ...] = 0.5
    proportional_attention: bool = False
    use_class_token: bool = False
    norm_after_pooling: bool = False
    qkv_bias: bool = True
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02

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
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        # Resolved here, because `@strict` checks the type of an assignment by the field's own name only.
        key = self.attribute_map.get(key, key)
        # One type per field, so that a configuration equals the one read back from its JSON.
        if key in ("image_size", "patch_size") and isinstance(value, list):
            value = tuple(value)
        elif key in ("hvt_pool", "merge_ratio") and isinstance(value, list | tuple):
            value = list(value)  # also a copy, which nobody else can change
        elif key == "hvt_pool_choices" and isinstance(value, list | tuple):
            value = _each_once(value)
        elif key == "drop_path_rate" and value is None:
            value = 0.0
        super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if {"hvt_pool", "hvt_pool_choices"} & kwargs.keys():
            # Weights come with the schedules that they were saved for, and a model needs a place for them.
            stored = [*filter(config._accepts, cls(**config_dict)._schedules_with_weights(config.pool_mode))]
            if "hvt_pool_choices" in kwargs:
                wanted = [*config.schedules, list(config.hvt_pool or [])]
                stored = [*_still_needed(stored, wanted), *wanted]
            config._list_schedules(stored)
        # The overrides in `kwargs` were assigned one by one, and must fit each other.
        config.validate()
        return result

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

    def tokens_per_stage(self, num_patches: int | None = None) -> list[int]:
        """
        Number of patch tokens (a class token not counted) at the start and after the pooling of each block in
        `hvt_pool`: 196, 97, 48, 23 for the defaults.

        Args:
            num_patches (`int`, *optional*): patches of the image; by default those of `image_size`.

        Raises:
            ValueError: if the tokens run out; it names the block and the number of tokens left.
        """
        tokens = [math.prod(self.patch_grid()) if num_patches is None else num_patches]
        if tokens[0] < 1:
            raise ValueError(
                f"The image is smaller than one patch of `patch_size={self.patch_size}` pixels: enlarge it."
            )
        for stage, block in enumerate(self.hvt_pool or []):
            left = tokens[-1]
            if self.pool_mode == "merge":
                tokens.append(left - self.num_merged(left, stage))
            elif left < self.pool_kernel_size:
                raise ValueError(
                    f"`hvt_pool={self.hvt_pool}` runs out of tokens at block {block}: {left} left, and "
                    f"`pool_kernel_size={self.pool_kernel_size}` needs as many. Pool at fewer blocks, or use larger "
                    "images, smaller patches or a smaller kernel."
                )
            else:
                tokens.append((left - self.pool_kernel_size) // self.pool_stride + 1)
        return tokens

    def num_merged(self, num_tokens: int, stage: int) -> int:
        """Number of the `num_tokens` patch tokens that join another at the merging stage `stage`, counted from 0."""
        ratio = self.merge_ratio[stage] if isinstance(self.merge_ratio, (list, tuple)) else self.merge_ratio
        # A ratio written as a fraction (48 / 196) must give that many tokens in spite of its rounding. In integers,
        # because exported programs with a free image size know no floor of a float.
        return (num_tokens * round(ratio * 10**12) + 10**6) // 10**12

    @property
    def schedules(self) -> list[list[int]]:
        """The schedules that the model has stages for, `hvt_pool_choices` or `hvt_pool` alone; []: no pooling."""
        return [list(schedule or []) for schedule in self.hvt_pool_choices or [self.hvt_pool]]

    def with_schedule(self, hvt_pool: Schedule) -> "HPoolViTConfig":
        """A copy that knows no other schedule than `hvt_pool`; it is not validated."""
        config = copy.copy(self)
        config.hvt_pool_choices = None
        config.hvt_pool = hvt_pool
        return config

    def change_schedule(self, hvt_pool: Schedule) -> None:
        """
        Assigns `hvt_pool`; where stages have weights, this schedule and those before it stay in `hvt_pool_choices`.

        Raises:
            ValueError: for a schedule that no model can be built with; nothing is changed then.
        """
        config = self.with_schedule(hvt_pool)
        config._list_schedules(self._schedules_with_weights(self.pool_mode))
        config._check_pooling()
        self.hvt_pool, self.hvt_pool_choices = config.hvt_pool, config.hvt_pool_choices

    def _schedules_with_weights(self, pool_mode: str) -> list[list[int]]:
        """Those whose stages have weights in a model of this configuration that one with `pool_mode` can take over."""
        merges = "merge" in (self.pool_mode, pool_mode)
        return [] if merges and self.hvt_pool_choices is None else self.schedules

    def _list_schedules(self, schedules: list[list[int]]) -> None:
        """Makes `schedules` and `hvt_pool` the choices; one alone needs no list."""
        choices = _each_once([*schedules, self.hvt_pool or []])
        self.hvt_pool_choices = choices if len(choices) > 1 else None

    def _accepts(self, hvt_pool: Schedule) -> bool:
        try:
            self.with_schedule(hvt_pool).validate()
        except ValueError:
            return False
        return True

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "HPoolViTConfig":
        """
        The configuration of one of the paper's models, with 1000 labels.

        Args:
            name (`str`): `hvt-ti-1`, `hvt-s-0` … `hvt-s-4` or `scale-hvt-ti-4`.
            overrides: fields that shall differ from the preset.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"`name={name!r}` is no preset: choose one of {', '.join(PRESETS)}.")
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
        self._check_pooling()

    def _check_sizes(self) -> None:
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"]
        names += ["pool_kernel_size", "pool_stride"]
        names += ["classifier_hidden_size"] if self.classifier_hidden_size is not None else []
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")
        for name in ("image_size", "patch_size"):
            shape = _pair(getattr(self, name))
            if len(shape) != 2 or min(shape) < 1:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` must be one number or (height, width), each at least 1 pixel."
                )
        if any(size % patch for size, patch in zip(self.image_shape, self.patch_shape, strict=True)):
            raise ValueError(
                f"`image_size={self.image_size}` is not divisible by `patch_size={self.patch_size}`: choose a "
                "multiple of the patch."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size={self.hidden_size}` is not divisible by "
                f"`num_attention_heads={self.num_attention_heads}`: choose a number of heads that divides the width."
            )

    def _check_choices(self) -> None:
        for name, choices in (
            ("ln_order", LN_ORDERS),
            ("patchify_technique", PATCHIFY_TECHNIQUES),
            ("pool_mode", POOL_MODES),
            ("hidden_act", ACT2FN),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown: choose one of {', '.join(choices)}.")
        if self.norm_after_pooling and self.ln_order != "pre":
            raise ValueError(f"`norm_after_pooling=True` needs `ln_order='pre'`, not {self.ln_order!r}.")

    def _check_numbers(self) -> None:
        probabilities = ["dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "projection_dropout_prob"]
        for name in [*probabilities, "drop_path_rate"]:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` is no probability in [0, 1).")
        for name in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}={getattr(self, name)}` must be a finite number above 0.")
        if self.layer_scale_init_value is not None and not math.isfinite(self.layer_scale_init_value):
            raise ValueError(f"`layer_scale_init_value={self.layer_scale_init_value}` must be finite, or None.")

    def _check_pooling(self) -> None:
        self._check_schedule()
        choices = self.hvt_pool_choices or []
        if choices and (self.hvt_pool or None) not in choices:
            raise ValueError(
                f"`hvt_pool={self.hvt_pool}` is none of `hvt_pool_choices={choices}`: choose one of them, or add it."
            )
        for choice in choices:
            try:
                self.with_schedule(choice)._check_schedule()
            except ValueError as error:
                raise ValueError(f"`hvt_pool_choices={choices}`: {error}") from None

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
