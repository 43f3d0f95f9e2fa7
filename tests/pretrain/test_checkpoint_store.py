"""Publication is atomic on every storage, verification names what differs, retention keeps what it must."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.checkpoints import copies
from pretrain.checkpoints import store as checkpoint
from pretrain.checkpoints.leftovers import QUIET_S, Leftovers
from pretrain.checkpoints.storage import FsspecStorage

STORAGES = ("local", "file", "memory", "memory, of an odd name")


@pytest.fixture(params=STORAGES)
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run whose checkpoints are in its directory, or elsewhere through fsspec; "s3" is a server of our own."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "runs" / "r"
    directory.mkdir(parents=True)
    uris = {"local": None, "file": f"file://{tmp_path}/[1] store", "memory": f"memory://{tmp_path.name}"}
    uris |= {"memory, of an odd name": f"memory://{tmp_path.name}[1]", "s3": f"s3://data/{tmp_path.name}"}
    uri = uris[request.param]
    if request.param == "s3":
        request.getfixturevalue("s3")
    checkpoint.place(directory, uri)
    yield directory
    fsspec.filesystem("memory").store.clear()


def _stage(run_dir: Path, step: int, *, training_state: bool = True) -> list[Path]:
    """As two ranks do it: each has a share of the training state, the first has the backbone."""
    checkpoint.begin(checkpoint.storage_of(run_dir), step)
    return _staged(run_dir, step, training_state=training_state)


def _staged(run_dir: Path, step: int, *, training_state: bool = True) -> list[Path]:
    staged = [checkpoint.stage(run_dir, step, rank) for rank in (0, 1)]
    (staged[0] / "backbone.safetensors").write_bytes(b"weights of step %d" % step)
    (staged[0] / "recipe.yaml").write_text("name: tiny\n")
    if training_state:
        for rank, own in enumerate(staged):
            (own / checkpoint.TRAINING_STATE).mkdir()
            (own / checkpoint.TRAINING_STATE / f"state-{rank}.pt").write_bytes(os.urandom(100))
    return staged


def _complete(run_dir: Path, step: int, staged: list[Path], **manifest: object) -> checkpoint.Published:
    storage = checkpoint.storage_of(run_dir)
    shares = [checkpoint.hand_over(storage, step, own) for own in staged]
    return checkpoint.publish(storage, step, {"run_id": "r", **manifest}, shares)


def _publish(run_dir: Path, *steps: int) -> None:
    for step in steps:
        _complete(run_dir, step, _stage(run_dir, step))


def _steps(run_dir: Path) -> list[int]:
    return [found.step for found in checkpoint.published(run_dir)]


def _resumable(run_dir: Path) -> list[int]:
    return [found.step for found in checkpoint.published(run_dir) if found.has_training_state]


def test_publish__lists_every_file_of_every_rank_with_its_digest(run_dir: Path) -> None:
    found = _complete(run_dir, 100, _stage(run_dir, 100), samples_seen=6400)
    assert checkpoint.published(run_dir) == [found] and checkpoint.latest(run_dir) == found
    manifest = checkpoint.verify(copies.local(found, training_state=True))
    assert manifest == found.manifest()
    state = {"training_state/state-0.pt", "training_state/state-1.pt"}
    assert set(manifest["files"]) == {"backbone.safetensors", "recipe.yaml"} | state
    assert manifest["step"] == 100 and manifest["samples_seen"] == 6400 and manifest["training_state"] is True
    assert not list((run_dir / "checkpoints").glob(".*"))  # nothing is left of what was staged
    using = copies.local(found)
    assert (using / "backbone.safetensors").read_bytes() == b"weights of step 100"
    assert checkpoint.verify(using, training_state=False) == manifest


def test_publish__a_name_that_two_ranks_wrote_is_refused(run_dir: Path) -> None:
    staged = _stage(run_dir, 1)
    (staged[1] / "backbone.safetensors").write_bytes(b"another")
    with pytest.raises(checkpoint.CheckpointError, match=r"rank 1 wrote backbone\.safetensors, which another rank"):
        _complete(run_dir, 1, staged)
    assert _steps(run_dir) == []


def test_publish__the_same_step_again_replaces_it(run_dir: Path) -> None:
    staged = _stage(run_dir, 1)
    (staged[0] / "training_state" / "of another world size.pt").write_bytes(b"old")
    before = _complete(run_dir, 1, staged).manifest()
    _publish(run_dir, 1)
    (found,) = checkpoint.published(run_dir)
    assert found.manifest() != before
    checkpoint.verify(copies.local(found, training_state=True))
    assert "training_state/of another world size.pt" not in found.storage.list(found.name)


def _publish_as_ranks_do(run_dir: Path, step: int, staged: list[Path], attempt: str) -> None:
    """As the threads of two ranks do it, which leave each other notes; here one after another."""
    storage = checkpoint.storage_of(run_dir)
    checkpoint.begin(storage, step, attempt)
    checkpoint.note(storage, step, attempt, "begun", {})
    for rank, own in enumerate(staged):
        share = checkpoint.hand_over(storage, step, own, attempt)
        checkpoint.note(storage, step, attempt, f"rank-{rank}", share)
    notes = checkpoint.notes(storage, step, attempt)
    assert notes.keys() == {"begun", "rank-0", "rank-1"}
    checkpoint.publish(storage, step, {"run_id": "r"}, [notes["rank-0"], notes["rank-1"]], attempt)


def _killed(moment: int, run_dir: Path, staged: list[Path], attempt: str) -> bool:
    """Whether a process that publishes step 2 died in its n-th write, fsync or rename; else it has published."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    try:  # in the child
        calls = itertools.count(1)

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if next(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        storage = checkpoint.storage_of(run_dir)
        if isinstance(storage, FsspecStorage):
            for name in ("put_file", "pipe_file", "rm_file", "rm"):
                setattr(storage._opened[0], name, dying(getattr(storage._opened[0], name)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checkpoint, "storage_of", lambda run_dir: storage)
                _publish_as_ranks_do(run_dir, 2, staged, attempt)
        else:
            os.fsync, os.rename, os.replace = dying(os.fsync), dying(os.rename), dying(os.replace)
            _publish_as_ranks_do(run_dir, 2, staged, attempt)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("run_dir", ["local", "file", pytest.param("s3", marks=pytest.mark.long)], indirect=True)
def test_publish__killed_at_any_moment_leaves_no_half_checkpoint(run_dir: Path) -> None:
    """A process that dies in the n-th write, fsync or rename leaves the checkpoint before as the newest one."""
    _publish(run_dir, 1)
    died = 0
    for moment in range(1, 60):
        staged = _staged(run_dir, 2)
        if not _killed(moment, run_dir, staged, f"attempt-{moment}"):
            break
        died += 1
        if _steps(run_dir) == [1, 2]:  # the last moments are after it was published
            break
        newest = checkpoint.latest(run_dir)
        assert newest is not None and newest.step == 1 and _steps(run_dir) == [1]
        if moment % 4 == 0:
            checkpoint.verify(copies.local(newest, training_state=True))
    assert died >= 7  # each file, each note and the manifest were a moment to die in
    checkpoint.verify(copies.local(checkpoint.published(run_dir)[-1], training_state=True))  # published: complete
    checkpoint.discard_unpublished(run_dir)
    assert [path.name for path in (run_dir / "checkpoints").glob(".*")] == []
    _publish(run_dir, 3)
    assert _steps(run_dir) == [1, 2, 3]


@pytest.mark.parametrize("run_dir", ["s3"], indirect=True)
def test_publish__what_a_store_has_lost_is_named(run_dir: Path) -> None:
    """An upload that was answered as done, and is not there or not whole, is no part of a checkpoint."""
    staged, storage = _stage(run_dir, 5), checkpoint.storage_of(run_dir)
    shares = [checkpoint.hand_over(storage, 5, own) for own in staged]
    name = "step-00000005/training_state/state-1.pt"
    storage.mark(name, b"cut off")
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"s3://.*/{name}: was written, and the store has 7 of its 100"
    ):
        checkpoint.publish(storage, 5, {}, shares)
    storage.remove("step-00000005/training_state")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"state-0.pt: was written, and the store does not have its 100"
    ):
        checkpoint.publish(storage, 5, {}, shares)
    assert _steps(run_dir) == []
    checkpoint.discard(storage, 5, "")
    assert storage.list("step-00000005") == []


