"""Which maps a segmentation head reads: its own choice, or the given blocks."""

import pytest
from helpers import tiny_model

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.dense.model import start_segmenter


GRID = {"pool_mode": "avg", "pool_kernel_size": (2, 2), "pool_stride": (2, 2), "hvt_pool": [3]}
NAMES = ["dark", "bright"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_model(pool_mode="merge")
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("head", "fields", "expected"),
    [
        ("linear", {}, [2, 4]),
        ("linear", {"hvt_pool": None}, [2, 4]),
        ("linear", {"out_indices": [1, 3]}, [1, 3]),
        ("upernet", {}, [1, 2, 3, 4]),
        ("upernet", {"out_indices": [2, 4]}, [2, 4]),
    ],
)
def test_a_head_reads_maps_of_evenly_spaced_blocks_or_the_given_ones(trained, head, fields, expected):
    model, _, _ = start_segmenter(trained, head, NAMES, (32, 32), **fields)
    backbone = model if head == "linear" else model.backbone
    assert backbone.out_indices == expected


def test_of_a_pooled_grid_a_head_reads_the_last_map_of_each_resolution(tmp_path):
    model = tiny_model(**GRID)
    model.save_pretrained(tmp_path)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(tmp_path)
    assert start_segmenter(str(tmp_path), "linear", NAMES, (32, 32))[0].out_indices == [3, 4]


@pytest.mark.parametrize("blocks", [[5], [3, 1], [2, 2], [-1], []])
def test_blocks_that_there_are_not_are_refused(trained, blocks):
    with pytest.raises(ValueError, match=r"`out_indices=.*give rising numbers of blocks from 0 to 4"):
        start_segmenter(trained, "linear", NAMES, (32, 32), out_indices=blocks)
