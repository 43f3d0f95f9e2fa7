"""What the health check says about skipped steps and collapses, and when it ends a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.config.schema import TrainConfig
from pretrain.record.events import Event, Warned
from pretrain.training.guard import PATIENCE, HealthCheck

TRAIN = TrainConfig(steps=100, global_batch_size=8, checkpoint_every=50, max_skipped_steps=2)


class Said(list[Warned]):
    def __call__(self, event: Event) -> None:
        assert isinstance(event, Warned)
        self.append(event)


def test_health_check__skipped_steps_are_counted_and_end_the_run() -> None:
    said = Said()
    health = HealthCheck(TRAIN, said)
    health.skipped(3, [1])
    health.skipped(7, [0, 1])
    with pytest.raises(FloatingPointError, match=r"3 steps were skipped, at last: the gradient of step 9 .*; lower"):
        health.skipped(9, [])
    abouts = [("non_finite_loss", 3), ("non_finite_loss", 7), ("non_finite_gradient", 9)]
    assert [(warning.about, warning.step) for warning in said] == abouts
    assert [warning.ranks for warning in said] == [(1,), (0, 1), ()]
    assert said[0].text == "the loss of step 3 is not finite on rank 1; skipped (1 of 2 allowed)"
    assert said[1].text == "the loss of step 7 is not finite on ranks 0, 1; skipped (2 of 2 allowed)"


def test_health_check__a_long_list_of_ranks_is_cut() -> None:
    said = Said()
    HealthCheck(TRAIN, said).skipped(3, range(20))
    assert "on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more; skipped" in said[0].text


def test_health_check__a_collapse_is_said_once_and_only_when_it_lasts() -> None:
    said = Said()
    health = HealthCheck(TRAIN, said)
    for step, symptom in enumerate(["flat", None, *["flat"] * (PATIENCE + 2)]):
        health.observe(symptom, step)
    (warning,) = said
    assert (warning.about, warning.step, warning.text) == ("collapse", 1 + PATIENCE, "collapsed: flat")


def test_health_check__stops_on_collapse_if_asked() -> None:
    health = HealthCheck(replace(TRAIN, stop_on_collapse=True), Said())
    with pytest.raises(FloatingPointError, match=r"stopped at step 2, train.stop_on_collapse is set: flat"):
        for step in range(PATIENCE):
            health.observe("flat", step)
