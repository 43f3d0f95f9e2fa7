"""Events come back as they were written; what other versions add or lack does not hurt, what is broken is named."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from evaluation.protocol import Metric
from pretrain.record import events
from pretrain.record.events import DamagedEvent, Evaluated, EvaluationFailed, Event, Metrics, Start, from_json

EXAMPLES: list[Event] = [
    events.Start(step=0, total_steps=9, world_size=2, device="cpu", exact=False, pids=(4, 5), decoder="pil"),
    events.SourceOpened(
        step=0,
        stage="",
        name="photos",
        shards="a/train-*.tar",
        num_shards=2,
        samples=9,
        digest="ab",
        share=0.5,
        fields=("jpg",),
        splits={"train": 9, "test": 1},
        duplicates=2,
        rejected=0,
    ),
    events.Preparing(what="building the model"),
    events.Startup(**{field.name: 1.5 for field in fields(events.Startup)}),
    events.Resumed(**{field.name: 3 for field in fields(events.Resumed)} | {"reference": "runs:/a/3"}),
    events.Metrics(step=1, values={"loss": 0.5, "samples_seen": 64}),
    events.Taught(step=40, stage="gram", teacher="pretrain/40: what this run exports at step 40"),
    events.Initialized(step=0, reference="timm:x", sha256="ab", loaded=3, total=4, missing=("pos_embed",)),
    events.StageBegan(step=8, stage="large", loaded=3, total=4, fresh=("pos_embed",)),
    events.CheckpointPublished(step=1, path="checkpoints/step-00000001"),
    events.Visualizations(step=1, path="visualizations/step-00000001.png", data="photos", shows="tokens"),
    events.Warned(step=1, about="collapse", text="collapsed: flat"),
    events.Warned(step=1, about="non_finite_loss", text="not finite", ranks=(0, 3)),
    events.Finished(step=9),
    events.Regrouping(step=9, why="a machine is taken away"),
    events.Stopped(step=9),
    events.Failed(error="worker 1 was killed"),
    events.Evaluated(step=1, protocol="knn", data="a", metrics={"top1": 0.5}, key="k", seconds=2.0, cached=True),
    events.EvaluationFailed(step=1, protocol="knn", data="a", error="out of memory"),
    events.Rejected(reason="ValueError: x", line="{"),
]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_event__comes_back_as_it_was_written(event: Event) -> None:
    record = json.loads(json.dumps(event.to_json()))
    assert list(record)[:2] == ["time", "kind"]
    assert from_json(record) == event
    assert from_json({**record, "added_by_a_newer_version": [1]}) == event


def test_event__every_class_has_an_example() -> None:
    classes = {value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event)}
    assert {type(event) for event in EXAMPLES} == classes - {Event}


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_from_json__a_missing_field_is_named(event: Event) -> None:
    record = event.to_json()
    optional = {
        Start: {"exact", "pids", "decoder", "epochs", "size"},
        events.Resumed: {"reference"},
        events.Initialized: {"resampled", "missing", "unexpected"},
        events.StageBegan: {"resampled", "fresh", "moments"},
        events.SourceOpened: {"fields", "splits", "duplicates", "rejected"},
        events.Visualizations: {"data", "shows"},
        events.Warned: {"ranks"},
    }.get(type(event), set())
    if isinstance(event, EvaluationFailed):
        optional = {"error", "left_out"}  # without an error the record is one of scores, which then lacks others
    if isinstance(event, Evaluated):
        optional = {
            "described",
            "num_test",
            "num_train",
            "num_test_in_train",
            "data_digest",
            "weights_digest",
        }  # older records do not say
    for name in record.keys() - {"kind"} - optional:
        with pytest.raises(DamagedEvent, match=f"{event.kind}: no '{name}'"):
            from_json({key: value for key, value in record.items() if key != name})
    with pytest.raises(DamagedEvent, match="without 'kind'"):
        from_json({key: value for key, value in record.items() if key != "kind"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": "3"},
        {"step": True},
        {"step": 1.5},
        {"step": None},
        {"time": "now"},
        {"values": None},
        {"values": [1.0]},
        {"values": {"loss": "high"}},
        {"values": {"loss": None}},
    ],
    ids=str,
)
def test_from_json__a_field_of_another_type_is_named(wrong: dict[str, Any]) -> None:
    record = {**Metrics(step=1, values={"loss": 1.0}).to_json(), **wrong}
    with pytest.raises(DamagedEvent, match=f"metrics: '{next(iter(wrong))}' is .*, expected"):
        from_json(record)


def test_from_json__kinds_of_a_newer_version_are_passed_over() -> None:
    assert from_json({"time": 1.0, "kind": "telemetry", "watts": 3}) is None


def test_from_json__reads_runs_of_before_the_renames() -> None:
    old = {"time": 1.0, "kind": "metrics", "step": 2, "values": {"loss": 0.5, "images_per_s": 300.0}}
    assert from_json(old) == Metrics(time=1.0, step=2, values={"loss": 0.5, "samples_per_s": 300.0})
    picture = from_json({"time": 1.0, "kind": "pictures", "step": 2, "path": "pictures/step-00000002.png"})
    assert picture == events.Visualizations(time=1.0, step=2, path="pictures/step-00000002.png")
    start = from_json({"time": 1.0, "kind": "start", "step": 0, "total_steps": 9, "world_size": 2, "device": "cpu"})
    assert isinstance(start, Start) and start.exact and start.pids == ()


def test_from_json__scores_and_failures_are_told_apart() -> None:
    task = {"time": 1.0, "kind": "evaluation", "step": 2, "protocol": "knn", "data": "photos"}
    failed = from_json({**task, "error": "boom"})
    assert isinstance(failed, EvaluationFailed) and failed.task == "knn/photos"
    scores = from_json({**task, "metrics": {"top1": 1}, "key": "k", "seconds": 3, "cached": False})
    assert isinstance(scores, Evaluated) and scores.task == "knn/photos"


def test_evaluated__says_what_its_numbers_mean_and_older_records_mean_what_their_protocol_says() -> None:
    facts = {"name": "error", "unit": "m", "better": "lower", "headline": True}
    scores = {"share": 0.5, "error": 0.25}
    event = Evaluated(
        step=1, protocol="depth", data="a", metrics=scores, key="k", seconds=2.0, cached=True, described=(facts,)
    )
    read = from_json(event.to_json())
    assert isinstance(read, Evaluated) and read == event
    assert read.headline == Metric("error", unit="m", better="lower", headline=True)
    old = from_json(
        {**event.to_json(), "protocol": "knn", "metrics": {"top1_ci_low": 0.4, "top1": 0.5}, "described": []}
    )
    assert isinstance(old, Evaluated) and old.headline.name == "top1"
    assert [metric.better for metric in old.reported] == [None, "higher"]


@pytest.mark.parametrize(
    "wrong",
    [{"metrics": {}}, {"described": [{"foo": 1}]}, {"step": 10**400}, {"time": float("nan")}, {"time": float("inf")}],
    ids=str,
)
def test_from_json__an_evaluation_that_says_nothing_is_damaged(wrong: dict[str, Any]) -> None:
    good = next(event for event in EXAMPLES if isinstance(event, Evaluated)).to_json()
    with pytest.raises(DamagedEvent, match="evaluation: "):
        from_json({**good, **wrong})
