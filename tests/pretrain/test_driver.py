"""What the driver does before and beside training; whole runs are in `tests/integration/test_run.py`."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.cli.main import main
from pretrain.config import layers, load, recipe_files
from pretrain.config.load import load_plan, load_recipe, to_yaml
from pretrain.config.schema import Recipe
from pretrain.config.stages import plan_yaml
from pretrain.driver import drive, start
from pretrain.driver.drive import Driver
from pretrain.driver.placement import only_driver
from pretrain.driver.trackers import open_mirrors
from pretrain.errors import RequestError, RunStopped
from pretrain.evaluations import due
from pretrain.record.events import Evaluated, Metrics, Start
from pretrain.record.journal import Journal
from pretrain.record.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "demo-1")
    run.path.mkdir()
    run.recipe.write_text(to_yaml(load_recipe("demo", [f"storage={tmp_path}"])))
    return run


@pytest.mark.parametrize(
    ("settings", "division"),
    [
        ([], (2, 32, 1)),
        (["train.workers=1"], (1, 32, 2)),  # the micro-batch stays
        (["train.workers=4"], (4, 16, 1)),  # it cannot stay: one of each worker
        (["train.workers=1", "train.accumulation=4"], (1, 16, 4)),
    ],
)
def test_resume__reads_and_checks_the_recipe_once(
    run_dir: RunDir, settings: list[str], division: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read up to four times: by the command and by the driver, for the saved recipe and for the changed one."""
    counts = {"read": 0, "checked": 0}
    seen: list[Recipe] = []

    def counting(what: str, function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            counts[what] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(recipe_files, "parse_yaml", counting("read", recipe_files.parse_yaml))
    monkeypatch.setattr(layers, "resolve", counting("checked", layers.resolve))
    monkeypatch.setattr(Driver, "drive", lambda self, on_start: seen.append(self.recipe))
    assert main(["resume", "demo-1", *settings, "--storage", str(run_dir.path.parent)]) == 0
    assert counts == {"read": 1, "checked": 1}
    (train,) = [recipe.train for recipe in seen]
    assert (train.workers, train.micro_batch_size, train.accumulation) == division


def test_resume__a_recipe_that_lacks_a_setting_is_named(
    run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in run_dir.recipe.read_text().splitlines() if "zero_stage" not in line]
    run_dir.recipe.write_text("\n".join(lines))
    assert main(["resume", "demo-1", "train.workers=1", "--storage", str(tmp_path)]) == 2
    assert f"error: recipe {run_dir.recipe}: train.zero_stage is missing" in capsys.readouterr().err


@pytest.mark.parametrize("is_staged", [False, True])
def test_resume__of_a_finished_run_says_so_and_starts_no_ray(
    is_staged: bool,
    run_dir: RunDir,
    make_checkpoint: Callable[[Path, int], Path],
    mlflow_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class RayWasStarted(Exception):
        pass

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise RayWasStarted

    monkeypatch.setattr("cluster.connect.connect", refuse)
    stages = "stages=[{name: a, train: {steps: 100}}, {name: b, train: {steps: 200}}]"
    settings = ["train.checkpoint_every=300", stages if is_staged else "train.steps=300"]
    plan = load_plan("demo", [f"storage={run_dir.path.parent}", *settings])
    run_dir.recipe.write_text(plan_yaml(plan))
    steps = (0, 100, 300) if is_staged else (0, 300)
    for step in steps:
        make_checkpoint(run_dir.path, step)
    with Journal(run_dir.journal) as journal:
        journal.write(Metrics(step=300, values={"loss": 1.0, "samples_per_s": 100.0}))
    storage = ["--storage", str(run_dir.path.parent)]
    with pytest.raises(RayWasStarted):  # evaluations are missing
        start.resume("demo-1", run_dir.path.parent)

    with Journal(run_dir.evaluations) as journal:
        for step, task in due(plan, steps, ()):
            score = Evaluated(
                step=step,
                protocol=task.protocol,
                data=task.data,
                metrics={"top1": 0.5},
                key="k",
                seconds=1.0,
                cached=False,
            )
            journal.write(score)
    capsys.readouterr()
    code, (said, problem) = main(["resume", "demo-1", *storage]), capsys.readouterr()
    assert code == 0, problem
    trains_on = (
        "the steps of its stages are fixed"
        if is_staged
        else f"pretrain resume demo-1 {' '.join(storage)} train.steps=MORE"
    )
    assert "all 300 steps are trained, and no evaluation is missing; " in said and trains_on in said
    assert "starting Ray" not in said and "1.0000 (step 300)" in said  # the closing table
    if not is_staged:
        with pytest.raises(RayWasStarted):
            start.resume("demo-1", run_dir.path.parent, ["train.steps=400"])


def test_resume__steps_may_become_fewer_down_to_those_that_are_done(
    run_dir: RunDir,
    make_checkpoint: Callable[[Path, int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A mistyped number that training has begun with can be taken back."""
    make_checkpoint(run_dir.path, 300)
    monkeypatch.setattr(Driver, "drive", lambda self, on_start: None)
    command = ["resume", "demo-1", "--storage", str(run_dir.path.parent)]
    assert main([*command, "train.steps=400"]) == 0
    rates = "so the learning rate is 2.5e-04 at step 301, after 9.8e-04 at step 300"
    assert f"train.steps 700 -> 400: schedules are those of a run of 400 steps, {rates}" in capsys.readouterr().out
    assert main([*command, "train.steps=299"]) == 2
    assert "train.steps=299: 300 steps of the run are done; give that many or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("begins", "said"),
    [
        (None, "stopped before the first step: nothing was trained; the same command begins again"),
        (0, "stopped before the first checkpoint; this begins at step 0 again: pretrain resume "),
        (10, "stopped at once; go on with: pretrain resume "),
    ],
)
def test_run__stopped_at_once_says_what_there_is_to_go_on_with(
    begins: int | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_checkpoint: Callable[[Path, int], Path],
) -> None:
    """A run that had not begun was told to be resumed, and stayed behind without anything in it."""

    @contextmanager
    def cluster(self: Driver) -> Iterator[None]:
        if begins is not None:
            with Journal(self.run_dir.journal) as journal:
                journal.write(Start(step=begins, total_steps=300, world_size=1, device="cpu"))
        if begins:
            make_checkpoint(self.run_dir.path, begins)
        self._on_signal()
        yield

    monkeypatch.setattr(Driver, "_cluster", cluster)
    monkeypatch.setattr(drive, "tracker_of", lambda *_: SimpleNamespace(start=int, close=lambda status: True))
    with pytest.raises(RunStopped) as stopped:
        start.run(load_recipe("demo", [f"storage={tmp_path}/new/runs"]))
    assert str(stopped.value).startswith(said)
    left = list(tmp_path.glob("new/runs/*/recipe.yaml"))
    assert len(left) == (begins is not None) and (tmp_path / "new").exists() == (begins is not None)


def test_only_driver__a_run_is_driven_by_one_process(run_dir: RunDir) -> None:
    with (
        only_driver(run_dir),
        pytest.raises(RequestError, match=r"run demo-1 is already driven by process \d+"),
        only_driver(run_dir),
    ):
        raise AssertionError("two drivers")
    refused = pytest.raises(RequestError, match=r"run demo-1 is already driven by process \d+")
    with only_driver(run_dir), refused, only_driver(run_dir):
        raise AssertionError("two drivers")
    with only_driver(run_dir):
        assert run_dir.driver_lock.read_text().isdigit()


def test_resume__settings_are_kept_once_their_training_has_begun(run_dir: RunDir, tmp_path: Path) -> None:
    """A mistyped number of steps of a run that did not even begin could not be taken back."""
    saved = run_dir.recipe.read_text()
    with pytest.raises(RequestError, match="no Ray answers there"):
        start.resume("demo-1", tmp_path, ["train.steps=100000", "cluster.address=127.0.0.1:1"])
    assert run_dir.recipe.read_text() == saved

    longer = load.load_for_resume(run_dir.recipe, ["train.steps=100000"])
    driving = Driver(longer, run_dir, launched=0.0)
    driving._mirrors = open_mirrors(driving.plan, run_dir, ())
    with Journal(run_dir.journal) as journal:
        journal.write(Start(step=0, total_steps=100_000, world_size=2, device="cpu"))
    driving._follow()
    assert load.load_for_resume(run_dir.recipe, ()).total_steps == 100_000


def test_stop__by_files_and_by_a_signal(run_dir: RunDir) -> None:
    """`stop` is the workers' while they train; `is_stop_wanted` tells a person's request from a signal's."""
    driving = Driver(load_plan(run_dir.recipe), run_dir, launched=0.0)
    driving._is_training = True
    driving._on_signal()
    assert run_dir.stop_request.exists() and not run_dir.is_stop_wanted
    driving._stop_asked = None
    driving._heed_files(is_training=True)
    assert driving._stop_asked is None
    driving._heed_files(is_training=False)  # evaluations of what the workers have left
    assert driving._stop_asked is not None
    run_dir.stop_now_request.touch()
    assert run_dir.is_stop_wanted
    with pytest.raises(KeyboardInterrupt):
        driving._heed_files(is_training=True)


def test_stop__a_signal_leaves_the_request_of_a_person_as_it_is(run_dir: RunDir) -> None:
    driving = Driver(load_plan(run_dir.recipe), run_dir, launched=0.0)
    run_dir.stop_request.touch()
    driving._is_training = True
    driving._on_signal()
    assert run_dir.is_stop_wanted


def test_only_driver__waits_for_who_looks_whether_the_lock_is_held(run_dir: RunDir) -> None:
    with run_dir.driver_lock.open("a") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        timer.start()
        with only_driver(run_dir):
            pass
        timer.join()
