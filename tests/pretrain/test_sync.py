from __future__ import annotations

import http.server
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints import copies, store
from pretrain.errors import RequestError
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    EvaluationFailed,
    Failed,
    Finished,
    Metrics,
    Rejected,
    Resumed,
    Start,
    Visualizations,
    Warned,
)
from pretrain.record.journal import Journal, read_events
from pretrain.record.run_dir import RunDir
from pretrain.tracking import sync as sync_module
from pretrain.tracking.client import MlflowRun, connect, default_database, default_uri
from pretrain.tracking.cursor import Cursor, Sent
from pretrain.tracking.sync import Tracker, sync

SELECT = "linear/photos/top1"
MakeCheckpoint = Callable[[Path, int], Path]


class Run:
    """A run directory as the worker and the driver fill it, and the tracker on it."""

    def __init__(self, storage: Path, run_id: str = "tiny-20260101-000000-0001") -> None:
        self.dir = storage / run_id
        self.dir.mkdir(exist_ok=True)
        (self.dir / "recipe.yaml").write_text("name: tiny\ntrain:\n  steps: 40\n")
        self.journal = Journal(self.dir / "journal.jsonl")
        self.evaluations = Journal(self.dir / "evaluations.jsonl")
        self.sent = RunDir(self.dir).sent
        self.slowest_write_s = 0.0

    def train(self, steps: range, scale: float = 1.0) -> None:
        for step in steps:
            began = time.perf_counter()
            self.journal.write(Metrics(step=step, values={"loss": scale / (step + 1), "lr": 1e-3}))
            self.slowest_write_s = max(self.slowest_write_s, time.perf_counter() - began)

    def publish(self, make_checkpoint: MakeCheckpoint, step: int) -> Path:
        path = make_checkpoint(self.dir, step)
        self.journal.write(CheckpointPublished(step=step, path=str(path.relative_to(self.dir))))
        return path

    def resume(self, step: int) -> None:
        counts = {"tensors": 1, "tensors_total": 1, "optimizer_step": step, "rng_states": 2, "saved_world_size": 2}
        self.journal.write(Resumed(step=step, samples_seen=step, epoch=0, position=step, **counts))

    def evaluate(self, step: int, top1: float, key: str = "k") -> None:
        metrics = {"top1": top1, "top1_ci_low": top1 - 0.1, "top1_ci_high": top1 + 0.1}
        task = {"protocol": "linear", "data": "photos", "key": key}
        self.evaluations.write(Evaluated(step=step, metrics=metrics, seconds=1.0, cached=False, **task))

    def track(self, uri: str, **changes: Any) -> Tracker:
        settings: dict[str, Any] = {
            "uri": uri,
            "experiment": "pretrain",
            "recipe_yaml": (self.dir / "recipe.yaml").read_text(),
            "params": {"name": "tiny", "train": {"steps": 40, "betas": [0.9, 0.95]}, "long": "x" * 10_000},
            "tags": {"objective": "mae", "backbone": "vit_tiny", "git.commit": "abc"},
            "model_name": "tiny",
            "select": SELECT,
            "exported": copies.exported,
        }
        tracker = Tracker(self.dir, **{**settings, **changes})
        tracker.start()
        return tracker

    def send(self, uri: str, **changes: Any) -> None:
        """One life of a driver that manages to send everything."""
        assert self.track(uri, **changes).close("FINISHED", 60)


def history(uri: str, mlflow_run_id: str | None, name: str) -> list[tuple[int, float, int]]:
    assert mlflow_run_id is not None
    points = connect(uri).get_metric_history(mlflow_run_id, name)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def versions(uri: str, name: str = "tiny") -> dict[int, Any]:
    """Step -> model version."""
    client = connect(uri)
    return {int(v.tags["step"]): v for v in client.search_model_versions(f"name='{name}'")}


def steps_by_alias(uri: str, name: str = "tiny") -> dict[str, int]:
    client = connect(uri)
    aliases = client.get_registered_model(name).aliases
    return {alias: int(client.get_model_version(name, str(v)).tags["step"]) for alias, v in aliases.items()}


def cursor(run: Run) -> dict[str, Any]:
    return json.loads((run.dir / "mlflow.json").read_text())


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "POLL_S", 0.05)
    monkeypatch.setattr(sync_module, "MAX_BACKOFF_S", 0.5)


