"""Which checkpoints of a run are evaluated, and which keep their training state: tables of two pure functions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.protocol import ranked
from pretrain.config.schema import EvaluationConfig, EvaluationTask, Recipe, TrainConfig
from pretrain.config.stages import Plan, Stage
from pretrain.evaluations import due, leaderboard, retention
from pretrain.record.events import Evaluated
from pretrain.record.run_dir import RunDir
from pretrain.record.scores import Ranking, best_steps

KNN, LINEAR = EvaluationTask("knn", "photos"), EvaluationTask("linear", "photos")


def recipe(**changes: Any) -> Recipe:
    """45 steps with a checkpoint every 10 and one at the end; `train.` and `evaluation.` settings by name."""
    train = TrainConfig(steps=45, global_batch_size=8, checkpoint_every=10)
    evaluation = EvaluationConfig(tasks=[KNN, LINEAR], select="knn/photos/top1")
    for key, value in changes.items():
        if hasattr(train, key):
            train = replace(train, **{key: value})
        else:
            evaluation = replace(evaluation, **{key: value})
    return Recipe(name="small", objective=None, train=train, evaluation=evaluation)


def plan(**changes: Any) -> Plan:
    return Plan.single(recipe(**changes))


def score(step: int, top1: float, task: str = "knn/photos", metric: str = "top1") -> Evaluated:
    protocol, data = task.split("/")
    return Evaluated(
        step=step, protocol=protocol, data=data, metrics={metric: top1}, key="k", seconds=1.0, cached=False
    )


STEPS = [0, 10, 20, 30, 40, 45]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 10, 20, 30, 40, 45]),
        ({"baseline": False}, [10, 20, 30, 40, 45]),
        ({"every": 2}, [0, 20, 40, 45]),
        ({"every": 3, "baseline": False}, [30, 45]),
        ({"every": 100}, [0, 45]),  # the last one always
        ({"every": 5}, [0, 45]),  # 45 is the fifth
        ({"enabled": False}, []),
        ({"tasks": []}, []),
    ],
    ids=str,
)
def test_due__which_checkpoints(changes: dict[str, Any], expected: list[int]) -> None:
    found = list(due(plan(**changes), STEPS, set()))
    assert found == [(step, task) for step in expected for task in (KNN, LINEAR)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"every": 2}, [0, 20, 40, 45]),
        ({"at": "last"}, [0, 45]),  # of the run, and what it began with, to compare with
        ({}, [0, 10, 20, 30, 40, 45]),
    ],
    ids=str,
)
def test_due__a_task_says_how_often_for_itself(changes: dict[str, Any], expected: list[int]) -> None:
    found = list(due(plan(tasks=[KNN, replace(LINEAR, **changes)]), STEPS, set()))
    assert [step for step, task in found if task.protocol == "linear"] == expected
    assert [step for step, task in found if task == KNN] == STEPS


def test_due__the_last_checkpoint_is_that_of_the_run_and_not_of_each_stage() -> None:
    one = recipe(tasks=[replace(KNN, at="last")], baseline=False)
    staged = Plan((Stage("a", one), Stage("b", one, first_step=45)))
    assert [step for step, _ in due(staged, [0, 10, 45, 55, 90], set())] == [90]


def test_due__counts_within_a_stage_and_takes_the_last_step_of_each() -> None:
    """45 steps with checkpoints at 10 20 30 40 45, then 45 more."""
    one = recipe(every=2, tasks=[KNN])
    staged = Plan((Stage("a", one), Stage("b", one, first_step=45)))
    steps = [0, 10, 20, 30, 40, 45, 55, 65, 75, 85, 90]
    assert [step for step, _ in due(staged, steps, set())] == [0, 20, 40, 45, 65, 85, 90]


def test_due__what_has_scores_is_not_due_again() -> None:
    done = {(10, "knn", "photos"), (45, "knn", "photos"), (45, "linear", "photos"), (45, "knn", "others")}
    assert list(due(plan(baseline=False), [10, 45], done)) == [(10, LINEAR)]


@pytest.mark.parametrize(
    ("changes", "scores", "expected"),
    [
        ({"keep_last": 1, "keep_best": 0}, [], {45}),
        ({"keep_last": 2, "keep_best": 0}, [score(10, 0.9)], {40, 45}),
        ({"keep_last": 9}, [], {10, 20, 30, 40, 45}),
        ({"keep_last": 1, "keep_best": 1}, [score(10, 0.5), score(20, 0.7), score(30, 0.6)], {20, 45}),
        ({"keep_last": 1, "keep_best": 2}, [score(10, 0.5), score(20, 0.7), score(30, 0.6)], {20, 30, 45}),
        ({"keep_last": 1, "keep_best": 1}, [score(45, 0.9), score(20, 0.7)], {45}),
        ({"keep_last": 1, "keep_best": 1}, [score(30, 0.7), score(20, 0.7)], {20, 45}),  # of equals the earlier
        ({"keep_last": 1, "keep_best": 1}, [score(0, 0.9), score(20, 0.1)], {20, 45}),  # the baseline is no product
        ({"keep_last": 1, "keep_best": 1}, [score(15, 0.9), score(20, 0.1)], {20, 45}),  # 15 is gone
        ({"keep_last": 1, "keep_best": 1}, [score(10, math.nan), score(20, 0.1)], {20, 45}),
        ({"keep_last": 1, "keep_best": 1}, [score(10, 0.9, "linear/photos"), score(20, 0.1)], {20, 45}),
        ({"keep_last": 1, "keep_best": 1}, [score(10, 0.9, metric="top5")], {45}),
        ({"keep_last": 1, "keep_best": 1, "select": None}, [score(10, 0.9)], {45}),
        ({"keep_last": 1, "keep_best": 1}, [score(10, 0.9), score(10, 0.2), score(20, 0.5)], {20, 45}),  # the newest
    ],
)
def test_retention__the_newest_and_the_best(
    changes: dict[str, Any], scores: list[Evaluated], expected: set[int]
) -> None:
    asked = recipe(**changes)
    best = [step for step in best_steps(asked.evaluation.select, scores) if step in STEPS]
    assert retention(asked.train, STEPS[1:], best) == expected


def test_retention__of_a_run_that_has_only_begun() -> None:
    assert retention(recipe().train, [], []) == set()


def test_retention__takes_no_more_than_it_needs_of_the_best() -> None:
    best = iter([30, 20, 10])
    assert retention(replace(recipe().train, keep_last=1, keep_best=1), STEPS[1:], best) == {30, 45}
    assert list(best) == [20, 10]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_ranking__is_the_order_of_all_scores_after_each(better: str) -> None:
    """Scores that come in any order, repeat a step, are equal or not finite; the direction may change on the way."""
    values = [0.5, 0.25, 0.5, math.nan, 0.75, 0.125, math.inf, 0.5]
    steps = [30, 10, 20, 40, 10, 50, 60, 5]
    ranking, last = Ranking("own/photos/top1"), {}
    for step, value in zip(steps, values, strict=True):
        direction = "lower" if step == 50 and better == "higher" else better
        described = ({"name": "top1", "unit": "", "better": direction, "headline": True},)
        event = replace(score(step, value, "own/photos"), described=described)
        ranking.add(event)
        last[step] = event
        newest = last[max(last)].reported[0]
        scores = {step: event.metrics["top1"] for step, event in last.items()}
        assert list(ranking.best()) == ranked(scores, newest)
    assert list(ranking.best())


def test_leaderboard__joins_by_data_and_weights_and_not_by_what_they_are_called(tmp_path: Path) -> None:
    """Two names of one data set are one task, one name of two data sets is two, and weights belong to their run."""

    def result(
        key: str, data: str, digest: str, weights: str, top1: float, protocol: str = "knn", **details: dict[str, Any]
    ) -> None:
        fields = {"key": key, "protocol": protocol, "version": 1, "data": data, "data_digest": digest}
        numbers = {"weights_digest": weights, "metrics": {"top1": top1}, "details": details, "seconds": 1.0}
        (tmp_path / "evaluations").mkdir(exist_ok=True)
        (tmp_path / "evaluations" / f"{key}.json").write_text(json.dumps({**fields, **numbers}))

    run = RunDir(tmp_path / "a")
    run.path.mkdir()
    run.recipe.touch()
    of_run = replace(score(10, 0.5), key="of-run", data_digest="1234567890", weights_digest="w10")
    older = replace(score(20, 0.7), key="older")  # whose record does not say what the data were: the store does
    run.evaluations.write_text("".join(f"{json.dumps(event.to_json())}\n" for event in (of_run, older)))
    result("older", "photos", "1234567890", "w20", 0.7)
    result("same-data", "pictures", "1234567890", "w10", 0.6)
    result("other-data", "photos", "fedcba9876", "w20", 0.9)
    result("other-weights", "photos", "fedcba9876", "elsewhere", 0.8)
    result("read-otherwise", "photos", "abcdef", "elsewhere", 0.4, protocol="linear")
    result("skipped", "photos", "fedcba9876", "w30", 0.3, known_as={"run_id": "a", "step": 30})
    result("foreign", "photos", "fedcba9876", "w40", 0.2, known_as={"reference": "timm:vit@a.safetensors"})
    result("strange", "photos", "fedcba9876", "w50", 0.1, known_as={"run_id": 3, "step": "a"})
    found = [(place.data, place.score, place.run, place.step, place.by_hand) for place in leaderboard(tmp_path)]
    assert found == [
        ("photos:12345678", 0.7, "a", 20, False),
        ("photos:12345678", 0.6, "a", 10, True),
        ("photos:12345678", 0.5, "a", 10, False),
        ("photos:fedcba98", 0.9, "a", 20, True),
        ("photos:fedcba98", 0.8, "(by hand)", None, True),
        ("photos:fedcba98", 0.3, "a", 30, True),  # a checkpoint that its run did not evaluate
        ("photos:fedcba98", 0.2, "timm:vit@a.safetensors (by hand)", None, True),
        ("photos:fedcba98", 0.1, "(by hand)", None, True),
        ("photos", 0.4, "(by hand)", None, True),  # by a protocol that has one data set of this name only
    ]


def test_leaderboard__what_is_damaged_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(tmp_path / "a")
    run.path.mkdir()
    run.recipe.touch()
    good = score(10, 0.5).to_json()
    lines = [good, {**good, "metrics": None}, {name: good[name] for name in ("time", "kind", "step")}, good]
    run.evaluations.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"kind": "eval')
    by_hand = tmp_path / "evaluations"
    by_hand.mkdir()
    for name, content in {
        "torn": '{"protocol": "kn',
        "list": "[]",
        "half": '{"protocol": "knn", "data": "photos"}',
        "word": '{"protocol": "knn", "data": "photos", "metrics": {"top1": "x"}, "key": "k"}',
    }.items():
        (by_hand / f"{name}.json").write_text(content)
    (by_hand / "folder.json").mkdir()
    (by_hand / "loop.json").symlink_to("loop.json")
    for name in ("no-file", "no-access"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").touch()
    (tmp_path / "no-file" / "evaluations.jsonl").mkdir()
    (tmp_path / "no-access" / "evaluations.jsonl").symlink_to("evaluations.jsonl")
    assert [(place.run, place.score) for place in leaderboard(tmp_path)] == [("a", 0.5)]
    for name in ("evaluations.jsonl", "torn", "list", "half", "word", "folder", "loop", "no-file"):
        assert name in caplog.text
