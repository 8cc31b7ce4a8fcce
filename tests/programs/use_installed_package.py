"""Builds, saves and loads a tiny model with the package that is installed, and prints JSON.

python use_installed_package.py FOLDER       FOLDER: where model and image processor are saved
"""

import json
import sys
import sysconfig

import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import hpool_vit


folder = sys.argv[1]
config = hpool_vit.HPoolViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=4,
    hvt_pool=[1],
    num_labels=3,
)
model = hpool_vit.HPoolViTForImageClassification(config).eval()
model.save_pretrained(folder)
hpool_vit.HPoolViTImageProcessor.for_config(config).save_pretrained(folder)

image_processor = AutoImageProcessor.from_pretrained(folder)
inputs = image_processor(torch.zeros(3, 40, 50, dtype=torch.uint8), return_tensors="pt")
again = AutoModelForImageClassification.from_pretrained(folder)
with torch.no_grad():
    same = torch.equal(again(**inputs).logits, model(**inputs).logits)
report = {
    "file": hpool_vit.__file__,
    "site_packages": sysconfig.get_path("purelib"),
    "version": hpool_vit.__version__,
    "model": type(AutoModel.from_pretrained(folder)).__name__,
    "same_logits": same,
}
print(json.dumps(report))
