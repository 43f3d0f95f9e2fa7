"""When entries of a schedule are due, who does their work, and what is told: with a clock and processes of the test."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import psutil
import pytest

from pretrain.cli.main import main
from pretrain.cli.schedule import schedule
from pretrain.config.load import load_plan
from pretrain.config.stages import plan_yaml
from pretrain.errors import RequestError
from pretrain.processes import LocalProcesses
from pretrain.record.events import CheckpointPublished, Evaluated, EvaluationFailed, Visualizations, Warned
from pretrain.record.journal import Journal, read_events
from pretrain.record.lock import hold
from pretrain.record.pictures import Drawn
from pretrain.record.run_dir import RunDir
from pretrain.schedules import work as works
from pretrain.schedules.cron import checked_cron, checked_zone, last_due, next_due
from pretrain.schedules.entries import Entry, Schedules
from pretrain.schedules.history import told
from pretrain.schedules.regressions import Scored, is_worse
from pretrain.schedules.service import POLL_S, REST, Service
from pretrain.schedules.webhooks import PAUSES_S, Alert, Outbox, signature
from pretrain.schedules.work import NewCheckpoints, done

BEGAN = datetime(2026, 6, 1, 12, tzinfo=UTC)
GROCERY = Path(__file__).parents[2] / "pretrain" / "demo_data" / "grocery"
NIGHTLY = Entry("nightly", ("knn",), {"grocery": str(GROCERY)}, ("photos@best",), cron="0 2 * * *")


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# Cron -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        # The clocks of Berlin go from 02:00 to 03:00 at 01:00 UTC on March 29: 02:30 does not exist, and runs at 03:00.
        ("30 2 * * *", "2026-03-28 12:00", ["2026-03-29 01:00", "2026-03-30 00:30"]),
        ("0 3 * * *", "2026-03-28 12:00", ["2026-03-29 01:00", "2026-03-30 01:00"]),
        # They go from 03:00 back to 02:00 at 01:00 UTC on October 25: 02:30 comes twice, and runs once.
        ("30 2 * * *", "2026-10-24 12:00", ["2026-10-25 00:30", "2026-10-26 01:30"]),
        ("0 * * * *", "2026-10-24 23:30", ["2026-10-25 00:00", "2026-10-25 01:00", "2026-10-25 02:00"]),
    ],
)
def test_cron__days_on_which_the_clocks_change(expression: str, after: str, expected: list[str]) -> None:
    found, now = [], utc(after)
    for _ in expected:
        now = next_due(expression, "Europe/Berlin", now)
        found.append(now)
    assert found == [utc(text) for text in expected]
    for due in found:
        assert last_due(expression, "Europe/Berlin", due) == due
        assert last_due(expression, "Europe/Berlin", due + timedelta(minutes=20)) == due
        assert last_due(expression, "Europe/Berlin", due - timedelta(seconds=1)) < due


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("61 2 * * *", "field 1 (minute) is '61'"),
        ("0 24 * * *", "field 2 (hour) is '24'"),
        ("0 2 0 * *", "field 3 (day of month) is '0'"),
        ("0 2 * JANUARY *", "field 4 (month) is 'JANUARY'"),
        ("0 2 * * 1#6", "field 5 (day of week) is '1#6'"),
        ("*/0 * * * *", "field 1 (minute) is '*/0'"),
        ("0 2 * *", "4 fields; expected five"),
        ("0 0 2 * * *", "6 fields; expected five"),
        ("@daily", "1 field; expected five"),
        ("0 0 31 2,4 *", "fields 3 to 5 (31 2,4 *) name no day that exists"),
    ],
)
def test_cron__a_malformed_expression_is_refused_where_it_is_wrong(expression: str, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        checked_cron(expression)
    assert said in str(refused.value) and repr(expression) in str(refused.value)


def test_cron__what_is_right_is_taken_and_a_zone_has_a_name() -> None:
    assert checked_cron(" 0  2 29 2 * ") == "0 2 29 2 *" and checked_cron("*/5 8-18 * * mon-fri")
    assert checked_zone("Europe/Berlin") == "Europe/Berlin"
    for wrong, hint in (
        ("Berlin", "did you mean 'Europe/Berlin'?"),
        ("../../etc/passwd", "no such"),
        ("localtime", ""),
    ):
        with pytest.raises(RequestError, match="no such time zone") as refused:
            checked_zone(wrong)
        assert hint in str(refused.value)


# The service ----------------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """A process of the test, which holds what it was given until the test ends it."""

    arguments: tuple[str, ...]
    locks: list[int]
    code: int | None = None

    def end(self, code: int) -> None:
        self.code = code
        for lock in self.locks:
            os.close(lock)


@dataclass
class Launched:
    """A launcher whose processes do nothing by themselves."""

    all: list[Started] = field(default_factory=list)

    def start(
        self, arguments: Sequence[str], log: Path, *, environment: Any = None, locks: Sequence[int] = ()
    ) -> Started:
        self.all.append(Started(tuple(arguments), [os.dup(lock) for lock in locks]))
        return self.all[-1]

    def poll(self, handle: Started) -> int | None:
        return handle.code

    def stop(self, handle: Started) -> None:
        handle.end(75)


class World:
    """One storage, a clock, and services that look after it."""

    def __init__(self, storage: Path) -> None:
        storage.mkdir()
        self.schedules = Schedules(storage)
        self.now = BEGAN
        self.launched, self.said = Launched(), list[str]()

    def service(self, launched: Launched | None = None) -> Service[Started]:
        return Service(self.schedules, launched or self.launched, lambda: self.now, self.said.append)

    def end(self, code: int = 0) -> None:
        """The newest process does its work and ends."""
        self.schedules.end("nightly", self.now, "ended", outcome="1 scores")
        self.launched.all[-1].end(code)

    def past(self) -> list[str]:
        return [line["what"] for line in self.schedules.past()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "runs")
    world.schedules.add(NIGHTLY, BEGAN)
    return world


def test_service__due_once_at_its_time(world: World) -> None:
    service = world.service()
    assert not service.tick() and world.launched.all == []  # nothing that was due before it was added
    world.now = utc("2026-06-02 01:59:59")
    assert not service.tick()
    world.now = utc("2026-06-02 02:00:00")
    assert service.tick()
    (started,) = world.launched.all
    assert started.arguments[2:] == (str(world.schedules.storage), "nightly", "2026-06-02T02:00:00Z")
    world.end()
    world.now += timedelta(hours=20)
    assert not service.tick() and world.past() == ["added", "began", "ended"]


def test_service__what_was_missed_while_it_was_down_is_made_up_for_once(world: World) -> None:
    world.now = utc("2026-06-09 11:00")
    service = world.service()
    assert service.tick()
    assert world.launched.all[0].arguments[-1] == "2026-06-09T02:00:00Z"
    world.end()
    assert not service.tick() and len(world.launched.all) == 1


def test_service__no_overlap(world: World) -> None:
    """While the work goes on, what becomes due is skipped and written down; then it is due as ever."""
    service = world.service()
    world.now = utc("2026-06-02 02:00")
    assert service.tick()
    for day in (3, 4):
        world.now = utc(f"2026-06-0{day} 02:00:01")
        assert not service.tick() and not service.tick()
    skipped = [line for line in world.schedules.past() if line["what"] == "skipped"]
    assert [line["due"] for line in skipped] == ["2026-06-03T02:00:00Z", "2026-06-04T02:00:00Z"]
    assert "2026-06-02T02:00:00Z goes on" in skipped[0]["why"]
    world.end()
    assert not service.tick() and len(world.launched.all) == 1
    world.now = utc("2026-06-05 02:00")
    assert service.tick() and len(world.launched.all) == 2


def test_service__two_of_them_and_one_runs(world: World) -> None:
    others = Launched()
    services = world.service(), world.service(others)
    world.now = utc("2026-06-02 02:00")
    assert [service.tick() for service in services] == [True, False]
    assert [service.tick() for service in services] == [False, False]
    world.end()
    assert [service.tick() for service in services] == [False, False]
    assert len(world.launched.all) == 1 and others.all == [] and world.past() == ["added", "began", "ended"]


def test_service__two_at_the_same_moment_and_one_runs(world: World) -> None:
    world.now = utc("2026-06-02 02:00")
    services = [world.service() for _ in range(8)]
    start = threading.Barrier(len(services))

    def look(service: Service[Started]) -> None:
        start.wait()
        service.tick()

    threads = [threading.Thread(target=look, args=(service,)) for service in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(world.launched.all) == 1 and world.past() == ["added", "began"]


def test_service__a_restart_keeps_entries_and_does_interrupted_work_again(world: World) -> None:
    world.now = utc("2026-06-02 02:00")
    assert world.service().tick()
    world.launched.all[0].end(-9)  # with its service, which so cannot say that it has failed
    world.now = utc("2026-06-02 05:00")
    service = world.service()
    assert [entry.name for entry in world.schedules.entries()] == ["nightly"]
    assert service.tick() and world.launched.all[1].arguments[-1] == "2026-06-02T02:00:00Z"
    world.end()
    assert not service.tick() and world.past() == ["added", "began", "interrupted", "began", "ended"]


def test_service__work_that_dies_is_a_failure_and_not_begun_again_before_its_time(world: World) -> None:
    service = world.service()
    world.now = utc("2026-06-02 02:00")
    service.tick()
    world.launched.all[0].end(-9)
    world.now = utc("2026-06-02 02:01")
    assert not service.tick() and not service.tick()
    assert world.past() == ["added", "began", "failed"] and any("ended with -9" in line for line in world.said)
    world.now = utc("2026-06-03 02:00")
    assert service.tick()


def test_service__stopped_at_work_it_says_so_and_the_next_one_begins_again(world: World) -> None:
    service = world.service()
    world.now = utc("2026-06-02 02:00")
    service.tick()
    assert service.stop(lambda seconds: None) == ["nightly"]
    assert world.service().tick() and world.past()[-2:] == ["interrupted", "began"]


def test_service__an_entry_that_is_removed_at_work_stays_removed(world: World) -> None:
    service = world.service()
    world.now = utc("2026-06-02 02:00")
    service.tick()
    world.schedules.remove("nightly", world.now)
    world.end()
    assert not service.tick() and world.schedules.entries() == []


def test_service__a_damaged_entry_stops_no_other(world: World, caplog: pytest.LogCaptureFixture) -> None:
    (world.schedules.path / "broken.json").write_text("{")
    world.now = utc("2026-06-02 02:00")
    assert world.service().tick() and "broken.json" in caplog.text


def test_service__one_entry_at_a_time(world: World) -> None:
    world.schedules.add(replace(NIGHTLY, name="other"), BEGAN)
    service = world.service()
    world.now = utc("2026-06-02 02:00")
    assert service.tick() and not service.tick()
    world.end()
    assert service.tick() and [started.arguments[-2] for started in world.launched.all] == ["nightly", "other"]


def test_service__once_ends_when_nothing_is_due_any_more(world: World) -> None:
    world.schedules.add(replace(NIGHTLY, name="often", cron="* * * * *"), BEGAN)
    world.now = utc("2026-06-02 02:00")
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        name = world.launched.all[-1].arguments[-2]
        if world.launched.all[-1].code is None:
            world.schedules.note(name, "failed", world.now, error="no such model")
            world.schedules.end(name, world.now, "ended", outcome="0 scores")
            world.launched.all[-1].end(1)
        world.now += timedelta(minutes=1)
        return len(waits) > 9

    assert world.service().run_once(wait) == 2
    assert set(waits) == {POLL_S} and [started.arguments[-2] for started in world.launched.all] == ["nightly", "often"]


def test_local_processes__hold_the_lock_until_they_end(tmp_path: Path) -> None:
    schedules = Schedules(tmp_path)
    schedules.add(NIGHTLY, BEGAN)
    claim = schedules.claim("nightly", utc("2026-06-02 02:00"))
    assert claim is not None
    launcher = LocalProcesses()
    with claim.lock:
        command = ["-c", "import sys; print('at work', flush=True); import time; time.sleep(600)"]
        process = launcher.start(command, tmp_path / "log", locks=[claim.lock.fileno()])
    try:
        assert launcher.poll(process) is None
        assert schedules.claim("nightly", utc("2026-06-02 03:00"), at_once=True) is None
    finally:
        launcher.stop(process)
        process.wait(60)
    assert launcher.poll(process) == -15
    again = schedules.claim("nightly", utc("2026-06-02 03:00"))
    assert again is not None and again.due == utc("2026-06-02 02:00")
    again.lock.close()


def test_local_processes__end_with_who_started_them(tmp_path: Path) -> None:
    sleeper = "import time; time.sleep(600)"
    code = "import sys, time; from pathlib import Path; from pretrain.processes import LocalProcesses\n"
    code += f"print(LocalProcesses().start(['-c', {sleeper!r}], Path(sys.argv[1])).pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.wait(60)
        deadline = time.monotonic() + 60
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with suppress(psutil.NoSuchProcess):
            child.kill()


# New checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of four checkpoints and the random backbone that evaluates every second one by itself, with knn."""
    run = RunDir(tmp_path / "runs" / "run-1")
    run.path.mkdir(parents=True)
    tasks = "evaluation.tasks=[{protocol: knn, data: grocery}]"
    settings = ["train.steps=40", "train.checkpoint_every=10", "evaluation.every=2", tasks]
    plan = load_plan("demo", [*settings, "evaluation.select=knn/grocery/top1", f"storage={tmp_path / 'runs'}"])
    run.recipe.write_text(plan_yaml(plan))
    return run


