"""Checkpoints: directories that appear complete or not at all, and are verified before anything of them is used.

    step-00000100/  backbone.safetensors  recipe.yaml  checkpoint.json  training_state/ (shards, RNG states)
                    heads.safetensors (of objectives whose outputs another run can learn, or are evaluated)

Publication. Each rank stages its files on its own disk, digests them, hands them to the storage and leaves a note that
it has; rank 0 then looks whether the storage has all of them, and publishes them with `checkpoint.json`, which lists
every file with its SHA-256. A process that dies on the way leaves nothing that is listed, and what it leaves goes when
a group of workers begins or the step is written again; in a remote storage, when a later one is published
(`pretrain.checkpoints.leftovers`).

Retention removes training states, which are large and of no use but to resume; backbones stay. A removed state leaves
the mark `training_state.removed`, written first: from then on nobody resumes from that checkpoint, however much of the
state is still being deleted. What a process that died on the way has left of it, the next driver of the run removes.

Trust. `verify` is the only verifier; it refuses a checkpoint whose manifest does not list what would be loaded. Using a
backbone reads safetensors, JSON and YAML, and so does resuming. Only ZeRO stage 3 and format 1 have files of DeepSpeed
in `training_state`, which are pickles: they are read with the unpickler of torch for weights, which builds tensors,
numbers and texts and runs no code. Digests tell that the files are those that the manifest lists, not who wrote the
manifest (docs/security.md).

Not here: the kinds of storage (`pretrain.checkpoints.storage`), copies of remote checkpoints
(`pretrain.checkpoints.copies`), finding them by name (`pretrain.checkpoints.references`), when to publish
(`pretrain.worker`), what a rank writes (`pretrain.training.state`).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_pipelines.files import sha256, write_atomically
from data_pipelines.parsing import parse_json
from data_pipelines.storage.locations import redacted
from pretrain.checkpoints.storage import CheckpointError, CheckpointStorage, LocalStorage, open_storage
from pretrain.record.run_dir import BACKBONE, HEADS, MANIFEST, RECIPE, RunDir
from pretrain.version import __version__

__all__ = [
    "REFERENCES",
    "TRAINING_STATE",
    "CheckpointError",
    "Published",
    "Surveyed",
    "begin",
    "checkpoint_path",
    "discard",
    "discard_unpublished",
    "find_published",
    "hand_over",
    "has_training_state",
    "latest",
    "note",
    "notes",
    "parse_manifest",
    "place",
    "publish",
    "published",
    "published_at",
    "published_by_event",
    "read_manifest",
    "remove_training_state",
    "stage",
    "storage_of",
    "survey",
    "unpublished",
    "unstage",
    "verify",
]

FORMAT = 2
FORMATS = (1, 2)  # that are read; of 1 the training state is DeepSpeed's in every ZeRO stage
TRAINING_STATE = "training_state"
REMOVED = "training_state.removed"
REFERENCES = "companions.json"  # in a training state: where weights that it has not come from, with their sha256
REMEDY = "delete this checkpoint to resume from the one before"
_NAME = re.compile(r"step-(\d{8})")
_STATE_FILE = re.compile(rf"{TRAINING_STATE}/|\.{TRAINING_STATE}\.removed/")  # the latter while a local one is deleted


@dataclass(frozen=True)
class Published:
    """A complete checkpoint: the directory `name` of a storage."""

    step: int
    storage: CheckpointStorage
    name: str

    @property
    def location(self) -> str:
        """Its directory or URI, a reference that `pretrain.checkpoints.references` resolves."""
        return self.storage.location(self.name)

    @property
    def has_training_state(self) -> bool:
        """Whether it can be resumed from."""
        return not self.storage.exists(f"{self.name}/{REMOVED}") and bool(
            self.storage.list(f"{self.name}/{TRAINING_STATE}")
        )

    def manifest(self) -> dict[str, Any]:
        """The contents of its `checkpoint.json`.

        Raises:
            CheckpointError: As `parse_manifest`.
        """
        return parse_manifest(self.storage.read(f"{self.name}/{MANIFEST}"), f"{self.location}/{MANIFEST}")


# Where ----------------------------------------------------------------------------------------------------------------


def place(run_dir: Path, uri: str | None) -> None:
    """Say once where the checkpoints of a run are stored; None: in its directory. Every machine of a run says it.

    Raises:
        CheckpointError: The run has begun to store them elsewhere.
    """
    pointer = RunDir(run_dir).stored_at
    wanted = None if uri is None else f"{uri.rstrip('/')}/{run_dir.name}"
    known = pointer.read_text().strip() if pointer.is_file() else None
    if known is None and wanted is not None and not LocalStorage(pointer.parent).published():
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(pointer, f"{wanted}\n".encode())
    elif known != wanted:
        raise CheckpointError(
            f"checkpoints.storage={uri}: the checkpoints of {run_dir.name} are in {known or pointer.parent} already"
        )


def storage_of(run_dir: Path) -> CheckpointStorage:
    """The storage of a run's checkpoints."""
    pointer = RunDir(run_dir).stored_at
    return open_storage(pointer.read_text().strip()) if pointer.is_file() else LocalStorage(pointer.parent)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """How the run calls the checkpoint of `step`: with local storage that is its directory."""
    return run_dir / "checkpoints" / _name(step)