def test_discard__takes_back_an_attempt_and_nothing_published(run_dir: Path) -> None:
    _publish(run_dir, 1)
    storage = checkpoint.storage_of(run_dir)
    checkpoint.begin(storage, 2, "a")
    checkpoint.hand_over(storage, 2, _staged(run_dir, 2)[0], "a")
    checkpoint.discard(storage, 2, "a")
    checkpoint.discard(storage, 1, "a")
    assert _steps(run_dir) == [1] and storage.list("step-00000002") == []
    checkpoint.verify(copies.local(checkpoint.published(run_dir)[0], training_state=True))


@pytest.mark.parametrize("run_dir", ["file", "memory, of an odd name", "s3"], indirect=True)
def test_leftovers__go_when_nothing_has_changed_for_a_while(run_dir: Path) -> None:
    """Of publications that were killed, and never of one that somebody is at, nor what is no checkpoint's."""
    storage, now = checkpoint.storage_of(run_dir), [0.0]
    _publish(run_dir, 1)
    storage.mark("logs/worker-0.log", b"of a run whose record is here, too")
    for step, attempt in ((2, "killed"), (3, "killed"), (4, "killed")):
        checkpoint.begin(storage, step, attempt)
        checkpoint.note(storage, step, attempt, "begun", {})
        checkpoint.hand_over(storage, step, _staged(run_dir, step)[0], attempt)
    left = Leftovers(run_dir, clock=lambda: now[0])
    checkpoint.begin(storage, 3, "elsewhere")  # meanwhile by others, with files of the same names and sizes
    checkpoint.note(storage, 3, "elsewhere", "begun", {})
    checkpoint.hand_over(storage, 3, _staged(run_dir, 3)[0], "elsewhere")
    _publish(run_dir, 4)
    now[0] = QUIET_S - 1
    left.remove()
    assert list(checkpoint.unpublished(storage)) == ["step-00000002", "step-00000003"]
    now[0] = QUIET_S
    left.remove()
    assert list(checkpoint.unpublished(storage)) == ["step-00000003"] and storage.list("step-00000002") == []
    assert _steps(run_dir) == [1, 4] and storage.list("logs") == ["worker-0.log"]
    checkpoint.verify(copies.local(checkpoint.published(run_dir)[-1], training_state=True))