def publish(run: RunDir, *steps: int, when: datetime = BEGAN) -> None:
    with Journal(run.journal) as journal:
        for step in steps:
            path = f"checkpoints/step-{step:08d}"
            journal.write(CheckpointPublished(time=when.timestamp(), step=step, path=path))


def score(step: int, protocol: str, top1: float, key: str = "k", half: float = 0.05) -> Evaluated:
    metrics = {"top1": top1, "top1_ci_low": top1 - half, "top1_ci_high": top1 + half}
    of = {"protocol": protocol, "data": "grocery", "metrics": metrics}
    return Evaluated(step=step, key=key, seconds=1.0, cached=False, num_test=100, **of)


def of_new(run: RunDir, **changes: Any) -> Entry:
    data = {"grocery": str(GROCERY)}
    entry = Entry("new", ("knn", "linear"), data, on_checkpoint=str(run.path.parent), added="2026-06-01T12:00:00Z")
    return replace(entry, handled=entry.added, **changes)


def test_new_checkpoints__as_often_as_the_run_says_and_what_it_does_itself_is_left_to_it(run: RunDir) -> None:
    new = NewCheckpoints(of_new(run))
    assert new.due([]) == []
    publish(run, 0, 10, 20)
    publish(run, 40, when=BEGAN - timedelta(seconds=1))  # before the entry was added
    found = new.due([])
    assert [(job.subject, job.step, [task.protocol for task in job.tasks]) for job in found] == [
        ("run-1", 0, ["linear"]),
        ("run-1", 20, ["linear"]),
    ]
    assert found[1].location == str(run.path / "checkpoints" / "step-00000020")
    with Journal(run.evaluations) as journal:
        journal.write(score(0, "linear", 0.5))
    assert [job.step for job in new.due([])] == [20]
    assert new.due([("run-1", 20, "linear", "grocery")]) == []
    publish(run, 30, 40)
    assert [job.step for job in new.due([])] == [20, 40] == [job.step for job in NewCheckpoints(of_new(run)).due([])]