def stage(run_dir: Path, step: int, rank: int, attempt: str = "") -> Path:
    """An empty directory where a rank writes its files first; no reader takes its name for a checkpoint."""
    staged = run_dir / "checkpoints" / f".{_name(step)}{attempt and '.'}{attempt}.rank-{rank:05d}"
    shutil.rmtree(staged, ignore_errors=True)  # of a process that died
    staged.mkdir(parents=True)
    return staged


# Which ----------------------------------------------------------------------------------------------------------------


def published(run_dir: Path) -> list[Published]:
    """All complete checkpoints of a run, by step."""
    storage = storage_of(run_dir)
    return [Published(int(match[1]), storage, name) for name in storage.published() if (match := _NAME.fullmatch(name))]


def unpublished(storage: CheckpointStorage) -> dict[str, dict[str, int]]:
    """Parts of checkpoints in a storage that no manifest names: directory -> bytes of each file."""
    return {name: files for name, files in storage.unpublished().items() if _NAME.fullmatch(name)}


class Surveyed(NamedTuple):
    """A complete checkpoint as a listing of its storage tells of it.

    Attributes:
        found: The checkpoint.
        has_training_state: As `Published` has it.
        is_half_removed: Whether there are files of a training state that nobody resumes from any more.
    """

    found: Published
    has_training_state: bool
    is_half_removed: bool


def survey(run_dir: Path) -> list[Surveyed]:
    """All complete checkpoints of a run, by step; a remote store is listed once."""
    storage, found = storage_of(run_dir), []
    for name, files in storage.survey().items():
        if match := _NAME.fullmatch(name):
            has_files, is_removed = any(_STATE_FILE.match(file) for file in files), REMOVED in files
            state = (has_files and not is_removed, has_files and is_removed)
            found.append(Surveyed(Published(int(match[1]), storage, name), *state))
    return found


def published_by_event(run_dir: Path, step: int) -> Published:
    """The checkpoint that the run has just said to be published; nothing is looked up."""
    return Published(step, storage_of(run_dir), _name(step))


def find_published(run_dir: Path, step: int) -> Published | None:
    """The complete checkpoint of a step, if there is one; the others are not listed for it."""
    found = published_by_event(run_dir, step)
    return found if found.storage.exists(f"{found.name}/{MANIFEST}") else None


def published_at(location: str) -> Published:
    """The checkpoint in a directory or at a URI, of whatever name.

    Raises:
        CheckpointError: There is none.
    """
    where, _, name = location.rstrip("/").rpartition("/")
    storage = open_storage(where or ".")
    try:
        manifest = parse_manifest(storage.read(f"{name}/{MANIFEST}"), f"{location}/{MANIFEST}")
    except FileNotFoundError:
        raise CheckpointError(f"{location}: no {MANIFEST} in it; not a published checkpoint") from None
    return Published(int(manifest["step"]), storage, name)


def latest(run_dir: Path) -> Published | None:
    """The newest checkpoint that training can resume from."""
    return next((found for found in reversed(published(run_dir)) if found.has_training_state), None)


