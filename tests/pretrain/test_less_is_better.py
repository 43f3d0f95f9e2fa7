"""A plug-in's protocol whose metric is an error in meters, where less is better, as `evaluation.select` of a run."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaluation import registry
from evaluation.protocol import Metric, Protocol
from evaluation.results import EvaluationResult
from pretrain.checkpoints.references import best_step
from pretrain.checkpoints.store import Published, published
from pretrain.cli.main import main
from pretrain.config.load import load_recipe
from pretrain.config.schema import EvaluationTask
from pretrain.config.stages import Plan
from pretrain.driver.drive import Driver
from pretrain.driver.trackers import open_mirrors, tracker_of
from pretrain.errors import RequestError
from pretrain.evaluations import _event
from pretrain.record.events import CheckpointPublished, Evaluated, Metrics
from pretrain.record.journal import Journal
from pretrain.record.run_dir import RunDir
from pretrain.tracking.client import connect

DEPTH = Protocol(
    name="distance",
    summary="an error in meters",
    target="plugin_of_a_test:score",
    version=1,
    tokens="pooled",
    label="cls",
    metrics=(
        Metric("within_25", better="higher"),
        Metric("rmse", unit="m", better="lower", headline=True),
        Metric("rmse_ci_low", unit="m", better=None),
        Metric("rmse_ci_high", unit="m", better=None),
    ),
)
ERRORS = {0: 1.5, 10: 0.75, 20: 0.25, 30: 0.25, 40: 0.5}  # of equal ones the earlier is best
TASK = "evaluation.tasks=[{protocol: distance, data: grocery}]"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("plugin_of_a_test")
    module.SPEC = DEPTH
    monkeypatch.setitem(sys.modules, "plugin_of_a_test", module)
    entry = EntryPoint("distance", "plugin_of_a_test:SPEC", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])


class Queue:
    """Answers for Ray: every task that is submitted ends at the next look, the newest first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Published, tuple[EvaluationTask]]] = []

    def submit(self, label: tuple[Published, tuple[EvaluationTask]], *call: Any, **options: Any) -> None:
        self.waiting.append(label)

    def finished(self) -> Iterator[tuple[Any, list[Evaluated], None]]:
        while self.waiting:
            checkpoint, (task,) = label = self.waiting.pop()
            error = ERRORS[step := checkpoint.step]
            metrics = {"within_25": 0.5, "rmse": error, "rmse_ci_low": error - 0.125, "rmse_ci_high": error + 0.125}
            result = EvaluationResult(
                "k", task.protocol, 1, task.data, "d", f"w{step}", metrics, {}, 1.0, described=DEPTH.metrics
            )
            yield label, [_event(step, result)], None


@pytest.mark.usefixtures("plugin")
def test_run__an_error_as_select_moves_best_pins_and_is_shown_with_its_unit(
    storage: Path, mlflow_uri: str, make_checkpoint: Callable[[Path, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.steps=40", "train.checkpoint_every=10", "train.keep_last=1", "train.keep_best=1")
    recipe = load_recipe("demo", [TASK, "evaluation.select=distance/grocery/rmse", *settings])
    run = RunDir(storage / "depth-run")
    run.logs.mkdir(parents=True)
    driver = Driver(Plan.single(replace(recipe, storage=str(storage))), run, time.time())
    driver.terminal.console = Console(file=io.StringIO(), width=160)
    driver._write_recipe()
    driver._mirrors = open_mirrors(driver.plan, run, ())
    with Journal(run.journal) as journal:
        values = {"loss": 1.0, "lr": 0.1, "samples_per_s": 100.0, "step_s": 0.1, "data_wait_fraction": 0.0}
        journal.write(Metrics(step=10, values=values))
        for step in ERRORS:
            path = make_checkpoint(run.path, step)
            journal.write(CheckpointPublished(step=step, path=run.relative(path)))
    queue: Any = Queue()
    evaluating = driver._evaluating(queue, {})
    assert driver._follow()
    evaluating.queue_due()
    for status in ("KILLED", "FINISHED"):  # checkpoints first, then scores: the one that is best last arrives first
        tracker = tracker_of(driver.plan, run)
        tracker.start()
        assert tracker.close(status, 60)
        evaluating.collect()
    tracker = tracker_of(driver.plan, run)
    tracker.start()
    assert tracker.close("FINISHED", 60)

    assert best_step(run.path) == 20
    states = {found.step for found in published(run.path) if found.has_training_state}
    assert states == {20, 40}, "the best and the newest keep their training state"
    client, name = connect(mlflow_uri), recipe.tracking.model_name or recipe.name
    aliases = client.get_registered_model(name).aliases
    assert client.get_model_version(name, str(aliases["best"])).tags["step"] == "20"

    driver._finish()
    said = driver.terminal.console.file.getvalue()  # type: ignore[attr-defined]
    assert "evaluation of step 20: distance/grocery/rmse 0.25 m" in said
    row = next(line for line in said.splitlines() if line.lstrip("│ ").startswith("distance/grocery rmse"))
    assert [text in row for text in ("1.5 m", "0.75 m (step 10)", "0.5 m (step 40)")] == [True] * 3
    page = run.report.read_text()
    assert "1 m below the random backbone" in page and "0.25 m" in page and "0.125 m to 0.375 m" in page
    assert "25.0%" not in page and "150.0%" not in page

    capsys.readouterr()
    other = storage / "worse-run"
    other.mkdir()
    (other / "recipe.yaml").touch()
    (other / "evaluations.jsonl").write_text(run.evaluations.read_text().splitlines()[-1] + "\n")
    assert main(["leaderboard", "--storage", str(storage)]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    shown = [row.split()[:2] for row in rows]
    assert title == "distance/grocery rmse" and shown == sorted(shown, key=lambda row: float(row[0]))
    assert shown[0] == ["0.25", "m"] and shown[-1] == ["1.5", "m"] and "0.125 m to 0.375 m" in rows[0]


@pytest.mark.usefixtures("plugin")
def test_load_recipe__only_metrics_with_a_direction_may_be_selected() -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe("demo", [TASK, "evaluation.select=distance/grocery/rmse_ci_low"])
    (line,) = caught.value.mistakes
    assert "only reported, nothing can be best by it" in line
    assert line.endswith("distance/grocery/within_25, distance/grocery/rmse")
