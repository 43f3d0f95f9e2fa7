"""`pretrain submit`, `jobs`, `status`, `logs` and `stop`: runs in a Ray cluster, and local runs of a storage."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.job_server import ADDRESS_VARIABLES, Job, JobServer, is_named_by_environment, server_address
from pretrain.cli.filled import Filled
from pretrain.cli.storage import storage_option
from pretrain.cli.tables import print_table
from pretrain.errors import RequestError
from pretrain.jobs.listing import Row, find_job, job_rows, row_of_job, row_of_run, run_jobs, run_rows
from pretrain.record.remote_runs import bring, brought, drives_elsewhere
from pretrain.record.run_dir import RunDir, find_run, shown_run
from pretrain.record.standing import standing_of
from pretrain.remote.places import is_uri, shown_storage
from pretrain.screen import say

if TYPE_CHECKING:
    from pretrain.jobs.submission import Submitted

__all__ = ["address_option", "jobs", "logs", "require_fitting_options", "status", "stop", "submit", "tell_submitted"]

SHOWN = 20  # of the newest, unless all are asked for
POLL_S, LONGEST_POLL_S = 1.0, 30.0
STORE_POLL_S = 5.0  # to a remote storage the driver of a run sends what is new every ten seconds
BYTES_PER_POLL_S = 1_000_000  # the whole log comes with each answer: a long one is asked for less often
STOP_NOW_S = 30.0  # for the cluster to pass on the request

address_option = click.option(
    "--address", metavar="URL", help=f"Job server of a cluster, http://HEAD:8265; default: ${ADDRESS_VARIABLES[0]}."
)
_storage = storage_option(None, "Directory or URI of the runs; default: runs, without a cluster.", may_be_remote=True)


@click.command(cls=Filled)
@click.argument("recipe")
@click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
@address_option
@click.option("--run-id", metavar="ID", help="Begin the run of this name, or go on with it; default: a new one.")
@click.option("--env", metavar="NAME[=VALUE|=@FILE]", multiple=True, help="Of the job; repeatable. Secrets by name.")
@click.option("--retries", type=click.IntRange(min=0), default=0, help="Of each run, without a new checkpoint between.")
@click.option("--sweep", is_flag=True, help="A run for each combination of values, in one job: KEY=VALUE,VALUE ...")
@click.option("--parallel", type=click.IntRange(1), metavar="N", help="Runs of a sweep at a time; default: 1.")
def submit(
    recipe: str,
    settings: tuple[str, ...],
    address: str | None,
    run_id: str | None,
    env: tuple[str, ...],
    retries: int,
    sweep: bool,
    parallel: int | None,
) -> None:
    """Run RECIPE as a job of a Ray cluster; prints the id of the job.

    The recipe, this version of the code and installed plug-ins are shipped; paths are those of the cluster. Sent again
    with the same --run-id, it answers with the job at work, or goes on with a run that has ended. A sweep has a name of
    its own, which the same request always is.
    """
    from pretrain.jobs.submission import submit, submit_sweep

    require_fitting_options(run_id, parallel, sweep=sweep)
    server = JobServer(server_address(address))
    if sweep:
        found = submit_sweep(server, recipe, settings, parallel=parallel or 1, environment=env, retries=retries)
    else:
        found = submit(server, recipe, settings, run_id=run_id, environment=env, retries=retries)
    tell_submitted(server, found, "sweep" if sweep else "run")


def require_fitting_options(run_id: str | None, parallel: int | None, *, sweep: bool) -> None:
    """Refuse options of a sweep without one, and the name of one run for many.

    Raises:
        RequestError: One line.
    """
    if parallel is not None and not sweep:
        raise RequestError(f"--parallel {parallel}: is how many runs of a sweep there are at a time; add --sweep")
    if run_id is not None and sweep:
        text = "a sweep has a run for each combination, which get names of their own"
        raise RequestError(f"--run-id {run_id}: {text}")


def tell_submitted(server: JobServer, found: Submitted, what: str) -> None:
    """The id of a job for scripts, and for people how to follow it."""
    _warn_of_exposed_token(server)
    say(found.job_id)
    if found.is_new:
        again = f", attempt {found.attempt}" if found.attempt > 1 else ""
        say(f"submitted{again}; the {what} is {found.directory} in the cluster", err=True)
        say(f"to follow it: pretrain logs -f {found.job_id} --address {server.address}", err=True)
    else:
        say("at work already; nothing was sent", err=True)


@click.command(cls=Filled)
@address_option
@_storage
@click.option("--all", "everything", is_flag=True, help=f"Not only the newest {SHOWN}.")
def jobs(address: str | None, storage: str | None, everything: bool) -> None:
    """List the runs of a cluster, or of a storage: state, progress, last score. The newest comes last."""
    place = _place(address, storage, progress=True)
    if isinstance(place, Path):
        if storage is not None and not place.is_dir():
            kind = "no run in it" if is_uri(storage) else "no such directory"
            raise RequestError(f"--storage {storage}: {kind}; give the one that holds the runs")
        rows = run_rows(place)
        left_out = 0 if everything else max(0, len(rows) - SHOWN)
        rows = rows[left_out:]
    else:
        found = run_jobs(place.jobs())
        left_out = 0 if everything else max(0, len(found) - SHOWN)
        rows = job_rows(place, found[left_out:])
    if not rows:
        say(f"no run in {shown_storage(place) if isinstance(place, Path) else place.address} yet")
        return
    print_table(
        ("run" if isinstance(place, Path) else "job", "state", "progress", "since", "last score"),
        [[row.id, row.state, row.progress, row.when, row.score] for row in rows],
    )
    for row in rows:
        if row.note:
            say(f"{row.id}: {row.note}")
    if left_out:
        say(f"and {left_out} more; --all shows them")


@click.command(cls=Filled)
@click.argument("name", metavar="ID")
@address_option
@_storage
def status(name: str, address: str | None, storage: str | None) -> None:
    """Say how a job or a run stands."""
    place = _place(address, storage, name)
    if isinstance(place, Path):
        run_dir = find_run(name, place)
        _print_status(row_of_run(run_dir), {"directory": shown_run(run_dir)})
        return
    job = find_job(place, name)
    more = {"run": job.metadata.get("run_id", ""), "directory": job.metadata.get("run_dir", "")}
    _print_status(row_of_job(place, job), more)


def _print_status(row: Row, more: dict[str, str]) -> None:
    told = {"id": row.id, **more, "state": row.state, "progress": row.progress, "last score": row.score}
    for label, text in {**told, "since": row.when, "note": row.note}.items():
        if text:
            say(f"{label:<12}{text}")


@click.command(cls=Filled)
@click.argument("name", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on until it ends.")
@address_option
@_storage
def logs(name: str, follow: bool, address: str | None, storage: str | None) -> None:
    """Print what a job has written, or what has happened in a run."""
    place = _place(address, storage, name)
    if isinstance(place, Path):
        _show_events(find_run(name, place), follow)
        return
    job = find_job(place, name)
    for line in _log_lines(place, job, follow):
        say(line)
    if follow:
        row = row_of_job(place, place.job(job.id))
        say(f"job {row.id}: {row.state}{f' ({row.note})' if row.note else ''}", err=True)


def _log_lines(server: JobServer, job: Job, follow: bool, wait: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The lines of a job's log; with `follow` as they come, until it has ended."""
    shown = 0
    while True:
        is_live = follow and server.job(job.id).is_live  # asked first: what it wrote last is then in the log
        log = server.logs(job.id)
        shown = min(shown, len(log))
        whole = len(log) if not is_live else log.rfind("\n") + 1  # a last line may still be being written
        if whole > shown:
            yield from log[shown:whole].splitlines()
            shown = whole
        if not is_live:
            return
        wait(min(max(POLL_S, len(log) / BYTES_PER_POLL_S), LONGEST_POLL_S))


