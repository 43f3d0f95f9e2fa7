"""Schedules as values, against the formulas written out."""

from __future__ import annotations

import math

import pytest

from objectives.schedules import Schedule, half_cosine
from objectives.teacher import cosine_momentum


def test_half_cosine__ends_middle_and_a_flat_start() -> None:
    assert half_cosine(0.2, 1.0, 0.0) == pytest.approx(0.2, abs=1e-15)
    assert half_cosine(0.2, 1.0, 0.5) == pytest.approx(0.6, abs=1e-15)
    assert half_cosine(0.2, 1.0, 1.0) == 1.0
    assert abs(half_cosine(0.0, 1.0, 1e-4)) < 1e-7


def test_schedule__warms_up_along_a_line_and_falls_along_half_a_cosine() -> None:
    schedule = Schedule(1e-3, 1e-5, num_steps=10, warmup_steps=4)
    line = [1e-3 * step / 4 for step in range(4)]
    fall = [1e-5 + (1e-3 - 1e-5) * 0.5 * (1.0 + math.cos(math.pi * (step - 4) / 6)) for step in range(4, 10)]
    assert [schedule.at(step) for step in range(10)] == pytest.approx(line + fall, rel=1e-15)
    assert schedule.at(0) == 0.0 and schedule.at(4) == 1e-3


def test_schedule__without_warm_up_begins_at_start_and_may_rise() -> None:
    values = [Schedule(0.0, 0.2, num_steps=8).at(step) for step in range(9)]
    assert values[0] == 0.0 and values[8] == 0.2 and values == sorted(values)


@pytest.mark.parametrize("step", [0, 1, 99, 10**9])
def test_schedule__constant_is_exactly_that(step: int) -> None:
    assert Schedule.constant(0.1).at(step) == 0.1


def test_schedule__warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    assert Schedule(1.0, 0.0, num_steps=3, warmup_steps=3).at(2) == pytest.approx(2 / 3)
    assert Schedule(1.0, 0.0, num_steps=3, warmup_steps=3).at(3) == 1.0


def test_schedule__a_decay_of_fewer_steps_has_its_end_in_the_last_of_them_and_keeps_it() -> None:
    schedule = Schedule(1.0, 0.2, num_steps=12, warmup_steps=3, decay_steps=5)
    fall = [0.2 + 0.8 * 0.5 * (1.0 + math.cos(math.pi * number / 4)) for number in range(5)]
    assert [schedule.at(step) for step in range(3, 12)] == pytest.approx([*fall, *[0.2] * 4], rel=1e-15)
    assert schedule.at(3) == 1.0 and schedule.at(7) == schedule.at(11) == 0.2


def test_schedule__a_stretched_decay_falls_later_and_has_its_end_in_the_last_step() -> None:
    plain, stretched = Schedule(1.0, 0.0, 100, decay_steps=100), Schedule(1.0, 0.0, 100, stretch=0.5)
    assert stretched.at(0) == 1.0 and stretched.at(99) == 0.0
    assert all(stretched.at(step) > plain.at(step) for step in range(1, 99))
    falls = [stretched.at(step) - stretched.at(step + 1) for step in range(99)]
    assert falls[98] > 40 * (plain.at(98) - plain.at(99))
    assert 74 <= falls.index(max(falls)) <= 75  # the middle of a cosine of 150 steps


def test_schedule__is_a_value() -> None:
    assert Schedule(1.0, 0.0, 3) == Schedule(1.0, 0.0, 3) and len({Schedule(1.0, 0.0, 3), Schedule(1.0, 0.0, 3)}) == 1


def test_cosine_momentum__is_the_formula_of_byol() -> None:
    expected = [1 - (1 - 0.996) * (math.cos(math.pi * step / 100) + 1) / 2 for step in range(101)]
    assert [cosine_momentum(0.996, step, 100) for step in range(101)] == pytest.approx(expected, rel=1e-15)