def test_latest__skips_a_backbone_without_training_state(run_dir: Path) -> None:
    _complete(run_dir, 0, _stage(run_dir, 0, training_state=False))
    assert checkpoint.latest(run_dir) is None
    assert _steps(run_dir) == [0]


def _write(found: checkpoint.Published, name: str, content: bytes) -> None:
    found.storage.mark(f"{found.name}/{name}", content)


def _remove(found: checkpoint.Published, name: str) -> None:
    directory = found.storage.directory(found.name)
    if directory is not None:
        (directory / name).unlink()
    else:
        filesystem, root = fsspec.core.url_to_fs(found.location)
        filesystem.rm_file(f"{root}/{name}")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify__names_the_damaged_file(run_dir: Path, damage: str) -> None:
    _publish(run_dir, 3)
    (found,) = checkpoint.published(run_dir)
    data = found.storage.read(f"{found.name}/training_state/state-1.pt")
    if damage == "remove":
        _remove(found, "training_state/state-1.pt")
    else:
        _write(
            found, "training_state/state-1.pt", data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:]
        )
    with pytest.raises(checkpoint.CheckpointError, match=r"state-1\.pt: (missing|contents differ)"):
        checkpoint.verify(copies.local(found, training_state=True))
    checkpoint.verify(copies.local(found), training_state=False)  # who uses the backbone does not read it


