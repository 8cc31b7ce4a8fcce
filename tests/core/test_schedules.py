"""One model, many schedules: changing where a trained model pools, with every weight kept."""

import copy
import itertools
import json

import pytest
import torch
from helpers import run_python, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTModel
from hpool_vit.configuration_hpool_vit import LN_ORDERS, POOL_MODES
from hpool_vit.pooling_hpool_vit import resize_positions


OTHER_SCHEDULES = [[0], [1], [2], [3], [1, 2], [0, 1, 3], [], None]


@torch.no_grad()
def logits(model: HPoolViTForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.eval()(pixel_values).logits


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def resized(positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return resize_positions(positions, (positions.shape[1],), (num_tokens,))


def train_a_step(model: HPoolViTForImageClassification, pixel_values: torch.Tensor):
    """One step far enough to change every parameter that has a gradient other than 0."""
    model.train().zero_grad()
    model(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad.sign() * 0.01


@pytest.fixture(params=["max", "avg", "merge"])
def folder(request, tmp_path):
    """A folder with a model that pools at the blocks 1 and 3."""
    tiny_model(pool_mode=request.param, merge_ratio=0.3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestChangingTheSchedule:
    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    @pytest.mark.parametrize("use_class_token", [False, True])
    def test_changed_back_the_logits_are_identical(self, ln_order, pool_mode, use_class_token, pixel_values):
        model = tiny_model(ln_order=ln_order, pool_mode=pool_mode, use_class_token=use_class_token, merge_ratio=0.3)
        before, first = weights(model), logits(model, pixel_values)
        for schedule in OTHER_SCHEDULES:
            model.set_hvt_pool(schedule)
            assert not torch.equal(logits(model, pixel_values), first), schedule
            assert model.config.hvt_pool == schedule
        after = weights(model)
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        model.set_hvt_pool([1, 3])
        assert torch.equal(logits(model, pixel_values), first)

    def test_the_tokens_follow_the_schedule(self, pixel_values):
        model = tiny_model(use_class_token=True)
        for schedule, lengths in (([0, 2], [64, 31, 31, 15, 15]), ([3], [64, 64, 64, 64, 31]), (None, [64] * 5)):
            model.set_hvt_pool(schedule)
            states = model(pixel_values, output_hidden_states=True).hidden_states
            assert [state.shape[1] - 1 for state in states] == lengths

    def test_a_list_of_ratios_changes_with_the_blocks(self, pixel_values):
        model = tiny_model(pool_mode="merge", hvt_pool=[1, 3], merge_ratio=[0.25, 0.5])
        first = logits(model, pixel_values)
        with pytest.raises(ValueError, match="give one number, or one per block"):
            model.set_hvt_pool([2])
        model.set_hvt_pool([2], merge_ratio=0.375)
        assert model.config.tokens_per_stage() == [64, 40]
        model.set_hvt_pool([1, 3], merge_ratio=[0.25, 0.5])
        assert torch.equal(logits(model, pixel_values), first)

    def test_a_model_without_head_changes_too(self, pixel_values):
        model = tiny_model()
        model.hpool_vit.set_hvt_pool([2])
        assert model.config.hvt_pool == [2]
        assert model.hpool_vit(pixel_values).last_hidden_state.shape == (2, 31, 32)

    def test_images_that_are_not_square_keep_their_logits(self):
        model = tiny_model(image_size=(24, 40), patch_size=(4, 8), hvt_pool=[1])
        images = torch.randn(2, 3, 24, 40)
        first = logits(model, images)
        model.set_hvt_pool([0, 2])
        assert model.config.tokens_per_stage() == [30, 14, 6]
        assert not torch.equal(logits(model, images), first)
        model.set_hvt_pool([1])
        assert torch.equal(logits(model, images), first)

    def test_other_image_sizes_work_under_every_schedule(self):
        model = tiny_model()
        for schedule in ([1], [2, 3], None, [1, 3]):
            model.set_hvt_pool(schedule)
            outputs = model.hpool_vit(torch.randn(1, 3, 48, 40), interpolate_pos_encoding=True)
            assert outputs.last_hidden_state.shape[1] == model.config.tokens_per_stage(120)[-1]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_new_stages_have_the_models_type(self, dtype, pixel_values):
        model = tiny_model().to(dtype)
        model.set_hvt_pool([2])
        assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
        assert model(pixel_values).logits.isfinite().all()

    def test_new_stages_are_ordinary_parameters_also_in_inference_mode(self, pixel_values):
        model = tiny_model()
        with torch.inference_mode():
            model.set_hvt_pool([2])
        train_a_step(model, pixel_values)
        assert (model.hpool_vit.pooling["2"].position_embeddings.grad != 0).any()

    def test_new_stages_of_a_frozen_model_are_frozen_because_an_adapter_does_not_save_them(self, pixel_values):
        model = tiny_model().requires_grad_(False)
        model.classifier.requires_grad_(True)
        model.set_hvt_pool([2])
        assert [name for name, p in model.named_parameters() if p.requires_grad] == [
            "classifier.weight",
            "classifier.bias",
        ]

    @pytest.mark.parametrize("pool_mode", ["max", "merge"])
    def test_each_schedule_is_compiled_once(self, pool_mode, pixel_values, fresh_compiler):
        model = tiny_model(pool_mode=pool_mode, num_hidden_layers=2, hvt_pool=[1])
        graphs = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        for count, schedule in ((1, [1]), (2, [0]), (3, None), (3, [1]), (3, [0]), (3, None)):
            model.set_hvt_pool(schedule)
            with torch.no_grad():
                torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits)
            assert graphs.frame_count == count, schedule


class TestPositionEmbeddings:
    def test_they_are_resized_where_an_earlier_stage_vanishes(self, pixel_values):
        model = tiny_model()
        model.set_hvt_pool([3])
        expected = tiny_model(hvt_pool=[3])
        given = weights(model)
        del given["hpool_vit.pooling.1.position_embeddings"]
        name = "hpool_vit.pooling.3.position_embeddings"
        assert given[name].shape[1] == 15
        given[name] = resized(given[name], 31)
        expected.load_state_dict(given)
        assert torch.equal(logits(model, pixel_values), logits(expected, pixel_values))

    @pytest.mark.parametrize(
        ("schedule", "new", "nearest", "num_tokens"),
        [([2], 2, 1, 31), ([0, 3], 0, 1, 31), ([1, 2, 3], 2, 1, 15), ([1, 4], 4, 3, 15), ([5], 5, 3, 31)],
    )
    def test_a_new_stage_starts_from_the_nearest_one(self, schedule, new, nearest, num_tokens):
        model = tiny_model(num_hidden_layers=6)
        model.set_hvt_pool(schedule)
        stages = model.hpool_vit.pooling
        expected = resized(stages[str(nearest)].position_embeddings, num_tokens)
        torch.testing.assert_close(stages[str(new)].position_embeddings, expected, rtol=0, atol=0)

    def test_two_new_stages_start_from_trained_ones_and_not_from_each_other(self):
        model = tiny_model(num_hidden_layers=6, hvt_pool=[0])
        model.set_hvt_pool([4, 5])
        stages = model.hpool_vit.pooling
        expected = resized(stages["0"].position_embeddings, 15)
        torch.testing.assert_close(stages["5"].position_embeddings, expected, rtol=0, atol=0)

    def test_the_stages_of_a_model_that_never_pooled_start_at_zero(self):
        model = tiny_model(hvt_pool=None)
        model.set_hvt_pool([1, 3])
        assert len(model.hpool_vit.pooling) == 2
        assert all((stage.position_embeddings == 0).all() for stage in model.hpool_vit.pooling.values())


class TestLoadingWithASchedule:
    @pytest.mark.parametrize("schedule", OTHER_SCHEDULES)
    def test_it_gives_what_changing_the_loaded_model_gives(self, schedule, folder, pixel_values):
        changed = HPoolViTForImageClassification.from_pretrained(folder)
        changed.set_hvt_pool(schedule)
        loaded = HPoolViTForImageClassification.from_pretrained(folder, hvt_pool=schedule)
        assert loaded.config.hvt_pool == schedule
        assert loaded.config.hvt_pool_choices == changed.config.hvt_pool_choices
        expected, given = weights(changed), weights(loaded)
        assert expected.keys() == given.keys()
        assert all(torch.equal(given[name], weight) for name, weight in expected.items())
        assert torch.equal(logits(loaded, pixel_values), logits(changed, pixel_values))

    def test_nothing_is_missing_and_nobody_is_warned(self, folder, capfd):
        _, report = HPoolViTForImageClassification.from_pretrained(folder, hvt_pool=[2], output_loading_info=True)
        assert not any(report.values()), report
        assert "pooling" not in capfd.readouterr().err

    def test_a_missing_stage_of_the_folders_own_schedule_is_still_reported(self, tmp_path):
        model = tiny_model()
        state_dict = weights(model)
        name = "hpool_vit.pooling.3.position_embeddings"
        del state_dict[name]
        model.save_pretrained(tmp_path, state_dict=state_dict)
        _, report = HPoolViTForImageClassification.from_pretrained(tmp_path, hvt_pool=[2], output_loading_info=True)
        assert report["missing_keys"] == {name}

    @pytest.mark.parametrize("missing", [1, 2, 3])
    @pytest.mark.parametrize("hvt_pool", [[2], [1, 3], [3]])
    def test_a_missing_weight_is_reported_whatever_the_order_of_the_choices(self, missing, hvt_pool, tmp_path):
        name = f"hpool_vit.pooling.{missing}.position_embeddings"
        for choices in ([[1, 3], [2]], [[2], [1, 3]]):
            model = tiny_model(hvt_pool=hvt_pool, hvt_pool_choices=choices)
            state_dict = weights(model)
            del state_dict[name]
            model.save_pretrained(tmp_path, state_dict=state_dict)
            for overrides in ({}, {"hvt_pool": [2]}, {"hvt_pool": [0, 3]}):
                _, report = HPoolViTForImageClassification.from_pretrained(
                    tmp_path, output_loading_info=True, **overrides
                )
                assert report["missing_keys"] == {name}

    def test_a_stage_that_merging_did_not_have_is_reported(self, tmp_path):
        tiny_model(pool_mode="merge").save_pretrained(tmp_path)
        _, report = HPoolViTForImageClassification.from_pretrained(
            tmp_path, pool_mode="avg", hvt_pool=[2], output_loading_info=True
        )
        assert report["missing_keys"] == {"hpool_vit.pooling.2.position_embeddings"}

    def test_it_works_in_a_process_without_the_package(self, tmp_path):
        folder = tmp_path / "model"
        tiny_model().save_pretrained(folder)
        program = tmp_path / "other_schedules.py"
        program.write_text(
            "import sys, torch\n"
            "from transformers import AutoModel, AutoModelForImageClassification as Auto\n"
            "folder, copy = sys.argv[1:]\n"
            "images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)\n"
            "trained = Auto.from_pretrained(folder, trust_remote_code=True)\n"
            "before = trained(images).logits\n"
            "for schedule in ([2], [0, 3], None):\n"
            "    model = Auto.from_pretrained(folder, hvt_pool=schedule, trust_remote_code=True)\n"
            "    assert type(model).__module__.startswith('transformers_modules')\n"
            "    trained.set_hvt_pool(schedule)\n"
            "    assert torch.equal(model(images).logits, trained(images).logits), schedule\n"
            "    base = AutoModel.from_pretrained(folder, hvt_pool=schedule, trust_remote_code=True)\n"
            "    assert torch.equal(base(images).pooler_output, trained.hpool_vit(images).pooler_output)\n"
            "trained.save_pretrained(copy)\n"
            "again = Auto.from_pretrained(copy, hvt_pool=[1, 3], trust_remote_code=True)\n"
            "assert torch.equal(again(images).logits, before)\n"
        )
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        run_python(program, folder, tmp_path / "copy", hide=("hpool_vit",), env=environment, cwd=tmp_path)

    def test_a_configuration_from_before_other_schedules_were_known_loads(self, folder, pixel_values):
        model = HPoolViTForImageClassification.from_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        assert saved.pop("hvt_pool_choices") is None
        (folder / "config.json").write_text(json.dumps(saved))
        loaded = HPoolViTForImageClassification.from_pretrained(folder)
        assert loaded.config.schedules == [[1, 3]]
        assert torch.equal(logits(loaded, pixel_values), logits(model, pixel_values))

    def test_fewer_blocks_or_smaller_images_leave_out_what_does_not_fit(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        fewer = HPoolViTForImageClassification.from_pretrained(tmp_path, num_hidden_layers=2, hvt_pool=[1])
        assert fewer.config.hvt_pool_choices is None and len(fewer.hpool_vit.pooling) == 1
        smaller = HPoolViTConfig.from_pretrained(tmp_path, image_size=8, hvt_pool=[3])
        assert smaller.hvt_pool_choices is None
        merging = HPoolViTConfig.from_pretrained(tmp_path, pool_mode="merge", hvt_pool=[3])
        assert merging.hvt_pool_choices is None


class TestSavingAgain:
    def test_the_folder_records_which_stages_it_has(self, tmp_path):
        def recorded(model):
            model.save_pretrained(tmp_path / "more")
            return json.loads((tmp_path / "more" / "config.json").read_text())["stages"]

        model = tiny_model()
        assert recorded(model) == {"1": 31, "3": 15} and recorded(tiny_model(hvt_pool=None)) == {}
        model.set_hvt_pool([2])
        assert recorded(model) == {"1": 31, "2": 31, "3": 15}
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path / "more")
        assert loaded.config.stages == {1: 31, 2: 31, 3: 15} and loaded.config.new_stages() == []
        merging = tiny_model(pool_mode="merge")
        merging.set_hvt_pool([2])
        assert recorded(merging) is None

    def test_every_schedule_of_the_model_comes_back(self, folder, tmp_path, pixel_values):
        model = HPoolViTForImageClassification.from_pretrained(folder)
        expected = {}
        for schedule in ((1, 3), (2,), (), (0, 3)):
            model.set_hvt_pool(schedule)
            expected[schedule] = logits(model, pixel_values)
        model.save_pretrained(tmp_path / "again")
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path / "again")
        assert loaded.config.hvt_pool == [0, 3]
        for schedule, answer in expected.items():
            loaded.set_hvt_pool(schedule)
            assert torch.equal(logits(loaded, pixel_values), answer)
            at_once = HPoolViTForImageClassification.from_pretrained(tmp_path / "again", hvt_pool=schedule)
            assert torch.equal(logits(at_once, pixel_values), answer)

    def test_what_was_trained_in_between_is_kept(self, tmp_path, pixel_values):
        model = tiny_model()
        model.set_hvt_pool([2])
        idle = model.hpool_vit.pooling["3"].position_embeddings.detach().clone()
        before = model.hpool_vit.pooling["2"].position_embeddings.detach().clone()
        train_a_step(model, pixel_values)
        assert torch.equal(model.hpool_vit.pooling["3"].position_embeddings, idle)
        assert not torch.equal(model.hpool_vit.pooling["2"].position_embeddings, before)
        expected = logits(model, pixel_values)
        model.set_hvt_pool([1, 3])
        model.save_pretrained(tmp_path)
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path, hvt_pool=[2])
        assert torch.equal(logits(loaded, pixel_values), expected)

    def test_the_base_model_and_the_classifier_load_each_others_stages(self, tmp_path, pixel_values):
        model = tiny_model()
        model.set_hvt_pool([0, 2])
        model.save_pretrained(tmp_path)
        base = HPoolViTModel.from_pretrained(tmp_path, hvt_pool=[1, 3])
        model.set_hvt_pool([1, 3])
        with torch.no_grad():
            assert torch.equal(base(pixel_values)[0], model.hpool_vit(pixel_values)[0])


BAD_SCHEDULES = {
    "names block 4": [1, 4],
    "names block -1": [-1],
    r"must name each block once, rising: \[1, 3\]": [3, 1],
    "runs out of tokens at block 3: 1 left": [0, 1, 2, 3],
    r"doesn't match any type in \(list\[int\]": "1,3",
    "doesn't match": 1,
    r"with value \[1\.5\]": [1.5],
}


class TestRefusals:
    @pytest.mark.parametrize(("message", "schedule"), BAD_SCHEDULES.items(), ids=BAD_SCHEDULES.keys())
    def test_a_bad_schedule_is_refused_and_changes_nothing(self, message, schedule, pixel_values, tmp_path):
        model = tiny_model(image_size=16)  # few enough tokens to run out of them
        images = pixel_values[..., :16, :16]
        model.save_pretrained(tmp_path)
        config, state, answer = copy.deepcopy(model.config), weights(model), logits(model, images)
        with pytest.raises(ValueError, match=message):
            model.set_hvt_pool(schedule)
        assert model.config.to_dict() == config.to_dict()
        assert weights(model).keys() == state.keys()
        assert torch.equal(logits(model, images), answer)
        with pytest.raises(ValueError, match=message):
            HPoolViTForImageClassification.from_pretrained(tmp_path, hvt_pool=schedule)

    def test_a_schedule_assigned_past_the_model_is_refused_with_the_remedy(self, pixel_values):
        model = tiny_model()
        model.config.hvt_pool = [2]
        with pytest.raises(ValueError, match=r"no stage for `hvt_pool=\[2\]`: call `set_hvt_pool\(\[2\]\)`"):
            model(pixel_values)

    def test_one_merge_ratio_per_block_fits_schedules_of_as_many_blocks(self, pixel_values):
        model = tiny_model(pool_mode="merge", merge_ratio=[0.25, 0.5])
        with pytest.raises(ValueError, match=r"2 entries for the 1 blocks of `hvt_pool=\[2\]`: give one number"):
            model.set_hvt_pool([2])
        assert model.config.hvt_pool == [1, 3]
        # The block 3 now merges first, by the first ratio.
        model.set_hvt_pool([2, 3])
        states = model(pixel_values, output_hidden_states=True).hidden_states
        assert [state.shape[1] for state in states] == [64, 64, 64, 48, 24]
        model.config.merge_ratio = 0.5
        model.set_hvt_pool([2])
        assert model.hpool_vit(pixel_values).last_hidden_state.shape[1] == 32

    @pytest.mark.parametrize(
        ("message", "fields"),
        [
            (r"`hvt_pool_choices=\[\[1, 3\], \[9\]\]`.*names block 9", {"hvt_pool_choices": [[1, 3], [9]]}),
            ("'hvt_pool_choices'", {"hvt_pool_choices": [3]}),
            ("'hvt_pool_choices'", {"hvt_pool_choices": "none;3"}),
            (
                r"`hvt_pool_choices=.*2 entries for the 1 blocks",
                {"pool_mode": "merge", "merge_ratio": [0.2, 0.3], "hvt_pool_choices": [[1, 3], [1]]},
            ),
            (r"`stages=\{4: 31\}` must map blocks from 0 to 3 .* 4: 31 does not fit", {"stages": {4: 31}}),
            (r"`stages=\{1: 0\}` .* 1: 0 does not fit", {"stages": {1: 0}}),
            (r"`stages=\{'first': 31\}` .* first: 31 does not fit", {"stages": {"first": 31}}),
            ("'stages'", {"stages": [1, 3]}),
        ],
    )
    def test_choices_and_stages_that_no_model_can_have_are_refused(self, message, fields):
        with pytest.raises(ValueError, match=message):
            tiny_config(**fields)


ELASTIC = {"hvt_pool_choices": [None, [2], [1, 3], [3]]}


class TestTrainingSeveralSchedules:
    def test_the_choices_are_kept_each_once_as_lists(self, tmp_path):
        config = tiny_config(hvt_pool_choices=((1, 3), [], None, [1, 3], (2,)))
        assert config.hvt_pool_choices == [[1, 3], None, [2]]
        assert config.schedules == [[1, 3], [], [2]]
        config.save_pretrained(tmp_path)
        assert HPoolViTConfig.from_pretrained(tmp_path).hvt_pool_choices == config.hvt_pool_choices
        more = HPoolViTConfig.from_pretrained(tmp_path, hvt_pool_choices=[[2], [0]])
        assert more.hvt_pool == [1, 3] and more.hvt_pool_choices == [[2], [0]]
        assert more.schedules == [[2], [0], [1, 3]]
        assert more.stages == {1: 31, 2: 31, 3: 15} and more.new_stages() == [0]

    @pytest.mark.parametrize(
        ("wanted", "stages"),
        [
            ({"hvt_pool": [2], "hvt_pool_choices": None}, ["2"]),
            ({"hvt_pool": [2], "hvt_pool_choices": [[2], []]}, ["2"]),
            ({"hvt_pool": [], "hvt_pool_choices": None}, []),
            # The stage at block 3 keeps the 15 position embeddings for the tokens that it gets after block 1.
            ({"hvt_pool": [3], "hvt_pool_choices": None}, ["3"]),
            # A new stage starts from the nearest trained one.
            ({"hvt_pool": [0], "hvt_pool_choices": [[0], [2]]}, ["0", "1", "2", "3"]),
        ],
        ids=str,
    )
    def test_a_model_loses_the_stages_that_no_schedule_needs_any_more(self, wanted, stages, tmp_path, pixel_values):
        model = tiny_model(**ELASTIC)
        model.save_pretrained(tmp_path / "all")
        loaded = HPoolViTForImageClassification.from_pretrained(tmp_path / "all", **wanted)
        assert sorted(loaded.hpool_vit.pooling) == stages
        if wanted["hvt_pool"] != [0]:
            model.set_hvt_pool(wanted["hvt_pool"])
            assert torch.equal(logits(loaded, pixel_values), logits(model, pixel_values))
        loaded.save_pretrained(tmp_path / "fewer")
        again = HPoolViTForImageClassification.from_pretrained(tmp_path / "fewer")
        assert sorted(again.hpool_vit.pooling) == stages and again.config.schedules == loaded.config.schedules
        assert torch.equal(logits(again, pixel_values), logits(loaded, pixel_values))

    @pytest.mark.parametrize("order", list(itertools.permutations([[1, 3], [3], [2, 3], None])), ids=str)
    def test_the_order_of_the_choices_decides_nothing(self, order):
        def positions(**overrides):
            stages = tiny_model(hvt_pool_choices=order, **overrides).hpool_vit.pooling
            return {block: stage.position_embeddings.shape[1] for block, stage in stages.items()}

        # One for each token under the schedule in use, or else under the choice that leaves the most.
        assert positions(hvt_pool=[1, 3]) == {"1": 31, "2": 31, "3": 15}
        assert positions(hvt_pool=[3]) == positions(hvt_pool=None) == {"1": 31, "2": 31, "3": 31}

    @pytest.mark.parametrize("ln_order", LN_ORDERS)
    @pytest.mark.parametrize("pool_mode", POOL_MODES)
    @pytest.mark.parametrize("schedule", ELASTIC["hvt_pool_choices"])
    def test_every_parameter_gets_a_gradient_and_that_of_an_idle_stage_is_zero(
        self, ln_order, pool_mode, schedule, pixel_values
    ):
        model = tiny_model(ln_order=ln_order, pool_mode=pool_mode, merge_ratio=0.3, **ELASTIC)
        model.set_hvt_pool(schedule)
        expected = logits(model, pixel_values)
        output = model.train()(pixel_values, labels=torch.tensor([0, 2]))
        assert torch.equal(output.logits, expected)
        output.loss.backward()
        without = {name for name, p in model.named_parameters() if p.grad.abs().sum() == 0}
        names = {
            f"hpool_vit.pooling.{block}.position_embeddings" for block in (1, 2, 3) if block not in (schedule or [])
        }
        assert without == (set() if pool_mode == "merge" else names)

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    def test_a_weight_of_an_idle_stage_that_is_not_finite_does_no_harm(self, value, pixel_values):
        model = tiny_model(**ELASTIC)
        expected = logits(model, pixel_values)
        idle = model.hpool_vit.pooling["2"].position_embeddings
        with torch.no_grad():
            idle.fill_(value)
        output = model.train()(pixel_values, labels=torch.tensor([0, 2]))
        assert torch.equal(output.logits, expected)
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters()) and (idle.grad == 0).all()

    def test_training_each_schedule_in_turn_trains_every_stage(self, tmp_path, pixel_values):
        model = tiny_model(**ELASTIC)
        before = weights(model)
        for schedule in model.config.schedules:
            model.set_hvt_pool(schedule)
            train_a_step(model, pixel_values)
        after = weights(model)
        assert before.keys() == after.keys()
        assert not any(torch.equal(after[name], before[name]) for name in before if "pooling" in name)
        model.save_pretrained(tmp_path)
        for schedule in model.config.schedules:
            model.set_hvt_pool(schedule)
            loaded = HPoolViTForImageClassification.from_pretrained(tmp_path, hvt_pool=schedule)
            assert loaded.config.hvt_pool_choices == ELASTIC["hvt_pool_choices"]
            assert torch.equal(logits(loaded, pixel_values), logits(model, pixel_values))
