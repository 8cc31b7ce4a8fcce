"""The search: what it compares, how it spends its budget, and that it goes on where it was killed."""

import json
import math

import pytest
import torch
from helpers import tiny_model

from hpool_vit.toolkit.speed.costs import MacsCost
from hpool_vit.toolkit.speed.evaluation import Evaluator, losses_of
from hpool_vit.toolkit.speed.schedules import Fitter, schedule_fields, seeds
from hpool_vit.toolkit.speed.search import Budget, BudgetSpent, Search, Tried
from hpool_vit.toolkit.speed.trials import TrialLog, fingerprint


MERGE = {"pool_mode": "merge", "proportional_attention": True, "hvt_pool": None}
SCHEDULES = [(), ((0, 20),), ((1, 20),), ((3, 30),), ((1, 10), (2, 10), (3, 10))]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def searching(images, path, made_with=None, **budget) -> Search:
    evaluator = Evaluator(tiny_model(**MERGE), images, batch_size=7)
    return Search(evaluator, TrialLog(path, made_with or {}), Budget(**budget), max_stages=4)


def fitter_of(search: Search) -> Fitter:
    return Fitter(MacsCost(search.evaluator.model.config), 64, 4)


def find(search: Search, speed: float = 2.0):
    fitter = fitter_of(search)
    return search.find(fitter, fitter.cost.unpooled / speed)


@pytest.mark.parametrize("max_cache_bytes", [1 << 30, 24 * 64 * 32 * 4, 0])
@pytest.mark.parametrize("ln_order", ["pre", "post", "residual"])
@pytest.mark.parametrize("num_labels", [3, 0])
@torch.no_grad()
def test_what_is_computed_once_gives_the_answers_of_the_whole_model(images, max_cache_bytes, ln_order, num_labels):
    model = tiny_model(**MERGE, ln_order=ln_order, num_labels=num_labels)
    evaluator = Evaluator(model, images, 7, max_cache_bytes)
    own = tiny_model(**MERGE, ln_order=ln_order, num_labels=num_labels)
    unpooled = own(images).logits
    for schedule in SCHEDULES:
        fields = schedule_fields(schedule, 64)
        own.change_schedule(**fields)
        pooled = own(images).logits
        found = evaluator.evaluate(fields, 0, 24)
        expected = losses_of(unpooled, pooled, num_labels > 0)
        torch.testing.assert_close(found.losses.float(), expected, atol=1e-5, rtol=1e-3)
        if num_labels:
            assert found.agreement == (unpooled.argmax(-1) == pooled.argmax(-1)).float().mean()
        else:
            assert found.agreement is None
    assert all(type(layer) is own.base_model.layer_class for layer in model.base_model.layers)


def test_a_budget_that_ends_among_the_seeds_leaves_the_best_of_those_that_met_the_most_images(images, tmp_path):
    whole = searching(images, tmp_path / "whole.jsonl")
    fitter = fitter_of(whole)
    limit = fitter.cost.unpooled / 2
    # The first loses much.
    starts = [((0, 32), (1, 16), (2, 8))]
    candidates = whole.fitted(fitter, limit, [*map(dict, starts), *seeds(4, 4)])
    # One candidate of those that meet more images is tried on them, and then the budget ends.
    search = searching(images, tmp_path / "short.jsonl", trials=len(candidates))
    best = search.find(fitter, limit, starts)
    first = {schedule: whole.try_out(schedule, 0).loss for schedule in candidates}
    assert len(candidates) > 2 and first[best] == min(first.values())
    assert best != candidates[0]


def test_the_losses_are_kl_in_nats_and_one_minus_cosine():
    reference, other = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert losses_of(reference, other, has_head=True).item() == pytest.approx(kl)
    assert losses_of(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), False).item() == pytest.approx(1 / 25)


def test_a_model_whose_answers_are_not_finite_is_refused(images):
    model = tiny_model(**MERGE)
    model.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        Evaluator(model, images).evaluate({"hvt_pool": None})


def test_the_result_keeps_the_limit_and_loses_no_more_than_the_seeds_that_met_all_images(images, tmp_path):
    search = searching(images, tmp_path / "trials.jsonl")
    fitter = fitter_of(search)
    limit = fitter.cost.unpooled / 1.5
    best = find(search, 1.5)
    assert fitter.cost(best) <= limit
    whole = {tried.schedule: tried.loss for tried in search.tried() if tried.num_images == 24}
    met = {fitter.fit(parts, limit) for parts in seeds(4, 4)} & whole.keys()
    assert len(met) > 1 and all(whole[best] <= whole[seed] for seed in met)
    expected = Evaluator(tiny_model(**MERGE), images).evaluate(schedule_fields(best, 64))
    assert whole[best] == pytest.approx(expected.loss, rel=1e-3)


