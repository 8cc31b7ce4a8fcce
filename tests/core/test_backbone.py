"""The backbone: feature maps of every resolution, also of tokens that have merged."""

import pytest
import torch
from helpers import run_python, tiny_config, tiny_model
from transformers import AutoBackbone

from hpool_vit import HPoolViTBackbone, HPoolViTForImageClassification
from hpool_vit.configuration_hpool_vit import LN_ORDERS
from hpool_vit.pooling_hpool_vit import HPoolViTMerging, Tokens


MERGE = {"pool_mode": "merge", "merge_ratio": 0.4, "proportional_attention": True}
GRID = {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)}
PREFIX = {"use_class_token": True, "num_register_tokens": 2}


def backbone(**fields) -> HPoolViTBackbone:
    torch.manual_seed(0)
    return HPoolViTBackbone(tiny_config(**{"initializer_range": 0.2, **fields})).eval()


class TestUnmerging:
    def test_every_patch_gets_the_token_that_it_went_into(self):
        stage = HPoolViTMerging(tiny_config(pool_mode="merge", merge_ratio=0.4), block=1)
        # 1 joins 0 and 19 joins 20.5; then 10 joins 0.5 and 12 joins 19.75.
        tokens = torch.tensor([0.0, 19.0, 10.0, 1.0, 20.5, 12.0])[None, :, None]
        once = stage(Tokens(tokens, grid=(2, 3)))
        torch.testing.assert_close(once.feature_map[0, 0], torch.tensor([[0.5, 19.75, 10], [0.5, 19.75, 12]]))
        twice = HPoolViTMerging(tiny_config(pool_mode="merge", merge_ratio=0.5, hvt_pool=[1]), block=1)(once)
        first, second = 11 / 3, 51.5 / 3
        expected = torch.tensor([[first, second, first], [first, second, second]])
        torch.testing.assert_close(twice.feature_map[0, 0], expected)
        assert torch.equal(twice.sizes[0], torch.bincount(twice.assignment[0]).float())

    def test_the_map_of_a_batch_is_that_of_each_image(self):
        model = backbone(**MERGE, **PREFIX)
        images = torch.randn(3, 3, 32, 32)
        together = model(images).feature_maps[0]
        alone = torch.cat([model(image[None]).feature_maps[0] for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)

    def test_patches_that_merged_share_their_features_and_others_do_not(self):
        model = backbone(**MERGE)
        seen = []
        model.hpool_vit.pooling["3"].register_forward_hook(lambda stage, args, output: seen.append(output))
        [cells] = model(torch.randn(1, 3, 32, 32)).feature_maps
        cells, assignment = cells[0].flatten(1).T, seen[0].assignment[0]
        same = (cells[:, None] == cells[None]).all(-1)
        assert torch.equal(same, assignment[:, None] == assignment[None])


class TestFeatureMaps:
    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    def test_without_pooling_a_map_is_the_normed_hidden_states_in_place(self, ln_order, pixel_values):
        model = backbone(hvt_pool=None, ln_order=ln_order, **PREFIX)
        expected = tiny_model(hvt_pool=None, ln_order=ln_order, **PREFIX)
        expected.hpool_vit.load_state_dict(model.hpool_vit.state_dict(), strict=False)
        states = expected.hpool_vit(pixel_values).last_hidden_state[:, 3:]
        torch.testing.assert_close(model(pixel_values).feature_maps[0], states.mT.unflatten(2, (8, 8)))

    def test_pooling_on_the_grid_gives_the_last_map_of_each_resolution(self, pixel_values):
        model = backbone(**GRID, **PREFIX)
        assert model.out_features == ["stage1", "stage3", "stage4"]
        assert model.channels == [32, 32, 32]
        maps = model(pixel_values).feature_maps
        assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)]

    @pytest.mark.parametrize("pooling", [MERGE, GRID], ids=["merge", "grid"])
    def test_any_maps_can_be_asked_for(self, pooling, pixel_values):
        model = backbone(**pooling, out_features=["stem", "stage2", "stage4"])
        assert model.out_indices == [0, 2, 4]
        every = backbone(**pooling, out_indices=[0, 1, 2, 3, 4])(pixel_values).feature_maps
        for index, feature_map in zip((0, 2, 4), model(pixel_values).feature_maps, strict=True):
            assert torch.equal(feature_map, every[index])

    def test_images_of_any_size_and_shape(self):
        maps = backbone(**GRID)(torch.randn(1, 3, 24, 50)).feature_maps
        assert [tuple(feature_map.shape[2:]) for feature_map in maps] == [(6, 12), (3, 6), (1, 3)]
        assert backbone(**MERGE)(torch.randn(1, 3, 24, 50)).feature_maps[0].shape[2:] == (6, 12)

    def test_a_pyramid_has_the_strides_of_vitdet(self, pixel_values):
        model = backbone(**MERGE, feature_pyramid_size=24)
        assert model.out_features == ["p2", "p3", "p4", "p5"] and model.channels == [24] * 4
        sides = [feature_map.shape[2] for feature_map in model(pixel_values).feature_maps]
        assert sides == [32, 16, 8, 4]
        some = backbone(**MERGE, feature_pyramid_size=24, out_features=["p3", "p5"])
        some.load_state_dict(model.state_dict(), strict=False)
        # Levels that nobody asked for would get no gradient.
        assert list(some.pyramid.levels) == ["p3", "p5"]
        expected = model(pixel_values).feature_maps
        assert all(map(torch.equal, some(pixel_values).feature_maps, (expected[1], expected[3])))

    def test_hidden_states_and_attentions_are_returned_where_asked_for(self, pixel_values):
        model = backbone(**MERGE)
        model.set_attn_implementation("eager")
        outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
        assert [state.shape[1] for state in outputs.hidden_states] == [64, 64, 39, 39, 24]
        assert len(outputs.attentions) == 4
        assert model(pixel_values).hidden_states is None

    @pytest.mark.parametrize("pooling", [MERGE, GRID], ids=["merge", "grid"])
    def test_it_trains_compiles_and_exports(self, pooling, pixel_values):
        model = backbone(**pooling, **PREFIX, out_indices=[1, 4]).train()
        sum(feature_map.square().sum() for feature_map in model(pixel_values).feature_maps).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        expected = model.eval()(pixel_values).feature_maps
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(pixel_values).feature_maps
        program = torch.export.export(model, (), {"pixel_values": pixel_values}).module()
        for given in (compiled, program(pixel_values=pixel_values).feature_maps):
            for feature_map, other in zip(given, expected, strict=True):
                torch.testing.assert_close(feature_map, other, atol=1e-5, rtol=1e-5)