@pytest.fixture
def run(storage: Path) -> Run:
    return Run(storage)


def test_tracker__everything_arrives(run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint) -> None:
    tracker = run.track(mlflow_uri)
    run.journal.write(Start(world_size=2, total_steps=40, step=0, device="cpu"))
    run.publish(make_checkpoint, 0)
    run.train(range(0, 21, 10))
    checkpoint = run.publish(make_checkpoint, 20)
    (run.dir / "visualizations").mkdir()
    (run.dir / "visualizations" / "step-00000020.png").write_bytes(b"\x89PNG")
    run.journal.write(Visualizations(step=20, path="visualizations/step-00000020.png"))
    run.journal.write(Warned(step=4, about="non_finite_loss", text="skipped (1 of 10 allowed)"))
    run.journal.write(Warned(step=5, about="non_finite_loss", text="skipped (2 of 10 allowed)"))
    run.journal.write(Warned(step=20, about="collapse", text="collapsed: flat"))
    run.evaluate(0, 0.25)
    run.evaluate(20, 0.5)
    run.evaluations.write(EvaluationFailed(step=20, protocol="knn", data="photos", error="out of memory"))
    run.journal.write(Finished(step=20))
    assert tracker.close("FINISHED", 60) and tracker.problem is None

    client = connect(mlflow_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("pretrain").experiment_id])
    assert found.info.run_id == tracker.mlflow_run_id and found.info.status == "FINISHED"
    assert found.data.params == {"name": "tiny", "train.steps": "40", "train.betas": "[0.9, 0.95]"}
    assert found.data.tags["pretrain.run_id"] == run.dir.name and found.data.tags["git.commit"] == "abc"
    assert found.data.tags["eval/knn/photos/error"] == "step 20: out of memory"
    assert found.data.tags["warning/non_finite_loss"] == "step 5: skipped (2 of 10 allowed)"
    assert found.data.tags["warning/collapse"] == "step 20: collapsed: flat"
    artifacts = run.dir.parent / "mlflow-artifacts" / found.info.run_id / "artifacts"
    assert (artifacts / "config" / "recipe.yaml").read_text() == (run.dir / "recipe.yaml").read_text()
    assert (artifacts / "visualizations" / "step-00000020.png").read_bytes() == b"\x89PNG"

    written = [event for event in read_events(run.dir / "journal.jsonl")[0] if isinstance(event, Metrics)]
    expected = [(event.step, event.values["loss"], int(event.time * 1000)) for event in written]
    assert history(mlflow_uri, tracker.mlflow_run_id, "train/loss") == expected
    scores = history(mlflow_uri, tracker.mlflow_run_id, "eval/linear/photos/top1")
    assert [(step, value) for step, value, _ in scores] == [(0, 0.25), (20, 0.5)]

    registered = versions(mlflow_uri)
    assert list(registered) == [20], "the random backbone is a floor, no version"
    tags = registered[20].tags
    assert tags["eval/linear/photos/top1"] == "0.5" and tags["run_id"] == run.dir.name
    assert tags["checkpoint_path"] == str(checkpoint) and tags["objective"] == "mae"
    model = client.get_logged_model(tags["model_id"])
    assert model.status == "READY" and model.source_run_id == found.info.run_id
    assert {m.key: m.value for m in model.metrics}["eval/linear/photos/top1"] == 0.5
    files = {p.name for p in (run.dir.parent / "mlflow-artifacts" / "models" / model.model_id / "artifacts").iterdir()}
    assert files == {"backbone.safetensors", "checkpoint.json", "recipe.yaml"}
    assert steps_by_alias(mlflow_uri) == {"best": 20}
    assert not (Path.cwd() / "mlruns").exists() and not (Path.cwd() / "mlflow.db").exists()


