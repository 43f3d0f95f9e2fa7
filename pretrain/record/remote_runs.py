"""The record of runs in a remote storage: copied to this machine for whoever reads it, to the store by who drives.

Not here: what a remote storage is and what is promised of it (`pretrain.remote`), when a driver copies
(`pretrain.driver.remote_record`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.files import write_atomically
from pretrain.record.lock import is_held
from pretrain.record.run_dir import LISTED_FOLDERS, RECORD_FOLDERS, RunDir, is_run_id
from pretrain.remote.folder import RemoteFolder, answering
from pretrain.remote.lease import Holder, Lease
from pretrain.remote.mirror import Mirror
from pretrain.remote.places import is_uri, uri_of, working_copy

__all__ = [
    "bring",
    "brought",
    "drives_elsewhere",
    "drives_no_more",
    "fetch_record",
    "is_elsewhere",
    "lease_of",
    "push_record",
    "push_results",
]

_RESULTS = "evaluations"  # of a storage (`evaluation.results`)
_RESULT = re.compile(r"[A-Za-z0-9_-]+\.(json|npz)")


def brought(storage: str | os.PathLike[str], run_id: str | None = None, *, progress: bool = False) -> Path:
    """The directory of a storage on this machine. Of a remote one that is its working copy, with what is read there.

    Args:
        storage: A directory or a URI.
        run_id: The run that is wanted as a whole; None: of all runs what tells of their checkpoints and scores.
        progress: Of all runs also what tells how they stand.

    Raises:
        RequestError: No runs can be there, or the store refuses.
        RunFailed: The store does not answer.
    """
    if not is_uri(storage):
        return Path(storage).absolute()
    folder = working_copy(os.fspath(storage))
    bring(folder, run_id, progress=progress)
    return folder


def bring(storage: Path, run_id: str | None = None, *, progress: bool = False) -> None:
    """Copy to a working copy what `brought` says; nothing happens to other directories.

    What this machine drives, or was the last to drive, stays as it is.

    Raises:
        RequestError, RunFailed: As `brought`.
    """
    if (uri := uri_of(storage)) is None:
        return
    there = RemoteFolder(uri)
    with answering(uri):
        is_named = run_id is not None and is_run_id(run_id)
        if is_named and _bring_run(RunDir(storage / str(run_id)), there, RECORD_FOLDERS, _is_of_run):
            return
        is_wanted = RunDir.is_about_progress if progress else RunDir.is_listed
        for name in filter(is_run_id, there.folders()):
            _bring_run(RunDir(storage / name), there, LISTED_FOLDERS, is_wanted)
        if there.files(_RESULTS):
            Mirror(storage, there).fetch([_RESULTS], lambda name: bool(_RESULT.fullmatch(name.rpartition("/")[2])))


def lease_of(run: RunDir) -> Lease | None:
    """The right to drive a run of a remote storage; None for a run of a local one, for which a lock is enough."""
    uri = uri_of(run.path.parent)
    if uri is None:
        return None
    return Lease(RemoteFolder(uri).inside(run.run_id), run.driver_lease.name, run.lease_token)


def drives_no_more(run: RunDir) -> bool:
    """Whether another machine has taken over a run of a remote storage that this one drove."""
    lease = lease_of(run)
    return lease is not None and not lease.is_mine()


def is_elsewhere(run: RunDir) -> bool:
    """Whether another machine was the last to drive a run of a remote storage, as far as the store tells."""
    return not is_held(run.driver_lock) and drives_no_more(run)


def drives_elsewhere(run: RunDir) -> Holder | None:
    """Which process of another machine drives a run, as of when the run was brought, by the clocks of both machines."""
    try:
        holder = Holder.parse(run.driver_lease.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    is_mine = run.lease_token.exists() and run.lease_token.read_text() == holder.token
    return holder if holder.is_fresh(time.time()) and not is_mine else None


def push_record(run: RunDir) -> None:
    """Copy to the remote storage of a run, if it is in one, what has changed of its record.

    Raises:
        Exception: Whatever the library of the store raises.
    """
    if (uri := uri_of(run.path.parent)) is not None:
        Mirror(run.path, RemoteFolder(uri).inside(run.run_id)).push(run.record())


def push_results(storage: Path) -> None:
    """Copy to a remote storage the results of evaluations that it does not have.

    Raises:
        Exception: Whatever the library of the store raises.
    """
    if (uri := uri_of(storage)) is not None:
        Mirror(storage, RemoteFolder(uri)).push(
            # What results are made of goes first, so that a result that is there can be compared.
            [f"{_RESULTS}/{path.name}" for form in ("npz", "json") for path in (storage / _RESULTS).glob(f"*.{form}")]
        )


def fetch_record(run: RunDir) -> None:
    """Copy all that a remote storage has of the record of a run to this machine, whoever drove it last.

    Raises:
        Exception: Whatever the library of the store raises.
    """
    if (uri := uri_of(run.path.parent)) is not None:
        _fetch(run, RemoteFolder(uri).inside(run.run_id), RECORD_FOLDERS, run.is_record)


def _is_of_run(run: RunDir, name: str) -> bool:
    return run.is_record(name) or run.is_about_progress(name)


def _bring_run(
    run: RunDir, storage: RemoteFolder, folders: Sequence[str], is_wanted: Callable[[RunDir, str], bool]
) -> bool:
    """Returns whether there is such a run in the store."""
    there = storage.inside(run.run_id)
    if run.recipe.name not in there.files():
        return False
    if is_held(run.driver_lock) or Lease(there, run.driver_lease.name, run.lease_token).is_mine():
        return True
    _fetch(run, there, folders, lambda name: is_wanted(run, name))
    return True


def _fetch(run: RunDir, there: RemoteFolder, folders: Sequence[str], is_wanted: Callable[[str], bool]) -> None:
    """Copy files of a run to this machine. Of a storage that was copied or renamed the checkpoints are those in it.

    Its files still name the storage in which they were written. Checkpoints that the run keeps somewhere else
    (`checkpoints.storage`) stay there.
    """
    Mirror(run.path, there).fetch(folders, is_wanted)
    if not (run.recipe.is_file() and run.stored_at.is_file()):
        return
    recorded = _recorded_storage(run)
    if there.uri != f"{recorded}/{run.run_id}" == run.stored_at.read_text().strip():
        write_atomically(run.stored_at, f"{there.uri}\n".encode())


def _recorded_storage(run: RunDir) -> str:
    """The storage that the recipe of a run names, in its last line; another one since the run was moved or copied."""
    last = run.recipe.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
    return last.removeprefix("storage:").strip().strip("'\"").rstrip("/")
