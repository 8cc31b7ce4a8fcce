"""Loads a saved folder through every Auto class and pipeline, as a user without the package would, and prints JSON.

python use_saved_folder.py FOLDER COPY       COPY: where everything is saved again
"""

import json
import sys

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

# Not from the top level, where Transformers 5.17 has a stand-in for it on machines without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


folder, copy = sys.argv[1:]
trust = {"trust_remote_code": True}
image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")

config = AutoConfig.from_pretrained(folder, **trust)
base = AutoModel.from_pretrained(folder, **trust)
model = AutoModelForImageClassification.from_pretrained(folder, **trust)
processors = {
    str(backend): AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
    for backend in (None, "torchvision", "pil")
    if backend != "torchvision" or sys.modules.get("torchvision", True) is not None
}
saved = load_file(f"{folder}/model.safetensors")
pixel_values = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
with torch.no_grad():
    result = {
        "config": type(config).__name__,
        "logits": model(pixel_values).logits.tolist(),
        "pooled": base(pixel_values).pooler_output.tolist(),
        "processors": {backend: type(processor).__name__ for backend, processor in processors.items()},
        "pixels": {b: p(image, return_tensors="pt").pixel_values.mean().item() for b, p in processors.items()},
    }
# Some versions of Transformers gave custom models random weights without a word.
result["weights_that_differ"] = [
    name
    for loaded, prefix in ((model, ""), (base, "hpool_vit."))
    for name, weight in loaded.state_dict().items()
    if not torch.equal(weight, saved[prefix + name])
]
result["classes"] = pipeline("image-classification", model=folder, **trust)(image)
features = pipeline("image-feature-extraction", model=folder, **trust)(image, return_tensors="pt")
result["feature_shape"] = list(features.shape)

model.save_pretrained(copy)
processors["None"].save_pretrained(copy)
base.save_pretrained(copy + "-base")
print("RESULT " + json.dumps(result))
