"""The record of a run in a remote storage: kept there by who drives it, and brought to whoever reads it or goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.checkpoints import store
from pretrain.cli import jobs
from pretrain.cli.main import main
from pretrain.config.load import load_for_resume, load_plan
from pretrain.config.stages import plan_yaml
from pretrain.driver import remote_record
from pretrain.driver.placement import only_driver
from pretrain.driver.remote_record import RemoteRecord
from pretrain.errors import RequestError, RunFailed
from pretrain.record.events import CheckpointPublished, Event, Finished, Start
from pretrain.record.journal import Journal
from pretrain.record.remote_runs import bring, drives_elsewhere, drives_no_more, is_elsewhere, push_record, push_results
from pretrain.record.run_dir import RunDir, find_run, resume_command, shown_run
from pretrain.record.standing import standing_of
from pretrain.remote import lease
from pretrain.remote.folder import RemoteFolder

RUN = "mae-1"
NEW = "s3://new/copy"
Machine = Callable[[str], RunDir]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Goes to another machine, and tells where the run is there; all see one store, in the memory of this process."""
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_S", 1.0)
    monkeypatch.setattr(remote_record, "REFRESH_S", 0.1)
    monkeypatch.setattr(remote_record, "EVERY_S", 0.1)
    monkeypatch.setattr(remote_record, "RETRY_S", 0.1)
    monkeypatch.setattr(remote_record, "LAST_S", 3.0)

    def go_to(name: str) -> RunDir:
        monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / name))
        run = RunDir(tmp_path / name / "runs/memory/store" / RUN)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    yield go_to
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/store"):
        filesystem.rm("/store", recursive=True)


STORE = RemoteFolder(f"memory://store/{RUN}")


def begin(run: RunDir) -> None:
    run.logs.mkdir(parents=True, exist_ok=True)
    add(run, "start\n")
    run.recipe.write_text("storage: x\n")


def add(run: RunDir, line: str) -> None:
    with run.journal.open("a") as file:
        file.write(line)


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def in_store(run: RunDir) -> bool:
    return STORE.read(run.journal.name) == run.journal.read_bytes()


def die(record: RemoteRecord) -> None:
    """As a process that is killed: nothing more is sent and nothing is said."""
    record._has_ended.set()
    record._is_over.set()
    record.wake()
    for thread in record._threads:
        thread.join(60)


def test_remote_record__is_kept_while_the_run_is_driven_and_whole_at_the_end(machine: Machine) -> None:
    run = machine("a")
    with RemoteRecord(run) as record:
        assert STORE.read(run.journal.name) is None
        begin(run)
        wait_for(lambda: STORE.read(run.recipe.name))
        add(run, "step 1\n")
        record.wake()
        wait_for(lambda: in_store(run))
        for path in (run.visualizations(1), run.samples(0), run.heartbeat(0), run.path / ".partial", run.stop_request):
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        results = run.path.parent / "evaluations" / "abc.json"
        results.parent.mkdir()
        results.write_text("{}")
        run.report.write_text("<html>")
    assert sorted(STORE.files()) == ["driver.json", "journal.jsonl", "recipe.yaml", "report.html"]
    assert STORE.files("samples") and STORE.files("visualizations") and not STORE.files("heartbeat")
    assert RemoteFolder("memory://store").read("evaluations/abc.json") == b"{}"
    assert b'"ended": true' in (STORE.read("driver.json") or b"")

    other = machine("b")
    bring(other.path.parent, RUN)
    assert find_run(RUN, other.path.parent).journal.read_bytes() == run.journal.read_bytes()
    assert other.report.read_text() == "<html>" and other.samples(0).is_file() and other.visualizations(1).is_file()
    assert not other.stop_request.exists() and drives_elsewhere(other) is None
    assert resume_command(other) == f"pretrain resume {RUN} --storage memory://store"
    assert shown_run(other) == f"memory://store/{RUN}, its working copy {other.path}"


