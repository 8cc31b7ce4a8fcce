"""Python started with this folder in PYTHONPATH has no torchvision, and has imported the package under test."""

import sys


sys.modules["torchvision"] = None

import hpool_vit  # noqa: E402, F401