def test_new_checkpoints__of_a_suite_what_fits_but_for_what_the_run_does_by_itself(run: RunDir) -> None:
    new = NewCheckpoints(of_new(run, tasks=(), suite="quick"))
    publish(run, 20)
    assert [[task.protocol for task in job.tasks] for job in new.due([])] == [["ridge", "spectrum"]]


def test_new_checkpoints__what_the_run_does_at_its_end_alone_is_not_left_to_it_before(run: RunDir) -> None:
    own = "  tasks:\n  - protocol: knn\n    data: grocery\n    image_size: null"
    text = run.recipe.read_text()
    assert own in text
    text = text.replace(own, own.replace("null", "96")).replace("    at: null", "    at: last", 1)
    run.recipe.write_text(text.replace("  select: knn/grocery/top1", "  select: null"))
    publish(run, 20, 40)
    found = NewCheckpoints(of_new(run)).due([])
    assert [(job.step, [task.protocol for task in job.tasks]) for job in found] == [
        (20, ["knn", "linear"]),
        (40, ["linear"]),
    ]
    assert [task.image_size for task in found[0].tasks] == [96, None]


def test_service__has_new_checkpoints_evaluated_and_rests_when_that_dies(run: RunDir) -> None:
    schedules, now = Schedules(run.path.parent), [BEGAN]
    schedules.add(of_new(run), BEGAN)
    launched, said = Launched(), list[str]()
    service = Service(schedules, launched, lambda: now[0], said.append)
    assert not service.tick()
    publish(run, 20)
    assert service.tick() and not service.tick()
    launched.all[0].end(-9)
    assert not service.tick() and not service.tick()
    now[0] += REST
    assert service.tick()
    schedules.note("new", "failed", now[0], run="run-1", step=20, protocol="linear", data="grocery", error="torn shard")
    schedules.end("new", now[0], "ended", outcome="0 scores, 1 failures")
    launched.all[1].end(1)
    now[0] += 2 * REST
    assert not service.tick() and len(launched.all) == 2  # what cannot be evaluated is not tried for ever


