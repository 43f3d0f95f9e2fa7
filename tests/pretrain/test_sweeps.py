"""Grids, the queue and the table of sweeps: which runs begin when, with processes of the test."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.main import main
from pretrain.cli.sweep import gpus_of_places
from pretrain.config.load import load_plan
from pretrain.errors import RequestError
from pretrain.machine import Machine
from pretrain.record.events import CheckpointPublished, Evaluated, Metrics
from pretrain.record.journal import Journal
from pretrain.record.lock import hold
from pretrain.record.run_dir import SIGNALLED, RunDir
from pretrain.sweeps.grid import grid, sweep_id
from pretrain.sweeps.launcher import LocalRuns
from pretrain.sweeps.parent import Parent
from pretrain.sweeps.queue import Job, Queue
from pretrain.sweeps.sweep import Sweep
from pretrain.sweeps.table import read_rows, shown, table_csv
from pretrain.tracking.client import MlflowRun, connect
from pretrain.tracking.cursor import Cursor

GRID = ["objective.name=mae,gmml", "train.steps=20", "optimizer.lr=1e-4,3e-4"]

# The grid -------------------------------------------------------------------------------------------------------------


def test_grid__is_the_product_and_the_last_key_changes_fastest() -> None:
    points = grid(GRID)
    assert [str(point) for point in points] == [
        "objective.name=mae optimizer.lr=1e-4",
        "objective.name=mae optimizer.lr=3e-4",
        "objective.name=gmml optimizer.lr=1e-4",
        "objective.name=gmml optimizer.lr=3e-4",
    ]
    assert points[1].settings == ("objective.name=mae", "train.steps=20", "optimizer.lr=3e-4")


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("optimizer.betas=[0.9,0.95],[0.9,0.999]", ["[0.9,0.95]", "[0.9,0.999]"]),
        ("deepspeed={a: 1, b: 2},{}", ["{a: 1, b: 2}", "{}"]),
        ("""description="a, b",it's""", ['"a, b"', "it's"]),
        ("x=['a,b', c],d", ["['a,b', c]", "d"]),
        ("train.steps=1, 2", ["1", "2"]),
    ],
)
def test_grid__commas_inside_of_values(setting: str, values: list[str]) -> None:
    assert [next(iter(point.chosen.values())) for point in grid([setting])] == values


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.steps=20"], "--sweep: no setting has several values"),
        (["optimizer.betas=[0.9,0.95]"], "--sweep: no setting has several values"),
        (["optimizer.lr=1e-4,"], "optimizer.lr=1e-4,: nothing between two commas, or at an end"),
        (["optimizer.lr=1e-4,1e-4"], "optimizer.lr=1e-4,1e-4: '1e-4' is named twice"),
        (["optimizer.lr=1,2", "optimizer.lr=3"], "optimizer.lr=1,2: optimizer.lr is given twice"),
        (["storage=a,b"], "storage=a,b: all runs of a sweep have the same storage"),
        (["name=a,b"], "name=a,b: all runs of a sweep have the same name"),
        ([f"a={','.join(map(str, range(40)))}", f"b={','.join(map(str, range(40)))}"], "--sweep: 1600 combinations"),
    ],
)
def test_grid__refuses(settings: list[str], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        grid(settings)
    assert str(refused.value).startswith(said)


def test_sweep_id__is_that_of_the_request() -> None:
    first = sweep_id("demo", "demo", {"a": 1}, GRID)
    assert first == sweep_id("demo", "demo", {"a": 1}, GRID[::-1]) and re.fullmatch("demo-[0-9a-f]{10}", first)
    assert len({first, sweep_id("demo", "demo", {"a": 2}, GRID), sweep_id("demo", "demo", {"a": 1}, GRID[:2])}) == 3


# The queue ------------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    job: Job
    run_id: str
    place: int
    code: int | None = None
    stops: int = 0


@dataclass
class Launched:
    """A launcher whose processes do nothing; it knows how many there are."""

    all: list[Process] = field(default_factory=list)
    most: int = 0

    @property
    def live(self) -> list[Process]:
        return [process for process in self.all if process.code is None]

    def start(self, job: Job, run_id: str, place: int) -> Process:
        self.all.append(Process(job, run_id, place))
        self.most = max(self.most, len(self.live))
        return self.all[-1]

    def poll(self, handle: Process) -> int | None:
        return handle.code

    def stop(self, handle: Process) -> None:
        handle.stops += 1

    def told(self, job: Job) -> str:
        return "error: memory ran out"


class World:
    """A storage with the sweep of four points, two at a time."""

    def __init__(self, storage: Path) -> None:
        self.storage, self.folder = storage, storage / "sweeps" / "tiny-1"
        self.folder.mkdir(parents=True)
        self.launched, self.said = Launched(), list[str]()

    def sweep(self, retries: int = 0) -> tuple[Sweep[Process], Queue]:
        self.launched, self.now = Launched(), 100.0
        queue = Queue(self.folder / "queue.jsonl", grid(GRID))
        follow = (self.said.append, lambda jobs: None)
        return Sweep("tiny", self.storage, queue, self.launched, 2, *follow, retries, lambda: self.now), queue

    def begun(self, run_id: str) -> RunDir:
        """A run that has written something."""
        run = RunDir(self.storage / run_id)
        run.path.mkdir()
        run.recipe.write_text("name: tiny\n")
        with Journal(run.journal) as journal:
            journal.write(Metrics(step=20, values={"loss": 0.25}))
        return run


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "runs")