def test_bring__all_runs_are_listed_by_what_tells_of_their_checkpoints_and_scores(machine: Machine) -> None:
    run = machine("a")
    with RemoteRecord(run):
        begin(run)
        run.evaluations.write_text("score\n")
        run.stored_at.parent.mkdir()
        run.stored_at.write_text("memory://store/mae-1")
    RemoteFolder("memory://store").write("shards/a.tar", b"")
    RemoteFolder("memory://store").write("evaluations/../x.json", b"")
    other = machine("b")
    bring(other.path.parent)
    assert sorted(path.name for path in other.path.parent.iterdir()) == [RUN]
    assert other.evaluations.read_text() == "score\n" and other.stored_at.is_file() and not other.journal.exists()
    with pytest.raises(RequestError, match=r"^run mae-2: not in memory://store; did you mean 'mae-1'"):
        bring(other.path.parent, "mae-2")
        find_run("mae-2", other.path.parent)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the store at `NEW`."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    place, filesystem = tmp_path / "store", fsspec.filesystem("file", auto_mkdir=True)
    opened = property(lambda folder: (filesystem, f"{place}{folder.uri.removeprefix(NEW)}"))
    monkeypatch.setattr(RemoteFolder, "_opened", opened)
    return place


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ((), "s3://new/copy/mae-1"),
        (("checkpoints.storage=s3://elsewhere/x",), "s3://elsewhere/x/mae-1"),
    ],
    ids=["with its checkpoints", "checkpoints elsewhere"],
)
def test_bring__a_storage_that_was_copied_has_its_own_checkpoints(
    settings: tuple[str, ...], place: str, copied: Path, tmp_path: Path
) -> None:
    """Who goes on with the copy writes nothing to where it was copied from."""
    plan = load_plan("demo", ["storage=s3://old/runs", *settings], check_files=False)
    run = RunDir(tmp_path / "cache/runs/s3/new/copy/mae-1")
    (copied / RUN / "checkpoints").mkdir(parents=True)
    (copied / RUN / "recipe.yaml").write_text(plan_yaml(plan))
    (copied / RUN / "checkpoints/stored_at.txt").write_text(f"{plan.recipe.checkpoints.storage}/mae-1\n")

    for _ in range(2):  # the second time nothing is new
        bring(run.path.parent, RUN)
        assert store.storage_of(run.path).location() == place
    resumed = load_for_resume(run.recipe, ()).recipe
    assert (resumed.storage, f"{resumed.checkpoints.storage}/mae-1") == (str(run.path.parent), place)
    store.place(run.path, resumed.checkpoints.storage)  # as a worker does
    push_record(run)
    assert (copied / RUN / "checkpoints/stored_at.txt").read_text().strip() == place