def _show_events(run_dir: RunDir, follow: bool) -> None:
    """The event log of a run as its terminal showed it; with `follow` as it grows, until nothing drives it."""
    from pretrain.config.load import load_plan
    from pretrain.record.journal import read_events
    from pretrain.reporting.terminal import Terminal
    from pretrain.screen import escaping_console

    console = escaping_console(sys.stdout, soft_wrap=True, force_terminal=False)
    terminal = Terminal(load_plan(run_dir.recipe, check_files=False), console, run_dir.path)
    offsets = {run_dir.journal: 0, run_dir.evaluations: 0}
    looked = time.monotonic()
    while True:
        is_live = follow and standing_of(run_dir).state in ("running", "stopping")
        new = []
        for path, offset in offsets.items():
            events, offsets[path] = read_events(path, offset)
            new += events
        for event in sorted(new, key=lambda event: event.time):
            terminal.show(event)
        if not is_live:
            break
        time.sleep(POLL_S)
        if time.monotonic() - looked > STORE_POLL_S:
            bring(run_dir.path.parent, run_dir.run_id)
            looked = time.monotonic()
    now = standing_of(run_dir)
    if follow:
        say(f"run {run_dir.run_id}: {now.state}{f' ({now.note})' if now.note else ''}", err=True)


@click.command(cls=Filled)
@click.argument("name", metavar="ID")
@click.option("--now", "at_once", is_flag=True, help="At once, without a checkpoint of its last steps.")
@address_option
@_storage
def stop(name: str, at_once: bool, address: str | None, storage: str | None) -> None:
    """End a job or a run after the step at work, with a checkpoint; it can go on later."""
    place = _place(address, storage, name)
    how = "at once" if at_once else "after the step at work, with a checkpoint"
    if isinstance(place, Path):
        run_dir = find_run(name, place)
        if holder := drives_elsewhere(run_dir):
            raise RequestError(f"run {name}: is driven by {holder}; stop it there")
        state = standing_of(run_dir).state
        if state not in ("running", "stopping"):
            say(f"run {name}: nothing to stop, it is {state}", err=True)
            return
        (run_dir.stop_now_request if at_once else run_dir.stop_request).touch()
        say(f"asked run {name} to end {how}")
        return
    job = find_job(place, name)
    if not job.is_live:
        say(f"job {job.id}: nothing to stop, it is {row_of_job(place, job).state}", err=True)
        return
    if at_once:
        _stop_now(place, job)
    place.stop(job.id)
    say(f"asked job {job.id} to end {how}")


