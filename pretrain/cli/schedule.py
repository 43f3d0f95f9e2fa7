"""`pretrain schedule ...`: evaluations at times or of each new checkpoint, by a service.

The work is in `pretrain.schedules`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import click

from data_pipelines.storage.locations import redact
from evaluation.suites import SUITES
from pretrain.cli.filled import Commands
from pretrain.cli.jobs import address_option, tell_submitted
from pretrain.cli.storage import storage_option
from pretrain.errors import RequestError, RunFailed, RunStopped, nearest
from pretrain.record.destinations import require_local
from pretrain.remote.places import is_uri
from pretrain.screen import say

if TYPE_CHECKING:
    from pretrain.schedules.entries import Entry, Schedules

__all__ = ["schedule"]

SHOWN = 20  # lines of the history
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")

_storage = storage_option(help="Directory of the runs.")


@click.group(cls=Commands)
def schedule() -> None:
    """Evaluate models at times, or each new checkpoint, and tell of regressions.

    \b
    pretrain schedule add nightly --cron "0 2 * * *" --tz Europe/Berlin --models photos@best --tasks knn --data mine=DIR
    pretrain schedule add new --on-checkpoint runs --suite quick --data mine=DIR
    pretrain schedule serve                            until it is stopped; or, from another cron: serve --once

    The files are in STORAGE/schedules; see docs/schedules.md.
    """


@schedule.command()
@click.argument("name")
@click.option("--cron", metavar="EXPRESSION", help="Minute, hour, day of month, month, day of week: '0 2 * * *'.")
@click.option("--tz", metavar="ZONE", help="Whose wall clock --cron means, e.g. Europe/Berlin; default: UTC.")
@click.option("--on-checkpoint", metavar="DIR", help="Each new checkpoint of the runs in DIR; in the place of --cron.")
@click.option("--models", metavar="CHECKPOINT,...", help="With --cron: NAME@ALIAS, runs:/RUN_ID/best, a directory ...")
@click.option("--tasks", metavar="NAME,...", help="Evaluation protocols: knn,linear ...")
@click.option("--suite", type=click.Choice(SUITES), help="In their place: those that fit each backbone and the data.")
@click.option("--data", metavar="NAME=DIRECTORY", multiple=True, required=True, help="Shards; repeatable.")
@click.option("--webhook-url-env", metavar="VARIABLE", help="Names the variable of the service that holds the URL.")
@click.option("--webhook-secret-env", metavar="VARIABLE", help="Names the one that holds the key of signatures.")
@_storage
def add(name: str, storage: str, **asked: Any) -> None:
    """Add an entry NAME to the schedule; what was due before is not."""
    from pretrain.schedules.entries import Schedules
    from pretrain.schedules.service import utc_now

    schedules = Schedules(Path(storage).absolute())
    entry = _checked(name, schedules, **asked)
    schedules.add(entry, utc_now())
    said = "" if entry.cron is None else f"; next: {_next(entry, utc_now())}"
    say(f"schedule {name}: {entry.when}{said}")


@schedule.command("list")
@_storage
def list_entries(storage: str) -> None:
    """List the entries with when they are due next and what happened last."""
    from pretrain.schedules.history import told
    from pretrain.schedules.service import utc_now

    schedules = _existing(storage)
    entries = schedules.entries()
    if not entries:
        say(f"no entries in {schedules.path}")
    last = {line.get("entry"): line for line in schedules.past()}
    for entry in entries:
        due = f"; next: {_next(entry, utc_now())}" if entry.cron else ""
        say(f"{entry.name}: {entry.when}{due}")
        data = ", ".join(f"{name}={directory}" for name, directory in entry.data.items())
        of = f"{', '.join(entry.models)}: " if entry.models else ""
        say(f"    {of}{entry.what} on {data}")
        if (line := last.get(entry.name)) is not None:
            say(f"    {line.get('time')} {told(line)}")


@schedule.command()
@click.argument("name")
@_storage
def remove(name: str, storage: str) -> None:
    """Remove the entry NAME; its history stays."""
    from pretrain.schedules.service import utc_now

    _existing(storage).remove(name, utc_now())
    say(f"schedule {name}: removed")


@schedule.command("run-now")
@click.argument("name")
@_storage
def run_now(name: str, storage: str) -> None:
    """Do the work of the entry NAME now; of new checkpoints also what has failed before."""
    # Before torch is imported: its threads would burn the cores while they wait for each other's small shares.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pretrain.record.interrupts import stopped_by_signals
    from pretrain.schedules.service import utc_now

    schedules = _existing(storage)
    schedules.entry(name)
    claim = schedules.claim(name, utc_now(), at_once=True)
    if claim is None:
        raise RequestError(f"schedule {name}: process {schedules.holder(name)} is at work on it; wait for its end")
    from pretrain.schedules.work import done

    with claim.lock:
        try:
            with stopped_by_signals(lambda: "stopped; the same command begins again, and computes no score twice"):
                outcome = done(schedules, claim.entry, claim.due, say, utc_now, retry=True)
        except BaseException as error:
            what = "stopped by a signal" if isinstance(error, RunStopped) else f"{type(error).__name__}: {error}"
            schedules.end(name, utc_now(), "failed", error=what)
            raise
    if outcome.failures or outcome.regressions:
        raise RunFailed(f"schedule {name}: {outcome}")
    say(f"schedule {name}: {outcome}")


@schedule.command()
@click.argument("name", required=False)
@click.option("--last", type=click.IntRange(1), default=SHOWN, show_default=True, metavar="N", help="Lines.")
@_storage
def history(name: str | None, last: int, storage: str) -> None:
    """Show what was done, found and skipped, of the entry NAME or of all."""
    from pretrain.schedules.history import told

    schedules = _existing(storage)
    lines = schedules.past(name)
    if name is not None and not lines:
        schedules.entry(name)
    for line in lines[-last:]:
        say(f"{line.get('time')} {line.get('entry')}: {told(line)}")


@schedule.command()
@click.option("--once", is_flag=True, help="Do what is due by now, and end.")
@click.option("--as-job", is_flag=True, help="As a job of a Ray cluster, one for each storage; prints its id.")
@address_option
@click.option("--env", metavar="NAME[=VALUE|=@FILE]", multiple=True, help="Of the job; repeatable. Secrets by name.")
@_storage
def serve(once: bool, as_job: bool, address: str | None, env: tuple[str, ...], storage: str) -> None:
    """Evaluate what is due, until SIGTERM or Ctrl-C. Several services may look after one storage.

    With --as-job the cluster does; --storage is a place there. Sent again, it answers with the job at work.
    """
    if as_job:
        if once:
            raise RequestError("--once: a job serves until it is stopped; leave it out, or leave --as-job out")
        from cluster.job_server import JobServer, server_address
        from pretrain.jobs.submission import submit_service

        server = JobServer(server_address(address))
        tell_submitted(server, submit_service(server, storage, environment=env), "schedule")
        return
    for option, given in (("--address", address), ("--env", env)):
        if given:
            raise RequestError(f"{option}: is of a job; add --as-job")
    from pretrain.processes import LocalProcesses
    from pretrain.record.interrupts import heard
    from pretrain.schedules.service import Service, utc_now

    schedules = _existing(storage)
    service = Service(schedules, LocalProcesses(), utc_now, say)
    stopping = threading.Event()
    wrong = 0
    with heard(stopping.set):
        if once:
            wrong = service.run_once(stopping.wait)
        else:
            say(f"serving {schedules.path}")
            service.run(stopping)
            say("stopping the service: what is at work ends")
        interrupted = service.stop(lambda seconds: threading.Event().wait(seconds))
    if interrupted:
        raise RunStopped(f"stopped at work on {', '.join(interrupted)}; the next service does it again")
    if wrong:
        raise RunFailed(f"{wrong} failures and regressions; pretrain schedule history", schedules.history)


def _existing(storage: str) -> Schedules:
    from pretrain.schedules.entries import Schedules

    schedules = Schedules(Path(storage).absolute())
    if not schedules.path.is_dir():
        remedy = "name the directory of the runs with --storage, or add an entry first: pretrain schedule add"
        raise RequestError(f"--storage {storage}: no schedule in it; {remedy}")
    return schedules


def _next(entry: Entry, now: datetime) -> str:
    """When an entry of cron is due next, by its own clock and by UTC."""
    from pretrain.schedules.cron import next_due

    assert entry.cron is not None
    due = next_due(entry.cron, entry.tz, now)
    there = due.astimezone(ZoneInfo(entry.tz))
    return f"{there:%Y-%m-%d %H:%M} {entry.tz}" + ("" if entry.tz == "UTC" else f" ({due.astimezone(UTC):%H:%M} UTC)")


def _checked(
    name: str,
    schedules: Schedules,
    *,
    cron: str | None,
    tz: str | None,
    on_checkpoint: str | None,
    models: str | None,
    tasks: str | None,
    suite: str | None,
    data: Sequence[str],
    webhook_url_env: str | None,
    webhook_secret_env: str | None,
) -> Entry:
    """The entry that a command asks for, with absolute paths.

    Raises:
        RequestError: one line per mistake, all of them.
    """
    from pretrain.schedules.cron import checked_cron, checked_zone
    from pretrain.schedules.entries import NAME, Entry

    mistakes: list[str] = []
    if not NAME.fullmatch(name):
        expected = "a letter or digit, then up to 63 letters, digits or any of . _ -"
        mistakes.append(f"schedule {name}: this name is no name of a file; expected {expected}")
    if (cron is None) == (on_checkpoint is None):
        mistakes.append("when: give either --cron EXPRESSION or --on-checkpoint DIR")
    for option, value in (("--tz", tz), ("--models", models)):
        if value is not None and cron is None and on_checkpoint is not None:
            mistakes.append(
                f"{option} {value}: goes with --cron, and each checkpoint has no {option[2:]}; leave it out"
            )
    if cron is not None and models is None:
        mistakes.append("--cron: --models is missing; name the checkpoints, as in --models NAME@best")
    if not schedules.storage.is_dir():
        mistakes.append(f"--storage {schedules.storage}: no such directory; give the one that holds the runs")
    cron = _tried(mistakes, checked_cron, cron)
    zone = _tried(mistakes, checked_zone, tz)
    if (tasks is None) == (suite is None):
        mistakes.append("what: give either --tasks NAME,... or --suite NAME")
    protocols = () if tasks is None else _listed(mistakes, "--tasks", tasks)
    _tried(mistakes, _require_protocols, protocols)
    directories = _directories(mistakes, data, protocols)
    runs = None if on_checkpoint is None else Path(on_checkpoint).absolute()
    if on_checkpoint is not None and is_uri(on_checkpoint):
        remedy = "a schedule follows runs in a directory; those there evaluate their checkpoints by evaluation.tasks"
        mistakes.append(f"--on-checkpoint {redact(on_checkpoint)}: a remote store; {remedy}")
    elif runs is not None and not runs.is_dir():
        mistakes.append(f"--on-checkpoint {on_checkpoint}: no such directory; give the one that holds the runs")
    for option, variable in (("--webhook-url-env", webhook_url_env), ("--webhook-secret-env", webhook_secret_env)):
        if variable is not None and not _VARIABLE.fullmatch(variable):  # not shown: it may be the secret itself
            mistakes.append(f"{option}: takes the name of an environment variable, such as ALERT_URL, never its value")
    if (webhook_url_env is None) != (webhook_secret_env is None):
        mistakes.append("--webhook-url-env and --webhook-secret-env: give both; messages are signed with the secret")
    references = () if models is None or cron is None else _listed(mistakes, "--models", models)
    if not mistakes:  # asks MLflow, which takes seconds
        references = tuple(
            found for reference in references if (found := _tried(mistakes, _model(schedules.storage), reference))
        )
    if mistakes:
        raise RequestError(*mistakes)
    require_local(schedules.path, "a schedule")
    return Entry(
        name,
        tasks=protocols,
        data=directories,
        models=references,
        cron=cron,
        tz=zone or "UTC",
        on_checkpoint=None if runs is None else str(runs),
        suite=suite,
        webhook_url_env=webhook_url_env,
        webhook_secret_env=webhook_secret_env,
    )


def _tried(mistakes: list[str], check: Any, value: Any) -> Any:
    """`check(value)`, or None and what it says is wrong."""
    try:
        return None if value is None else check(value)
    except RequestError as error:
        mistakes += error.mistakes
    return None


def _listed(mistakes: list[str], option: str, text: str) -> tuple[str, ...]:
    """What an option lists, with commas between."""
    items = tuple(part.strip() for part in text.split(","))
    if "" in items:
        mistakes.append(f"{option} {text}: nothing between two commas, or at an end; expected A,B")
    if repeated := sorted({item for item in items if items.count(item) > 1}):
        mistakes.append(f"{option} {text}: {repeated[0]} is named twice")
    return tuple(item for item in items if item)


def _require_protocols(names: Sequence[str]) -> None:
    from evaluation import registry

    known = registry.names()
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(known)
        raise RequestError(
            *(f"--tasks {name}: no such protocol; there are {there}{nearest(name, known)}" for name in unknown)
        )


def _directories(mistakes: list[str], data: Sequence[str], protocols: Sequence[str]) -> dict[str, str]:
    """The data by name, each with both splits and the labels of all protocols that are known."""
    from pretrain.config.checks.evaluation import evaluation_data_problem
    from pretrain.config.paths import absolute

    found: dict[str, str] = {}
    for text in data:
        name, _, directory = text.partition("=")
        if not (_DATA_NAME.fullmatch(name) and directory):
            problem = "expected NAME=DIRECTORY, a name of letters, digits and . _ -"
        elif name in found:
            problem = f"{name} is named twice; give each its own name"
        else:
            found[name] = absolute(directory)
            problem = evaluation_data_problem(found[name]) or _without_labels(found[name], protocols) or ""
        if problem:
            mistakes.append(f"--data {text}: {problem}")
    return found


def _without_labels(directory: str, protocols: Sequence[str]) -> str | None:
    """Of which protocols the data have no labels; None if they have those of all."""
    from data_pipelines.shards.dataset import open_dataset
    from evaluation import registry
    from evaluation.data import has_labels

    dataset = open_dataset(str(Path(directory) / "train-*.tar"))
    known = [registry.protocol(name) for name in protocols if name in registry.names()]
    absent = [spec.name for spec in known if not has_labels(dataset, spec.target_label)]
    return (
        f"its samples have no labels for {', '.join(absent)}; they have {', '.join(dataset.fields)}" if absent else None
    )


def _model(storage: Path) -> Any:
    """A check of references to checkpoints; those with a path in them become absolute."""
    from pretrain.checkpoints.references import locate, registered_version
    from pretrain.config.paths import absolute_reference

    def check(reference: str) -> str:
        try:
            found = absolute_reference(reference) or reference
            if locate(found, storage) is None and not found.startswith("runs:/"):
                registered_version(found, storage)  # its alias may move; the name has to be there
        except RequestError as error:
            raise RequestError(*(f"--models {reference}: {line}" for line in error.mistakes)) from None
        return found

    return check