def remove_training_state(found: Published) -> None:
    """Remove what it takes to resume from a checkpoint; its backbone stays."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found.storage.mark(f"{found.name}/{REMOVED}", f"removed by retention (train.keep_last), {when}\n".encode())
    found.storage.remove(f"{found.name}/{TRAINING_STATE}")


# Writing --------------------------------------------------------------------------------------------------------------


def begin(storage: CheckpointStorage, step: int, attempt: str = "") -> None:
    """Make room for the checkpoint of `step`. Call it on one rank, before any other hands over."""
    storage.begin(_name(step), attempt)


def hand_over(
    storage: CheckpointStorage, step: int, staged: Path, attempt: str = "", digests: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Digest what this rank has staged and give it to the storage; `staged` is gone afterwards.

    Args:
        storage: Of the run.
        step: Optimizer steps done.
        staged: From `stage`.
        attempt: The one that has begun.
        digests: Name -> SHA-256 of files that were digested while they were written.

    Returns:
        Name -> SHA-256 and bytes, this rank's share of the manifest's `files`.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        name = path.relative_to(staged).as_posix()
        known = (digests or {}).get(name)
        files[name] = {"sha256": known or sha256(path), "bytes": path.stat().st_size}
        storage.write(_name(step), name, path, attempt)
    shutil.rmtree(staged)
    return files


def unstage(staged: Path) -> None:
    """Remove what a rank has staged."""
    shutil.rmtree(staged, ignore_errors=True)


def note(storage: CheckpointStorage, step: int, attempt: str, name: str, content: Any) -> None:
    """Tell the other ranks of an attempt something, as JSON, without a collective."""
    storage.note(_name(step), attempt, f"{name}.json", json.dumps(content).encode())


def notes(storage: CheckpointStorage, step: int, attempt: str) -> dict[str, Any]:
    """What the ranks of an attempt have told so far, by name."""
    found = storage.notes(_name(step), attempt)
    return {name.removesuffix(".json"): parse_json(content) for name, content in found.items()}


def discard(storage: CheckpointStorage, step: int, attempt: str) -> None:
    """Remove what an attempt has handed over. Call it on one rank."""
    storage.discard(_name(step), attempt)


def discard_unpublished(run_dir: Path) -> None:
    """Remove what ranks that have ended had written of a checkpoint; a local storage keeps it beside the others."""
    for pattern in (".step-*.partial", ".step-*.rank-*", ".step-*.removed"):
        for path in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def publish(
    storage: CheckpointStorage,
    step: int,
    manifest: Mapping[str, Any],
    shares: Sequence[Mapping[str, Any]],
    attempt: str = "",
) -> Published:
    """Publish what all ranks have handed over. Call it on one rank, after all of them.

    Args:
        storage: Of the run.
        step: Optimizer steps done.
        manifest: What `checkpoint.json` says beside format, time, files and versions.
        shares: What `hand_over` returned on each rank.
        attempt: The one that has begun.

    Raises:
        CheckpointError: Two ranks wrote a file of the same name, or the storage does not have what it was given.
    """
    files: dict[str, Any] = {}
    for rank, share in enumerate(shares):
        if twice := sorted(files.keys() & share.keys()):
            raise CheckpointError(f"step {step}: rank {rank} wrote {twice[0]}, which another rank wrote, too")
        files.update(share)
    stored = storage.sizes(_name(step), attempt)
    for name, facts in files.items():
        if stored.get(name) != facts["bytes"]:
            found = f"has {stored[name]} of its" if name in stored else "does not have its"
            raise CheckpointError(
                f"{storage.location(_name(step))}/{name}: was written, and the store {found} {facts['bytes']} bytes"
            )
    complete = {
        "format": FORMAT,
        **manifest,
        "step": step,
        "created": time.time(),
        "files": files,
        "versions": {"pretrain": __version__, **{name: version(name) for name in ("torch", "deepspeed", "timm")}},
        TRAINING_STATE: any(name.startswith(f"{TRAINING_STATE}/") for name in files),
    }
    content = (json.dumps(redacted(complete), indent=1, sort_keys=True) + "\n").encode()
    storage.publish(_name(step), content, attempt)
    return Published(step, storage, _name(step))


# Reading --------------------------------------------------------------------------------------------------------------


def parse_manifest(content: bytes, origin: str) -> dict[str, Any]:
    """What a `checkpoint.json` says.

    Raises:
        CheckpointError: It is not JSON, of a format this version does not know, or lists names outside a checkpoint.
    """
    try:
        manifest = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{origin}: not valid JSON ({error})") from None
    found = manifest.get("format") if isinstance(manifest, dict) else "?"
    if found not in FORMATS or isinstance(found, bool):
        raise CheckpointError(f"{origin}: format {found}, expected {' or '.join(map(str, FORMATS))}")
    files = manifest.get("files")
    is_listing = isinstance(files, dict) and all(
        isinstance(facts, dict) and isinstance(facts.get("sha256"), str) and isinstance(facts.get("bytes"), int)
        for facts in files.values()
    )
    wrong = [
        key
        for key, is_right in (
            ("files", is_listing),
            ("step", type(manifest.get("step")) is int),
            ("backbone", isinstance(manifest.get("backbone", {}), dict)),
        )
        if not is_right
    ]
    if wrong:
        raise CheckpointError(f"{origin}: {wrong[0]!r} is missing or not what it has to be; it was changed or cut off")
    for name in manifest["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.as_posix() != name:
            raise CheckpointError(f"{origin}: {name!r} is no path inside a checkpoint; refused")
    checked: dict[str, Any] = manifest
    return checked


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The contents of the `checkpoint.json` in a directory.

    Raises:
        CheckpointError: It is missing, or as `parse_manifest`.
    """
    try:
        return parse_manifest((checkpoint / MANIFEST).read_bytes(), str(checkpoint / MANIFEST))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {MANIFEST} in it; not a published checkpoint") from None