def _stop_now(server: JobServer, job: Job) -> None:
    """Have the cluster write the file that ends a run at once: Ray has nothing harder while a stop is under way.

    A job takes seconds to begin, on a busy head half a minute: where the files of the run are seen here, it is written
    here as well. Here may be a copy of the run, so that this is not enough.
    """
    if job.metadata.get("work") == "schedules":
        raise RequestError(f"job {job.id}: a service ends what is at work in any case; stop it without --now")
    if not (directory := job.metadata.get("run_dir")):
        raise RequestError(f"job {job.id}: was not sent by `pretrain submit`; stop it without --now")
    helper = f"stop-now.{secrets.token_hex(6)}"
    request = RunDir(Path(directory)).stop_now_request
    if request.parent.is_dir() and request.parent.name == job.metadata.get("run_id"):
        with suppress(OSError):  # seen, and of another user
            request.touch()
    file = str(request)
    server.submit(helper, ["touch", file], runtime_env={}, metadata={"stops": job.id})
    until = time.monotonic() + STOP_NOW_S
    while (sent := server.job(helper)).is_live and time.monotonic() < until:
        time.sleep(POLL_S / 5)
    if sent.status == "FAILED":
        say(f"job {job.id}: its run has not begun, so it ends by the signal alone", err=True)
    if not sent.is_live:
        server.delete(helper)


def _place(
    address: str | None, storage: str | None, run_id: str | None = None, *, progress: bool = False
) -> JobServer | Path:
    """Where to look: the cluster that is named or that the environment names, else a storage, as `brought` gives it."""
    if address is not None and storage is not None:
        raise RequestError("--address and --storage: give one of them, a cluster or where runs are")
    if storage is None and (address is not None or is_named_by_environment()):
        server = JobServer(server_address(address))
        _warn_of_exposed_token(server)
        return server
    return brought(storage or "runs", run_id, progress=progress)


def _warn_of_exposed_token(server: JobServer) -> None:
    """Of one that other users of this machine can read."""
    if server.token is not None and server.token.exposed:
        say(f"warning: {server.token.exposed}", err=True)
