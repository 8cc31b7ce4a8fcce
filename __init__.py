"""HPool-ViT, the hierarchically pooled Vision Transformer, for Hugging Face Transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# Not from the top level, where Transformers 5.17 has a stand-in for it on machines without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_hpool_vit import HPoolViTConfig
from .image_processing_hpool_vit import HPoolViTImageProcessor, HPoolViTImageProcessorPil
from .modeling_hpool_vit import (
    HPoolViTBackbone,
    HPoolViTForImageClassification,
    HPoolViTForSemanticSegmentation,
    HPoolViTModel,
    HPoolViTPreTrainedModel,
)


__version__ = "0.1.0"

# `exist_ok`: the package may come after a folder loaded with `trust_remote_code`, which registers the same names.
AutoConfig.register("hpool_vit", HPoolViTConfig, exist_ok=True)
AutoModel.register(HPoolViTConfig, HPoolViTModel, exist_ok=True)
AutoModelForImageClassification.register(HPoolViTConfig, HPoolViTForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(HPoolViTConfig, HPoolViTForSemanticSegmentation, exist_ok=True)
AutoBackbone.register(HPoolViTConfig, HPoolViTBackbone, exist_ok=True)
AutoImageProcessor.register(
    HPoolViTConfig,
    image_processor_classes={"torchvision": HPoolViTImageProcessor, "pil": HPoolViTImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "HPoolViTBackbone",
    "HPoolViTConfig",
    "HPoolViTForImageClassification",
    "HPoolViTForSemanticSegmentation",
    "HPoolViTImageProcessor",
    "HPoolViTImageProcessorPil",
    "HPoolViTModel",
    "HPoolViTPreTrainedModel",
]