class TestEarlyMaps:
    """A last map before the last block."""

    @pytest.mark.parametrize("pooling", [MERGE, GRID], ids=["merge", "grid"])
    def test_no_block_after_the_last_map_runs(self, pooling, pixel_values):
        model, ran = backbone(**pooling, out_indices=[1, 2]), []
        for index, layer in enumerate(model.hpool_vit.layers):
            layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        early, expected = model(pixel_values), backbone(**pooling, out_indices=[1, 2, 4])(pixel_values)
        assert ran == [0, 1]
        assert all(map(torch.equal, early.feature_maps, expected.feature_maps[:2]))

    def test_what_is_recorded_is_recorded_of_all_blocks(self, pixel_values):
        outputs = backbone(hvt_pool=None, out_indices=[2])(pixel_values, output_hidden_states=True)
        assert len(outputs.hidden_states) == 5

    def test_exactly_what_runs_learns_also_after_loading(self, pixel_values, tmp_path):
        backbone(**GRID, out_indices=[2]).save_pretrained(tmp_path)
        for model in (backbone(**GRID, out_indices=[2]), HPoolViTBackbone.from_pretrained(tmp_path)):
            model.train()(pixel_values).feature_maps[0].square().sum().backward()
            learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert learning == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert "hpool_vit.layers.1.mlp.fc1.weight" in learning
            assert not any(name.startswith(("hpool_vit.layers.2.", "hpool_vit.pooling.3.")) for name in learning)

    def test_all_blocks_learn_again_once_a_map_follows_them(self, pixel_values, tmp_path):
        backbone(**MERGE, out_indices=[2]).save_pretrained(tmp_path)
        model = HPoolViTBackbone.from_pretrained(tmp_path, out_indices=[4])
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_blocks_learn_again_once_other_maps_are_chosen(self, pixel_values):
        model = backbone(**GRID, out_indices=[1])
        model.out_indices = [3]
        model.train()(pixel_values).feature_maps[0].square().sum().backward()
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert "hpool_vit.layers.2.mlp.fc1.weight" in learning

    def test_a_stage_that_is_added_after_the_last_map_does_not_learn(self):
        model = backbone(**GRID, out_indices=[2])
        model.set_hvt_pool([1, 2])
        added = model.hpool_vit.pooling["2"]
        assert [parameter.requires_grad for parameter in added.parameters()] == [False]