@pytest.mark.parametrize("run_dir", ["local"], indirect=True)
@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, r"backbone\.safetensors: not listed in checkpoint\.json"),
        (("backbone.safetensors", "recipe.yaml"), r"training_state/state-0\.pt: not listed"),
        (
            ("backbone.safetensors", "training_state/state-0.pt", "training_state/state-1.pt"),
            r"recipe\.yaml: not listed",
        ),
    ],
)
def test_verify__refuses_what_would_be_loaded_and_is_not_listed(run_dir: Path, files: tuple[str], names: str) -> None:
    """An empty list of files has no file that differs; DeepSpeed's pickles must not get through on that."""
    _publish(run_dir, 3)
    (found,) = checkpoint.published(run_dir)
    manifest = found.manifest()
    manifest["files"] = {name: manifest["files"][name] for name in files}
    _write(found, "checkpoint.json", json.dumps(manifest).encode())
    with pytest.raises(checkpoint.CheckpointError, match=names):
        checkpoint.verify(copies.local(found))


@pytest.mark.parametrize("run_dir", ["local"], indirect=True)
def test_verify__a_folder_behind_a_link_is_not_listed(run_dir: Path, tmp_path: Path) -> None:
    """Its files would be read and not be seen by a walk that follows no links, as digests of others are right."""
    _publish(run_dir, 3)
    (found,) = checkpoint.published(run_dir)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mp_rank_00_model_states.pt").write_bytes(b"code")
    state = copies.local(found) / "training_state"
    (state / "deepspeed").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(checkpoint.CheckpointError, match=r"training_state/deepspeed: not listed"):
        checkpoint.verify(copies.local(found))


