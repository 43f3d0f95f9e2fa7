"""A sweep of two real runs: stopped at work, gone on with by the same command, compared, and nested in MLflow."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.record.events import Resumed
from pretrain.record.journal import read_events
from pretrain.record.run_dir import runs_in
from pretrain.tracking.client import connect, default_database
from pretrain.tracking.cursor import Cursor

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1500)]


def test_sweep__stopped_and_gone_on_with(
    recipe: Path,
    tmp_path: Path,
    losses: Callable[[Path], dict[int, float]],
    wait_for: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage, log = tmp_path / "storage", tmp_path / "sweep.log"
    settings = ["train.seed=1,2", "train.workers=1", "train.checkpoint_every=4", f"storage={storage}"]
    command = [sys.executable, "-m", "pretrain", "run", str(recipe), "--sweep", *settings]
    with log.open("w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for(lambda: any(losses(run.path) for run in runs_in(storage)), 400, log)
        first.send_signal(signal.SIGINT)
        assert first.wait(300) == 75, log.read_text()[-3000:]
    finally:
        first.kill()
    (begun,) = runs_in(storage)
    assert "stopping all runs" in log.read_text() and "0 of 2 runs done" in log.read_text()

    second = subprocess.run([*command, "--parallel", "2"], capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    runs = runs_in(storage)
    assert len(runs) == 2 and all(max(losses(run.path)) == 12 for run in runs)
    assert any(isinstance(event, Resumed) for event in read_events(begun.journal)[0])
    (folder,) = (storage / "sweeps").iterdir()
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["train.seed"], row["state"], row["step"]) for row in rows] == [
        ("1", "done", "12"),
        ("2", "done", "12"),
    ]
    assert {row["run"] for row in rows} == {run.run_id for run in runs}
    assert all(0 <= float(row["knn/grocery top1"]) <= 1 for row in rows)
    assert all(row["run"] in second.stdout.replace("\n", "") for row in rows)

    client = connect(default_database(storage))
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    (above,) = client.search_runs([experiment.experiment_id], f"tags.`pretrain.run_id` = '{folder.name}'")
    nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{above.info.run_id}'")
    cursors = [Cursor.load(run.cursor) for run in runs]
    assert {run.info.run_id for run in nested} == {cursor.mlflow_run_id for cursor in cursors if cursor}
    assert above.info.status == "FINISHED" and len(nested) == 2

    third = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert third.returncode == 0 and "2 runs, 0 to do" in third.stdout and len(runs_in(storage)) == 2