def has_training_state(checkpoint: Path) -> bool:
    """Whether a directory on this machine can be resumed from."""
    return not (checkpoint / REMOVED).exists() and bool(_state_files(checkpoint))


def verify(
    checkpoint: Path,
    *,
    digest: str | None = None,
    training_state: bool = True,
    share: tuple[int, int] = (0, 1),
    remedy: str = REMEDY,
) -> dict[str, Any]:
    """Check a checkpoint against its manifest; the only verifier there is.

    Whatever would be loaded has to be listed, and whatever is listed has to be there and equal. The training state may
    be missing as a whole, never in part.

    Args:
        checkpoint: Its directory on this machine.
        digest: SHA-256 that `checkpoint.json` itself has in the registry, if it comes from there.
        training_state: False leaves the training state alone, for who only uses the backbone.
        share: (i, n) reads the i-th of n shares of the files, because other processes read the others.
        remedy: How messages end.

    Returns:
        The manifest.

    Raises:
        CheckpointError: Names the first file that is missing, not listed or different.
    """
    manifest = read_manifest(checkpoint)
    if digest is not None and sha256(checkpoint / MANIFEST) != digest:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} differs from the SHA-256 in the registry: "
            f"it was changed after it was registered; {remedy}"
        )
    listed: dict[str, Any] = manifest["files"]
    state = _state_files(checkpoint) if training_state and has_training_state(checkpoint) else set()
    exported = {BACKBONE} | {name for name in (RECIPE, HEADS) if (checkpoint / name).exists()}
    if unlisted := sorted((state | exported) - listed.keys()):
        raise CheckpointError(f"{checkpoint / unlisted[0]}: not listed in {MANIFEST}; {remedy}")
    names = sorted(name for name in listed if state or not name.startswith(f"{TRAINING_STATE}/"))
    if missing := [name for name in names if not (checkpoint / name).is_file()]:
        raise CheckpointError(f"{checkpoint / missing[0]}: missing, {MANIFEST} lists it; {remedy}")
    for name in names[share[0] :: share[1]]:
        path, expected = checkpoint / name, listed[name]
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: contents differ from the SHA-256 in {MANIFEST}; {remedy}")
    return manifest


def _state_files(checkpoint: Path) -> set[str]:
    """Names of all files of the training state; a link counts as one, so that no folder behind it goes unseen."""
    paths = (checkpoint / TRAINING_STATE).rglob("*")
    return {path.relative_to(checkpoint).as_posix() for path in paths if path.is_symlink() or not path.is_dir()}


def _name(step: int) -> str:
    return f"step-{step:08d}"
