"""The MLflow side of a run: every call that `pretrain.tracking.sync` and `pretrain.checkpoints.references` make to a
tracking server.

All calls can be repeated: a point identical in (name, time, step, value) is stored once by MLflow, files overwrite
themselves, models and versions are looked up before they are made. So a sender that never heard the answer sends again.

Not here: when to send, what was sent already and what to do when the server is away (`pretrain.tracking.sync`).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import sqlite3
import ssl
import time
import urllib.error
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from cluster.redirects import opener_without_redirects
from data_pipelines.files import sha256
from evaluation.protocol import Metric, best
from pretrain.errors import RequestError
from pretrain.record.lock import hold, holder
from pretrain.record.run_dir import EXPORTED_FILES, HEADS, MANIFEST, RECIPE
from pretrain.tracking.mlflow_internals import importing_without_pandas

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "MODEL_NAME",
    "MlflowRun",
    "Point",
    "Version",
    "artifact_uri",
    "checked_model_name",
    "connect",
    "default_database",
    "default_uri",
    "require_answer",
    "verdict",
]

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._\- ]{0,126}"  # also a good name for a directory
RUN_ID_TAG = "pretrain.run_id"
MAX_POINTS = 1000  # metrics per request: about 0.2 s for a server
MAX_PARAMS = 100
ANSWER_S = 5.0  # of a server that is asked whether it is there
DATABASE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"  # in a storage
MAX_WAIT_S = 300.0  # for another process that makes the database; it takes seconds
MAX_VALUE = 500  # characters of a parameter; MLflow cuts longer ones silently, the recipe artifact has them in full


class Point(NamedTuple):
    """One value of one metric; `time_ms` is fixed when it is measured, which makes sending it twice harmless."""

    name: str
    value: float
    time_ms: int
    step: int


class Version(NamedTuple):
    """A registered checkpoint."""

    model_id: str
    version: str


def default_uri(storage: Path) -> str:
    """$MLFLOW_TRACKING_URI, else an SQLite file in `storage`, which needs no server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_database(storage)


def default_database(storage: Path) -> str:
    """The SQLite file in `storage`."""
    return _sqlite(Path(storage).resolve() / DATABASE)


def artifact_uri(location: str, uri: str) -> str:
    """Where artifacts are that the server at `uri` says to be at `location`.

    MLflow records absolute places. A storage that was moved since has them beside its database.
    """
    place, _, rest = location.rpartition(f"/{ARTIFACTS}/")
    if place and (database := _database(uri)) and (database.resolve().parent / ARTIFACTS / unquote(rest)).exists():
        return f"{_artifacts_beside(database)}/{rest}"
    return location


