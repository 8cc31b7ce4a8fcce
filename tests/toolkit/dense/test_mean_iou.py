"""Mean IoU from counts of pixels, and pictures of masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from hpool_vit.toolkit.dense.evaluation import count_batch, count_pixels, mean_iou
from hpool_vit.toolkit.dense.pictures import MARGIN, coloured, palette, save_mask, side_by_side


class TestMeanIoU:
    def test_known_masks_have_the_known_overlap(self):
        truth = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]])
        answer = torch.tensor([[[0, 0, 1, 1], [1, 0, 2, 1]]])
        counts = count_pixels(answer, truth, num_labels=4)
        assert counts[0, :2, :2].tolist() == [[2, 1], [1, 2]] and counts.sum() == 6
        result = mean_iou(counts)
        assert result["per_class_iou"] == [0.5, 0.5, None, None]
        assert result["mean_iou"] == 0.5
        assert result["overall_accuracy"] == result["mean_accuracy"] == pytest.approx(2 / 3)

    def test_a_class_that_only_the_answer_has_counts_as_wrong(self):
        counts = count_pixels(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), num_labels=2)
        assert mean_iou(counts)["per_class_iou"] == [0.5, 0.0]

    def test_pixels_of_all_images_count_together(self):
        truth, answer = torch.randint(0, 3, (5, 6, 7)), torch.randint(0, 3, (5, 6, 7))
        expected = []
        for label in range(3):
            both = ((truth == label) & (answer == label)).sum()
            expected.append((both / ((truth == label) | (answer == label)).sum()).item())
        assert mean_iou(count_pixels(answer, truth, 3))["per_class_iou"] == pytest.approx(expected)
        assert mean_iou(count_pixels(answer, truth, 3))["mean_iou"] == pytest.approx(np.mean(expected))

    def test_logits_are_compared_at_the_resolution_of_the_labels(self):
        logits = torch.zeros(1, 3, 2, 2)
        logits[:, 0, :, 0] = logits[:, 2, :, 1] = 4
        labels = torch.tensor([[[0, 0, 2, 2]] * 4])
        assert count_batch((logits, "hidden states"), labels)[0].tolist() == [[8, 0, 0], [0, 0, 0], [0, 0, 8]]

    def test_without_a_pixel_that_counts_it_is_0(self):
        assert mean_iou(torch.zeros(2, 3, 3, dtype=torch.long))["mean_iou"] == 0


class TestPictures:
    def test_every_class_has_a_colour_of_its_own_and_pixels_that_do_not_count_are_white(self):
        colours = palette()
        assert len(np.unique(colours, axis=0)) == 256
        assert colours[255].tolist() == [255, 255, 255] and colours[0].tolist() == [128, 0, 0]

    def test_a_saved_mask_is_coloured_and_its_pixels_are_the_classes(self, tmp_path):
        mask = np.array([[0, 1], [255, 7]])
        save_mask(mask, tmp_path / "mask.png")
        with Image.open(tmp_path / "mask.png") as image:
            assert np.array_equal(np.array(image), mask)
            assert np.array_equal(np.array(image.convert("RGB")), palette()[mask])

    def test_image_truth_and_answer_stand_side_by_side(self):
        truth, answer = np.zeros((10, 20), dtype=np.uint8), np.ones((10, 20), dtype=np.uint8)
        truth[:5] = 255
        picture = side_by_side([Image.new("RGB", (20, 10), "green")] * 2, [truth] * 2, [answer] * 2)
        assert picture.size == (3 * 20 + 4 * MARGIN, 2 * (10 + MARGIN) + 3 * MARGIN)
        row = [picture.getpixel((MARGIN + column * (20 + MARGIN) + 3, 2 * MARGIN + 8)) for column in range(3)]
        assert row == [(0, 128, 0), *(tuple(palette()[label].tolist()) for label in (0, 1))]
        assert picture.getpixel((MARGIN + 2 * (20 + MARGIN) + 3, 2 * MARGIN + 2)) == (255, 255, 255)
        assert np.array_equal(np.array(coloured(answer)), answer)