def test_tracker__replayed_steps_are_not_logged_twice(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint
) -> None:
    run.train(range(0, 15))
    run.publish(make_checkpoint, 10)
    run.evaluate(10, 0.5)
    run.send(mlflow_uri)
    first_id = cursor(run)["mlflow_run_id"]
    run.resume(10)  # a new driver and new workers, from the checkpoint of step 10
    run.train(range(11, 20))
    run.journal.write(CheckpointPublished(step=10, path="checkpoints/step-00000010"))
    run.journal.write(Metrics(step=12, values={"late": 1.0}))
    run.evaluate(10, 0.5)
    run.send(mlflow_uri, params={"name": "tiny", "train": {"steps": 80, "betas": [0.9, 0.95]}})

    assert cursor(run)["mlflow_run_id"] == first_id
    assert [step for step, _, _ in history(mlflow_uri, first_id, "train/loss")] == list(range(20))
    assert [step for step, _, _ in history(mlflow_uri, first_id, "train/late")] == [12], "highest step is per metric"
    assert len(history(mlflow_uri, first_id, "eval/linear/photos/top1")) == 1
    assert len(connect(mlflow_uri).search_model_versions("name='tiny'")) == 1
    data = connect(mlflow_uri).get_run(first_id).data
    assert data.params["train.steps"] == "40" and data.tags["resumed/train.steps"] == "80"


def test_tracker__another_result_of_the_same_task_arrives_and_a_regression_is_a_tag(run: Run, mlflow_uri: str) -> None:
    """What a schedule writes into a run that has ended: the same result again, and that of data which have changed."""
    run.train(range(5))
    run.evaluate(4, 0.5)
    run.send(mlflow_uri)
    run.evaluate(4, 0.5)
    run.evaluate(4, 0.4, key="of other data")
    run.evaluations.write(Warned(step=4, about="regression", text="worse"))
    assert sync(run.dir, copies.exported)
    mlflow_run_id = cursor(run)["mlflow_run_id"]
    found = history(mlflow_uri, mlflow_run_id, "eval/linear/photos/top1")
    assert [value for _, value, _ in found] == [0.4, 0.5]
    mlflow_run = connect(mlflow_uri).get_run(mlflow_run_id)
    assert mlflow_run.data.tags["warning/regression"] == "step 4: worse"
    last = [event.time for event in read_events(run.dir / "journal.jsonl")[0]][-1]
    assert mlflow_run.info.end_time == int(last * 1000)  # the run has not become longer


def test_tracker__a_lost_cursor_costs_nothing(run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint) -> None:
    run.train(range(5))
    run.publish(make_checkpoint, 4)
    run.evaluate(4, 0.5)
    run.send(mlflow_uri)
    before, sent = cursor(run), Sent(run.sent)
    assert sent.versions and sent.evaluations == {"4 linear/photos": "k"}
    (run.dir / "mlflow.json").write_text("{ torn")
    run.send(mlflow_uri)
    assert cursor(run)["mlflow_run_id"] == before["mlflow_run_id"]
    assert Sent(run.sent).versions == sent.versions
    for name in ("train/loss", "eval/linear/photos/top1"):
        found = history(mlflow_uri, before["mlflow_run_id"], name)
        assert len(found) == len({step for step, _, _ in found})
    assert len(connect(mlflow_uri).search_model_versions("name='tiny'")) == 1


