"""Packaging of HPool-ViT: the repository root is the package `hpool_vit`."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
TRAINING = ["accelerate>=1.10", "datasets>=5.0", "evaluate>=0.4.6"]
EXAMPLES = ["torchvision", *TRAINING, "scikit-learn", "matplotlib", "pandas", "psutil", "pyyaml", "tensorboard"]
EXAMPLES += ["requests", "tqdm"]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]
DEMO = ["gradio>=6"]
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "parameterized", "timm", "playwright"]
TEST += ["build", "setuptools>=77", "ruff", "mypy"]

setup(
    script_name="setup.py",  # by which setuptools knows the one file beside the modules that is none
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
        "hpool_vit.toolkit.hub": ["*.md"],
    },
    entry_points={"console_scripts": ["hpool-vit = hpool_vit.toolkit.command:main"]},
    install_requires=["torch>=2.11", "transformers>=5.17", "huggingface_hub>=1.5", "pillow"],
    extras_require={
        "vision": ["torchvision"],
        "train": TRAINING,
        "examples": EXAMPLES,
        "export": EXPORT,
        "demo": [*EXAMPLES, *DEMO],
        "docs": DOCS,
        "test": [*EXAMPLES, *EXPORT, *DEMO, *DOCS, *TEST],
    },
)
