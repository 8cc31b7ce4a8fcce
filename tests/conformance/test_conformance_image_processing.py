"""Transformers' suite for image processors, on both backends."""

import os
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers_tests import test_image_processing_common
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from hpool_vit import HPoolViTImageProcessor, HPoolViTImageProcessorPil


pytestmark = pytest.mark.conformance

WITHOUT_TORCHVISION = Path(__file__).parent / "without_torchvision"


class HPoolViTImageProcessingTester(ImageProcessingTester):
    batch_size = 7
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    crop_size = {"height": 18, "width": 20}
    # Of the scores that are segmented.
    num_labels = 5
    size = {"height": 6, "width": 7}

    def __init__(self):
        """Nothing to look up: the tests below name the image processors."""

    def prepare_image_processor_dict(self):
        return {
            "do_resize": True,
            "size": {"shortest_edge": 24},
            "do_center_crop": True,
            "crop_size": self.crop_size,
            "do_normalize": True,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4],
        }


# Earlier versions of the suite do not have it.
PostProcessTestMixin = getattr(test_image_processing_common, "PostProcessSemanticSegmentationTestMixin", object)


class HPoolViTImageProcessingTest(ImageProcessingTestMixin, PostProcessTestMixin, unittest.TestCase):
    image_processing_classes = {"torchvision": HPoolViTImageProcessor, "pil": HPoolViTImageProcessorPil}
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = HPoolViTImageProcessingTester()
        # For the program that one test runs, which knows Transformers' own classes only.
        self.enterContext(patch.dict(os.environ, {"PYTHONPATH": str(WITHOUT_TORCHVISION)}))

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_call_numpy_4_channels(self):
        # Earlier versions of the suite leave the conversion to three channels on.
        for image_processor_class in self.image_processing_classes.values():
            self.enterContext(patch.object(image_processor_class, "do_convert_rgb", False))
        super().test_call_numpy_4_channels()