def test_tracker__a_score_is_there_once_whose_answers_were_lost_three_times(
    run: Run, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow has taken it each time, and adds a point for each time at which something is said to have happened."""
    log_metrics, asked = MlflowRun.log_metrics, []

    def lose_the_answer(self: MlflowRun, points: Any, model_id: str | None = None) -> None:
        log_metrics(self, points, model_id)
        if any(point.name == "eval/linear/photos/top1" for point in points):
            asked.append(points)
            if len(asked) <= 3:
                raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(MlflowRun, "log_metrics", lose_the_answer)
    run.train(range(5))
    run.evaluate(4, 0.5)
    run.send(mlflow_uri)
    assert len(asked) == 4
    points = history(mlflow_uri, cursor(run)["mlflow_run_id"], "eval/linear/photos/top1")
    assert [(step, value) for step, value, _ in points] == [(4, 0.5)]


def test_tracker__the_cursor_does_not_grow_with_checkpoints_and_evaluations(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint
) -> None:
    """It is written anew after each of them."""
    sizes = []
    for step in (11, 22, 33):
        run.publish(make_checkpoint, step)
        run.evaluate(step, 0.5)
        run.send(mlflow_uri)
        sizes.append(len(json.dumps(cursor(run) | {"journal_offset": 0, "evaluations_offset": 0})))
    assert sizes[0] == sizes[1] == sizes[2]
    sent = Sent(run.sent)
    assert list(sent.versions) == [11, 22, 33] and len(sent.evaluations) == 3


def test_tracker__mlflow_is_not_asked_for_all_versions_of_a_model(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint cost what there were checkpoints before: MLflow looks through all of them to answer."""
    from mlflow import MlflowClient

    found: list[int] = []
    plain = MlflowClient.search_model_versions

    def search(*arguments: Any, **options: Any) -> Any:
        versions = plain(*arguments, **options)
        found.append(len(versions))
        return versions

    monkeypatch.setattr(MlflowClient, "search_model_versions", search)
    for step in (10, 20, 30):
        run.publish(make_checkpoint, step)
        run.evaluate(step, step / 100)
    run.send(mlflow_uri)
    run.sent.unlink()
    (run.dir / "mlflow.json").unlink()
    run.send(mlflow_uri)
    assert found == [0, 0, 0, 1, 1, 1]
    monkeypatch.undo()
    assert steps_by_alias(mlflow_uri) == {"best": 30, "previous": 20}


def test_sent__a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    sent = Sent(path)
    sent.add_version(10, "m-1", "1")
    sent.add_evaluation("10 knn/photos", "k")
    path.write_bytes(path.read_bytes()[:-4])
    Sent(path).add_evaluation("20 knn/photos", "k")
    found = Sent(path)
    assert found.versions == {10: ("m-1", "1")} and found.evaluations == {"20 knn/photos": "k"}
    found.forget()
    assert not path.exists() and not found.versions and not Sent(path).evaluations


def test_cursor__of_a_version_that_kept_checkpoints_in_it_has_its_lines_sent_again(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint
) -> None:
    run.train(range(5))
    run.publish(make_checkpoint, 4)
    run.evaluate(4, 0.5)
    run.send(mlflow_uri)
    sent, saved = Sent(run.sent), cursor(run)
    old = saved | {"versions": {"4": list(sent.versions[4])}, "evaluated": ["4 linear/photos"]}
    (run.dir / "mlflow.json").write_text(json.dumps(old))
    run.sent.unlink()
    loaded = Cursor.load(run.dir / "mlflow.json")
    assert loaded is not None and loaded.journal_offset == 0 and loaded.mlflow_run_id == saved["mlflow_run_id"]
    run.send(mlflow_uri)
    assert Sent(run.sent).versions == sent.versions and cursor(run) == saved
    assert len(connect(mlflow_uri).search_model_versions("name='tiny'")) == 1


def test_tracker__best_moves_both_ways_and_across_runs(
    storage: Path, mlflow_uri: str, make_checkpoint: MakeCheckpoint
) -> None:
    run = Run(storage)
    for step in (10, 20, 30):
        run.publish(make_checkpoint, step)
    run.evaluate(20, 0.5)
    run.send(mlflow_uri)
    assert steps_by_alias(mlflow_uri) == {"best": 20}
    run.evaluate(30, 0.4)
    run.send(mlflow_uri)
    assert steps_by_alias(mlflow_uri) == {"best": 20}, "a lower score moves nothing"
    run.evaluate(10, 0.6)  # an earlier checkpoint, evaluated late
    run.send(mlflow_uri)
    assert steps_by_alias(mlflow_uri) == {"best": 10, "previous": 20}

    other = Run(storage, "tiny-20260101-000000-0002")
    for step, score in ((40, 0.55), (50, math.nan), (60, 0.7)):
        other.publish(make_checkpoint, step)
        other.evaluate(step, score)
        other.send(mlflow_uri)
        assert steps_by_alias(mlflow_uri)["best"] == (60 if step == 60 else 10)
    assert steps_by_alias(mlflow_uri) == {"best": 60, "previous": 10}


def test_tracker__the_newest_is_best_until_one_has_a_score(
    storage: Path, mlflow_uri: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Without evaluations no version got the alias, and the line `pretrain pull NAME@best` of the summary failed."""
    run = Run(storage)
    for step in (10, 20):
        run.publish(make_checkpoint, step)
        run.send(mlflow_uri)
        assert steps_by_alias(mlflow_uri) == {"best": step}
    run.evaluate(10, 0.3)
    run.send(mlflow_uri)
    assert steps_by_alias(mlflow_uri) == {"best": 10}
    run.publish(make_checkpoint, 30)
    run.send(mlflow_uri)
    assert steps_by_alias(mlflow_uri) == {"best": 10}, "what has a score gives way to a better one only"


def test_tracker__without_select_the_newest_is_best(run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint) -> None:
    run.publish(make_checkpoint, 10)
    run.publish(make_checkpoint, 20)
    run.evaluate(10, 0.9)
    run.send(mlflow_uri, select=None)
    assert steps_by_alias(mlflow_uri) == {"best": 20, "previous": 10}


def test_tracker__bad_records_are_parked_and_their_neighbours_arrive(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    run.train(range(3))
    run.journal.write(Metrics(step=3, values={"x//y": 1.0}))  # MLflow refuses the name
    run.journal.write(Visualizations(step=3, path="../../outside.png"))
    with open(run.dir / "journal.jsonl", "ab") as file:
        file.write(b'{"time": 1.0, "kind": "metrics", "values": {"loss": 1.0}}\n')
        file.write(b'{"kind": "metr\n')
    run.journal.write(Metrics(step=4, values={"loss": math.nan, "odd(name)": 2.0}))
    run.journal.write(CheckpointPublished(step=4, path="checkpoints/step-00000004"))  # pruned before it could be sent
    run.evaluate(4, 0.5)
    run.send(mlflow_uri)

    mlflow_run_id = cursor(run)["mlflow_run_id"]
    assert [step for step, _, _ in history(mlflow_uri, mlflow_run_id, "train/loss")] == [0, 1, 2, 4]
    assert [step for step, _, _ in history(mlflow_uri, mlflow_run_id, "train/odd_name_")] == [4]
    assert [step for step, _, _ in history(mlflow_uri, mlflow_run_id, "eval/linear/photos/top1")] == [4]
    parked = [event for event in read_events(run.dir / "tracking-rejected.jsonl")[0] if isinstance(event, Rejected)]
    reasons = " ".join(event.reason for event in parked)
    assert len(parked) == 4
    assert all(text in reasons for text in ("x//y", "'step'", "outside the run directory", "not a JSON object"))
    assert "the checkpoint of step 4 is gone" in caplog.text


def test_tracker__a_dead_server_stops_nothing_and_sync_delivers_later(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"http://user:secret@127.0.0.1:{free_port()}"
    tracker = run.track(dead)
    run.train(range(5))
    run.publish(make_checkpoint, 4)
    wait_for(lambda: tracker.problem is not None)
    began = time.monotonic()
    assert not tracker.close("FAILED", 2)
    assert time.monotonic() - began < 4
    assert f"python -m pretrain.tracking {run.dir}" in caplog.text
    assert sum("training goes on" in record.message for record in caplog.records) == 1, "told once per outage"
    assert "secret" not in caplog.text and "secret" not in (run.dir / "mlflow.json").read_text()

    assert sync(run.dir, copies.exported, uri=mlflow_uri)
    sent = connect(mlflow_uri).get_run(cursor(run)["mlflow_run_id"])
    assert sent.info.status == "FAILED" and sent.data.params["train.steps"] == "40"
    assert len(history(mlflow_uri, sent.info.run_id, "train/loss")) == 5
    assert list(versions(mlflow_uri)) == [4]


def test_sync__registers_every_checkpoint_of_a_run_that_mlflow_missed(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Retention went on meanwhile, as the driver does it; it used to take backbones that were not registered yet."""
    tracker = run.track(f"http://127.0.0.1:{free_port()}")
    for step in (10, 20, 30, 40):
        run.train(range(step - 10, step))
        run.publish(make_checkpoint, step)
        run.evaluate(step, step / 100)
        for found in store.published(run.dir)[:-1]:
            store.remove_training_state(found)
    run.journal.write(Finished(step=40))
    assert not tracker.close("FINISHED", 1)
    assert [found.step for found in store.published(run.dir)] == [10, 20, 30, 40]

    command = [sys.executable, "-m", "pretrain.tracking", str(run.dir)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_uri, "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    registered = versions(mlflow_uri)
    assert sorted(registered) == [10, 20, 30, 40]
    assert all(version.tags["eval/linear/photos/top1"] == str(step / 100) for step, version in registered.items())
    assert steps_by_alias(mlflow_uri) == {"best": 40, "previous": 30}


def test_tracker__registers_checkpoints_of_a_remote_store(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    store.place(run.dir, f"file://{tmp_path}/bucket")
    published = make_checkpoint(run.dir, 10)
    (tmp_path / "bucket" / run.dir.name).mkdir(parents=True)
    published.rename((tmp_path / "bucket" / run.dir.name).joinpath(published.name))
    run.journal.write(CheckpointPublished(step=10, path="checkpoints/step-00000010"))
    run.send(mlflow_uri)
    tags = versions(mlflow_uri)[10].tags
    assert tags["checkpoint_path"] == f"file://{tmp_path}/bucket/{run.dir.name}/step-00000010"


def test_sync__ends_a_run_whose_driver_was_killed(run: Run, mlflow_uri: str) -> None:
    run.track(f"http://127.0.0.1:{free_port()}").close("FINISHED", 0)
    ends = (Metrics(step=1, values={}), "KILLED"), (Failed(error="boom"), "FAILED"), (Finished(step=1), "FINISHED")
    for event, status in ends:
        run.journal.write(event)
        content = cursor(run) | {"status": None}
        (run.dir / "mlflow.json").write_text(json.dumps(content))
        assert sync(run.dir, copies.exported, uri=mlflow_uri)
        assert connect(mlflow_uri).get_run(cursor(run)["mlflow_run_id"]).info.status == status


def test_tracker__a_moved_storage_is_no_new_server(
    run: Run, mlflow_uri: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The cursor said where the database was, so everything was sent again, and `sync` made the old place again."""
    run.publish(make_checkpoint, 10)
    run.send(mlflow_uri)
    sent = cursor(run)
    moved = run.dir.parent.rename(tmp_path / "moved")
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # as in a process that begins after the move
    assert str(tmp_path) not in (moved / run.dir.name / "mlflow.json").read_text()
    assert sync(moved / run.dir.name, copies.exported)
    again = json.loads((moved / run.dir.name / "mlflow.json").read_text())
    assert again == sent
    assert not run.dir.parent.exists()


def test_connect__several_processes_meet_a_new_storage(tmp_path: Path) -> None:
    """Each ran MLflow's migrations on the same file, which broke it for good."""
    uri = default_database(tmp_path / "new %20 ?")
    (tmp_path / "new %20 ?").mkdir()
    (tmp_path / "new %20 ?" / ".mlflow.db.new-dead").write_bytes(b"of a process that was killed while it made one")
    code = (
        "import sys; from pretrain.tracking.client import MlflowRun, connect; "
        "print(MlflowRun.bind(connect(sys.argv[1]), sys.argv[1], 'pretrain', sys.argv[2], 0, None).mlflow_run_id)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, uri, f"run-{i}"], stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    ids = {process.communicate(timeout=240)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    client = connect(uri)
    experiment = client.get_experiment_by_name("pretrain")
    assert experiment is not None
    assert {found.info.run_id for found in client.search_runs([experiment.experiment_id])} == ids
    assert sorted(path.name for path in (tmp_path / "new %20 ?").iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_sync__refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not a tracked run; expected runs/RUN_ID with mlflow\.json"):
        sync(tmp_path, copies.exported)


def test_tracker__refused_credentials_are_told_once_and_close_does_not_wait(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(401) as uri:
        tracker = run.track(uri)
        run.train(range(3))
        wait_for(lambda: tracker._failures >= 3)
        began = time.monotonic()
        assert not tracker.close("FINISHED", 60)
        assert time.monotonic() - began < 10
    assert "MLFLOW_TRACKING_USERNAME" in caplog.text and "refuses" in str(tracker.problem)
    assert sum("training goes on" in record.message for record in caplog.records) == 1


def test_tracker__a_deleted_run_is_not_replaced(run: Run, mlflow_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run.train(range(3))
    run.send(mlflow_uri)
    connect(mlflow_uri).delete_run(cursor(run)["mlflow_run_id"])
    tracker = run.track(mlflow_uri)
    run.train(range(3, 6))
    assert not tracker.close("FINISHED", 60)
    assert "whether the run was deleted" in caplog.text
    experiment = connect(mlflow_uri).get_experiment_by_name("pretrain")
    assert connect(mlflow_uri).search_runs([experiment.experiment_id]) == []
    assert not (run.dir / "tracking-rejected.jsonl").exists()


def test_tracker__a_server_that_never_answers_blocks_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = run.track(f"http://127.0.0.1:{silent.getsockname()[1]}")
        run.train(range(200))
        wait_for(lambda: tracker.problem is not None)
        began = time.monotonic()
        assert not tracker.close("KILLED", 1)
        assert time.monotonic() - began < 4
    assert run.slowest_write_s < 0.5


def test_tracker__only_one_process_sends_a_run(run: Run, mlflow_uri: str) -> None:
    run.train(range(3))
    first = run.track(mlflow_uri)
    wait_for(lambda: first.mlflow_run_id is not None)
    second = run.track(mlflow_uri)
    assert not second.close("FINISHED", 30)
    assert "another process is sending" in str(second.problem)
    assert first.close("FINISHED", 30)


def test_tracker__imports_mlflow_only_when_there_is_something_to_send(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from pretrain.tracking import sync as sync_module
sync_module.POLL_S = 0.01
Path("run").mkdir()
tracker = sync_module.Tracker(Path("run"), uri="sqlite:///x.db", experiment="e", recipe_yaml="", params={}, tags={},
                           model_name="m", select=None, exported=lambda run_dir, step: None)
tracker.start()
time.sleep(0.3)
assert not {"mlflow", "torch", "ray", "deepspeed"} & sys.modules.keys()
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


@pytest.mark.parametrize("name", ["a/b", "models:x", "../up", "", ".hidden", "a" * 200])
def test_tracker__refuses_a_bad_model_name_before_anything_starts(run: Run, name: str) -> None:
    with pytest.raises(RequestError, match="model name"):
        run.track("sqlite:///unused.db", model_name=name)


def test_default_uri__environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert default_uri(tmp_path) == "http://host"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_tracker__a_password_in_the_query_is_never_written_down(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """`?password=` is where database drivers take it from; it was kept in the cursor and the log."""
    host = f"127.0.0.1:{free_port()}"
    tracker = run.track(f"http://me:s/e@cret@{host}/mlflow?password=secret&user=me")
    run.train(range(2))
    wait_for(lambda: tracker.problem is not None)
    assert not tracker.close("FINISHED", 1)
    told = caplog.text + str(tracker.problem) + (run.dir / "mlflow.json").read_text()
    assert host in told and not any(part in told for part in ("secret", "cret@", "s/e"))


@pytest.mark.integration
@pytest.mark.long
def test_tracker__server_down_started_killed_and_restarted(
    run: Run, tmp_path: Path, migrated_database: Path, make_checkpoint: MakeCheckpoint
) -> None:
    database = tmp_path / "server.db"
    database.write_bytes(migrated_database.read_bytes())
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    tracker = run.track(uri)  # nobody is listening yet
    run.train(range(0, 100))
    run.publish(make_checkpoint, 99)
    run.evaluate(99, 0.4)
    wait_for(lambda: tracker.problem is not None)

    with serving(database, tmp_path / "artifacts", port) as server:
        wait_for(lambda: list(Sent(run.sent).evaluations) == ["99 linear/photos"])
        run.train(range(100, 3000))
        wait_for(lambda: cursor(run)["last_step"]["train/loss"] > 100)
        os.killpg(server.pid, signal.SIGKILL)  # in the middle of sending
        run.train(range(3000, 4000))
        run.resume(3900)
        run.train(range(3900, 4200))
        wait_for(lambda: tracker.problem is not None)
    assert cursor(run)["last_step"]["train/loss"] < 4199

    with serving(database, tmp_path / "artifacts", port):
        run.publish(make_checkpoint, 4199)
        run.evaluate(4199, 0.6)
        assert tracker.close("FINISHED", 120)
        points = history(uri, tracker.mlflow_run_id, "train/loss")
        assert [step for step, _, _ in points] == list(range(4200)), "every point exactly once"
        assert all(value == 1 / (step + 1) for step, value, _ in points)
        assert steps_by_alias(uri) == {"best": 4199, "previous": 99}
        assert connect(uri).get_run(tracker.mlflow_run_id).info.status == "FINISHED"
    assert run.slowest_write_s < 0.5  # one write: 0.02 ms; the rest is two busy cores


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that gives every request the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_PATCH = do_PUT = do_GET

        def log_message(self, *args: Any) -> None:
            logging.getLogger(__name__).debug("request")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(database: Path, artifacts: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real MLflow server in its own process group, ready to answer."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(artifacts)]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(database.with_suffix(".log"), "ab") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: server.poll() is None and is_healthy(port))
        yield server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