def test_logs__follow_a_run_that_another_machine_drives(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = RunDir(copied / RUN)
    there.path.mkdir(parents=True)
    there.recipe.write_text(plan_yaml(load_plan("demo", [f"storage={NEW}"], check_files=False)))
    holder = lease.Holder("b", "host", 7, 1, time.time())
    there.driver_lease.write_text(json.dumps(asdict(holder)))

    def tell(*events: Event) -> None:
        with Journal(there.journal) as journal:
            for event in events:
                journal.write(event)

    tell(Start(step=0, total_steps=200, world_size=2, device="cpu"), CheckpointPublished(step=11, path="a"))
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            tell(CheckpointPublished(step=22, path="b"), Finished(step=200))
            there.driver_lease.write_text(json.dumps(asdict(replace(holder, ended=True))))

    monkeypatch.setattr(jobs, "STORE_POLL_S", 0.0)
    monkeypatch.setattr(time, "sleep", wait)
    assert main(["logs", "-f", RUN, "--storage", NEW]) == 0
    out, err = capsys.readouterr()
    assert out.count("step 11") == out.count("step 22") == 1 and out.index("step 11") < out.index("step 22")
    assert err == "run mae-1: finished\n" and len(waits) == 2


def test_load_for_resume__a_copy_on_a_disk_of_a_run_in_a_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would publish to one place, of whom neither knows of the other."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "runs" / RUN / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(plan_yaml(load_plan("demo", ["storage=s3://old/runs"], check_files=False)))
    with pytest.raises(RequestError) as refused:
        load_for_resume(recipe, ())
    (line,) = refused.value.mistakes
    assert line.startswith(f"run mae-1: {tmp_path}/runs has a copy of what is kept in s3://old/runs; go on with it ")
    assert line.endswith("there: pretrain resume mae-1 --storage s3://old/runs")


def test_remote_record__a_second_driver_is_refused_while_the_first_lives(machine: Machine) -> None:
    run = machine("a")
    with RemoteRecord(run):
        begin(run)
        wait_for(lambda: STORE.read(run.recipe.name))
        other = machine("b")
        bring(other.path.parent, RUN)
        add(run, "step 1\n")
        line = r"^run mae-1 is already driven by process \d+ of .+; stop it there"
        with pytest.raises(RequestError, match=line), RemoteRecord(other):
            pytest.fail("two drive the run")
        machine("a")
    assert in_store(run)


def test_remote_record__another_machine_takes_over_from_one_that_died_and_the_dead_writes_no_more(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    run = machine("a")
    first = RemoteRecord(run).__enter__()
    begin(run)
    add(run, "step 1\n")
    wait_for(lambda: in_store(run))
    die(first)
    add(run, "step 2, which the store never saw\n")

    other = machine("b")
    bring(other.path.parent, RUN)
    with RemoteRecord(other) as second:
        assert other.journal.read_text() == "start\nstep 1\n"
        add(other, "step 2 again\n")
        wait_for(lambda: in_store(other))
        machine("a")
        assert drives_no_more(run) and is_elsewhere(run)
        with pytest.raises(lease.LeaseLost):
            assert first._lease is not None
            first._lease.refresh()
        machine("b")
        assert not drives_no_more(other) and not is_elsewhere(other)
        second.look()
    run = machine("a")
    bring(run.path.parent, RUN)
    assert run.journal.read_text() == "start\nstep 1\nstep 2 again\n"  # its own line was of a past that is none


def test_remote_record__what_was_driven_elsewhere_until_the_last_moment_is_brought(machine: Machine) -> None:
    run = machine("a")
    first = RemoteRecord(run).__enter__()
    begin(run)
    wait_for(lambda: in_store(run))
    other = machine("b")
    bring(other.path.parent, RUN)
    machine("a")
    add(run, "step 1\n")
    wait_for(lambda: in_store(run))
    die(first)
    machine("b")
    with RemoteRecord(other):
        assert other.journal.read_text() == "start\nstep 1\n"

    third = machine("c")
    bring(third.path.parent, RUN)
    machine("b")
    with RemoteRecord(other) as record:
        other.recipe.write_text("storage: x\nmore: steps\n")
        wait_for(lambda: STORE.read(other.recipe.name) == other.recipe.read_bytes())
        record.look()
    machine("c")
    with pytest.raises(RequestError, match="run mae-1: was changed by another machine at this moment; try again"):
        RemoteRecord(third).__enter__()


def test_remote_record__who_is_taken_over_while_it_lives_ends_and_writes_no_more(machine: Machine) -> None:
    run = machine("a")
    with RemoteRecord(run) as record:
        begin(run)
        wait_for(lambda: STORE.read(run.recipe.name))
        STORE.write("driver.json", b'{"token": "b", "host": "h", "process": 7, "beat": 99, "time": 0, "ended": false}')
        wait_for(lambda: record._lost)
        with pytest.raises(RunFailed, match="run mae-1 is driven by process 7 of h now, so it ends here"):
            record.look()
        add(run, "step 1\n")
    assert not in_store(run) and b'"ended": false' in (STORE.read("driver.json") or b"")


def test_remote_record__what_the_store_lacks_of_this_machines_run_stays_and_is_sent(machine: Machine) -> None:
    """The driver was killed before it could send its last lines; the same machine goes on."""
    run = machine("a")
    first = RemoteRecord(run).__enter__()
    begin(run)
    wait_for(lambda: in_store(run))
    die(first)
    add(run, "step 1\n")
    bring(run.path.parent, RUN)
    bring(run.path.parent)
    assert run.journal.read_text() == "start\nstep 1\n"
    with RemoteRecord(run):
        pass
    assert in_store(run)


def test_standing__of_a_run_that_another_machine_drives_is_running_while_its_lease_is_fresh(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = machine("a")
    monkeypatch.setattr(lease, "EXPIRY_S", 60.0)
    with only_driver(run), RemoteRecord(run):
        begin(run)
        wait_for(lambda: STORE.read(run.recipe.name))
        bring(run.path.parent, progress=True)
        assert standing_of(run).state == "running" and standing_of(run).note == ""  # here the lock tells
        other = machine("b")
        bring(other.path.parent, progress=True)
        found = standing_of(other)
        assert found.state == "running" and found.note.startswith("driven by process ")
        assert other.journal.exists() and not other.logs.exists()
        monkeypatch.setattr(lease, "EXPIRY_S", 0.0)
        assert standing_of(other).state != "running"
        machine("a")
    machine("b")
    monkeypatch.setattr(lease, "EXPIRY_S", 60.0)
    bring(other.path.parent, progress=True)
    assert standing_of(other).state != "running"


def test_bring__leaves_alone_what_this_machine_drives(machine: Machine) -> None:
    run = machine("a")
    STORE.write("recipe.yaml", b"theirs")
    run.recipe.write_text("mine")
    with only_driver(run):
        bring(run.path.parent, RUN)
    assert run.recipe.read_text() == "mine"
    bring(run.path.parent, RUN)
    assert run.recipe.read_text() == "theirs"


def test_remote_record__a_store_that_is_away_is_told_once_and_catches_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, real = machine("a"), RemoteFolder.put
    is_away, tries = False, 0

    def put(self: RemoteFolder, path: Path, name: str) -> str:
        nonlocal tries
        if is_away:
            tries += 1
            raise ConnectionError("cannot reach https://me:secret@store/x")
        return real(self, path, name)

    monkeypatch.setattr(RemoteFolder, "put", put)
    with caplog.at_level(logging.WARNING), RemoteRecord(run) as record:
        begin(run)
        wait_for(lambda: in_store(run))
        is_away = True
        add(run, "step 1\n")
        wait_for(lambda: tries > 2)
        record.look()  # the run goes on
        is_away = False
        wait_for(lambda: in_store(run))
        wait_for(lambda: "again" in caplog.text)
    (away, back) = caplog.messages
    assert away.startswith("memory://store does not take the record of the run: ConnectionError: cannot reach https://")
    assert "secret" not in away and back == "memory://store has the record of the run again"


def test_remote_record__what_cannot_be_sent_at_the_end_is_told_with_the_remedy(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = machine("a")
    monkeypatch.setattr(remote_record, "LAST_S", 0.3)
    with caplog.at_level(logging.WARNING), RemoteRecord(run):
        begin(run)
        wait_for(lambda: in_store(run))

        def put(self: RemoteFolder, path: Path, name: str) -> str:
            raise ConnectionError("down")

        with monkeypatch.context() as patch:
            patch.setattr(RemoteFolder, "put", put)
            add(run, "step 1\n")
            wait_for(lambda: "down" in caplog.text)
        monkeypatch.setattr(RemoteFolder, "put", put)
    assert caplog.messages[-1] == (
        f"what memory://store lacks is in {run.path}; send it from here with: "
        f"pretrain resume {RUN} --storage memory://store"
    )


def test_remote_record__of_a_run_that_never_began_nothing_is_left(machine: Machine) -> None:
    run = machine("a")
    with pytest.raises(RequestError, match="no"), RemoteRecord(run):
        assert STORE.files()
        raise RequestError("no")
    assert STORE.files() == {} and run.is_free


def test_remote_record__a_run_of_a_directory_has_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / RUN)
    begin(run)
    with RemoteRecord(run) as record:
        record.wake()
        record.look()
    push_record(run)
    push_results(tmp_path)
    bring(tmp_path, RUN)
    assert record.uri is None and not drives_no_more(run) and not is_elsewhere(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["journal.jsonl", "logs", "recipe.yaml"]


def test_record__its_names_and_no_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run)
    run.stored_at.parent.mkdir()
    for path in (run.stored_at, run.report, run.cursor, run.sent, run.rejected, run.evaluations, run.driver_log):
        path.write_text("x")
    names = run.record()
    assert all(run.is_record(name) for name in names) and set(filter(run.is_listed, names)) < set(names)
    assert names[0] == "recipe.yaml" and names.index("mlflow.json") < names.index("journal.jsonl")
    for name in ("driver.json", ".lease", "stop", "logs/../x", "logs/.x", "logs", "checkpoints/x", "../recipe.yaml"):
        assert not run.is_record(name)
