"""Pooling in windows on the grid of patches."""

import pytest
import torch
from helpers import tiny_config, tiny_model
from torch.nn import functional as F

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification
from hpool_vit.configuration_hpool_vit import LN_ORDERS
from hpool_vit.pooling_hpool_vit import POOLINGS, Tokens
from hpool_vit.toolkit.inspection.stats import model_stats
from hpool_vit.toolkit.inspection.trace import trace_pooling


GRID = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
POOL2D = {"max": F.max_pool2d, "avg": F.avg_pool2d}


@pytest.mark.parametrize("pool_mode", POOL2D)
@pytest.mark.parametrize(
    ("kernel_size", "stride"), [((2, 2), (2, 2)), ((3, 3), (2, 2)), ((1, 2), (1, 2)), ((3, 2), (2, 1))]
)
def test_windows_are_those_of_pytorchs_own_pooling(pool_mode, kernel_size, stride):
    config = tiny_config(pool_mode=pool_mode, pool_kernel_size=kernel_size, pool_stride=stride, image_size=(28, 36))
    stage = POOLINGS[pool_mode](config, block=1)
    images = torch.randn(2, 32, 7, 9)
    expected = POOL2D[pool_mode](images, kernel_size, stride)
    # The first token stands before the patches and stays.
    first = torch.randn(2, 1, 32)
    tokens = torch.cat((first, images.flatten(2).transpose(1, 2)), dim=1)
    pooled = stage(Tokens(tokens, residual=-tokens, num_prefix_tokens=1, grid=(7, 9)))
    assert torch.equal(pooled.hidden_states[:, :1], first)
    torch.testing.assert_close(pooled.feature_map, expected)
    assert pooled.grid == tuple(expected.shape[2:]) == config.shapes_per_stage()[1]
    torch.testing.assert_close(pooled.residual[:, 1:], POOL2D[pool_mode](-images, kernel_size, stride).flatten(2).mT)


@pytest.mark.parametrize("pool_mode", POOL2D)
@pytest.mark.parametrize("ln_order", LN_ORDERS)
def test_the_model_keeps_rows_and_columns_to_the_end(pool_mode, ln_order, pixel_values):
    model = tiny_model(pool_mode=pool_mode, ln_order=ln_order, **GRID).train()
    outputs = model(pixel_values, labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert [state.shape[1] for state in outputs.hidden_states] == [64, 64, 16, 16, 4]
    assert model.hpool_vit.pooling["1"].position_embeddings.shape == (1, 16, 32)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stage_positions_are_resized_in_two_dimensions():
    model = tiny_model(hvt_pool=[1], **GRID)
    stage = model.hpool_vit.pooling["1"]
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    with torch.no_grad():
        stage.position_embeddings.copy_(rows.reshape(1, 16, 1).expand(-1, -1, 32))
    pooled = stage(Tokens(torch.zeros(1, 4 * 12, 32), grid=(4, 12)), interpolate_pos_encoding=True)
    expected = F.interpolate(rows[None, None], size=(2, 6), mode="bicubic").flatten(2).mT.expand(-1, -1, 32)
    torch.testing.assert_close(pooled.hidden_states, expected)
    assert model(torch.randn(1, 3, 44, 60), interpolate_pos_encoding=True).logits.shape == (1, 3)


def test_a_saved_folder_keeps_the_grid_of_its_stages(tmp_path, pixel_values):
    model = tiny_model(image_size=(32, 64), **GRID)
    images = torch.randn(2, 3, 32, 64)
    model.save_pretrained(tmp_path)
    loaded = HPoolViTForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.stages == {1: (4, 8), 3: (2, 4)}
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_new_stage_starts_from_the_nearest_ones_positions_in_two_dimensions(tmp_path):
    tiny_model(hvt_pool=[1], image_size=(32, 64), **GRID).save_pretrained(tmp_path)
    model = HPoolViTForImageClassification.from_pretrained(tmp_path, hvt_pool=[1, 2])
    trained, new = (model.hpool_vit.pooling[block].position_embeddings for block in "12")
    expected = F.interpolate(trained.mT.unflatten(2, (4, 8)), size=(2, 4), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(new, expected)
    model.set_hvt_pool([3])
    assert model.config.stages == {1: (4, 8), 2: (2, 4)}
    assert model.hpool_vit.pooling["3"].position_embeddings.shape == (1, 32, 32)


@pytest.mark.parametrize("pool_mode", POOL2D)
def test_the_trace_follows_the_windows(pool_mode):
    model = tiny_model(hvt_pool=[1], pool_mode=pool_mode, **GRID)
    trace = trace_pooling(model, torch.randn(1, 3, 32, 32))
    corner = trace.stages[1].receptive_field[0, 0].reshape(8, 8)
    assert corner.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    torch.testing.assert_close(trace.stages[1].share.sum(-1), torch.ones(1, 16))


def test_the_preset_of_ours_has_the_tokens_of_a_pyramid():
    config = HPoolViTConfig.from_preset("hpool-s-grid")
    assert config.shapes_per_stage() == [(14, 14), (7, 7), (3, 3)]
    assert model_stats(config)["parameters"] == pytest.approx(22.08e6, rel=0.001)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool_kernel_size": (2, 2)}, "`pool_kernel_size=(2, 2)` and `pool_stride=2` must both be numbers"),
        ({"pool_kernel_size": (2, 0), "pool_stride": (2, 2)}, "`pool_kernel_size=(2, 0)` must be one number or (rows"),
        ({"pool_stride": 0}, "`pool_stride=0` must be one number or (rows"),
        ({**GRID, "hvt_pool": [0, 1, 2, 3]}, "runs out of tokens at block 3: 1 × 1 left"),
        ({**GRID, "stages": {1: 31}}, "does not fit `pool_kernel_size=(2, 2)`"),
        ({"stages": {1: (4, 4)}}, "does not fit `pool_kernel_size=3`"),
    ],
    ids=["mixed", "zero", "no-step", "runs-out", "row-of-positions", "grid-of-positions"],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    assert message in str(error.value)


def test_a_number_of_patches_is_not_enough_for_a_grid():
    with pytest.raises(ValueError, match="needs the rows and columns of patches"):
        tiny_config(**GRID).tokens_per_stage(64)
    assert tiny_config(**GRID).tokens_per_stage((6, 9)) == [54, 12, 2]


def test_static_shapes_export_and_compile(pixel_values):
    model = tiny_model(**GRID)
    expected = model(pixel_values).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values).logits, expected)
    batch = {"pixel_values": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (), {"pixel_values": pixel_values}, dynamic_shapes=batch).module()
    torch.testing.assert_close(program(pixel_values=pixel_values[:1].repeat(3, 1, 1, 1)).logits[2], expected[0])


@pytest.mark.parametrize("fields", [{}, {"hvt_pool": [1], "hvt_pool_choices": None}], ids=["same blocks", "others"])
def test_a_grid_takes_the_place_of_stages_along_the_row(fields, tmp_path):
    tiny_model(hvt_pool_choices=[[1, 3], [2]]).save_pretrained(tmp_path)
    grid = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2), **fields}
    model, loading = HPoolViTForImageClassification.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, **grid
    )
    new = {key for key, *_ in loading["mismatched_keys"]} | set(loading["missing_keys"])
    assert "hpool_vit.pooling.1.position_embeddings" in new and all("pooling" in key for key in new)
    assert model.config.tokens_per_stage()[:2] == [64, 16]