def test_sweep__never_more_than_two_at_a_time_though_one_fails(world: World) -> None:
    sweep, queue = world.sweep()
    launched = world.launched
    for _ in range(3):
        assert sweep.tick()
    assert len(launched.all) == 2 and [process.place for process in launched.all] == [0, 1]
    launched.all[1].code = 1
    assert sweep.tick() and len(launched.all) == 3 and launched.all[2].place == 1
    while sweep.tick():
        launched.live[0].code = 0
    assert launched.most == 2 and [job.state for job in queue.jobs] == ["done", "failed", "done", "done"]
    assert len({process.run_id for process in launched.all}) == 4
    assert any(line.endswith("lr=3e-4: failed: error: memory ran out") for line in world.said)


def test_sweep__the_same_again_goes_on_with_what_is_not_done(world: World) -> None:
    """One is done, one has failed after its beginning, one was running as the sweep was killed, one never began."""
    sweep, _ = world.sweep()
    sweep.tick()
    failed = world.begun(world.launched.all[1].run_id)
    world.launched.all[0].code, world.launched.all[1].code = 0, 1
    sweep.tick()
    world.launched.all[3].code = 75
    sweep.tick()
    running = world.launched.all[2].run_id

    sweep, queue = world.sweep()
    assert [job.state for job in queue.jobs] == ["done", "waiting", "waiting", "waiting"]
    driven = world.begun(running)
    lock = hold(driven.driver_lock)  # it outlives its sweep for a moment
    assert lock is not None
    sweep.tick()
    first, other = world.launched.all
    assert first.run_id == failed.run_id and other.run_id not in (failed.run_id, running)
    assert str(other.job.point) == "objective.name=gmml optimizer.lr=3e-4"
    first.code = other.code = 0
    assert sweep.tick() and len(world.launched.all) == 2
    lock.close()
    assert sweep.tick() and world.launched.all[2].run_id == running
    world.launched.all[2].code = 0
    assert not sweep.tick() and [job.state for job in queue.jobs] == ["done"] * 4
    sweep, _ = world.sweep()
    assert not sweep.tick() and world.launched.all == []


def test_sweep__stopped_it_begins_nothing_and_waits_for_the_ends(world: World) -> None:
    sweep, queue = world.sweep()
    sweep.tick()
    sweep.stop()
    assert sweep.tick() and sweep.tick() and [process.stops for process in world.launched.all] == [1, 1]
    world.launched.all[0].code = 75
    assert sweep.tick()
    sweep.stop()
    assert sweep.tick() and [process.stops for process in world.launched.all] == [1, 2]
    world.launched.all[1].code = -15  # before it could hear signals
    assert not sweep.tick() and len(world.launched.all) == 2
    assert [job.state for job in queue.jobs] == ["stopped", "stopped", "waiting", "waiting"]


