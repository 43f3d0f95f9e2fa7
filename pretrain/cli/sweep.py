"""`pretrain run RECIPE --sweep`: checks every point of the grid, then runs them. The work is in `pretrain.sweeps`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.files import write_atomically
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan
from pretrain.errors import RequestError, RunFailed, RunStopped
from pretrain.machine import Machine, misfit, this_machine
from pretrain.record.destinations import require_local
from pretrain.record.interrupts import heard
from pretrain.record.lock import hold, holder
from pretrain.record.run_dir import RunDir
from pretrain.remote.places import uri_of
from pretrain.screen import escaping_console, say
from pretrain.sweeps.grid import Point, grid, sweep_id

if TYPE_CHECKING:
    from pretrain.sweeps.queue import Job

__all__ = ["gpus_of_places", "run_sweep"]

ECHO_S = 1.0  # between two signals that one Ctrl-C sends


def run_sweep(
    recipe: str, settings: Sequence[str], address: str | None, parallel: int, retries: int, *, dry_run: bool
) -> None:
    """Run all points of a grid that are not done yet, and print the comparison.

    Args:
        recipe: Name or file.
        settings: `key=value` or `key=value,value,...`.
        address: Of a Ray cluster.
        parallel: Runs at a time.
        retries: Restarts of each run without a new checkpoint between them.
        dry_run: Only say what would be run.

    Raises:
        RequestError: A point is wrong; nothing was started.
        RunFailed: A run failed; the others were run.
        RunStopped: It was asked to end.
    """
    points = grid(settings)
    place = () if address is None else (f"cluster.address={address}",)
    plans = _checked_plans(recipe, points, place)
    first = plans[0].recipe
    storage = Path(first.storage)
    if uri := uri_of(storage):
        remedy = f"a sweep is kept in a directory; checkpoints.storage={uri} puts the checkpoints of its runs there"
        raise RequestError(f"storage={uri}: {remedy}")
    environments = gpus_of_places([plan.recipe for plan in plans], this_machine(), parallel)
    _warn_of_crowd([plan.recipe for plan in plans], this_machine(), parallel)
    if dry_run:
        _explain(recipe, points, place, plans[0], parallel)
        return
    from pretrain.config.recipe_files import read_yaml, recipe_path
    from pretrain.sweeps.launcher import LocalRuns
    from pretrain.sweeps.parent import Parent
    from pretrain.sweeps.queue import QUEUE, Queue
    from pretrain.sweeps.sweep import Sweep

    name = sweep_id(first.name, recipe, read_yaml(recipe_path(recipe)), settings)
    folder = storage / "sweeps" / name
    require_local(folder, "a sweep")
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := hold(folder / ".lock")) is None:
        raise RequestError(f"sweep {name}: process {holder(folder / '.lock')} runs it; wait for its end, or stop it")
    with lock:
        queue = Queue(folder / QUEUE, points)
        write_atomically(folder / "request.json", json.dumps({"recipe": recipe, "settings": [*settings]}).encode())
        left = sum(job.state != "done" for job in queue.jobs)
        say(
            f"sweep {name} in {folder}: {len(points)} runs, {left} to do, at most {parallel} at a time; output in logs/"
        )
        parent = Parent(name, storage, first.tracking.experiment, " ".join(map(str, _swept(points))))
        launcher = LocalRuns(recipe, address, environments, folder / "logs")
        sweep = Sweep(first.name, storage, queue, launcher, parallel, say, parent.adopt, retries)
        stop_now = RunDir(folder).stop_now_request
        stop_now.unlink(missing_ok=True)  # it was for a sweep that has ended
        signals: list[float] = []

        def wait(seconds: float) -> None:
            time.sleep(seconds)
            if stop_now.exists():
                sweep.end_at_once()

        def stop() -> None:
            now = time.monotonic()
            if signals and now - signals[-1] < ECHO_S:
                return
            signals.append(now)
            say("stopping all runs, with a checkpoint each; again to end at once")
            sweep.stop()

        with heard(stop):
            sweep.run(wait)
        with heard(lambda: None):
            parent.close(queue.jobs)
            if parent.problem is not None:
                say(f"warning: {parent.problem}; the same command tells it later", err=True)
            _finish(queue.jobs, storage, folder, name)


def gpus_of_places(recipes: Sequence[Recipe], machine: Machine, parallel: int) -> list[Mapping[str, str]]:
    """The environment of each of `parallel` runs at a time, which divides the GPUs of a machine among private Rays.

    Each Ray would take all of them for its own.

    Raises:
        RequestError: There are too few for so many runs at a time.
    """
    takes = [_gpus_of(recipe) for recipe in recipes]
    if parallel == 1 or not machine.gpus or not max(takes):
        return [{}] * parallel
    most = machine.gpus // max(takes)
    if parallel > most:
        text = f"--parallel {parallel}: a run takes {max(takes)} of the {machine.gpus} GPUs of this machine"
        raise RequestError(f"{text}; give at most {max(most, 1)}, or --address of a cluster")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [part.strip() for part in given.split(",")] if given else [str(idx) for idx in range(machine.gpus)]
    share = machine.gpus // parallel
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[place * share : (place + 1) * share])} for place in range(parallel)]


def _gpus_of(recipe: Recipe) -> int:
    """What a run of a private Ray takes, where there are some."""
    cluster = recipe.cluster
    if recipe.train.device == "cpu" or cluster.address or os.environ.get("RAY_ADDRESS"):
        return 0
    return recipe.train.workers * (1 if cluster.gpus_per_worker is None else cluster.gpus_per_worker)


def _warn_of_crowd(recipes: Sequence[Recipe], machine: Machine, parallel: int) -> None:
    """Of runs on CPUs that share cores: each is told of its own workers only."""
    here = [recipe for recipe in recipes if not (recipe.cluster.address or os.environ.get("RAY_ADDRESS"))]
    workers = parallel * max((recipe.train.workers for recipe in here if not machine.gpus), default=0)
    if parallel > 1 and workers > machine.cpus:
        text = f"--parallel {parallel}: up to {workers} workers at a time on this machine's {machine}"
        say(f"warning: {text}; each run takes as much longer", err=True)


def _checked_plans(recipe: str, points: Sequence[Point], place: Sequence[str]) -> list[Plan]:
    """The plan of each point, as far as it can be known before photos are packed.

    Raises:
        RequestError: The mistakes of all points, each once.
    """
    from pretrain.config.load import load_plan, replaced_objective
    from pretrain.photos import photo_folder

    mistakes: dict[str, None] = {}
    notes: dict[str, None] = {}
    plans: list[Plan] = []
    for point in points:
        try:
            photos = photo_folder(recipe, point.settings)
            plan = load_plan(recipe, (*point.settings, *place), check_files=photos is None)
            if (found := misfit(plan.recipe, this_machine())) is not None and found.is_refused:
                raise RequestError(found.text)
        except RequestError as error:
            mistakes.update(dict.fromkeys(error.mistakes))
            continue
        plans.append(plan)
        if note := replaced_objective(recipe, point.settings):
            notes[note] = None
    if mistakes:
        raise RequestError(*mistakes)
    for note in notes:
        say(f"note: {note}", err=True)
    return plans


def _explain(recipe: str, points: Sequence[Point], place: Sequence[str], plan: Plan, parallel: int) -> None:
    from pretrain.cli.dry_run import explain
    from pretrain.photos import photo_folder

    say(f"sweep: {len(points)} runs, at most {parallel} at a time")
    for point in points:
        say(f"  {point.number + 1}/{len(points)} {point}")
    say("the first of them:")
    explain(recipe, (*points[0].settings, *place), plan, photo_folder(recipe, points[0].settings))


def _swept(points: Sequence[Point]) -> list[str]:
    """The settings with several values, as typed."""
    keys = points[0].chosen
    return [f"{key}={','.join(dict.fromkeys(point.chosen[key] for point in points))}" for key in keys]


def _finish(jobs: Sequence[Job], storage: Path, folder: Path, name: str) -> None:
    """The table, and the exit code."""
    from rich.table import Table

    from pretrain.sweeps.table import read_rows, shown, table_csv

    rows = read_rows(jobs, storage)
    write_atomically(folder / "table.csv", table_csv(rows).encode())
    header, cells = shown(rows)
    table = Table(box=None, pad_edge=False)
    for column in header:
        table.add_column(column, overflow="fold")
    for line in cells:
        table.add_row(*line)
    with suppress(BrokenPipeError):
        escaping_console().print(table)
    say(f"table       {folder / 'table.csv'}")
    states = [job.state for job in jobs]
    done = f"sweep {name}: {states.count('done')} of {len(jobs)} runs done"
    if failed := states.count("failed"):
        raise RunFailed(f"{done}, {failed} failed; the same command tries the rest again", folder / "logs")
    if states.count("done") < len(jobs):
        raise RunStopped(f"{done}; the same command goes on with the rest")
