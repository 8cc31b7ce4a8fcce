"""Packaging of HPool-ViT: the repository root is the package `hpool_vit`."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
# What the modules of the package import themselves, whether Transformers brings it along or not.
BASE = ["torch>=2.11", "transformers>=5.17", "huggingface_hub>=1.5", "pillow", "numpy", "safetensors"]
BASE += ["jinja2", "pyyaml", "tqdm", "typer"]
# One extra per command that needs more than that.
VISION = ["torchvision"]
VISUALIZE = [*VISION, "matplotlib"]
PREDICT = [*VISUALIZE, "accelerate>=1.10", "requests"]
TRAIN = [*PREDICT, "datasets>=5.0", "evaluate>=0.4.6", "pandas", "psutil", "scikit-learn"]
EXPORT = [*VISION, "onnx", "onnxscript", "onnxruntime"]
DEMO = [*VISUALIZE, "gradio>=6"]
# Photos of phones; every command reads them if it is there.
HEIF = ["pillow-heif"]
EXAMPLES = [*TRAIN, "tensorboard"]
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "parameterized", "timm", "playwright"]
TEST += ["build", "setuptools>=77", "ruff", "mypy"]

setup(
    script_name="setup.py",  # so that setuptools does not take this file for a module of the package
    name="hpool-vit",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text()).group(1),
    description="HPool-ViT, the hierarchically pooled Vision Transformer, for Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The HPool-ViT authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["vision transformer", "token pooling", "token merging", "image classification", "transformers"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=["hpool_vit", *(f"hpool_vit.{name}" for name in find_packages(include=["toolkit", "toolkit.*"]))],
    package_dir={"hpool_vit": "."},
    package_data={
        "hpool_vit": ["py.typed", "LICENSE"],
        "hpool_vit.toolkit.demo": ["space_files/*"],
        "hpool_vit.toolkit.export": ["web_files/*"],
        "hpool_vit.toolkit.hub": ["*.md"],
    },
    entry_points={"console_scripts": ["hpool-vit = hpool_vit.toolkit.command:main"]},
    install_requires=BASE,
    extras_require={
        "vision": VISION,
        "visualize": VISUALIZE,
        "predict": PREDICT,
        "train": TRAIN,
        "export": EXPORT,
        "demo": DEMO,
        "heif": HEIF,
        "all": [*TRAIN, *EXPORT, *DEMO, *HEIF],
        "examples": EXAMPLES,
        "docs": DOCS,
        "test": [*EXAMPLES, *EXPORT, *DEMO, *DOCS, *TEST],
    },
)