# The work -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Step -> top-1 that evaluations of the test give; a step without one fails. What is asked is kept under -1."""
    given: dict[int, float] = {}

    def evaluate(location: str, step: int, tasks: Any, *rest: Any, **options: Any) -> Any:
        if step not in given:
            return [EvaluationFailed(step=step, protocol=t.protocol, data=t.data, error="no weights") for t in tasks]
        return [score(step, task.protocol, given[step], key=f"{task.protocol}-{step}") for task in tasks]

    monkeypatch.setattr(works, "evaluate_tasks", evaluate)
    monkeypatch.setattr(works, "send", lambda run: True)
    return given


def test_done__scores_are_lines_of_the_run_and_a_regression_is_told_everywhere(
    run: RunDir, scores: dict[int, float]
) -> None:
    schedules, said = Schedules(run.path.parent), list[str]()
    entry = of_new(run, webhook_url_env="ALERT_URL", webhook_secret_env="ALERT_SECRET")
    schedules.add(entry, BEGAN)
    publish(run, 0, 10, 20, 30, 40)
    scores.update({0: 0.9, 20: 0.6, 40: 0.5})
    outcome = done(schedules, entry, BEGAN, said.append, lambda: BEGAN)
    assert (outcome.scores, outcome.failures, outcome.regressions) == (3, 0, 1)
    events, _ = read_events(run.evaluations)
    assert [(event.step, event.task) for event in events if isinstance(event, Evaluated)] == [
        (0, "linear/grocery"),
        (20, "linear/grocery"),
        (40, "linear/grocery"),
    ]
    (warned,) = [event for event in events if isinstance(event, Warned)]
    expected = "run-1: linear/grocery top1 is 50.0% (45.0-55.0%) at step 40, was 60.0% (55.0-65.0%) at step 20"
    assert (warned.step, warned.about) == (40, "regression") and warned.text.startswith(expected)
    (alert,) = Outbox(schedules.outbox).waiting()
    assert alert.body["text"].startswith(f"new: {expected}") and alert.url_env == "ALERT_URL"
    assert alert.body["before"]["score"] == 0.6 and alert.body["after"]["step"] == 40
    assert any(line.startswith(f"REGRESSION: {expected}") for line in said)
    whats = [line["what"] for line in schedules.past()]
    assert whats == ["added", "scored", "scored", "regressed", "scored", "ended"]
    done(schedules, entry, BEGAN, said.append, lambda: BEGAN)
    assert read_events(run.evaluations)[0] == events