def test_sweep__each_run_begins_again_as_often_as_it_may_without_a_checkpoint(world: World) -> None:
    sweep, queue = world.sweep(retries=1)
    sweep.tick()
    first, second = world.launched.all
    run = world.begun(first.run_id)
    first.code = 1
    assert sweep.tick() and [process.job.point.number for process in world.launched.all] == [0, 1, 2]  # it pauses
    assert world.said[-2].endswith("memory ran out; it goes on in 1 s (restart 1 of 1 without a checkpoint)")
    third = world.launched.all[2]
    third.code = -9  # another one's failures are its own
    assert sweep.tick() and world.launched.all[3].job.point.number == 3
    world.now += 1.0
    second.code = 0
    assert sweep.tick() and world.launched.all[4].run_id in (first.run_id, third.run_id)
    world.launched.all[3].code = 0
    assert sweep.tick() and {process.run_id for process in world.launched.live} == {first.run_id, third.run_id}
    again = {process.run_id: process for process in world.launched.live}
    with Journal(run.journal) as journal:
        journal.write(CheckpointPublished(step=10, path="checkpoints/step-00000010"))
    again[first.run_id].code = again[third.run_id].code = 1
    assert sweep.tick() and not world.launched.live  # the one without a checkpoint has failed for good
    assert [job.state for job in queue.jobs][2] == "failed"
    world.now += 1.0
    assert sweep.tick()
    (process,) = world.launched.live
    assert process.run_id == first.run_id
    process.code = 0
    assert not sweep.tick() and [job.state for job in queue.jobs] == ["done", "done", "failed", "done"]


def test_sweep__restarts_are_counted_on_where_a_sweep_was_killed_and_anew_after_its_end(world: World) -> None:
    sweep, _ = world.sweep(retries=2)

    def fail_first() -> str:
        world.now += 60.0
        sweep.tick()
        next(process for process in world.launched.live if process.job.point.number == 0).code = 1
        sweep.tick()
        return next(line for line in reversed(world.said) if line.startswith("1/4 ") and "failed" in line)

    assert fail_first().endswith("(restart 1 of 2 without a checkpoint)")
    sweep, _ = world.sweep(retries=2)  # a job begins it again, as its own process was killed
    assert fail_first().endswith("(restart 2 of 2 without a checkpoint)")
    sweep, _ = world.sweep(retries=2)
    assert fail_first().endswith("failed: error: memory ran out")  # for good
    sweep.stop()
    for process in world.launched.live:
        process.code = 75
    sweep.run(lambda seconds: None)
    sweep, _ = world.sweep(retries=2)  # a person does, once it was over
    assert fail_first().endswith("(restart 1 of 2 without a checkpoint)")


@pytest.mark.parametrize("code", [0, 2, 75])
def test_sweep__what_a_person_stopped_is_done_or_wrong_does_not_begin_again(code: int, world: World) -> None:
    sweep, _ = world.sweep(retries=5)
    sweep.tick()
    world.begun(world.launched.all[0].run_id).stop_request.touch()
    world.launched.all[0].code = code
    assert sweep.tick() and "goes on" not in "".join(world.said)
    world.launched.all[1].code = 75  # by nobody's request: its machine is taken away
    assert sweep.tick() and "stopped: error: memory ran out; it goes on in 1 s" in world.said[-2]
    sweep.stop()
    world.launched.live[0].code = 1
    assert sweep.tick() and "goes on" not in world.said[-1]


def test_sweep__a_run_that_has_heard_the_signal_itself_is_not_told_again(world: World) -> None:
    """A cluster that stops a job signals all of its processes; a second signal would end a run at once."""
    sweep, _ = world.sweep()
    sweep.tick()
    world.begun(world.launched.all[0].run_id).stop_request.write_text(SIGNALLED)
    sweep.stop()
    assert sweep.tick() and sweep.tick() and [process.stops for process in world.launched.all] == [0, 1]
    sweep.stop()  # a person, again
    assert sweep.tick() and [process.stops for process in world.launched.all] == [1, 2]