@pytest.mark.parametrize("run_dir", ["local"], indirect=True)
def test_verify__shares_cover_every_file(run_dir: Path) -> None:
    _publish(run_dir, 3)
    directory = checkpoint.checkpoint_path(run_dir, 3)
    for path in (path for path in directory.rglob("*") if path.is_file() and path.name != "checkpoint.json"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused = 0
        for number in range(3):
            try:
                checkpoint.verify(directory, share=(number, 3))
            except checkpoint.CheckpointError:
                refused += 1
        assert refused == 1
        path.write_bytes(data)


def test_read_manifest__refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint\.json"):
        checkpoint.read_manifest(tmp_path)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(checkpoint.CheckpointError, match="format 99, expected 1 or 2"):
        checkpoint.read_manifest(tmp_path)


def test_remove_training_state__keeps_the_backbone(run_dir: Path) -> None:
    _complete(run_dir, 0, _stage(run_dir, 0, training_state=False))
    _publish(run_dir, 1, 2, 3, 4, 5)
    for found in checkpoint.published(run_dir)[2:4]:
        checkpoint.remove_training_state(found)
    assert _steps(run_dir) == [0, 1, 2, 3, 4, 5]
    assert _resumable(run_dir) == [1, 4, 5]
    there = checkpoint.published(run_dir)
    assert checkpoint.survey(run_dir) == [(found, found.has_training_state, False) for found in there]
    for found in checkpoint.published(run_dir):
        using = copies.local(found)
        assert (using / "backbone.safetensors").read_bytes() == b"weights of step %d" % found.step
        checkpoint.verify(using, training_state=False)
    pruned = checkpoint.published(run_dir)[2]
    assert pruned.storage.list(f"{pruned.name}/training_state") == []
    if pruned.storage.directory(pruned.name) is not None:
        checkpoint.verify(copies.local(pruned))  # absent as a whole: no damage


def test_remove_training_state__killed_half_way_leaves_a_checkpoint_without_one(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(run_dir, 1, 2)
    first = checkpoint.published(run_dir)[0]

    def die_half_way(storage: object, name: str) -> None:
        monkeypatch.undo()
        _remove(first, "training_state/state-0.pt")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(first.storage), "remove", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove_training_state(first)
    assert _steps(run_dir) == [1, 2] and _resumable(run_dir) == [2]
    checkpoint.verify(copies.local(first), training_state=False)
    if (directory := first.storage.directory(first.name)) is not None:
        checkpoint.verify(directory)
        assert not checkpoint.has_training_state(directory)
    assert [each.is_half_removed for each in checkpoint.survey(run_dir)] == [True, False]


@pytest.mark.parametrize("run_dir", ["local"], indirect=True)
def test_remove_training_state__what_a_disk_keeps_of_one_is_seen_and_can_be_removed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the training state was renamed away, while its files are deleted."""
    _publish(run_dir, 1, 2)
    first = checkpoint.published(run_dir)[0]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *arguments, **options: None)
        checkpoint.remove_training_state(first)
    size = sum(path.stat().st_size for path in run_dir.rglob("state-*.pt"))
    assert size == 400 and [each.is_half_removed for each in checkpoint.survey(run_dir)] == [True, False]
    checkpoint.remove_training_state(first)
    assert sum(path.stat().st_size for path in run_dir.rglob("state-*.pt")) == 200
    assert [each.is_half_removed for each in checkpoint.survey(run_dir)] == [False, False]
    assert sorted(path.name for path in (run_dir / "checkpoints/step-00000001").iterdir()) == [
        "backbone.safetensors",
        "checkpoint.json",
        "recipe.yaml",
        checkpoint.REMOVED,
    ]


def test_place__is_said_once(tmp_path: Path) -> None:
    checkpoint.place(tmp_path / "a", "memory://one")
    checkpoint.place(tmp_path / "a", "memory://one/")
    assert checkpoint.storage_of(tmp_path / "a").location("step-1") == "memory://one/a/step-1"
    with pytest.raises(checkpoint.CheckpointError, match=r"storage=None: the checkpoints of a are in memory://one/a"):
        checkpoint.place(tmp_path / "a", None)
    checkpoint.place(tmp_path / "b", None)
    _publish(tmp_path / "b", 1)
    with pytest.raises(checkpoint.CheckpointError, match=r"the checkpoints of b are in .*checkpoints already"):
        checkpoint.place(tmp_path / "b", "memory://one")


@pytest.mark.parametrize(
    "change",
    [
        {"files": None}, {"files": []}, {"files": "x"}, {"files": {"a": 1}}, {"files": {"a": {"sha256": "x"}}},
        {"step": "x"}, {"step": None}, {"step": True}, {"backbone": 3},
    ],
    ids=str,
)  # fmt: skip
def test_parse_manifest__what_was_changed_is_one_line(change: dict[str, Any]) -> None:
    good = {"format": 1, "step": 3, "files": {"a": {"sha256": "x", "bytes": 1}}, "backbone": {}}
    assert checkpoint.parse_manifest(json.dumps(good).encode(), "here")["step"] == 3
    with pytest.raises(
        checkpoint.CheckpointError, match=f"^here: '{next(iter(change))}' is missing or not what it has to be"
    ):
        checkpoint.parse_manifest(json.dumps({**good, **change}).encode(), "here")
    with pytest.raises(checkpoint.CheckpointError, match=r"^here: not valid JSON"):
        checkpoint.parse_manifest(b"[" * 100_000, "here")


def test_storage_read__a_small_file_of_a_remote_storage_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FsspecStorage("memory://bounded")
    storage.mark("step-00000001/checkpoint.json", bytes(100))
    assert storage.read("step-00000001/checkpoint.json") == bytes(100)
    monkeypatch.setattr("pretrain.checkpoints.storage.SMALL_FILE_BYTES", 99)
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.json: has 100 bytes, expected at most 99"):
        storage.read("step-00000001/checkpoint.json")
