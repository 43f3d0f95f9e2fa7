"""Submit a run, a sweep or a service of schedules as a Ray job: checked here, shipped, and never twice.

Each has a name of its own on the cluster, and is one job at a time (`pretrain.jobs.attempts`). Ray refuses an id that
is taken, so that the same request can be sent any number of times.

What is checked here is all but the files: those are the cluster's. Not here: what is shipped
(`pretrain.jobs.shipping`), what runs inside (`pretrain.jobs.supervisor`).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from omegaconf import OmegaConf

from cluster.job_package import PackageTooLarge, packed
from cluster.job_server import Job, JobExists, JobServer
from cluster.secret_names import holds_issued_key
from data_pipelines.files import expanded
from data_pipelines.storage.locations import redact
from pretrain.config.load import load_plan, recipe_content
from pretrain.config.mistakes import shown
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, plan_yaml
from pretrain.config.values import texts_in
from pretrain.errors import RequestError, RunStopped
from pretrain.jobs.attempts import attempt_of, attempts_of, job_id_of
from pretrain.jobs.environment import Environment, read_environment
from pretrain.jobs.listing import is_stopping
from pretrain.jobs.shipping import ISSUED_KEY, URLS_REMEDY, files_of_job, files_of_package
from pretrain.record.run_dir import checked_run_id
from pretrain.remote.places import uri_of
from pretrain.sweeps.grid import grid, sweep_id
from pretrain.version import __version__

__all__ = ["Submitted", "submit", "submit_service", "submit_sweep"]

GRACE_S = 600  # from the request to stop to the end of the last step and its checkpoint; Ray's default is 3
OLDEST = {"ray": (2, 60), "python": (3, 11)}


@dataclass(frozen=True)
class Submitted:
    """What a request came to.

    Attributes:
        job_id: Of the job that does it.
        directory: Of the run, the sweep or the schedules, on the nodes of the cluster.
        attempt: Which job of this name it is, from 1 on.
        is_new: False: the job was there already.
    """

    job_id: str
    directory: Path
    attempt: int
    is_new: bool


@dataclass(frozen=True)
class _Work:
    """What a job is to do.

    Attributes:
        kind: `run`, `sweep` or `schedules`.
        name: Begins the ids of its jobs; the same for what goes on where another left off.
        directory: As in `Submitted`.
        command: What follows `pretrain`, word by word.
        digest: Of the request; two jobs of one name and other digests are not at work at once.
        files: What is shipped, by place in the working directory.
        other: How a live job of that name differs, for the message.
    """

    kind: str
    name: str
    directory: Path
    command: Sequence[str]
    digest: str
    files: Mapping[str, Path | bytes]
    other: str


def submit(
    server: JobServer,
    recipe: str,
    settings: Sequence[str] = (),
    *,
    run_id: str | None = None,
    environment: Sequence[str] = (),
    retries: int = 0,
) -> Submitted:
    """Have a cluster run a recipe.

    Args:
        server: Of the cluster.
        recipe: A name, or a YAML file.
        settings: `key=value` texts.
        run_id: Name of the run, to begin it or to go on with it; None: a new one.
        environment: Texts of `--env`, see `pretrain.jobs.environment`.
        retries: Restarts without a new checkpoint between them.

    Raises:
        RequestError: The request is wrong, too large, or that of another run; nothing was sent.
        RunStopped: Its job is at work but about to end, as it was asked to; nothing was sent.
        JobServerError: The server refuses, or does not answer.
    """
    plan = load_plan(recipe, settings, check_files=False)
    run_id = checked_run_id(run_id or f"{plan.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    require_no_secrets(settings)
    require_directory(plan.recipe)
    require_absolute_places(plan, recipe, settings)
    name, files = files_of_job(recipe)
    work = _Work(
        kind="run",
        name=run_id,
        directory=Path(plan.recipe.storage) / run_id,
        command=["run", name, *_in_the_cluster(plan, settings), "--run-id", run_id],
        digest=_digest(plan_yaml(plan)),
        files=files,
        other=f"--run-id {run_id}: job {{}} of that run is at work with another recipe or other settings; stop it "
        "first, or give another name",
    )
    return _send(server, work, environment, retries)


def submit_sweep(
    server: JobServer,
    recipe: str,
    settings: Sequence[str],
    *,
    parallel: int = 1,
    environment: Sequence[str] = (),
    retries: int = 0,
) -> Submitted:
    """Have a cluster run every point of a grid: one job, which runs them as `pretrain run --sweep` does there.

    The job is called as the sweep, which the same request always is: sent again it goes on with what is not done.

    Args:
        server, recipe, environment: As in `submit`.
        settings: `key=value` or `key=value,value,...`.
        parallel: Runs at a time.
        retries: Restarts of each run without a new checkpoint between them.

    Raises:
        RequestError, RunStopped, JobServerError: As in `submit`; one line for each mistake of any point.
    """
    plans: list[Plan] = []
    mistakes: dict[str, None] = {}
    for point in grid(settings):
        try:
            plan = load_plan(recipe, point.settings, check_files=False)
            require_no_secrets(point.settings)
            require_directory(plan.recipe)
            require_absolute_places(plan, recipe, point.settings)
            plans.append(plan)
        except RequestError as error:
            mistakes.update(dict.fromkeys(error.mistakes))
    if mistakes:
        raise RequestError(*mistakes)
    first = plans[0]
    name, files = files_of_job(recipe)
    there = _in_the_cluster(first, settings)
    sweep = sweep_id(first.recipe.name, name, recipe_content(recipe), there)
    work = _Work(
        kind="sweep",
        name=sweep,
        directory=Path(first.recipe.storage) / "sweeps" / sweep,
        command=["run", name, "--sweep", *there, "--parallel", str(parallel), *_retries(retries)],
        digest=_digest(*map(plan_yaml, plans), str(parallel)),
        files=files,
        other="job {} runs that sweep with another --parallel or another version of the package; stop it first",
    )
    return _send(server, work, environment, retries)


def submit_service(server: JobServer, storage: str, *, environment: Sequence[str] = ()) -> Submitted:
    """Have a cluster look after the schedules of a storage: one job for each storage, until it is stopped.

    Args:
        server, environment: As in `submit`.
        storage: Directory of the runs, on the nodes of the cluster.

    Raises:
        RequestError, RunStopped, JobServerError: As in `submit`.
    """
    if not storage.startswith("/"):
        problem = "is relative to the current folder of this machine; a job needs a place that all its nodes see"
        raise RequestError(f"--storage {storage}: {problem}: --storage /...")
    place = os.path.normpath(storage)
    work = _Work(
        kind="schedules",
        name=f"schedules-{_digest(place)[:10]}",
        directory=Path(place) / "schedules",
        command=["schedule", "serve", "--storage", place],
        digest=_digest(place),
        files=files_of_package(),
        other="job {} looks after other schedules; stop it first",
    )
    return _send(server, work, environment, retries=0)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _in_the_cluster(plan: Plan, settings: Sequence[str]) -> list[str]:
    """The settings; a job is in its own cluster, and its runs where we say that they are, whoever is at home there."""
    ours = {"storage": plan.recipe.storage, "cluster.address": "null"}
    others = [text for text in settings if text.partition("=")[0].strip() not in ours]
    return [*others, *(f"{key}={value}" for key, value in ours.items())]


def _send(server: JobServer, work: _Work, environment: Sequence[str], retries: int) -> Submitted:
    """Have the work done by one job, unless one is at it.

    Raises:
        RequestError, RunStopped, JobServerError: As in `submit`.
    """
    variables = read_environment(environment)
    require_fitting_versions(server)
    known = attempts_of(work.name, server.jobs())
    if (live := _live(server, known, work)) is not None:
        return Submitted(live.id, work.directory, attempt_of(live), is_new=False)
    try:
        package = packed(work.files)
    except PackageTooLarge as error:
        raise RequestError(str(error)) from None
    if not server.has_package(package.name):
        server.upload(package.name, package.content)
    attempt = max((attempt_of(job) for job in known), default=0)
    while True:
        attempt += 1
        job_id = job_id_of(work.name, attempt)
        try:
            server.submit(
                job_id,
                _entrypoint(work, variables, retries),
                runtime_env={"working_dir": package.uri, "env_vars": _env_vars(variables)},
                metadata={
                    "work": work.kind,
                    "run_id": work.name,
                    "run_dir": str(work.directory),
                    "recipe_digest": work.digest,
                    "attempt": str(attempt),
                    "pretrain_version": __version__,
                },
            )
        except JobExists:  # sent at the same moment from elsewhere, or a job of another name
            known = attempts_of(work.name, server.jobs())
            if (live := _live(server, known, work)) is not None:
                return Submitted(live.id, work.directory, attempt_of(live), is_new=False)
            continue
        return Submitted(job_id, work.directory, attempt, is_new=True)


def _live(server: JobServer, attempts: Sequence[Job], work: _Work) -> Job | None:
    """The attempt that is at work.

    Raises:
        RequestError: It does something else.
        RunStopped: It is about to end, and would not do what is asked.
    """
    live = next((job for job in attempts if job.is_live), None)
    if live is not None and is_stopping(server, live):
        remedy = f"when it has ended (pretrain logs -f {live.id} --address {server.address}), the same command goes on"
        raise RunStopped(f"job {live.id} was asked to stop and is about to end, so nothing was sent; {remedy}")
    if live is not None and live.metadata.get("recipe_digest") != work.digest:
        raise RequestError(work.other.format(live.id))
    return live


def _entrypoint(work: _Work, variables: Environment, retries: int) -> list[str]:
    words = ["python", "-m", "pretrain.jobs.supervisor", "--run-dir", str(work.directory)]
    words += _retries(retries)
    words += ["--sweep"] if retries and work.kind == "sweep" else []
    words += [word for name in variables.needed for word in ("--need", name)]
    words += [word for name, path in variables.files.items() for word in ("--file", f"{name}={path}")]
    return [*words, "--", "-m", "pretrain", *work.command]


def _retries(number: int) -> list[str]:
    return ["--retries", str(number)] if number else []


def _env_vars(variables: Environment) -> dict[str, str]:
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **variables.values}


def require_no_secrets(settings: Sequence[str]) -> None:
    """Refuse settings with credentials, in their URLs or as issued: everybody who may list jobs can read them.

    Raises:
        RequestError: One line for each.
    """
    wrong = [text.partition("=")[0] for text in settings if redact(text, marked=True) != text]
    if wrong:
        problem = "a user, password or query in a URL would be readable by everybody who may list jobs"
        raise RequestError(*(f"{key}: {problem}; {URLS_REMEDY}" for key in wrong))
    if issued := [text.partition("=")[0] for text in settings if holds_issued_key(text)]:
        raise RequestError(*(f"{key}: {ISSUED_KEY}" for key in issued))


def require_directory(recipe: Recipe) -> None:
    """Refuse a remote storage, whose working copy would be in the home directory of whoever has the job.

    Raises:
        RequestError: It is one.
    """
    if uri := uri_of(Path(recipe.storage)):
        remedy = f"a job needs a directory that all its nodes see, and checkpoints.storage={uri} for its checkpoints"
        raise RequestError(f"storage={uri}: {remedy}")


def require_absolute_places(plan: Plan, recipe: str, settings: Sequence[str]) -> None:
    """Refuse paths that are relative to the current folder of this machine, which is no place in the cluster.

    Raises:
        RequestError: One line for each.
    """
    here = f"{os.getcwd().rstrip('/')}/"
    written = [*(text for _, text in texts_in(recipe_content(recipe))), *(text.partition("=")[2] for text in settings)]
    said = [str(expanded(text)) for text in written if text.startswith(("/", "~"))]
    shipped = f"{Path(__file__).parents[1]}/"  # what `package:` means
    found: dict[str, str] = {}
    for stage in plan.stages:
        for key, value in texts_in(OmegaConf.to_container(OmegaConf.structured(stage.recipe))):
            path = value.rpartition("@")[2]  # of `timm:NAME@FILE`
            if not path.startswith(here) or path.startswith(shipped):
                continue
            if not any(path.startswith(text.partition("${")[0]) for text in said):
                found[key] = path
    if found:
        problem = "is relative to the current folder of this machine; a job needs a place that all its nodes see"
        raise RequestError(*(f"{k}: {shown(v.removeprefix(here))} {problem}: {k}=/..." for k, v in found.items()))


def require_fitting_versions(server: JobServer) -> None:
    """Refuse a cluster whose Ray or Python cannot run what is shipped.

    Raises:
        RequestError: One line that has both versions.
    """
    here = {"ray": version("ray"), "python": ".".join(map(str, OLDEST["python"]))}
    for name, found in server.versions().items():
        numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
        oldest = OLDEST[name]
        if len(numbers) == 2 and (numbers < oldest or numbers[0] > oldest[0]):
            wanted = f"{oldest[0]}.{oldest[1]} or later"
            besides = f" (here is {here[name]})" if name == "ray" else ""
            raise RequestError(f"{server.address}: has {name.capitalize()} {found}, and jobs need {wanted}{besides}")