def test_done__pictures_are_kept_once_and_one_that_there_is_not_is_a_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(location: str, step: int, tasks: Any, *rest: Any, **options: Any) -> list[Any]:
        drawn = Drawn(step, "grocery", "tokens", b"a picture")
        return [score(step, "linear", 0.5, key="k"), drawn, Warned(step=step, about="pictures", text="no pictures")]

    monkeypatch.setattr(works, "evaluate_tasks", evaluate)
    monkeypatch.setattr(works, "send", lambda run: True)
    schedules, said = Schedules(run.path.parent), list[str]()
    entry = of_new(run)
    schedules.add(entry, BEGAN)
    publish(run, 20)
    for _ in range(2):  # the second time the score is gone, and the picture is there
        done(schedules, entry, BEGAN, said.append, lambda: BEGAN)
        (picture,) = (event for event in read_events(run.evaluations)[0] if isinstance(event, Visualizations))
        assert run.inside(picture.path).read_bytes() == b"a picture" and "no pictures" in said[-1]
        run.evaluations.write_text(f"{json.dumps(picture.to_json())}\n")


def test_done__work_that_is_cut_off_tells_nothing_twice(
    run: RunDir, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at each of the places where it writes; the next one ends with the same files."""
    schedules = Schedules(run.path.parent)
    entry = of_new(run, webhook_url_env="ALERT_URL", webhook_secret_env="ALERT_SECRET")
    schedules.add(entry, BEGAN)
    publish(run, 20, 40)
    scores.update({20: 0.6, 40: 0.3})
    for name in ("_alert", "_record"):
        whole = getattr(works, name)
        calls: list[Any] = []

        def die(*arguments: Any, whole: Any = whole, calls: list[Any] = calls) -> Any:
            calls.append(arguments)
            if arguments[-1] is not None and len(calls) == (1 if whole.__name__ == "_alert" else 2):
                raise KeyboardInterrupt
            return whole(*arguments)

        monkeypatch.setattr(works, name, die)
        with pytest.raises(KeyboardInterrupt):
            done(schedules, entry, BEGAN, lambda line: None, lambda: BEGAN)
        monkeypatch.setattr(works, name, whole)
        if name == "_alert":
            assert [event.step for event in read_events(run.evaluations)[0] if isinstance(event, Evaluated)] == [20]
            publish(run, 40)
            run.evaluations.unlink()  # so that the second time dies at the line of the run, of both
            schedules.history.unlink()
    done(schedules, entry, BEGAN, lambda line: None, lambda: BEGAN)
    assert [event.step for event in read_events(run.evaluations)[0] if isinstance(event, Evaluated)] == [20, 40]
    assert len(Outbox(schedules.outbox).waiting()) == 1


def test_done__what_a_suite_has_that_fits_not_is_told_and_neither_a_failure_nor_tried_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(location: str, step: int, tasks: Any, *rest: Any, **options: Any) -> list[Any]:
        assert {task.suite for task in tasks} == {"quick"}
        of = [{"step": step, "protocol": task.protocol, "data": task.data} for task in tasks]
        return [EvaluationFailed(**each, error="too few of 1 class", left_out=True) for each in of]

    monkeypatch.setattr(works, "evaluate_tasks", evaluate)
    schedules, entry = Schedules(run.path.parent), of_new(run, tasks=(), suite="quick")
    schedules.add(entry, BEGAN)
    publish(run, 20)
    outcome = done(schedules, entry, BEGAN, list[str]().append, lambda: BEGAN, retry=True)
    assert (outcome.scores, outcome.failures) == (0, 0)
    said = [told(line) for line in schedules.past() if line["what"] == "left out"]
    assert said[0] == "run-1 step 20: ridge/grocery is left out of its suite: too few of 1 class" and len(said) == 2
    assert schedules.entry("new").suite == "quick"
    done(schedules, entry, BEGAN, list[str]().append, lambda: BEGAN, retry=True)
    assert len([line for line in schedules.past() if line["what"] == "left out"]) == 2


def test_done__a_failure_is_written_down_and_stops_nothing(run: RunDir, scores: dict[int, float]) -> None:
    schedules = Schedules(run.path.parent)
    entry = of_new(run)
    schedules.add(entry, BEGAN)
    publish(run, 20, 40)
    scores[40] = 0.5
    outcome = done(schedules, entry, BEGAN, lambda line: None, lambda: BEGAN)
    assert (outcome.scores, outcome.failures) == (1, 1)
    (failed,) = [line for line in schedules.past() if line["what"] == "failed"]
    assert (failed["run"], failed["step"], failed["error"]) == ("run-1", 20, "no weights")
    again = done(schedules, entry, BEGAN, lambda line: None, lambda: BEGAN)
    assert (again.scores, again.failures) == (0, 0)
    scores[20] = 0.4  # by hand it is tried again
    assert done(schedules, entry, BEGAN, lambda line: None, lambda: BEGAN, retry=True).scores == 1


def test_done__other_data_under_a_name_of_the_run_are_refused(
    run: RunDir, scores: dict[int, float], tmp_path: Path
) -> None:
    schedules = Schedules(run.path.parent)
    entry = of_new(run, data={"grocery": str(tmp_path)})
    schedules.add(entry, BEGAN)
    publish(run, 20)
    scores[20] = 0.5
    outcome = done(schedules, entry, BEGAN, lambda line: None, lambda: BEGAN)
    assert outcome.failures == 1 and not run.evaluations.exists()
    assert "give the data another name" in next(line["error"] for line in schedules.past() if line["what"] == "failed")


@pytest.mark.parametrize(
    ("before", "after", "better", "worse"),
    [
        (Scored(0.60, 0.55, 0.65), Scored(0.50, 0.45, 0.55), "higher", True),
        (Scored(0.60, 0.55, 0.65), Scored(0.54, 0.49, 0.59), "higher", False),
        (Scored(0.50, 0.45, 0.55), Scored(0.60, 0.55, 0.65), "higher", False),
        (Scored(0.50, 0.45, 0.55), Scored(0.60, 0.55, 0.65), "lower", True),
        # Wilson's intervals of 98 and 92 of 100: Newcombe's interval of the difference is -0.009 to 0.130.
        (Scored(0.98, 0.9300, 0.9945), Scored(0.92, 0.8500, 0.9589), "higher", False),
        (Scored(0.98, 0.9300, 0.9945), Scored(0.90, 0.8256, 0.9448), "higher", True),
    ],
)
def test_is_worse__beyond_noise_only(before: Scored, after: Scored, better: Any, worse: bool) -> None:
    assert is_worse(before, after, better) is worse


# Webhooks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """Answers with the codes in its list `codes`, and keeps what it was sent in `taken`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.taken.append((dict(self.headers), body))  # type: ignore[attr-defined]
            self.send_response(self.server.codes.pop(0))  # type: ignore[attr-defined]
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.codes, server.taken = [], []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


ALERT = Alert(
    "abc", "nightly", {"text": "worse"}, "ALERT_URL", "ALERT_SECRET", tries=0, next_try="2026-06-01T12:00:00Z"
)


def test_outbox__a_server_that_fails_twice_takes_one_message_whose_signature_is_right(
    world: World, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/hook/very-secret"
    monkeypatch.setenv("ALERT_URL", url)
    monkeypatch.setenv("ALERT_SECRET", "key of signatures")
    server.codes += [500, 500, 200]
    Outbox(world.schedules.outbox).put(ALERT)
    at_it = hold(world.schedules.outbox / ".lock")  # another service
    assert at_it is not None
    world.service().tick()
    assert server.taken == []
    at_it.close()
    world.service().tick()
    world.service().tick()  # not before its time
    assert len(server.taken) == 1
    world.now += timedelta(seconds=PAUSES_S[0])
    world.service().tick()
    world.now += timedelta(seconds=PAUSES_S[0])  # the pause is longer now
    world.service().tick()
    assert len(server.taken) == 2
    world.now += timedelta(seconds=PAUSES_S[1])
    world.service().tick()
    world.now += timedelta(days=1)
    world.schedules.remove("nightly", world.now)
    world.service().tick()
    assert len(server.taken) == 3 and Outbox(world.schedules.outbox).waiting() == []
    for headers, body in server.taken:
        headers = {name.lower(): value for name, value in headers.items()}
        assert headers["idempotency-key"] == headers["webhook-id"] == "abc" and json.loads(body) == {"text": "worse"}
        timestamp = int(headers["webhook-timestamp"])
        assert headers["webhook-signature"] == signature("key of signatures", "abc", timestamp, body)
    assert [what for what in world.past() if what != "removed"] == ["added", "undelivered", "undelivered", "delivered"]
    written = "".join(path.read_text() for path in world.schedules.path.rglob("*") if path.is_file())
    assert "very-secret" not in written + "".join(world.said) and "key of signatures" not in written


def test_signature__of_the_standard() -> None:
    """By `openssl dgst -sha256 -hmac secret -binary | base64` of `id.1700000000.{}`."""
    assert signature("secret", "id", 1700000000, b"{}") == "v1,GBemBzTgbKoVEGKycqyY3615LbdJbhFLE1oQk+zZ+lo="


def test_outbox__gives_up_follows_no_redirect_and_never_shows_the_url(tmp_path: Path, server: Any) -> None:
    outbox, now = Outbox(tmp_path / "outbox"), BEGAN
    url = f"http://127.0.0.1:{server.server_port}/hook/very-secret"
    server.codes += [302] * 9
    outbox.put(ALERT)
    problems = []
    for pause in (*PAUSES_S, 0.0):
        (sent,) = outbox.deliver(now, {"ALERT_URL": url, "ALERT_SECRET": "s"})
        problems.append(sent.problem)
        assert sent.is_over == (pause == 0.0)
        now += timedelta(seconds=pause)
    assert set(problems) == {"the server of ALERT_URL answers 302"} and len(server.taken) == 5
    assert outbox.waiting() == []
    for environment, said in (
        ({}, "the environment of the service has no ALERT_URL and no ALERT_SECRET"),
        ({"ALERT_URL": "http://example.com/very-secret", "ALERT_SECRET": "s"}, "ALERT_URL is no https URL"),
        ({"ALERT_URL": "file:///etc/passwd", "ALERT_SECRET": "s"}, "ALERT_URL is no https URL"),
        (
            {"ALERT_URL": "http://127.0.0.1:1/very-secret", "ALERT_SECRET": "s"},
            "the server of ALERT_URL is not reached",
        ),
    ):
        outbox.put(ALERT)
        (sent,) = outbox.deliver(BEGAN, environment)
        assert sent.problem is not None and sent.problem.startswith(said) and "very-secret" not in sent.problem


# The command line -----------------------------------------------------------------------------------------------------


def test_schedule__surface_is_frozen() -> None:
    surface = {
        name: [
            parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            for parameter in command.params
        ]
        for name, command in schedule.commands.items()
    }
    when, what = ["--cron", "--tz", "--on-checkpoint"], ["--models", "--tasks", "--suite", "--data"]
    assert surface == {
        "add": ["NAME", *when, *what, "--webhook-url-env", "--webhook-secret-env", "--storage"],
        "list": ["--storage"],
        "remove": ["NAME", "--storage"],
        "run-now": ["NAME", "--storage"],
        "history": ["NAME", "--last", "--storage"],
        "serve": ["--once", "--as-job", "--address", "--env", "--storage"],
    }


ADD = ["schedule", "add", "nightly", "--cron", "0 2 * * *", "--models", "run-1", "--tasks", "knn"]
DATA = ["--data", f"grocery={GROCERY}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*ADD[:3], *ADD[5:], *DATA], "when: give either --cron EXPRESSION or --on-checkpoint DIR"),
        ([*ADD, *DATA, "--on-checkpoint", "runs"], "when: give either"),
        ([*ADD[:2], "a/b", *ADD[3:], *DATA], "schedule a/b: this name is no name of a file"),
        ([*ADD[:4], "61 2 * * *", *ADD[5:], *DATA], "--cron '61 2 * * *': field 1 (minute) is '61'"),
        ([*ADD, *DATA, "--tz", "Berlin"], "--tz Berlin: no such time zone"),
        ([*ADD[:6], "run-2", *ADD[7:], *DATA], "--models run-2: checkpoint run-2: no such directory"),
        ([*ADD[:6], "runs:/run-2/best", *ADD[7:], *DATA], "--models runs:/run-2/best: no run 'run-2'"),
        ([*ADD[:6], "run-1,,run-1", *ADD[7:], *DATA], "--models run-1,,run-1: nothing between two commas"),
        ([*ADD[:8], "knn,liner", *DATA], "--tasks liner: no such protocol"),
        ([*ADD[:7], *DATA], "what: give either --tasks NAME,... or --suite NAME"),
        ([*ADD, *DATA, "--suite", "quick"], "what: give either --tasks NAME,... or --suite NAME"),
        ([*ADD, "--data", "grocery=nowhere"], "--data grocery=nowhere: no such directory"),
        ([*ADD, "--data", "nowhere"], "--data nowhere: expected NAME=DIRECTORY"),
        ([*ADD[:8], "segmentation", *DATA], "its samples have no labels for segmentation"),
        ([*ADD, *DATA, "--webhook-url-env", "https://hooks.example/secret"], "--webhook-url-env: takes the name"),
        ([*ADD, *DATA, "--webhook-url-env", "ALERT_URL"], "--webhook-url-env and --webhook-secret-env: give both"),
        (
            ["schedule", "add", "n", "--on-checkpoint", "nowhere", "--tasks", "knn", *DATA],
            "--on-checkpoint nowhere: no",
        ),
        (
            ["schedule", "add", "n", "--on-checkpoint", "s3://me:hooks.example@b/runs", "--tasks", "knn", *DATA],
            "--on-checkpoint s3://b/runs: a remote store; a schedule follows runs in a directory; those there evaluate",
        ),
        (["schedule", "add", "n", "--on-checkpoint", "runs", "--tz", "UTC", "--tasks", "knn", *DATA], "--tz UTC: goes"),
        ([*ADD, *DATA, "--storage", "rusn"], "rusn: no such directory; give the one that holds the runs"),
        (["schedule", "remove", "nightly"], "--storage runs: no schedule in it"),
        (["schedule", "run-now", "nightly"], "--storage runs: no schedule in it"),
        (["schedule", "serve"], "--storage runs: no schedule in it"),
        (["schedule", "history"], "--storage runs: no schedule in it"),
    ],
)
def test_schedule__a_wrong_request_is_2_and_leaves_nothing(
    arguments: list[str],
    said: str,
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(run, 20)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(said in line for line in lines) and all(line.startswith("error: ") for line in lines), lines
    assert "hooks.example" not in "".join(lines) and sorted(tmp_path.rglob("*")) == before


def test_schedule__add_list_history_remove(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["schedule", "add", "new", "--on-checkpoint", "runs", "--tasks", "knn,linear", *DATA]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "new: is in" in (twice := capsys.readouterr().err) and "pretrain schedule remove new" in twice
    assert main(["schedule", "list"]) == 0
    when, what, last = capsys.readouterr().out.splitlines()
    assert when == f"new: each checkpoint in {tmp_path / 'runs'}" and last.endswith("Z added")
    assert what.strip() == f"knn, linear on grocery={GROCERY}"
    assert main(["schedule", "run-now", "neww"]) == 2
    assert "schedule neww: not in" in (wrong := capsys.readouterr().err) and "did you mean 'new'?" in wrong
    assert main(["schedule", "run-now", "new"]) == 0 and main(["schedule", "remove", "new"]) == 0
    capsys.readouterr()
    assert main(["schedule", "history", "new"]) == 0
    whats = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert (
        whats[0] == "added" and whats[1].startswith("began") and whats[2].endswith("0 scores") and whats[3] == "removed"
    )
