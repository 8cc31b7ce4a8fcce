"""
Stand-ins for what Transformers' tests import and its source distribution leaves out, small and for images only: the
suites of exporters and of text generation are empty, the others do the same work as those that they stand for.
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import sklearn.datasets
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, pipeline
from transformers.models.auto import modeling_auto

import hpool_vit
from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification


PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"

# Where the suite finds the tiny models that it otherwise takes from the Hub: `FOLDER/MODEL_TYPE/ARCHITECTURE`.
TINY_MODELS = tempfile.TemporaryDirectory()
ARCHITECTURES = ("HPoolViTModel", "HPoolViTForImageClassification")
IMAGE_PROCESSORS = ("HPoolViTImageProcessor", "HPoolViTImageProcessorPil")

# Fields that every configuration takes, with values that are not the defaults.
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["HPoolViTModel"],
    "id2label": {0: "ant", 1: "bee"},
    "label2id": {"ant": 0, "bee": 1},
    "problem_type": "regression",
}


class ImageClassificationPipelineTests:
    """What Transformers' class of this name offers its pipeline suite."""

    task = "image-classification"

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **processors):
        model = model.to(getattr(torch, dtype))
        photo = Image.open(PHOTO)
        examples = [photo, str(PHOTO), photo.convert("L"), photo.convert("RGBA"), photo.convert("P")]
        return pipeline(self.task, model=model, image_processor=image_processor), examples

    def run_pipeline_test(self, pipe, examples):
        labels = set(pipe.model.config.id2label.values())
        for answer in [*(pipe(example, top_k=2) for example in examples), *pipe(examples, top_k=2, batch_size=2)]:
            assert len(answer) == 2 and {entry["label"] for entry in answer} <= labels
            assert 1 >= answer[0]["score"] >= answer[1]["score"] >= 0


class ImageFeatureExtractionPipelineTests(ImageClassificationPipelineTests):
    task = "image-feature-extraction"

    def run_pipeline_test(self, pipe, examples):
        config = pipe.model.config
        num_tokens = config.tokens_per_stage()[-1] + config.use_class_token
        for example in examples:
            assert pipe(example, return_tensors=True).shape == (1, num_tokens, config.hidden_size)
            assert len(pipe(example)[0]) == num_tokens
            assert len(pipe(example, pool=True)[0]) == config.hidden_size
        assert len(pipe(examples, batch_size=2)) == len(examples)


class HPoolViTForImageClassificationOfBytes(HPoolViTForImageClassification):
    """
    The suite for sharded training (FSDP) trains language models only, on 64 tokens below 256: to this class that is a
    greyscale image of 8 × 8 pixels in 256 shades, of the class that its first pixel names.
    """

    _auto_class = None  # its code is not to be saved with the model

    def forward(self, input_ids, labels, **kwargs):
        size, num_channels = self.config.image_shape, self.config.num_channels
        pixel_values = (input_ids.view(-1, 1, 8, 8) / 255).to(self.dtype)
        pixel_values = torch.nn.functional.interpolate(pixel_values, size).expand(-1, num_channels, -1, -1)
        return super().forward(pixel_values, labels=labels[:, 0] % self.num_labels)


def device_type() -> str:
    return (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type


def rank_device(rank: int) -> torch.device:
    return torch.device("cpu") if device_type() == "cpu" else torch.device(device_type(), rank)


def set_rank_device(rank: int):
    if device_type() != "cpu":
        torch.accelerator.set_device_index(rank)


def start_rank_processes(function, args, nprocs):
    # Forked from a process that has imported what takes long to import.
    multiprocessing.set_forkserver_preload(["hpool_vit", "transformers.testing_utils"])
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="forkserver")


def install(package: str, suites: Path):
    """Makes importable, as modules of `package`, what the modules in `suites` import and do not find."""

    def add(name: str, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module

    add(f"{package}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add(f"{package}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    add(f"{package}.utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
    add("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(PHOTO))
    add(
        f"{package}.distributed_testing_utils",
        _get_distributed_device_type=device_type,
        _get_distributed_backend=lambda: torch.distributed.get_default_backend_for_device(device_type()),
        _get_rank_device=rank_device,
        _set_rank_device=set_rank_device,
        _start_rank_processes=start_rank_processes,
    )
    # Imported by relative or by absolute name, depending on the version, and with those of every other task.
    mixin = (suites / "test_pipeline_mixin.py").read_text(encoding="utf-8")
    for module, name in re.findall(r"\.pipelines\.(test_\w+)(?: import |\.)(\w+)", mixin):
        contents = {name: globals().get(name, type(name, (), {}))}
        add(f"{package}.pipelines.{module}", **contents)
        add(f"tests.pipelines.{module}", **contents)

    adopt_model()


def adopt_model():
    """Gives HPool-ViT the places in which the suites look up Transformers' own models."""
    modeling_auto.MODEL_MAPPING_NAMES["hpool_vit"] = "HPoolViTModel"
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["hpool_vit"] = "HPoolViTForImageClassification"
    AutoModelForCausalLM.register(HPoolViTConfig, HPoolViTForImageClassificationOfBytes)
    # Where the suites would import Transformers from the source tree around them, they get the package under test.
    transformers.utils.direct_transformers_import = lambda path: hpool_vit

    summary = {name: {"tokenizer_classes": [], "processor_classes": IMAGE_PROCESSORS} for name in ARCHITECTURES}
    reports = Path(TINY_MODELS.name, "reports")
    reports.mkdir()
    (reports / "tiny_model_summary.json").write_text(json.dumps(summary))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = TINY_MODELS.name
