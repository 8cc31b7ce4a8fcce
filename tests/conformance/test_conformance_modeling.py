"""Transformers' suites for configurations, models, pipelines and training, on every kind of HPool-ViT."""

import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers.models.dinov3_vit import configuration_dinov3_vit
from transformers_tests import test_fsdp_mixin
from transformers_tests.stand_ins import TINY_MODELS
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

import hpool_vit
from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTModel
from hpool_vit.modeling_hpool_vit import HPoolViTEmbeddings


pytestmark = pytest.mark.conformance


class HPoolViTModelTester:
    """The tiny model of the suites; `variant` holds the fields in which one test class differs from the next."""

    is_training = True
    batch_size = 4
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    image_size = 32
    patch_size = 4

    def __init__(self, parent, **variant):
        self.parent = parent
        self.variant = variant
        # The suites look at the input of the first block, which is not pooled.
        self.seq_length = (self.image_size // self.patch_size) ** 2 + variant.get("use_class_token", False)

    def get_config(self):
        return HPoolViTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            image_size=self.image_size,
            patch_size=self.patch_size,
            hvt_pool=[1],
            **self.variant,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class ImagePipelineTesterMixin(PipelineTesterMixin):
    """The pipeline suite without the tasks of text, sound, video and boxes."""

    pipeline_model_mapping = {
        "image-feature-extraction": HPoolViTModel,
        "image-classification": HPoolViTForImageClassification,
    }


for name in vars(PipelineTesterMixin):
    if name.startswith("test_pipeline_") and not name.startswith(
        ("test_pipeline_image_feature_extraction", "test_pipeline_image_classification")
    ):
        setattr(ImagePipelineTesterMixin, name, None)


class Suites(ModelTesterMixin, ImagePipelineTesterMixin, TrainingTesterMixin):
    """The suites that every variant runs. What they expect of models of text, and is another for images, is below."""

    variant = {}
    all_model_classes = (HPoolViTModel, HPoolViTForImageClassification)
    model_tester = None
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = HPoolViTModelTester(self, **self.variant)

    def test_config(self):
        config_tester = ConfigTester(
            self, config_class=HPoolViTConfig, has_text_modality=False, hidden_size=48, **self.variant
        )
        config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIs(model.get_input_embeddings(), model.base_model.embeddings)
            self.assertIsNone(model.get_output_embeddings())
            model.set_input_embeddings(torch.nn.Identity())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Identity)

    def test_can_init_all_missing_weights(self):
        # The suite reads a model's year in the header of its file, and leaves out the older ones.
        with patch("inspect.getfile", return_value=configuration_dinov3_vit.__file__):
            super().test_can_init_all_missing_weights()

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # The weight that the suite looks for is that of a table of tokens.
        weight = property(lambda embeddings: embeddings.patch_embeddings.projection.weight)
        with patch.object(HPoolViTEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_can_capture_specific_layers_hidden_states(self):
        # The suite leaves out models that record the outputs of several classes: the embeddings and the blocks.
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            hidden_states = model(**inputs, output_hidden_states=True).hidden_states
            captured = model(**inputs, output_hidden_states=[0, 2]).hidden_states
            torch.testing.assert_close(captured[::2], hidden_states[::2])
            self.assertIsNone(captured[1])

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        folder = Path(TINY_MODELS.name, model_architecture.config_class.model_type, repo_name)
        config = self.model_tester.get_config()
        model_architecture(config).save_pretrained(folder)
        getattr(hpool_vit, kwargs["image_processor_name"]).for_config(config).save_pretrained(folder)
        super().run_pipeline_test(task, repo_name, model_architecture, **kwargs)

    @unittest.skip("Position embeddings of images are interpolated, not resized")
    def test_resize_position_vector_embeddings(self):
        pass

    @unittest.skip("An image model has no parts of other modalities")
    def test_sdpa_can_dispatch_composite_models(self):
        pass

    # The training suite has batches of text only so far: it takes ours in their place.

    def _get_model_modality(self):
        return "text"

    def _get_trainable_model_class(self):
        return HPoolViTForImageClassification

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return {"pixel_values": inputs["pixel_values"][:batch_size], "labels": torch.arange(batch_size) % 2}

    def test_training_overfit(self):
        with patch.object(HPoolViTConfig, "vocab_size", None, create=True):
            super().test_training_overfit()


class PreNormTest(Suites, unittest.TestCase):
    variant = {"ln_order": "pre"}


class PostNormTest(Suites, unittest.TestCase):
    variant = {"ln_order": "post", "patchify_technique": "convolutional", "pool_mode": "avg"}


class ResidualTest(Suites, unittest.TestCase):
    variant = {"ln_order": "residual", "layer_scale_init_value": 0.1, "classifier_hidden_size": 16}
    # A classifier of two layers starts with a tenth of the gradient.
    training_overfit_learning_rate = 5e-3


class MergeTest(Suites, unittest.TestCase):
    variant = {
        "ln_order": "pre",
        "pool_mode": "merge",
        "merge_ratio": 0.3,
        "proportional_attention": True,
        "use_class_token": True,
    }


class ShardedTest(FSDPTesterMixin, unittest.TestCase):
    """Trains, saves and loads with sharded parameters (FSDP) in two processes, against DistributedDataParallel."""

    model_tester = None

    def setUp(self):
        self.model_tester = HPoolViTModelTester(self)
        # The models that the suite runs on by default are a few of text; None means any.
        self.enterContext(patch.object(test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", None))