class TestFolders:
    def test_a_trained_classifier_becomes_a_backbone(self, pixel_values, tmp_path):
        classifier = tiny_model(**MERGE)
        classifier.save_pretrained(tmp_path)
        model = HPoolViTBackbone.from_pretrained(tmp_path, out_indices=[2, 4]).eval()
        tokens, _ = classifier.hpool_vit.encode(pixel_values, False)
        expected = classifier.hpool_vit.finish(tokens).feature_map
        assert torch.equal(model(pixel_values).feature_maps[1], expected)

    def test_a_saved_backbone_loads_again_with_its_outputs(self, pixel_values, tmp_path):
        model = backbone(**MERGE, feature_pyramid_size=24, out_features=["p3", "p5"])
        model.save_pretrained(tmp_path)
        loaded = HPoolViTBackbone.from_pretrained(tmp_path).eval()
        assert loaded.out_features == ["p3", "p5"]
        assert all(map(torch.equal, loaded(pixel_values).feature_maps, model(pixel_values).feature_maps))
        assert HPoolViTForImageClassification.from_pretrained(tmp_path).config.feature_pyramid_size == 24

    def test_auto_classes_know_it_with_and_without_the_package(self, pixel_values, tmp_path):
        model = backbone(**GRID)
        assert type(AutoBackbone.from_config(model.config)) is HPoolViTBackbone
        model.save_pretrained(tmp_path)
        program = tmp_path / "program.py"
        program.write_text(
            "import sys\n"
            "from transformers import AutoBackbone, AutoConfig\n"
            "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            "print(type(AutoBackbone.from_config(config, trust_remote_code=True)).__name__)\n"
        )
        assert run_python(program, tmp_path, hide=("hpool_vit",)).stdout.strip() == "HPoolViTBackbone"


def test_windows_along_the_row_of_tokens_are_refused():
    with pytest.raises(ValueError, match=r"leaves no grid: use pairs such as `pool_kernel_size=\(2, 2\)`"):
        backbone()
    assert backbone(hvt_pool=None).out_features == ["stage4"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "leaves no grid"), (GRID | {"feature_pyramid_size": 24}, "needs a map of every patch")],
    ids=["row", "pyramid"],
)
def test_a_new_schedule_is_refused_as_in_a_new_model_and_changes_nothing(fields, message, pixel_values):
    model = backbone(**fields | {"hvt_pool": None, "speeds": {2.0: {"hvt_pool": [1]}}})
    before = model(pixel_values).feature_maps
    for change in (lambda: model.set_hvt_pool([1]), lambda: model.set_speed(2)):
        with pytest.raises(ValueError, match=message):
            change()
    assert model.config.hvt_pool is None
    assert all(map(torch.equal, model(pixel_values).feature_maps, before))


def test_a_pyramid_of_a_pooled_grid_is_refused():
    with pytest.raises(ValueError, match="`feature_pyramid_size` needs a map of every patch"):
        backbone(**GRID, feature_pyramid_size=24)
