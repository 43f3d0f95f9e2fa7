"""What a reference to a checkpoint means, in one place: `resolve` turns it into a verified directory on this machine.

    NAME, NAME@ALIAS, models:/NAME, models:/NAME@ALIAS    a registered checkpoint; without an alias the best
    models:/NAME/3                                        that version
    runs:/RUN_ID[/STEP | /best | /last]                   a checkpoint of a run (our id or MLflow's); default: the last
    RUN_ID, RUN_DIRECTORY                                 its last checkpoint
    DIRECTORY                                             a checkpoint directory
    URI                                                   one in a remote store, e.g. s3://BUCKET/RUN_ID/step-00000100

Whatever is fetched is checked before it appears: the version in the registry holds the digest of `checkpoint.json`,
which holds the digest of every file. Only safetensors, JSON and YAML are read, nothing is unpickled.

Not here: registering checkpoints and moving aliases (`pretrain.tracking.sync`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from yaml import YAMLError

from data_pipelines.storage.locations import redact
from pretrain.checkpoints import copies
from pretrain.checkpoints.storage import open_storage
from pretrain.checkpoints.store import (
    REMOVED,
    TRAINING_STATE,
    CheckpointError,
    Published,
    find_published,
    latest,
    published,
    published_at,
    read_manifest,
    verify,
)
from pretrain.config.stages import written_stages
from pretrain.config.values import first_line, parse_yaml
from pretrain.errors import RequestError, RunFailed, listed, nearest
from pretrain.record.destinations import require_local
from pretrain.record.journal import read_events
from pretrain.record.remote_runs import bring, brought, is_elsewhere
from pretrain.record.run_dir import EXPORTED_FILES, HEADS, MANIFEST, RunDir, runs_in
from pretrain.record.scores import best_steps
from pretrain.remote.places import uri_of
from pretrain.tracking.client import (
    MODEL_NAME,
    artifact_uri,
    connect,
    default_database,
    default_uri,
    require_answer,
    verdict,
)
from pretrain.tracking.cursor import Cursor

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from backbones.encoder import Encoder

__all__ = ["best_step", "load_backbone", "locate", "pull", "registered_version", "resolve"]

REGISTERED = re.compile(
    rf"(?P<scheme>models:/)?(?P<name>{MODEL_NAME})(?:@(?P<alias>[A-Za-z][A-Za-z0-9_\-]*)|(?(scheme)/(?P<version>[1-9][0-9]{{0,17}})|(?!)))?"
)
RUN = re.compile(rf"runs:/(?P<run>{MODEL_NAME})(?:/(?P<step>[0-9]{{1,18}}|best|last))?")
MLFLOW_RUN_ID = re.compile(r"[0-9a-f]{32}")
FORMS = "a directory or URI, NAME@ALIAS, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID[/STEP]"


@dataclass(frozen=True)
class Registered:
    """What a reference to the registry asks for; `version` wins over `alias`."""

    name: str
    alias: str
    version: str | None


def pull(
    reference: str,
    dest: str | os.PathLike[str] | None = None,
    *,
    tracking_uri: str | None = None,
    storage: str | os.PathLike[str] = "runs",
    full: bool = False,
) -> Path:
    """Fetch a registered checkpoint; `dest` appears complete and verified, or not at all.

    Args:
        reference: NAME, NAME@ALIAS, models:/NAME@ALIAS or models:/NAME/VERSION.
        dest: Directory to make (or an empty one); default: `NAME-vVERSION` in the current directory.
        tracking_uri: Default: $MLFLOW_TRACKING_URI, else the database in `storage`.
        storage: Where runs live, a directory or URI.
        full: Copy the whole checkpoint with its training state from where the run wrote it.

    Returns:
        The absolute path of the directory: backbone.safetensors, checkpoint.json, recipe.yaml, heads.safetensors if the
        objective has some (and training_state).

    Raises:
        RequestError: Unknown or malformed reference, or `dest` is in use or cannot be written to.
        CheckpointError: What was fetched is not what was registered.
        RunFailed: The tracking server cannot be used.
    """
    wanted = _parse_registered(reference)
    if dest is not None:
        _refuse_occupied(require_local(dest, "a checkpoint"))
    runs = brought(storage)
    uri = tracking_uri or _registry(runs, wanted.name)
    with _reachable(uri):
        client = connect(uri, create=False)
        version = _find(client, wanted)
    place = require_local(f"{wanted.name}-v{version.version}" if dest is None else dest, "a checkpoint")
    return _fetch(version, place, uri, full, runs)


def resolve(
    reference: str | Path, storage: Path = Path("runs"), *, tracking_uri: str | None = None, forms: str = FORMS
) -> Path:
    """The local directory of the checkpoint that a reference means; what its backbone needs is there and verified.

    What is not on this machine is copied once into the cache (`pretrain.checkpoints.copies`).

    Args:
        reference: One of the forms at the top of this file.
        storage: Where runs live.
        tracking_uri: As for `pull`.
        forms: What the caller takes, for messages.

    Raises:
        RequestError, CheckpointError, RunFailed: As `pull`.
    """
    text = os.fspath(reference)
    found = locate(text, Path(storage), forms=forms)
    if found is None:
        wanted = REGISTERED.fullmatch(text)
        checkpoint = _from_registry(text, tracking_uri or _registry(Path(storage), wanted and wanted["name"]))
    else:
        checkpoint = copies.local(found)
    verify(checkpoint, training_state=False, remedy=copies.REFUSED)
    return checkpoint


def locate(reference: str, storage: Path, *, resumable: bool = False, forms: str = FORMS) -> Published | None:
    """Where the run that published a checkpoint put it; None for what only the registry knows.

    Args:
        reference: One of the forms at the top of this file, a run's id or its directory.
        storage: Where runs live.
        resumable: Of a run without a step, the newest with a training state.
        forms: What the caller takes, for messages.

    Raises:
        RequestError: There is no such thing.
        CheckpointError: A manifest is damaged.
    """
    path = Path(reference)
    if (path / MANIFEST).is_file() or ("://" in reference and "@" not in reference):
        return published_at(reference)
    if RunDir(path).is_run:
        return _step_of(path, "last", resumable)
    if RunDir(storage / reference).is_run and "/" not in reference:
        return _step_of(storage / reference, "last", resumable)
    if reference.startswith("runs:/"):
        return _of_run(reference, storage, resumable)
    if path.exists() or not (reference.startswith("models:/") or "@" in reference):
        from pretrain.errors import nearest_file

        why = f"no {MANIFEST} in it" if path.exists() else f"no such directory{nearest_file(path)}"
        raise RequestError(f"checkpoint {reference}: {why}; expected {forms}")
    _parse_registered(reference)
    return None


def registered_version(reference: str, storage: Path) -> str:
    """`models:/NAME/VERSION` for what a reference to the registry means now; aliases move.

    Raises:
        RequestError, RunFailed: As `pull`.
    """
    wanted = _parse_registered(reference)
    uri = _registry(storage, wanted.name)
    with _reachable(uri):
        version = _find(connect(uri, create=False), wanted)
    return f"models:/{version.name}/{version.version}"


def load_backbone(
    reference: str | Path, *, storage: str | os.PathLike[str] = "runs", tracking_uri: str | None = None
) -> Encoder:
    """The backbone of a checkpoint with its pretrained weights, in evaluation mode.

    Raises:
        RequestError, CheckpointError, RunFailed: As `pull`.
    """
    checkpoint = resolve(reference, brought(storage), tracking_uri=tracking_uri)
    from backbones.io import load_backbone as load  # imports torch

    return load(checkpoint)


def best_step(run_dir: Path) -> int | None:
    """The best published step by the recipe's `evaluation.select`; None if none has a score of it yet.

    Raises:
        RequestError: The recipe is damaged.
    """
    run = RunDir(run_dir)
    try:
        select = written_stages(parse_yaml(run.recipe.read_text(encoding="utf-8")))[-1]["evaluation"]["select"]
    except (ValueError, LookupError, TypeError, YAMLError) as error:
        raise RequestError(f"{run.recipe}: damaged, it does not say evaluation.select: {first_line(error)}") from None
    on_disk = {found.step for found in published(run_dir)}
    order = best_steps(select, read_events(run.evaluations)[0])
    return next((step for step in order if step in on_disk), None)


# The registry ---------------------------------------------------------------------------------------------------------


def _registry(storage: Path, name: str | None) -> str:
    """Where models are registered: $MLFLOW_TRACKING_URI, else the database of a storage.

    That of a remote storage is on this machine and knows the runs that were driven here. It is told of the others that
    have published under `name` (None: any) first, which copies their backbones beside it.
    """
    uri = default_uri(storage)
    if uri_of(storage) is None or uri != default_database(storage):
        return uri
    from pretrain.tracking.sync import sync

    for run in runs_in(storage):
        cursor = Cursor.load(run.cursor)
        if cursor is not None and name in (None, cursor.model_name) and is_elsewhere(run):
            bring(storage, run.run_id)
            if not sync(run.path, copies.exported):
                raise RunFailed(f"MLflow at {redact(uri)}: does not take what run {run.run_id} has published")
    return uri


def _parse_registered(reference: str) -> Registered:
    match = REGISTERED.fullmatch(reference)
    if match is None:
        raise RequestError(
            f"{reference!r} names no registered model; expected NAME[@ALIAS], models:/NAME@ALIAS or models:/NAME/3"
        )
    return Registered(match["name"], match["alias"] or "best", match["version"])


def _find(client: MlflowClient, wanted: Registered) -> ModelVersion:
    """The version that `wanted` means; RequestError lists what there is instead."""
    try:
        model = client.get_registered_model(wanted.name)
    except Exception as error:
        if verdict(error) != "missing":
            raise
        names = [found.name for found in client.search_registered_models(max_results=1000)]
        raise RequestError(f"no registered model {wanted.name!r}{_suggest(wanted.name, names)}") from None
    number = wanted.version or model.aliases.get(wanted.alias)
    if number is None:
        raise RequestError(
            f"registered model {wanted.name!r} has no alias {wanted.alias!r}{_suggest(wanted.alias, model.aliases)}; "
            f"or name a version: models:/{wanted.name}/1"
        )
    try:
        return client.get_model_version(wanted.name, str(number))
    except Exception as error:
        if verdict(error) != "missing":
            raise
        versions = sorted((str(v.version) for v in client.search_model_versions(f"name='{wanted.name}'")), key=int)
        raise RequestError(
            f"registered model {wanted.name!r} has no version {number}; there are: {', '.join(versions)}"
        ) from None


def _fetch(version: ModelVersion, dest: Path, uri: str, full: bool, storage: Path) -> Path:
    """Make `dest` a copy of a registered checkpoint."""
    _refuse_occupied(dest)
    recorded = _published_as(version, storage) or version.tags.get("checkpoint_path", "")

    def fill(into: Path) -> None:
        if full:
            _copy_recorded(recorded, into)
        else:
            _download(version, into, uri)

    return copies.assemble(dest, fill, _digest(version))


def _from_registry(reference: str, uri: str) -> Path:
    """The cached copy of a registered checkpoint, or of one that a run on another machine registered."""
    if match := RUN.fullmatch(reference):
        return _registered_by(match["run"], match["step"] or "last", uri)
    with _reachable(uri):
        version = _find(connect(uri, create=False), _parse_registered(reference))
    return _cached(version, uri)


def _cached(version: ModelVersion, uri: str) -> Path:
    return copies.cached(_digest(version), lambda into: _download(version, into, uri))


def _digest(version: ModelVersion) -> str:
    """Of `checkpoint.json`, as registered."""
    digest = str(version.tags.get("checkpoint_sha256", ""))
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(
            f"{version.name} version {version.version} has no valid tag checkpoint_sha256: pretrain did not register it"
        )
    return digest


def _download(version: ModelVersion, into: Path, uri: str) -> None:
    with _reachable(uri):
        from mlflow.artifacts import download_artifacts

        source = artifact_uri(str(version.source), uri)
        # The names are ours, not the server's: nothing it says can lead out of `into`.
        for name in EXPORTED_FILES:
            download_artifacts(artifact_uri=f"{source}/{name}", dst_path=str(into), tracking_uri=uri)
        if HEADS in read_manifest(into)["files"]:
            download_artifacts(artifact_uri=f"{source}/{HEADS}", dst_path=str(into), tracking_uri=uri)


def _published_as(version: ModelVersion, storage: Path) -> str | None:
    """Where the run that registered a version has its checkpoint, if it is in `storage`: that may have been moved."""
    run_id, step = version.tags.get("run_id", ""), version.tags.get("step", "")
    if not re.fullmatch(MODEL_NAME, run_id):  # of a server: it must not lead out of the storage
        return None
    found = find_published(storage / run_id, int(step)) if re.fullmatch("[0-9]{1,18}", step) else None
    return None if found is None else found.location


def _copy_recorded(recorded: str, into: Path) -> None:
    """The whole checkpoint from where the run wrote it."""
    where, _, name = recorded.rpartition("/")
    found = open_storage(where or "/")
    if not found.list(f"{name}/{TRAINING_STATE}") or found.exists(f"{name}/{REMOVED}"):
        raise RequestError(
            f"{recorded}: its training state is not there any more (removed by train.keep_last, or another machine's); "
            "without --full the backbone is fetched from MLflow"
        )
    copies.copy_listed(found, name, into, training_state=True)


# Runs -----------------------------------------------------------------------------------------------------------------


def _of_run(reference: str, storage: Path, resumable: bool) -> Published | None:
    """None: an MLflow run that is not on this machine."""
    match = RUN.fullmatch(reference)
    if match is None:
        raise RequestError(
            f"{reference!r}: expected runs:/RUN_ID, runs:/RUN_ID/STEP, runs:/RUN_ID/best or runs:/RUN_ID/last"
        )
    run_id, step = match["run"], match["step"] or "last"
    runs = {run.run_id: run for run in runs_in(storage)}
    run = runs.get(run_id) or _with_mlflow_id(run_id, runs.values())
    if run is not None:
        return _step_of(run.path, step, resumable)
    if MLFLOW_RUN_ID.fullmatch(run_id):
        return None
    raise RequestError(f"no run {run_id!r} in {storage}{_suggest(run_id, runs)}")


def _with_mlflow_id(mlflow_run_id: str, runs: Iterable[RunDir]) -> RunDir | None:
    for run in runs:
        cursor = Cursor.load(run.cursor)
        if cursor is not None and cursor.mlflow_run_id == mlflow_run_id:
            return run
    return None


def _step_of(run_dir: Path, step: str, resumable: bool) -> Published:
    found = {checkpoint.step: checkpoint for checkpoint in published(run_dir)}
    if not found:
        raise RequestError(f"{run_dir}: this run has published no checkpoint")
    if step == "last" and resumable:
        return latest(run_dir) or found[max(found)]
    number = best_step(run_dir) if step == "best" else max(found) if step == "last" else int(step)
    if number is None:
        raise RequestError(f"{run_dir}: no checkpoint was scored by evaluation.select; steps: {listed(found)}")
    if number not in found:
        raise RequestError(f"{run_dir}: no checkpoint of step {number}; there are: {listed(found)}")
    return found[number]


def _registered_by(mlflow_run_id: str, step: str, uri: str) -> Path:
    """A checkpoint of a run that is not on this machine."""
    with _reachable(uri):
        client = connect(uri, create=False)
        found = {
            int(v.tags["step"]): v
            for v in client.search_model_versions(f"run_id='{mlflow_run_id}'")
            if "step" in v.tags
        }
        if step == "best":
            raise RequestError(
                f"run {mlflow_run_id} is not on this machine; use models:/NAME@best or runs:/{mlflow_run_id}/STEP"
            )
        number = max(found, default=None) if step == "last" else int(step)
    if number is None or number not in found:
        raise RequestError(
            f"MLflow run {mlflow_run_id}: no registered checkpoint of step {step}; there are: {listed(sorted(found))}"
        )
    return _cached(found[number], uri)


# Small print ----------------------------------------------------------------------------------------------------------


@contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """Turn what MLflow raises for a dead server into one line; such a one is noticed before MLflow is imported."""
    try:
        if "mlflow" not in sys.modules:
            require_answer(uri)
        yield
    except (RequestError, CheckpointError):
        raise
    except Exception as error:
        raise RunFailed(f"MLflow at {redact(uri)}: {redact(str(error).partition(chr(10))[0])}") from error


def _refuse_occupied(dest: Path) -> None:
    if dest.is_symlink() or (dest.exists() and (not dest.is_dir() or any(dest.iterdir()))):
        raise RequestError(
            f"{dest}: already exists and is not an empty directory; choose another destination or remove it"
        )


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{nearest(name, known) or ';'} there are: {listed(known)}"
