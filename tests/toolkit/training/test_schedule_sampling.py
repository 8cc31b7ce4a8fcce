from collections import Counter

import pytest
from helpers import tiny_model

from hpool_vit.toolkit.training.schedules import ScheduleSampler, schedule_name


CHOICES = [None, [2], [1, 3]]


def draws(seed: int, steps: range) -> list[str]:
    sampler = ScheduleSampler(tiny_model(hvt_pool_choices=CHOICES), CHOICES, seed)
    names = []
    for step in steps:
        sampler.draw(step)
        names.append(schedule_name(sampler.model.config.hvt_pool))
    return names


def test_each_schedule_is_drawn_about_as_often_as_the_others():
    counts = Counter(draws(0, range(300)))
    assert counts.keys() == {"none", "2", "1,3"}
    assert min(counts.values()) > 75


def test_a_step_draws_the_same_in_every_process_and_in_a_resumed_run():
    assert draws(0, range(20))[10:] == draws(0, range(10, 20))
    assert draws(0, range(20)) != draws(1, range(20))


def test_the_model_has_its_own_schedule_again_after_each_step():
    model = tiny_model(hvt_pool_choices=CHOICES)
    sampler = ScheduleSampler(model, CHOICES, seed=0)
    for step in range(8):
        sampler.draw(step)
        sampler.restore()
        assert model.config.hvt_pool == [1, 3]


def test_without_choices_nothing_changes():
    model = tiny_model(hvt_pool_choices=CHOICES)
    sampler = ScheduleSampler(model, None, seed=0)
    for step in range(8):
        sampler.draw(step)
        assert model.config.hvt_pool == [1, 3]
    assert list(sampler.each()) == []


def test_each_schedule_is_visited_and_the_own_one_restored_even_after_an_error():
    model = tiny_model(hvt_pool_choices=CHOICES)
    sampler = ScheduleSampler(model, CHOICES, seed=0)
    assert [(name, model.config.hvt_pool) for name in sampler.each()] == [("none", None), ("2", [2]), ("1,3", [1, 3])]
    assert model.config.hvt_pool == [1, 3]
    with pytest.raises(RuntimeError):
        for _ in sampler.each():
            raise RuntimeError
    assert model.config.hvt_pool == [1, 3]