def test_sweep__at_once_asks_runs_by_their_files_and_those_without_by_a_signal(world: World) -> None:
    sweep, queue = world.sweep()
    sweep.tick()
    begun = world.begun(world.launched.all[0].run_id)
    sweep.end_at_once()
    assert sweep.tick() and begun.stop_now_request.exists()
    assert [process.stops for process in world.launched.all] == [0, 1]
    world.begun(world.launched.all[1].run_id)  # which it does in this moment
    sweep.end_at_once()
    assert sweep.tick() and RunDir(world.storage / world.launched.all[1].run_id).stop_now_request.exists()
    for process in world.launched.all:
        process.code = 75
    assert not sweep.tick() and [job.state for job in queue.jobs] == ["stopped", "stopped", "waiting", "waiting"]


def test_sweep__asked_to_stop_while_a_run_is_being_started_asks_that_as_well(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes at any moment."""
    sweep, _ = world.sweep()
    start = world.launched.start

    def interrupted(*arguments: Any) -> Process:
        process = start(*arguments)
        sweep.stop()
        return process

    monkeypatch.setattr(world.launched, "start", interrupted)
    assert sweep.tick() and [process.stops for process in world.launched.all] == [1]


def test_local_runs__say_what_failed(tmp_path: Path) -> None:
    """A real process, of a recipe that there is not."""
    launcher = LocalRuns("tniy", "ray-head:6379", [{}], tmp_path / "logs")
    (job, *_) = Queue(tmp_path / "queue.jsonl", grid(GRID)).jobs
    assert launcher.told(job) == "it said nothing"
    process = launcher.start(job, "tiny-1", 0)
    assert process.wait(120) == 2 == launcher.poll(process)
    assert launcher.told(job).startswith("error: recipe tniy: unknown")
    with (tmp_path / "logs" / "point-000.log").open("a") as log:
        log.write("step 1\nerror: the disk is full\nerror: the log is runs/x/logs\n")
    assert launcher.told(job) == "error: the disk is full"  # and not where to read on
    command = ["run", "tniy", "objective.name=mae", "train.steps=20", "optimizer.lr=1e-4"]
    assert list(process.args)[2:] == ["pretrain", *command, "--address", "ray-head:6379", "--run-id", "tiny-1"]  # type: ignore[arg-type, call-overload]


def test_table__is_whole_though_a_run_failed(world: World) -> None:
    sweep, queue = world.sweep()
    while sweep.tick():
        process = world.launched.live[0]
        number = world.launched.all.index(process)
        run = world.begun(process.run_id)
        scores = {0: 0.9} | ({} if number == 1 else {10: 0.1, 20: 0.5 + number / 10})  # what failed learned nothing
        for step, top1 in scores.items():
            metrics = {"top1": top1, "top1_ci_low": top1 - 0.05, "top1_ci_high": top1 + 0.05}
            with Journal(run.evaluations) as journal:
                of = {"protocol": "knn", "data": "photos", "key": "k", "seconds": 1.0, "cached": False}
                journal.write(Evaluated(step=step, metrics=metrics, **of))
        process.code = 1 if number == 1 else 0
    rows = read_rows(queue.jobs, world.storage)
    header, cells = shown(rows)
    assert header == ["objective.name", "optimizer.lr", "state", "step", "loss", "knn/photos top1", "run"]
    assert [line[2] for line in cells] == ["done", "failed", "done", "done"]
    assert [line[5] for line in cells] == ["50.0% (45.0-55.0%)", "", "70.0% (65.0-75.0%)", "80.0% * (75.0-85.0%)"]
    table = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert table[3]["knn/photos top1"] == "0.8" and table[3]["knn/photos top1 step"] == "20"
    assert table[1]["knn/photos top1"] == "" and table[1]["state"] == "failed" and table[0]["loss"] == "0.25"


def test_gpus_of_places__each_private_ray_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    recipes = [load_plan("demo", [f"train.workers={workers}", "train.device=auto"]).recipe for workers in (1, 2)]
    assert gpus_of_places(recipes, Machine(16, 8), 3) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
        {"CUDA_VISIBLE_DEVICES": "4,5"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert gpus_of_places(recipes, Machine(16, 4), 2)[1] == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert gpus_of_places(recipes, Machine(16, 4), 1) == [{}] and gpus_of_places(recipes, Machine(16, 0), 2) == [{}, {}]
    with pytest.raises(RequestError, match="--parallel 3: a run takes 2 of the 4 GPUs of this machine; give at most 2"):
        gpus_of_places(recipes, Machine(16, 4), 3)


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.steps=20"], ["--sweep: no setting has several values"]),
        (["objective.name=mae,gmmml"], ["command line: objective.name=gmmml: unknown"]),
        (["train.zero_stage=0,9", "train.log_every=1,2"], ["command line: train.zero_stage=9: expected a whole"]),
        (["train.stepz=3,4"], ["command line: train.stepz=3: unknown", "command line: train.stepz=4: unknown"]),
        (["storage=a,b"], ["storage=a,b: all runs of a sweep have the same storage"]),
        (["train.seed=1,2", "--run-id", "mine"], ["--run-id mine: a sweep has a run for each combination"]),
    ],
)
def test_run__a_wrong_sweep_is_2_and_starts_nothing(
    arguments: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every point is checked before the first one starts, and a mistake of several is said once."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "demo", "--sweep", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said), lines
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(f"error: {start}")
    assert list(tmp_path.iterdir()) == []


def test_run__parallel_without_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "demo", "--parallel", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --parallel 2: is how many runs of a sweep")
    assert main(["run", "demo", "--retries", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --retries 2: is of the runs of a sweep; add --sweep, or leave it")
    assert list(tmp_path.iterdir()) == []


def test_run__a_sweep_that_another_process_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    from pretrain.config.recipe_files import read_yaml, recipe_path

    settings = ["train.seed=1,2"]
    folder = tmp_path / "runs" / "sweeps" / sweep_id("demo", "demo", read_yaml(recipe_path("demo")), settings)
    folder.mkdir(parents=True)
    lock = hold(folder / ".lock")
    assert lock is not None
    with lock:
        assert main(["run", "demo", "--sweep", *settings]) == 2
    assert "runs it; wait for its end" in capsys.readouterr().err


# MLflow ---------------------------------------------------------------------------------------------------------------


def test_parent__is_above_its_runs_and_the_same_for_the_same_sweep(
    storage: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(mlflow_uri)
    jobs = Queue(storage / "queue.jsonl", grid(["train.seed=1,2"])).jobs
    children = []
    for number, job in enumerate(jobs):
        job.run_id, job.state = f"tiny-{number}", "done"
        child = MlflowRun.bind(client, mlflow_uri, "pretrain", job.run_id, 0, None)
        children.append(child.mlflow_run_id)
        run = RunDir(storage / job.run_id)
        run.path.mkdir()
        if number == 0:
            Cursor("", "pretrain", "tiny", None, {}, 0, mlflow_run_id=children[0]).save(run.cursor)
    parent = Parent("tiny-0123456789", storage, "pretrain", "train.seed=1,2")
    parent.adopt(jobs)
    (experiment,) = client.search_experiments(filter_string="name = 'pretrain'")
    (above,) = client.search_runs([experiment.experiment_id], "tags.`pretrain.run_id` = 'tiny-0123456789'")
    nested = "tags.`mlflow.parentRunId` = '{}'"
    found = client.search_runs([experiment.experiment_id], nested.format(above.info.run_id))
    assert [run.info.run_id for run in found] == children[:1]
    Cursor("", "pretrain", "tiny", None, {}, 0, mlflow_run_id=children[1]).save(RunDir(storage / "tiny-1").cursor)
    again = Parent("tiny-0123456789", storage, "pretrain", "train.seed=1,2")  # of the same command
    again.close(jobs)
    found = client.search_runs([experiment.experiment_id], nested.format(above.info.run_id))
    assert {run.info.run_id for run in found} == set(children)
    assert client.get_run(above.info.run_id).info.status == "FINISHED" and again.problem is None

    def away(*arguments: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(MlflowRun, "bind", away)
    lost = Parent("tiny-0123456789", storage, "pretrain", "train.seed=1,2")
    lost.close(jobs)
    assert lost.problem == "MLflow does not take the sweep: no server"
