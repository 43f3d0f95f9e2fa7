"""Submit a run as a Ray job: checked here, shipped, and never twice.

A run has a name of its own on the cluster, and is one job at a time (`pretrain.jobs.attempts`). Ray refuses an id that
is taken, so that the same request can be sent any number of times.

What is checked here is all but the files: those are the cluster's. Not here: what is shipped
(`pretrain.jobs.shipping`), what runs inside (`pretrain.jobs.supervisor`).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from omegaconf import OmegaConf

from cluster.job_package import PackageTooLarge, packed
from cluster.job_server import Job, JobExists, JobServer
from data_pipelines.files import expanded
from data_pipelines.storage.locations import redact
from pretrain.config.load import load_plan, recipe_content
from pretrain.config.mistakes import shown
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, plan_yaml
from pretrain.config.values import texts_in
from pretrain.errors import RequestError
from pretrain.jobs.attempts import attempt_of, attempts_of, job_id_of
from pretrain.jobs.environment import Environment, read_environment
from pretrain.jobs.shipping import URLS_REMEDY, files_of_job
from pretrain.record.run_dir import RunDir, checked_run_id
from pretrain.remote.places import uri_of
from pretrain.version import __version__

__all__ = ["Submitted", "submit"]

GRACE_S = 600  # from the request to stop to the end of the last step and its checkpoint; Ray's default is 3
OLDEST = {"ray": (2, 60), "python": (3, 11)}


@dataclass(frozen=True)
class Submitted:
    """What a request came to.

    Attributes:
        job_id: Of the job that runs it.
        run_dir: Of the run, on the nodes of the cluster.
        attempt: Which job of the run it is, from 1 on.
        is_new: False: the job was there already.
    """

    job_id: str
    run_dir: RunDir
    attempt: int
    is_new: bool


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
        JobServerError: The server refuses, or does not answer.
    """
    plan = load_plan(recipe, settings, check_files=False)
    run_id = checked_run_id(run_id or f"{plan.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    require_no_secrets(settings)
    require_directory(plan.recipe)
    require_absolute_places(plan, recipe, settings)
    variables = read_environment(environment)
    name, files = files_of_job(recipe)
    require_fitting_versions(server)
    digest = hashlib.sha256(plan_yaml(plan).encode()).hexdigest()[:32]
    run_dir = RunDir(Path(plan.recipe.storage) / run_id)
    known = attempts_of(run_id, server.jobs())
    if (live := _live(known, run_id, digest)) is not None:
        return Submitted(live.id, run_dir, attempt_of(live), is_new=False)
    try:
        package = packed(files)
    except PackageTooLarge as error:
        raise RequestError(str(error)) from None
    if not server.has_package(package.name):
        server.upload(package.name, package.content)
    # A job is in its own cluster, and its run where we say that it is, whoever is at home there.
    command = [name, *settings, f"storage={plan.recipe.storage}", "cluster.address=null", "--run-id", run_id]
    attempt = max((attempt_of(job) for job in known), default=0)
    while True:
        attempt += 1
        job_id = job_id_of(run_id, attempt)
        try:
            server.submit(
                job_id,
                _entrypoint(run_dir, command, variables, retries),
                runtime_env={"working_dir": package.uri, "env_vars": _env_vars(variables)},
                metadata={
                    "run_id": run_id,
                    "run_dir": str(run_dir.path),
                    "recipe_digest": digest,
                    "attempt": str(attempt),
                    "pretrain_version": __version__,
                },
            )
        except JobExists:  # sent at the same moment from elsewhere, or a job of another name
            known = attempts_of(run_id, server.jobs())
            if (live := _live(known, run_id, digest)) is not None:
                return Submitted(live.id, run_dir, attempt_of(live), is_new=False)
            continue
        return Submitted(job_id, run_dir, attempt, is_new=True)


def _live(attempts: Sequence[Job], run_id: str, digest: str) -> Job | None:
    """The attempt that is at work.

    Raises:
        RequestError: It has another recipe.
    """
    live = next((job for job in attempts if job.is_live), None)
    if live is not None and live.metadata.get("recipe_digest") != digest:
        problem = f"job {live.id} of that run is at work with another recipe or other settings"
        raise RequestError(f"--run-id {run_id}: {problem}; stop it first, or give another name")
    return live


def _entrypoint(run_dir: RunDir, command: Sequence[str], variables: Environment, retries: int) -> list[str]:
    words = ["python", "-m", "pretrain.jobs.supervisor", "--run-dir", str(run_dir.path)]
    words += ["--retries", str(retries)] if retries else []
    words += [word for name in variables.needed for word in ("--need", name)]
    words += [word for name, path in variables.files.items() for word in ("--file", f"{name}={path}")]
    return [*words, "--", "-m", "pretrain", "run", *command]


def _env_vars(variables: Environment) -> dict[str, str]:
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S), **variables.values}


def require_no_secrets(settings: Sequence[str]) -> None:
    """Refuse settings with credentials in their URLs: everybody who may list jobs can read them.

    Raises:
        RequestError: One line for each.
    """
    wrong = [text.partition("=")[0] for text in settings if redact(text, marked=True) != text]
    if wrong:
        problem = "a user, password or query in a URL would be readable by everybody who may list jobs"
        raise RequestError(*(f"{key}: {problem}; {URLS_REMEDY}" for key in wrong))


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
