"""A run, and a service that evaluates its checkpoints by another protocol: scores stand where those of it stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.record.events import Evaluated, Visualizations
from pretrain.record.journal import read_events
from pretrain.record.run_dir import runs_in
from pretrain.tracking.client import connect, default_database
from pretrain.tracking.cursor import Cursor

GROCERY = Path(__file__).resolve().parents[2] / "pretrain" / "demo_data" / "grocery"

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1500)]


def pretrain(*arguments: str) -> str:
    """What a command says that succeeds."""
    command = [sys.executable, "-m", "pretrain", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_schedule__new_checkpoints_of_a_run_and_then_its_best(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = tmp_path / "storage"
    storage.mkdir()
    here, data = ["--storage", str(storage)], ["--data", f"grocery={GROCERY}"]
    pretrain("schedule", "add", "each", "--on-checkpoint", str(storage), "--tasks", "knn,linear", *data, *here)
    settings = ["train.workers=1", "train.steps=4", "train.checkpoint_every=2", f"storage={storage}"]
    pretrain("run", str(recipe), *settings)
    (run,) = runs_in(storage)
    by_run = read_events(run.evaluations)[0]

    said = pretrain("schedule", "serve", "--once", *here)
    events = read_events(run.evaluations)[0]
    scores = [event for event in events if isinstance(event, Evaluated)]
    pictures = [event for event in events if isinstance(event, Visualizations)]
    assert events[: len(by_run)] == by_run and len(scores) + len(pictures) == len(events)
    kinds = ("knn_confusion", "knn_neighbors", "linear_confusion", "tokens")
    assert sorted((event.step, event.shows) for event in pictures) == [(s, kind) for s in (0, 2, 4) for kind in kinds]
    assert all(run.inside(event.path).is_file() for event in pictures)
    assert sorted((event.step, event.protocol) for event in scores) == [
        (step, protocol) for step in (0, 2, 4) for protocol in ("knn", "linear")
    ]
    assert said.count("linear/grocery top1") == 3 and "ended the work" in said
    cursor = Cursor.load(run.cursor)
    assert cursor is not None and cursor.mlflow_run_id is not None
    client = connect(default_database(storage))
    points = client.get_metric_history(cursor.mlflow_run_id, "eval/linear/grocery/top1")
    expected = {event.step: event.metrics["top1"] for event in scores if event.protocol == "linear"}
    assert {point.step: point.value for point in points} == expected and len(points) == 3
    assert client.get_run(cursor.mlflow_run_id).info.status == "FINISHED"

    assert pretrain("schedule", "serve", "--once", *here) == ""
    when = ["--cron", "0 2 * * *", "--tz", "Europe/Berlin"]
    added = pretrain("schedule", "add", "best", *when, "--models", "small@best", "--tasks", "knn,linear", *data, *here)
    assert "02:00 Europe/Berlin (" in added
    known = pretrain("schedule", "run-now", "best", *here)
    assert known.splitlines()[-1] == "schedule best: 2 scores"
    history = pretrain("schedule", "history", "best", *here)
    assert history.count("(known)") == 2 and read_events(run.evaluations)[0] == events