def test_a_budget_that_ends_after_a_step_to_a_better_neighbour_leaves_this_one(images, tmp_path, monkeypatch):
    search, steps = searching(images, tmp_path / "trials.jsonl"), []

    def choose(candidates, best):
        if steps:
            raise BudgetSpent
        steps.append(next(schedule for schedule in candidates if schedule != best))
        return steps[0]

    monkeypatch.setattr(search, "choose", choose)
    assert find(search, 1.5) == steps[0]


def test_only_a_gain_beyond_chance_counts():
    known = Tried((), (0.1, 0.2, 0.3, 0.4), None)
    assert Tried((), (0.05, 0.14, 0.26, 0.35), None).is_surely_better(known)
    # The same mean, but one image decides.
    assert not Tried((), (0.1, 0.2, 0.3, 0.2), None).is_surely_better(known)
    assert not known.is_surely_better(known)


def test_the_same_images_and_number_of_trials_give_the_same_search(images, tmp_path):
    searches = [searching(images, tmp_path / f"{name}.jsonl", trials=40) for name in "ab"]
    assert find(searches[0]) == find(searches[1])
    assert [t.schedule for t in searches[0].tried()] == [t.schedule for t in searches[1].tried()]
    assert searches[0].budget.used_trials <= 41


def test_most_schedules_meet_only_a_few_images(images, tmp_path):
    search = searching(images, tmp_path / "trials.jsonl", trials=60)
    find(search)
    numbers = [tried.num_images for tried in search.tried()]
    assert {8, 24} <= set(numbers) <= {8, 12, 24}
    assert numbers.count(24) < len(numbers) / 2


def test_a_search_that_was_killed_goes_on_and_ends_like_one_that_was_not(images, tmp_path, monkeypatch):
    whole = searching(images, tmp_path / "whole.jsonl", {"seed": 0}, trials=40)
    expected = find(whole)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    killed = tmp_path / "killed.jsonl"
    killed.write_text("\n".join([*lines[:20], lines[20][:30]]))  # in the middle of a line
    resumed = searching(images, killed, {"seed": 0}, trials=40)
    assert resumed.log.num_resumed == 19
    evaluated = []
    evaluate = resumed.evaluator.evaluate
    monkeypatch.setattr(resumed.evaluator, "evaluate", lambda *args: evaluated.append(args) or evaluate(*args))
    assert find(resumed) == expected
    assert len(evaluated) == len(lines) - 1 - 19
    content = [json.loads(line) | {"seconds": 0} for line in killed.read_text().splitlines()]
    assert content == [json.loads(line) | {"seconds": 0} for line in lines]


def test_trials_with_another_model_or_other_images_are_not_taken_over(images, tmp_path):
    find(searching(images, tmp_path / "trials.jsonl", {"model": 1}, trials=5))
    assert TrialLog(tmp_path / "trials.jsonl", {"model": 2}).num_resumed == 0
    assert fingerprint(tiny_model(seed=0)) == fingerprint(tiny_model(seed=0)) != fingerprint(tiny_model(seed=1))


def test_a_search_stops_when_its_time_is_up_even_before_it_compared_anything(images, tmp_path):
    search = searching(images, tmp_path / "trials.jsonl", seconds=1e-9)
    best = find(search)
    assert fitter_of(search).cost(best) <= fitter_of(search).cost.unpooled / 2
    assert len(search.tried()) <= 2


def test_what_a_killed_search_used_of_its_time_counts(images, tmp_path):
    find(searching(images, tmp_path / "trials.jsonl", {"seed": 0}, trials=5))
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    slow = [lines[0], json.dumps(json.loads(lines[1]) | {"seconds": 100.0}), *lines[2:]]
    (tmp_path / "trials.jsonl").write_text("\n".join(slow) + "\n")
    search = searching(images, tmp_path / "trials.jsonl", {"seed": 0}, seconds=60)
    find(search)
    assert search.budget.used >= 1 and len(search.tried()) <= 2


def test_a_limit_that_only_the_cheapest_schedule_reaches_is_reached(images, tmp_path):
    search = searching(images, tmp_path / "trials.jsonl", trials=50)
    search.max_stages = 1
    fitter = fitter_of(search)
    limit = fitter.cost(fitter.cheapest)
    assert fitter.cost(search.find(fitter, limit)) <= limit
