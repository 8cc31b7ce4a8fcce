"""Schedules that fit a cost, and the neighbours among which a search looks."""

import itertools

import numpy as np
import pytest
from helpers import tiny_config

from hpool_vit.toolkit import model_stats
from hpool_vit.toolkit.speed.costs import MacsCost, TimeCost, non_negative_fit
from hpool_vit.toolkit.speed.schedules import Fitter, clamped, moves, schedule_fields, seeds


MERGE = {"pool_mode": "merge", "proportional_attention": True, "hvt_pool": None}


@pytest.fixture
def cost() -> MacsCost:
    return MacsCost(tiny_config(**MERGE))


@pytest.fixture
def fitter(cost) -> Fitter:
    return Fitter(cost, cost.num_patches, 4)


@pytest.mark.parametrize("schedule", [(), ((1, 32),), ((0, 7), (2, 13)), ((1, 31), (2, 16), (3, 8))])
def test_the_fields_of_a_schedule_merge_exactly_its_tokens(schedule):
    tokens = tiny_config(**{**MERGE, **schedule_fields(schedule, 64)}).tokens_per_stage()
    assert [before - after for before, after in itertools.pairwise(tokens)] == [n for _, n in schedule]


@pytest.mark.parametrize("schedule", [(), ((1, 32),), ((0, 7), (2, 13))])
def test_the_macs_of_a_schedule_are_those_that_stats_counts(cost, schedule):
    config = tiny_config(**{**MERGE, **schedule_fields(schedule, 64)})
    assert cost(schedule) == model_stats(config)["macs"]
    assert cost(()) == cost.unpooled


def test_at_most_half_of_the_tokens_merge_at_a_block():
    assert clamped({1: 40, 2: 40, 3: 0}, 64) == ((1, 32), (2, 16))
    assert clamped({0: 1, 1: 5}, 2) == ((0, 1),)


@pytest.mark.parametrize("speed", [1.1, 1.5, 2, 2.5])
@pytest.mark.parametrize("parts", [{1: 1}, {0: 1, 2: 3}, {1: 1, 2: 1, 3: 1}], ids=str)
def test_a_fitted_schedule_merges_as_few_tokens_as_the_limit_allows(fitter, cost, parts, speed):
    limit = cost.unpooled / speed
    schedule = fitter.fit(parts, limit)
    if schedule is None:
        assert cost(fitter.scaled(parts, 64)) > limit
        return
    assert cost(schedule) <= limit and {block for block, _ in schedule} <= parts.keys()
    for block, merged in schedule:
        assert cost(clamped({**dict(schedule), block: merged - 1}, 64)) > limit


def test_a_limit_that_no_number_of_tokens_reaches_has_no_schedule(fitter, cost):
    assert fitter.fit({3: 1}, cost.unpooled / 2) is None
    assert fitter.cheapest == ((0, 32), (1, 16), (2, 8), (3, 4))


def test_seeds_are_different_places_for_equal_numbers_and_fit_any_depth():
    for num_blocks in (1, 4, 12, 24):
        found = [tuple(parts) for parts in seeds(num_blocks, 6)]
        assert len(found) == len(set(found)) or found[-1] == tuple(range(num_blocks))
        assert all(0 <= block < num_blocks for blocks in found for block in blocks)
    assert {3: 1, 5: 1, 7: 1, 9: 1} in list(seeds(12, 6))


def test_neighbours_shift_split_join_and_move_tokens_between_blocks():
    neighbours = list(moves(((3, 40), (7, 60)), 12, 0.1, max_stages=3))
    for expected in (
        {4: 40, 7: 60},  # a block shifts
        {3: 20, 4: 20, 7: 60},  # a block splits
        {3: 30, 7: 70},  # a tenth of all tokens moves
        {7: 100},  # two blocks join
        {7: 60},  # a block is left out
        {3: 40, 7: 60, 10: 10},  # a block begins to merge
    ):
        assert expected in neighbours
    assert all(len(parts) <= 2 for parts in moves(((3, 40), (7, 60)), 12, 0.1, max_stages=2))


def test_the_cost_in_time_finds_what_products_tokens_and_stages_take(cost):
    schedules = [(), ((1, 32),), ((3, 1),), ((1, 8), (2, 8)), ((0, 8), (1, 8), (2, 8), (3, 8))]

    def seconds(schedule):
        gathered = sum(64 - sum(n for _, n in schedule[:stage]) for stage in range(len(schedule)))
        return 2e-9 * cost(schedule) + 1e-6 * gathered + 3e-4 * len(schedule)

    fitted = TimeCost(cost, [(schedule, seconds(schedule)) for schedule in schedules])
    for schedule in [*schedules, ((2, 20),)]:
        assert fitted(schedule) == pytest.approx(seconds(schedule), rel=1e-6)


def test_no_part_of_the_time_counts_as_negative():
    factors = non_negative_fit(np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 1.0]]), np.array([1.0, 1.5, 2.5]))
    assert factors.min() >= 0 and factors[0] > 0


def test_a_speed_is_relative_to_the_source_which_computes_all_tokens_in_its_last_block():
    config = tiny_config(**MERGE, use_class_token=True)
    cost = MacsCost(config)
    assert cost.unpooled == cost(()) > model_stats(config.with_schedule(None))["macs"]
    assert cost(((1, 32),)) == model_stats(config.with_schedule(**schedule_fields(((1, 32),), 64)))["macs"]