def checked_model_name(name: str) -> str:
    """`name` if it can be the name of a registered model and of a directory.

    Raises:
        RequestError: It can not.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise RequestError(
            f"model name {name!r}: expected a letter or digit, then up to 126 letters, digits, spaces or any of . _ -"
        )
    return name


def connect(uri: str, *, create: bool = True) -> MlflowClient:
    """A client that fails within seconds instead of minutes. Importing MLflow takes about 2 CPU-seconds.

    The environment variables concern the whole process; those the user has set stay as they are.

    Args:
        uri: Server or database.
        create: Make a database in a file that is not there yet.

    Raises:
        RequestError: There is no such file, and none is to be made.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    database = _database(uri)
    if database and not (create or database.exists()):
        raise RequestError(f"{database}: no such MLflow database; name the directory of the runs with --storage")
    with importing_without_pandas():
        from mlflow import MlflowClient

        if database:
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # the client would do so later
    if database and not database.exists():
        _make(database)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def require_answer(uri: str) -> None:
    """Ask a tracking server for anything by plain HTTP, which takes no import of MLflow; a database is not asked.

    Raises:
        ConnectionError: There is no answer, of whatever kind, within seconds.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "/health", "", ""))
    try:
        opener_without_redirects().open(place, timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return  # of a proxy or a server that wants to know who asks
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):
            return  # it has answered; which certificates are good MLflow knows
        said = getattr(cause, "strerror", None) or cause
        remedy = "is it up, and MLFLOW_TRACKING_URI right? `pretrain doctor` asks it, too"
        raise ConnectionError(f"does not answer ({said}); {remedy}") from None


def verdict(error: Exception) -> Literal["retry", "invalid", "denied", "missing"]:
    """What an error of an MLflow call means for what was to be sent."""
    code = getattr(error, "error_code", None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED") or status in (401, 403):
        return "denied"
    if code == "INVALID_PARAMETER_VALUE":
        # A deleted run or experiment is the user's decision, not a fault of the record that meets it.
        return "denied" if "'active' state" in str(error) else "invalid"
    return "missing" if code == "RESOURCE_DOES_NOT_EXIST" else "retry"


class MlflowRun:
    """One run on one server.

    Args:
        client: From `connect`.
        experiment_id: Where the run lives.
        mlflow_run_id: Its id on the server.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, mlflow_run_id: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.mlflow_run_id = mlflow_run_id

    @classmethod
    def bind(
        cls, client: MlflowClient, uri: str, experiment: str, run_id: str, created_ms: int, known: str | None
    ) -> MlflowRun:
        """Find the run by its `known` MLflow id or by our `run_id`, or create it, and mark it as running.

        A run that was deleted in MLflow is not replaced: that error is "denied" (`verdict`).
        """
        if database := _database(uri):
            _follow_move(database)
        experiment_id = _experiment_id(client, uri, experiment)
        if known is not None:
            try:
                client.update_run(known, status="RUNNING")
                return cls(client, experiment_id, known)
            except Exception as error:
                if verdict(error) != "missing":
                    raise
        if found := client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{run_id}'", max_results=1):
            mlflow_run_id = found[0].info.run_id
            client.update_run(mlflow_run_id, status="RUNNING")
        else:
            tags = {RUN_ID_TAG: run_id, "mlflow.source.name": "pretrain"}
            run = client.create_run(experiment_id, start_time=created_ms, tags=tags, run_name=run_id)
            mlflow_run_id = run.info.run_id
        return cls(client, experiment_id, mlflow_run_id)

    def check_exists(self) -> None:
        """Raise what MLflow raises if the run is not there."""
        self.client.get_run(self.mlflow_run_id)

    def describe(self, recipe_yaml: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record the recipe, its flattened settings and `tags`.

        MLflow keeps the first value of a parameter for ever; one changed by a resume becomes the tag `resumed/KEY`.
        """
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.mlflow_run_id).data.params
        flat = _flatten(params)
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        changed = {f"resumed/{key}": value for key, value in flat.items() if known.get(key, value) != value}
        for first in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.mlflow_run_id, params=new[first : first + MAX_PARAMS], synchronous=True)
        run_tags = [RunTag(key, str(value)) for key, value in {**tags, **changed}.items()]
        self.client.log_batch(self.mlflow_run_id, tags=run_tags, synchronous=True)
        self.client.log_text(self.mlflow_run_id, recipe_yaml, f"config/{RECIPE}")

    def log_metrics(self, points: Sequence[Point], model_id: str | None = None) -> None:
        """Record points of the run; with `model_id` they belong to that model as well."""
        from mlflow.entities import Metric

        metrics = [Metric(_name(p.name), p.value, p.time_ms, p.step, model_id=model_id) for p in points]
        for first in range(0, len(metrics), MAX_POINTS):
            self.client.log_batch(self.mlflow_run_id, metrics=metrics[first : first + MAX_POINTS], synchronous=True)

    def log_visualizations(self, path: Path) -> None:
        self.client.log_artifact(self.mlflow_run_id, str(path), "visualizations")

    def tag(self, key: str, value: str) -> None:
        self.client.set_tag(self.mlflow_run_id, _name(key), value)

    def end(self, status: str, end_ms: int | None = None) -> None:
        """`status` is FINISHED, FAILED or KILLED; `end_ms` when that was, in Unix milliseconds (None: now)."""
        self.client.set_terminated(self.mlflow_run_id, status, end_ms)

    def register(
        self, checkpoint: Path, step: int, model_name: str, tags: Mapping[str, str], location: str | None = None
    ) -> Version:
        """Upload the exported files of a checkpoint directory and make them a version of `model_name`.

        The version carries `location`, where the whole checkpoint is published (default: that directory), and the
        digest of `checkpoint.json`, which holds the digests of all other files: who downloads can tell whether anything
        was changed in the artifact store since. A crash half-way leaves a PENDING model.
        """
        digest = sha256(checkpoint / MANIFEST)
        model = self._logged_model(checkpoint, f"step-{step:08d}", {**tags, "step": str(step)})
        if (version := self._version_of(step, model_name)) is None:
            self._ensure_registered_model(model_name)
            version = self.client.create_model_version(
                model_name,
                # Not models:/ID: an SQLite registry would look that up on the process-wide default server.
                source=model.artifact_location,
                run_id=self.mlflow_run_id,
                model_id=model.model_id,
                tags={
                    **tags,
                    "step": str(step),
                    "model_id": model.model_id,
                    "checkpoint_path": location or str(checkpoint.resolve()),
                    "checkpoint_sha256": digest,
                },
                await_creation_for=0,
            )
        return Version(model.model_id, str(version.version))

    def tag_version(self, model_name: str, version: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(model_name, version, _name(key), value)

    def promote(self, model_name: str, version: str) -> None:
        """Move the alias `best` to `version`; the version that had it becomes `previous`."""
        holder = self._best(model_name)
        if holder is not None:
            if str(holder.version) == version:
                return
            self.client.set_registered_model_alias(model_name, "previous", str(holder.version))
        self.client.set_registered_model_alias(model_name, "best", version)

    def promote_unscored(self, model_name: str, version: str, score_tag: str) -> None:
        """Move the alias `best` to `version`, which has no score yet, unless the one that has it has the tag of one."""
        holder = self._best(model_name)
        if holder is None or _score(holder, score_tag) is None:
            self.client.set_registered_model_alias(model_name, "best", version)

    def promote_best(self, model_name: str, version: str, score_tag: str, metric: Metric, score: float) -> None:
        """`promote`, if `score` is better than the tag `score_tag` of the present best, of whatever run that is.

        Of equal scores the older version keeps the alias; a score that is not finite never gets it.
        """
        holder = self._best(model_name)
        held = None if holder is None else _score(holder, score_tag)
        if holder is None or held is None:
            if best({int(version): score}, metric) is not None:
                self.client.set_registered_model_alias(model_name, "best", version)
        elif best({int(version): score, int(holder.version): held}, metric) == int(version):
            self.promote(model_name, version)

    def _best(self, model_name: str) -> ModelVersion | None:
        """The version that has the alias `best`. Asked for the model, MLflow would look through all its versions."""
        try:
            return self.client.get_model_version_by_alias(model_name, "best")
        except Exception as error:
            if verdict(error) not in ("invalid", "missing"):  # how an alias that there is not is refused
                raise
            return None

    def _logged_model(self, checkpoint: Path, name: str, tags: Mapping[str, str]) -> LoggedModel:
        known = self.client.search_logged_models(
            [self.experiment_id], f"source_run_id = '{self.mlflow_run_id}' AND name = '{name}'"
        )
        model = known[0] if known else None
        if model is None:
            model = self.client.create_logged_model(
                self.experiment_id, name, self.mlflow_run_id, dict(tags), {"step": tags["step"]}, model_type="backbone"
            )
        if model.status != "READY":
            for file in (*EXPORTED_FILES, *([HEADS] if (checkpoint / HEADS).is_file() else [])):
                self.client.log_model_artifact(model.model_id, str(checkpoint / file))
            model = self.client.finalize_logged_model(model.model_id, "READY")
        return model

    def _version_of(self, step: int, model_name: str) -> ModelVersion | None:
        mine = f"name='{model_name}' and run_id='{self.mlflow_run_id}' and tags.`step`='{step}'"
        return next(iter(self.client.search_model_versions(mine)), None)

    def _ensure_registered_model(self, model_name: str) -> None:
        try:
            self.client.create_registered_model(model_name)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise


def _score(version: ModelVersion, score_tag: str) -> float | None:
    held = version.tags.get(_name(score_tag))
    return None if held is None else float(held)


def _experiment_id(client: MlflowClient, uri: str, experiment: str) -> str:
    """Find or create the experiment. Where its artifacts go is decided once, by whoever creates it."""
    if (found := client.get_experiment_by_name(experiment)) is not None:
        return str(found.experiment_id)
    database = _database(uri)
    location = _artifacts_beside(database) if database else None
    return str(client.create_experiment(experiment, artifact_location=location))


def _database(uri: str) -> Path | None:
    """The file of an `sqlite:///` URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def _sqlite(database: Path) -> str:
    """The URI of a file, where SQLAlchemy would take a percent sign and a question mark for its own."""
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F")


def _artifacts_beside(database: Path) -> str:
    return (database.resolve().parent / ARTIFACTS).as_uri()


def _make(database: Path) -> None:
    """An empty database, which appears whole: MLflow's migrations run aside, and in one process at a time.

    Two that migrate the same file at once, or one that is killed half-way, would leave it broken for good.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    guard, deadline = database.with_name(f".{database.name}.lock"), time.monotonic() + MAX_WAIT_S
    while (lock := hold(guard)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{database}: process {holder(guard)} is still making it, see {guard}")
        time.sleep(0.1)
    with lock:
        if database.exists():
            return
        prefix = f".{database.name}.new-"
        for left_over in database.parent.iterdir():
            if left_over.name.startswith(prefix):
                left_over.unlink()
        fresh = database.with_name(f"{prefix}{secrets.token_hex(4)}")
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=_sqlite(fresh)).search_experiments(max_results=1)
        fresh.rename(database)


def _follow_move(database: Path) -> None:
    """Have MLflow write and find artifacts beside its database, if that was moved together with them."""
    here = _artifacts_beside(database)
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        known = [place for (place,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments")]
        for old in known:
            if old is None or old == here or not old.endswith(f"/{ARTIFACTS}"):
                continue
            if not (database.resolve().parent / ARTIFACTS).is_dir():
                continue  # only the database was moved, or it is a copy
            for table, column in _PLACES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (here, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


# Where MLflow's database holds absolute places of artifacts.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def _name(text: str) -> str:
    """`text` with the characters MLflow refuses in names of metrics and tags replaced."""
    return re.sub(r"[^A-Za-z0-9_\-./: ]", "_", text)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b.c` -> text; texts too long for MLflow are left out."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if len(text) <= MAX_VALUE:
            flat[_name(f"{prefix}{key}")] = text
    return flat
