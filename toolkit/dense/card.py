"""The model card of a segmentation model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..hub.card import escape, format_facts
from .model import trunk_of


WITH_REMOTE_CODE = """\
`trust_remote_code=True` lets Transformers run the model's code, which is stored in this repository. You do not need it
if you import the package `hpool_vit` first."""
WITH_PACKAGE = (
    "Import the package `hpool_vit` first: Transformers does not load the code of a head's backbone by itself."
)


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the name alone of every file and folder: where it lies is nobody else's business."""
    return {
        key: Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else value
        for key, value in settings.items()
    }


def write_segmentation_card(
    output_dir: Path,
    model: PreTrainedModel,
    class_names: list[str],
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    picture: str | None = None,
) -> Path:
    """
    Writes `output_dir/README.md`.

    Args:
        output_dir (`Path`): the saved folder.
        model (`PreTrainedModel`): the saved model.
        class_names (`list[str]`): the names of its classes.
        results: as `mean_iou` returns them.
        settings: the flags of the run.
        data: what to say of the data.
        picture: a picture in `output_dir`.
    """
    name = Path(output_dir).resolve().name
    config = trunk_of(model).config
    carries_code = hasattr(model, "hpool_vit")
    facts = {
        "model": type(model).__name__,
        "parameters": f"{model.num_parameters():,}",
        "classes": len(class_names),
        "blocks": f"{config.num_hidden_layers}, {config.hidden_size} wide",
        "pooling": f"{config.pool_mode} before blocks {config.hvt_pool}" if config.hvt_pool else "none",
        "tokens per stage": config.tokens_per_stage(),
    }
    shares = {key: f"{value:.2%}" for key, value in results.items() if isinstance(value, float)}
    classes = zip(class_names, results["per_class_iou"], strict=True)
    shares |= {f"IoU of {label}": "does not occur" if iou is None else f"{iou:.2%}" for label, iou in classes}
    trust = ", trust_remote_code=True" if carries_code else ""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["hpool-vit", "image-segmentation", *(["custom_code"] if carries_code else [])],
        metrics=["mean_iou"],
    )
    sections = [
        f"---\n{metadata}\n---\n\n# {escape(name)}",
        "An HPool-ViT, a Vision Transformer that pools its token sequence between blocks, for semantic segmentation.",
        format_facts(facts),
        "## How to use",
        "```python\n"
        + ("" if carries_code else "import hpool_vit\n")
        + "from transformers import pipeline\n\n"
        + f'segment = pipeline("image-segmentation", model={json.dumps(name)}{trust})\n'
        + 'print(segment("photo.jpg"))\n```',
        WITH_REMOTE_CODE if carries_code else WITH_PACKAGE,
        "## Results",
        format_facts(shares, "metric", "value"),
        "## Data",
        format_facts(public(data)),
        "## Training",
        f"```yaml\n{yaml.safe_dump(json.loads(json.dumps(public(settings), default=str)), sort_keys=False)}```",
    ]
    if picture:
        sections += ["## Pictures", f"![Image, truth and answer]({picture})"]
    file = Path(output_dir) / "README.md"
    ModelCard("\n\n".join(sections) + "\n").save(file)
    return file
