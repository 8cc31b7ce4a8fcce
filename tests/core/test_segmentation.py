"""The segmentation model: a linear head on the backbone's maps, and what turns its scores into masks."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import run_python, tiny_config, tiny_model
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput

from hpool_vit import (
    HPoolViTBackbone,
    HPoolViTForSemanticSegmentation,
    HPoolViTImageProcessor,
    HPoolViTImageProcessorPil,
)


MERGE = {"pool_mode": "merge", "merge_ratio": 0.4, "proportional_attention": True}
GRID = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
POOLINGS = {"merge": MERGE, "grid": GRID, "none": {"hvt_pool": None}}
LABELS = {"id2label": {0: "road", 1: "sky", 2: "tree"}, "label2id": {"road": 0, "sky": 1, "tree": 2}}


def segmenter(**fields) -> HPoolViTForSemanticSegmentation:
    torch.manual_seed(0)
    return HPoolViTForSemanticSegmentation(tiny_config(**{"initializer_range": 0.2, **LABELS, **fields})).eval()


@pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)
class TestEveryPooling:
    def test_scores_are_a_linear_function_of_the_maps_side_by_side(self, pooling, pixel_values):
        model = segmenter(**pooling)
        backbone = HPoolViTBackbone(tiny_config(**pooling)).eval()
        backbone.load_state_dict(model.state_dict(), strict=False)
        first, *others = backbone(pixel_values).feature_maps
        resized = [torch.nn.functional.interpolate(other, first.shape[2:], mode="bilinear") for other in others]
        features = torch.cat([first, *resized], dim=1)
        weight, bias = model.decode_head.weight[:, :, 0, 0], model.decode_head.bias
        expected = torch.einsum("bcij,kc->bkij", features, weight) + bias[:, None, None]
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)

    def test_every_parameter_learns(self, pooling, pixel_values):
        model = segmenter(**pooling).train()
        model(pixel_values, labels=torch.randint(0, 3, (2, 32, 32))).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_a_saved_folder_loads_again(self, pooling, pixel_values, tmp_path):
        model = segmenter(**pooling)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_saved_folders_load_without_the_package(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        "from transformers import AutoModelForSemanticSegmentation\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    print(model(torch.ones(1, 3, 32, 32)).logits.sum().item())\n"
    )
    expected = []
    for name, pooling in POOLINGS.items():
        model = segmenter(**pooling)
        model.save_pretrained(tmp_path / name)
        expected.append(model(torch.ones(1, 3, 32, 32)).logits.sum().item())
    printed = run_python(program, *(tmp_path / name for name in POOLINGS), hide=("hpool_vit",)).stdout
    assert [float(line) for line in printed.split()] == pytest.approx(expected, rel=1e-4)


class TestLoss:
    def test_it_is_the_mean_over_the_pixels_that_count_at_the_labels_resolution(self, pixel_values):
        model = segmenter(**MERGE)
        labels = torch.randint(0, 3, (2, 32, 32))
        labels[:, :10] = 255
        outputs = model(pixel_values, labels=labels)
        scores = torch.nn.functional.interpolate(outputs.logits, (32, 32), mode="bilinear")
        nll = -scores.log_softmax(1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
        torch.testing.assert_close(outputs.loss, nll[:, 10:].mean())

    def test_a_batch_in_which_no_pixel_counts_has_the_loss_0(self, pixel_values):
        loss = segmenter(**MERGE)(pixel_values, labels=torch.full((2, 32, 32), 255)).loss
        assert loss.item() == 0

    def test_the_trainer_averages_over_steps_itself(self):
        assert HPoolViTForSemanticSegmentation.accepts_loss_kwargs is False


class TestLoading:
    def test_a_trained_classifier_gives_its_trunk_and_only_the_head_is_new(self, pixel_values, tmp_path):
        classifier = tiny_model(**MERGE)
        classifier.save_pretrained(tmp_path)
        model, loading = HPoolViTForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
        assert set(loading["missing_keys"]) == {"decode_head.weight", "decode_head.bias"}
        expected = classifier.hpool_vit.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.hpool_vit.state_dict().items())

    def test_a_model_without_classes_is_refused(self):
        with pytest.raises(ValueError, match="a segmentation model needs classes"):
            HPoolViTForSemanticSegmentation(tiny_config(**MERGE, num_labels=0))

    def test_windows_along_the_row_of_tokens_are_refused(self):
        with pytest.raises(ValueError, match="leaves no grid"):
            segmenter()

    def test_a_pyramid_gives_scores_at_a_quarter_of_the_patches_size(self):
        assert segmenter(**MERGE, feature_pyramid_size=8)(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3, 32, 32)

    def test_images_of_any_size(self):
        assert segmenter(**MERGE)(torch.randn(1, 3, 24, 50)).logits.shape == (1, 3, 6, 12)


@pytest.mark.parametrize("cls", [HPoolViTImageProcessor, HPoolViTImageProcessorPil])
class TestMasks:
    def test_scores_become_the_classes_of_the_pixels_at_the_size_of_each_image(self, cls):
        logits = torch.zeros(2, 3, 2, 2)
        logits[0, 1, :, 0] = logits[0, 2, :, 1] = 1
        logits[1, 2] = 1
        small = cls().post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits))
        assert [mask.tolist() for mask in small] == [[[1, 2], [1, 2]], [[2, 2], [2, 2]]]
        outputs = SemanticSegmenterOutput(logits=logits)
        large, other = cls().post_process_semantic_segmentation(outputs, target_sizes=[(4, 8), (3, 5)])
        assert large.tolist() == [[1] * 4 + [2] * 4] * 4
        assert other.tolist() == [[2] * 5] * 3

    @pytest.mark.parametrize("num_labels", [1, 2, 7])
    def test_few_scores_are_resized_at_a_time(self, cls, num_labels, monkeypatch):
        module, resized = sys.modules[cls.__module__], []
        resize = module.resize_scores
        monkeypatch.setattr(module, "resize_scores", lambda *args: resized.append(resize(*args)) or resized[-1])
        monkeypatch.setattr(module, "MOST_RESIZED_SCORES", 2 * 9 * 11)
        outputs = SemanticSegmenterOutput(logits=torch.randn(1, num_labels, 4, 5))
        [mask] = cls().post_process_semantic_segmentation(outputs, target_sizes=[(9, 11)])
        assert max(len(scores) for scores in resized) <= 2
        [whole] = cls().post_process_semantic_segmentation(outputs, [(9, 11)], return_segmentation_scores=True)
        assert torch.equal(mask, whole["segmentation"]) and mask.dtype == torch.long

    def test_a_wrong_number_of_sizes_is_refused(self, cls):
        with pytest.raises(ValueError, match="1 sizes for 2 images"):
            cls().post_process_semantic_segmentation(
                SemanticSegmenterOutput(logits=torch.zeros(2, 3, 2, 2)), target_sizes=[(4, 4)]
            )


def test_the_pipeline_returns_a_mask_of_each_class_in_the_image(tmp_path):
    model = segmenter(**MERGE)
    model.save_pretrained(tmp_path)
    processor = HPoolViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    image.save(tmp_path / "image.png")
    answers = pipeline("image-segmentation", model=str(tmp_path))(image)
    masks = {answer["label"]: np.array(answer["mask"]) > 0 for answer in answers}
    assert masks.keys() <= {"road", "sky", "tree"} and all(mask.shape == (40, 60) for mask in masks.values())
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "from transformers import pipeline\n"
        "segment = pipeline('image-segmentation', model=sys.argv[1], trust_remote_code=True)\n"
        "print(json.dumps(sorted(answer['label'] for answer in segment(sys.argv[1] + '/image.png'))))\n"
    )
    printed = run_python(program, tmp_path, hide=("hpool_vit",)).stdout
    assert json.loads(printed.splitlines()[-1]) == sorted(masks)
