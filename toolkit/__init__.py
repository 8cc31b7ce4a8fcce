"""
What people do with an HPool-ViT: convert, train, predict, visualize, export, publish and show it, as functions and as
the command `hpool-vit`.
"""

import importlib
from typing import Any


# Each public name, and the module that is imported when you first use it.
_MODULES = {
    "Comparison": "conversion.compare",
    "ConversionError": "conversion.checkpoint",
    "ConversionReport": "conversion.building",
    "DataArguments": "data.sources",
    "PoolingTrace": "inspection.trace",
    "SavedModelError": "shared.saved_model",
    "StageTrace": "inspection.trace",
    "block_macs": "inspection.trace",
    "compare_with_source": "conversion.compare",
    "compute_metrics": "training.evaluation",
    "convert": "conversion.convert",
    "convert_hvt": "conversion.hvt",
    "convert_source": "conversion.vit",
    "convert_vit": "conversion.vit",
    # Not from `inspection.figure`, because this module says which package is missing.
    "draw": "inspection.visualize",
    "draw_chart": "inspection.visualize",
    "export_model": "export.export",
    "final_report": "training.report",
    "load_backbone": "dense.backbone",
    "load_digits_dataset": "data.digits",
    "load_image_data": "data.sources",
    "load_saved_classifier": "shared.saved_model",
    "load_saved_model": "shared.saved_model",
    "make_optimizer": "training.optimization",
    "make_space": "demo.space",
    "model_stats": "inspection.stats",
    "predict": "inference.predict",
    "prepare_repository": "hub.repository",
    "read_source": "conversion.sources",
    "recipe_arguments": "training.recipes",
    "recover": "recovery.recover",
    "serve": "demo.app",
    "speed_up": "speed.speed_up",
    "trace_images": "inspection.visualize",
    "trace_pooling": "inspection.trace",
    "train_transform": "training.recipes",
    "training_settings": "training.recipes",
    "upload_repository": "hub.push",
    "validation_transform": "training.recipes",
    "write_model_card": "hub.card",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
