"""The command line. Exit codes: 0 done, 1 the work failed, 2 the request was wrong (one line per mistake), 75 stopped
after a checkpoint, 130 interrupted.

Requests are checked before anything heavy is imported: `--help`, `recipes` and every refused request answer without
torch, Ray, MLflow or DeepSpeed. The work itself is in `pretrain.driver`, `pretrain.evaluations`,
`pretrain.checkpoints.references` and `pretrain.reporting.page`.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from data_pipelines.files import write_atomically
from evaluation.protocol import CI_SUFFIXES, floors, format_interval, format_value
from evaluation.suites import SUITES
from pretrain.cli.data import data, plain_warnings
from pretrain.cli.doctor import doctor
from pretrain.cli.export import embed, export
from pretrain.cli.filled import Commands
from pretrain.cli.init import init
from pretrain.cli.jobs import jobs, logs, require_fitting_options, status, stop, submit
from pretrain.cli.manifest import manifest
from pretrain.cli.parent import Parent
from pretrain.cli.recipes import recipes
from pretrain.cli.schedule import schedule
from pretrain.cli.storage import storage_option
from pretrain.cli.tables import print_table
from pretrain.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    RequestError,
    RunFailed,
    RunStopped,
    nearest,
    said_by_system,
    shortened,
)
from pretrain.record.destinations import require_local
from pretrain.record.remote_runs import brought
from pretrain.record.run_dir import checked_run_id, find_run
from pretrain.remote.places import is_uri, shown_storage
from pretrain.screen import escape_diagnostics, printable, say
from pretrain.tracking.mlflow_internals import leave_out_pandas
from pretrain.version import __version__

if TYPE_CHECKING:
    from data_pipelines.packing.inputs import Listing
    from pretrain.evaluations import Place

__all__ = ["cli", "main"]

MOST_MISTAKES = 6  # that are shown of one request
LONGEST_LINE = 400  # characters
BEST = 20  # scores of a task that are shown

_storage = storage_option(may_be_remote=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="pretrain")
def cli() -> None:
    """Pretrain vision backbones without labels, and know what every checkpoint is worth.

    \b
    pretrain run demo                                  two workers, shipped photos, minutes on two CPU cores
    pretrain run mae_photos data.root=PHOTOS/          your photos, or shards
    pretrain init PHOTOS/                              a recipe fitted to them and to this machine
    pretrain run mae_photos data.root=PHOTOS/ train.steps=200 train.workers=1 --dry-run
    pretrain recipes mae_cifar10                       every setting that recipe makes
    """


@cli.command()
@click.argument("recipe")
@click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--address", metavar="URL", help="A running Ray; default: $RAY_ADDRESS, else a private local one.")
@click.option("--run-id", metavar="ID", help="Begin the run of this name, or go on with it; default: a new one.")
@click.option("--sweep", is_flag=True, help="A run for each combination of values: KEY=VALUE,VALUE ...")
@click.option("--parallel", type=click.IntRange(1), metavar="N", help="Runs of a sweep at a time; default: 1.")
@click.option("--retries", type=click.IntRange(min=0), help="Of each run of a sweep, without a new checkpoint between.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; start nothing, leave nothing.")
@click.pass_obj
def run(
    parent: Parent,
    recipe: str,
    settings: tuple[str, ...],
    address: str | None,
    run_id: str | None,
    sweep: bool,
    parallel: int | None,
    retries: int | None,
    dry_run: bool,
) -> None:
    """Train RECIPE (a name or a YAML file), evaluate its checkpoints, record everything, print a summary.

    DIR in data.root=DIR may be a plain folder of photos; it is packed into shards first, once. With --run-id the same
    command can be given again and again, as schedulers do: it goes on where the run is, and does nothing when it has
    finished.
    """
    require_fitting_options(run_id, parallel, sweep=sweep)
    if retries is not None and not sweep:
        remedy = "a run begins its workers again by itself (train.max_failures)"
        raise RequestError(f"--retries {retries}: is of the runs of a sweep; add --sweep, or leave it out: {remedy}")
    if sweep:
        from pretrain.cli.sweep import run_sweep

        run_sweep(recipe, settings, address, parallel or 1, retries or 0, dry_run=dry_run)
        return
    from pretrain.config.load import load_plan, replaced_objective
    from pretrain.photos import packed_plan, photo_folder

    place = () if address is None else (f"cluster.address={address}",)
    if run_id is not None:
        checked_run_id(run_id)
    photos = photo_folder(recipe, settings)
    plan = load_plan(recipe, (*settings, *place), check_files=photos is None)
    if note := replaced_objective(recipe, settings):
        say(f"note: {note}", err=True)
    evaluation = plan.recipe.evaluation
    if unused := sorted(evaluation.data.keys() - {task.data for task in evaluation.tasks}) if evaluation.tasks else ():
        said = f"no task of evaluation.tasks is on {', '.join(unused)} of evaluation.data, so nothing is scored on it"
        say(f"note: {said}", err=True)
    if dry_run:
        from pretrain.cli.dry_run import explain

        explain(recipe, (*settings, *place), plan, photos)
        if run_id is not None:
            from pretrain.driver.start import begun_run

            say(f"run       {run_id}: {'goes on' if begun_run(plan, run_id) else 'begins'}")
        return
    parent.watch()
    if photos is not None:
        with plain_warnings():
            plan = packed_plan(recipe, (*settings, *place), photos, plan)
    from pretrain.driver.start import run

    run(plan, run_id=run_id, on_start=parent.begun)


@cli.command()
@click.argument("run_id")
@click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
@_storage
@click.pass_obj
def resume(parent: Parent, run_id: str, settings: tuple[str, ...], storage: str) -> None:
    """Go on with a run from its last complete checkpoint, on other workers if you say so (train.workers=1)."""
    runs = brought(storage, run_id)
    find_run(run_id, runs)  # refused before anything is imported
    parent.watch()
    from pretrain.driver.start import resume

    resume(run_id, runs, settings, on_start=parent.begun)


@cli.command()
@click.argument("checkpoint")
@click.option("--protocol", "protocols", metavar="NAME", multiple=True, help="Repeatable; default: as its recipe.")
@click.option("--suite", type=click.Choice(SUITES), help="Protocols that fit data and backbone: a few, more, all.")
@click.option("--data", metavar="NAME=DIRECTORY", multiple=True, help="Repeatable; default: the data of its recipe.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples at a time; decides speed and memory, no score.")
@click.option("--again", is_flag=True, help="Compute known results again; features are kept.")
@click.option("--half-features", is_flag=True, default=None, help="Store features in half precision.")
@click.option("--pictures", metavar="FOLDER", help="Draw what it makes of test samples, as DATA-KIND.png in there.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
@_storage
def evaluate(
    checkpoint: str,
    protocols: tuple[str, ...],
    suite: str | None,
    data: tuple[str, ...],
    batch_size: int | None,
    again: bool,
    half_features: bool | None,
    pictures: str | None,
    device: str | None,
    storage: str,
) -> None:
    """Evaluate CHECKPOINT: a directory, runs:/ID[/step], models:/NAME@ALIAS, or timm:NAME@FILE for weights of others.

    Known results are not computed again.

    DIRECTORY holds shards, or photos in a folder per class, which are packed into shards first, once.
    """
    if suite is not None and protocols:
        raise RequestError(f"--suite {suite} beside --protocol {protocols[0]}: give one of them")
    if pictures is not None and (folder := require_local(pictures, "a picture")).exists() and not folder.is_dir():
        raise RequestError(f"--pictures {pictures}: is no folder; name one")
    # Before torch is imported: its threads would burn the cores while they wait for each other's small shares.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    root = brought(storage)
    directories, photos = _check_evaluation(checkpoint, protocols, data, root)
    for name, listing in photos.items():
        from pretrain.photos import packed

        with plain_warnings():
            directories[name] = str(packed(Path(directories[name]), root, listing))
    from pretrain.evaluations import evaluate

    results = evaluate(
        checkpoint,
        protocols or None,
        directories or None,
        storage=root,
        batch_size=batch_size,
        device=device,
        suite=suite,
        again=again,
        half_features=half_features,
        pictures=pictures,
        said=lambda text: say(text, err=True),
    )
    rows = []
    for result in results:
        metric = next(metric for metric in result.described if metric.headline)
        score = format_value(result.metrics[metric.name], metric.unit)
        low, high = (result.metrics.get(metric.name + suffix) for suffix in CI_SUFFIXES)
        interval = "" if low is None or high is None else format_interval(low, high, metric.unit)
        num_test = str(result.details.get("num_scored", result.details.get("num_test", "")))
        time = "known" if result.cached else f"{result.seconds:.1f} s"
        named = floors(metric, result.described)
        without = ", ".join(f"{format_value(result.metrics[name], metric.unit)} {named[name]}" for name in named)
        rows.append([result.protocol, result.data, metric.name, score, interval, without, num_test, time])
    print_table(("protocol", "data", "metric", "score", "95 % CI", "no backbone", "n", "time"), rows)
    for result in results:
        if result.details.get("at_grid_edge"):
            edge = "the best setting is the first or last of its grid, so that a wider one might do better"
            say(f"note: {result.protocol}/{result.data}: {edge}", err=True)
    copies = {result.data: result.details for result in results if result.details.get("num_test_in_train")}
    for name, known in copies.items():
        said = f"{known['num_test_in_train']} of {known['num_test']} test samples of {name} are in its train split, too"
        say(f"warning: {said}; scores on them say little", err=True)


@cli.command()
@click.option("--protocol", metavar="NAME", help="Only this protocol.")
@click.option("--data", metavar="NAME", help="Only this data set.")
@click.option("--all", "everything", is_flag=True, help="Every score; default: the best 20 of each task.")
@click.option("--csv", "as_csv", is_flag=True, help="Every score as comma-separated values.")
@click.option("--html", metavar="FILE", help="Write one self-contained page, with tables that can be sorted.")
@_storage
def leaderboard(
    protocol: str | None, data: str | None, everything: bool, as_csv: bool, html: str | None, storage: str
) -> None:
    """List the headline scores of all runs, best first; step 0 is what a run began with."""
    page = None if html is None else _page_file(html, beside_csv=as_csv)
    if protocol is not None:
        _check_protocols([protocol])
    from pretrain.evaluations import excerpt, leaderboard

    root = brought(storage)
    if storage != "runs" and not root.is_dir():
        kind = "no run in it" if is_uri(storage) else "no such directory"
        raise RequestError(f"--storage {storage}: {kind}; give the one that holds the runs")
    found = leaderboard(root)
    _check_filter("data", data, {place.data for place in found})
    chosen = [place for place in found if protocol in (None, place.protocol) and data in (None, place.data)]
    if as_csv:
        _write_csv(chosen)
        return
    if page is not None:
        from pretrain.reporting.leaderboard_page import leaderboard_page

        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page.resolve(), leaderboard_page(chosen, shown_storage(root), None if everything else BEST))
        say(str(page))
        return
    if not chosen:
        say(f"no evaluation in {shown_storage(root)} yet")
        return
    for (protocol, data, metric), group in groupby(chosen, lambda place: (place.protocol, place.data, place.metric)):
        say(f"{protocol}/{data} {metric.name}")
        places = list(group)
        shown = places if everything else excerpt(places, BEST)
        rows = []
        for place in shown:
            step = "" if place.step is None else f"{place.step} {place.start}".rstrip()
            score = format_value(place.score, metric.unit)
            rows.append([score, place.interval, str(place.num_test or ""), step, place.shown_run])
        print_table(("score", "95 % CI", "n", "step", "run"), rows)
        if len(shown) < len(places):
            say(f"and {len(places) - len(shown)} more; --all shows them")


@cli.command()
@click.argument("first")
@click.argument("second")
@_storage
def compare(first: str, second: str, storage: str) -> None:
    """Say whether checkpoint SECOND is better than FIRST, by the evaluations that both have.

    Scores are paired by test sample: a difference that is small beside the intervals of both may be certain.
    """
    from pretrain.comparisons import compare, scores_of

    header = ("task", "first", "second", "difference [95 % CI]", "n", "second is")
    found = compare(first, second, storage=storage)
    print_table(header, scores_of(found))
    if any(one.difference is None for one in found):
        say(
            "note: not known of results from before single samples were kept; evaluate --again makes them anew",
            err=True,
        )


@cli.command()
@click.argument("name", metavar="NAME[@ALIAS]")
@click.argument("dest", required=False)
@click.option("--full", is_flag=True, help="With the training state, to resume from.")
@_storage
def pull(name: str, dest: str | None, full: bool, storage: str) -> None:
    """Fetch a registered checkpoint to DEST (default: ./NAME-vVERSION), verified; an existing DEST is refused."""
    from pretrain.checkpoints.references import pull
    from pretrain.comparisons import words_on

    place = pull(name, dest, storage=storage, full=full)
    origin, shortcomings = words_on(place, brought(storage))
    say(f"{name} is in {place}: {origin}")
    for shortcoming in shortcomings:
        say(f"warning: {shortcoming}", err=True)


@cli.command()
@click.argument("run_id")
@_storage
def report(run_id: str, storage: str) -> None:
    """Write the report of a run: one self-contained HTML page."""
    run_dir = find_run(run_id, brought(storage, run_id))
    require_local(run_dir.report, "a report")
    from pretrain.reporting.page import write_report

    say(str(write_report(run_dir.path)))


cli.add_command(recipes)
cli.add_command(init)
cli.add_command(data)
cli.add_command(doctor)
cli.add_command(schedule)
cli.add_command(embed)
cli.add_command(export)
cli.add_command(manifest)
for _command in (submit, jobs, status, logs, stop):
    cli.add_command(_command)


def console() -> NoReturn:
    """As `pretrain.cli.console`, once all is imported; runs are watched over by a parent process."""
    leave_out_pandas()
    parent = Parent(wanted=True)
    code = main(parent=parent)
    parent.ended()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None, *, parent: Parent | None = None) -> int:
    """Run one command and return its exit code."""
    escape_diagnostics()
    try:
        code = cli.main(arguments, prog_name="pretrain", standalone_mode=False, obj=parent or Parent(wanted=False))
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        _complain([" ".join(error.format_message().split())])
        return 2
    except (KeyboardInterrupt, click.Abort):
        _complain(["interrupted"])
        return EXIT_INTERRUPTED
    except RequestError as error:
        _complain(error.mistakes)
        return 2
    except RunStopped as error:
        say(str(error), err=True)
        return EXIT_STOPPED
    except RunFailed as error:
        _complain([error.message, *([f"the log is {error.log}"] if error.log else [])])
        return 1
    except OSError as error:  # of the disk, or of a name that no file can have
        _complain([said_by_system(error)])
        return 2 if error.errno == errno.ENAMETOOLONG else 1
    except Exception as error:
        if isinstance(error, _mistakes_of_other_packages()):
            _complain([str(error)])
            return 2
        from pretrain.checkpoints.store import CheckpointError

        if isinstance(error, CheckpointError):
            _complain([str(error)])
            return 1
        first_line = (str(error).splitlines() or [""])[0]
        _complain([f"{type(error).__name__}: {first_line}", f"the traceback is in {_save_traceback()}"])
        return 1


def _mistakes_of_other_packages() -> tuple[type[Exception], ...]:
    from backbones.errors import BackboneError
    from cluster.job_server import JobServerError
    from data_pipelines.errors import DataError
    from evaluation.protocol import EvaluationError
    from objectives.errors import ObjectiveError

    return JobServerError, BackboneError, DataError, EvaluationError, ObjectiveError


def _complain(lines: Iterable[str]) -> None:
    """One line per mistake on standard error: the first ones, and how many more there are."""
    mistakes = list(lines)
    for line in mistakes[:MOST_MISTAKES]:
        say(f"error: {shortened(printable(line), LONGEST_LINE - len('error: '))}", err=True)
    if len(mistakes) > MOST_MISTAKES:
        say(f"error: and {len(mistakes) - MOST_MISTAKES} more mistakes", err=True)


def _save_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="pretrain-", suffix=".log", delete=False, encoding="utf-8") as file:
        traceback.print_exc(file=file)
    return file.name


def _check_evaluation(
    checkpoint: str, protocols: Sequence[str], data: Sequence[str], storage: Path
) -> tuple[dict[str, str], dict[str, Listing]]:
    """Refuse what can be known to be wrong without loading anything.

    Returns:
        The data directories by name, and of those with plain photos what is to be packed.
    """
    from data_pipelines.errors import DataError
    from pretrain.checkpoints.gradable import is_foreign
    from pretrain.checkpoints.references import locate
    from pretrain.config.checks.evaluation import evaluation_data_problem
    from pretrain.config.paths import absolute
    from pretrain.photos import holds_photos, listed, unfit_for_evaluation

    mistakes: list[str] = []
    try:
        if "://" not in checkpoint and not is_foreign(checkpoint):  # another machine is asked when it is needed
            locate(checkpoint, storage)
    except RequestError as error:
        mistakes += error.mistakes
    known: Sequence[str] = protocols
    try:
        _check_protocols(protocols)
    except RequestError as error:
        mistakes += error.mistakes
        known = ()
    directories: dict[str, str] = {}
    photos: dict[str, Listing] = {}
    for text in data:
        name, _, directory = text.partition("=")
        if not (name and directory):
            mistakes.append(f"--data {text}: expected NAME=DIRECTORY")
            continue
        if name in directories:
            mistakes.append(f"--data {text}: {name} is named twice; give each its own name")
            continue
        directories[name] = absolute(directory)
        folder = Path(directories[name])
        try:
            if holds_photos(folder):
                photos[name] = listed(folder, storage)
                problem = unfit_for_evaluation(photos[name], known)
            else:
                problem = evaluation_data_problem(folder)
        except (DataError, RequestError) as error:
            problem = str(error)
        if problem:
            mistakes.append(f"--data {text}: {problem}")
    if mistakes:
        raise RequestError(*mistakes)
    return directories, photos


def _check_protocols(names: Iterable[str]) -> None:
    from evaluation import registry

    known = registry.names()
    unknown = [name for name in names if name not in known]
    if unknown:
        listing = ", ".join(known)
        raise RequestError(*(f"protocol {n}: unknown; known are {listing}{nearest(n, known)}" for n in unknown))


def _write_csv(places: Sequence[Place]) -> None:
    """On standard output, with a header; numbers as they are, bounds empty where none were recorded."""
    import csv

    table = csv.writer(sys.stdout, lineterminator="\n")
    names = ("protocol", "data", "metric", "unit", "score", "ci_low", "ci_high", "n", "step", "began_with", "run")
    table.writerow([*names, "by_hand"])
    for place in places:
        low, high = place.bounds or ("", "")
        task = (place.protocol, place.data, place.metric.name, place.metric.unit, place.score)
        step = "" if place.step is None else place.step
        table.writerow([*task, low, high, place.num_test or "", step, place.start, place.run, place.by_hand])


def _page_file(html: str, *, beside_csv: bool) -> Path:
    """Where a page goes; refused are places that cannot take one."""
    if beside_csv:
        raise RequestError(f"--html {html} beside --csv: give one of them")
    path = require_local(html, "a page")
    if path.exists() and not path.is_file():
        raise RequestError(f"--html {html}: is there and no file; name one")
    return path


def _check_filter(option: str, name: str | None, known: set[str]) -> None:

    if name is not None and known and name not in known:
        listing = ", ".join(sorted(known))
        raise RequestError(f"--{option} {name}: no such results; known are {listing}{nearest(name, known)}")
