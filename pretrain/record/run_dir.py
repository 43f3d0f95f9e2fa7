"""The directory of a run: the only place that spells the names in it, and the only answer to "is this a run?".

    RUN_ID/  recipe.yaml          the resolved recipe; whatever holds one is a run
             journal.jsonl        the event log, written by rank 0 and the driver
             evaluations.jsonl    scores of its checkpoints, written by the driver
             mlflow.json          how much of the two has reached MLflow (mlflow-sent.jsonl: which checkpoints and
                                  scores; tracking-rejected.jsonl: what never will)
             checkpoints/         by step (`pretrain.checkpoints.store`)
             visualizations/      by step; of evaluation data by name and kind, too
             samples/             which samples each rank took, if asked for
             logs/                output of the processes
             stop                 a request to end after the next step
             stop-now             a request to end at once
             regroup              a request to begin again with other workers
             training             there while workers train: evaluations leave the cores to them
             heartbeat/           what each rank is doing, while it does it
             report.html
             driver.json          in a remote storage: which machine drives it (`pretrain.remote.lease`)
             .lease               on a machine that drives it, or did: what it is called there

Not here: what the files mean (`pretrain.record.events`), what a checkpoint holds beside the names of its files.
"""

from __future__ import annotations

import re
import secrets
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import RequestError, listed, nearest
from pretrain.remote.places import shown_storage

__all__ = [
    "BACKBONE",
    "EXPORTED_FILES",
    "HEADS",
    "LISTED_FOLDERS",
    "MANIFEST",
    "RECIPE",
    "RECORD_FOLDERS",
    "SIGNALLED",
    "RunDir",
    "checked_run_id",
    "find_run",
    "is_run_id",
    "new_run_id",
    "resume_command",
    "runs_in",
    "shown_run",
    "stopped_line",
]

RECIPE = "recipe.yaml"  # of a run and of each of its checkpoints
BACKBONE = "backbone.safetensors"
HEADS = "heads.safetensors"  # of an objective with heads that another run can learn from, or that are evaluated
MANIFEST = "checkpoint.json"
_FOLDERS = ("logs", "visualizations", "samples")
RECORD_FOLDERS = ("", "checkpoints", *_FOLDERS)  # that a remote storage has, beside those of checkpoints
LISTED_FOLDERS = ("", "checkpoints")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # also a good id of a Ray job, and its log file's name
_BEFORE_IT_BEGAN = {"logs", "stop", "stop-now", "training"}  # of a driver that was killed, with files `.NAME` of locks
SIGNALLED = "a signal"  # what the files `stop` and `stop-now` say that a driver writes for one
EXPORTED_FILES = (BACKBONE, MANIFEST, RECIPE)  # of a checkpoint: all that using its backbone takes


@dataclass(frozen=True)
class RunDir:
    """The paths of one run. Nothing is opened or made, except where a method says so."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def is_run(self) -> bool:
        """Whether a run lives here: its recipe does."""
        return self.recipe.is_file()

    @property
    def is_free(self) -> bool:
        """Whether a run can begin here: nothing is there, or what a driver leaves that was killed before it began."""
        try:
            return {path.name for path in self.path.iterdir() if path.name[0] != "."} <= _BEFORE_IT_BEGAN
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            return False

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def cursor(self) -> Path:
        """What has reached MLflow (`pretrain.tracking.cursor`)."""
        return self.path / "mlflow.json"

    @property
    def sent(self) -> Path:
        """Which checkpoints and evaluations have reached MLflow (`pretrain.tracking.cursor`)."""
        return self.path / "mlflow-sent.jsonl"

    @property
    def sender_lock(self) -> Path:
        """Held by the one process that sends the run to MLflow."""
        return self.path / "mlflow.lock"

    @property
    def driver_lock(self) -> Path:
        """Held by the one process that drives the run."""
        return self.path / ".driver.lock"

    @property
    def driver_lease(self) -> Path:
        """Its name in a remote storage says which machine drives the run."""
        return self.path / "driver.json"

    @property
    def lease_token(self) -> Path:
        """What this machine is called in `driver_lease`."""
        return self.path / ".lease"

    @property
    def stored_at(self) -> Path:
        """The URI of the storage that holds the checkpoints instead of the directory of this file."""
        return self.path / "checkpoints" / "stored_at.txt"

    @property
    def rejected(self) -> Path:
        """Lines that MLflow does not get."""
        return self.path / "tracking-rejected.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def evaluations_log(self) -> Path:
        """How far evaluations that take long are, of all processes that make them."""
        return self.logs / "evaluations.log"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def driver_log(self) -> Path:
        return self.logs / "driver.log"

    @property
    def stop_request(self) -> Path:
        """While it exists the workers end after their next step, with a checkpoint."""
        return self.path / "stop"

    @property
    def stop_now_request(self) -> Path:
        """While it exists the driver ends at once."""
        return self.path / "stop-now"

    @property
    def is_stop_asked(self) -> bool:
        """Whether anybody asks for the end of the run: a person, or a signal that its driver has heard."""
        return self.stop_request.exists() or self.stop_now_request.exists()

    @property
    def is_stop_wanted(self) -> bool:
        """Whether a person asks for the end of the run, by a file; one for a signal says `SIGNALLED`."""
        asked = [path.read_text() for path in (self.stop_request, self.stop_now_request) if path.exists()]
        return any(text != SIGNALLED for text in asked)

    @property
    def regroup_request(self) -> Path:
        """While it exists the workers end soon, with a checkpoint, to begin again (`pretrain.training.stopping`)."""
        return self.path / "regroup"

    @property
    def training(self) -> Path:
        """While it exists workers train, and evaluations leave the cores to them."""
        return self.path / "training"

    def take_back_requests(self) -> None:
        """Before workers start: what was asked of those before them is done."""
        for asked in (self.stop_request, self.stop_now_request, self.regroup_request):
            asked.unlink(missing_ok=True)

    def worker_log(self, rank: int) -> Path:
        return self.logs / f"worker-{rank}.log"

    def worker_stacks(self, rank: int) -> Path:
        """Stacks of all threads of a rank that hung, or was asked for them."""
        return self.logs / f"worker-{rank}.stacks"

    def heartbeat(self, rank: int) -> Path:
        """What a rank is doing (`pretrain.record.heartbeat`)."""
        return self.path / "heartbeat" / f"rank-{rank:05d}"

    def heartbeats(self) -> list[Path]:
        """Of all ranks that have begun and not ended, by rank."""
        return sorted((self.path / "heartbeat").glob("rank-*"))

    def rank_of(self, heartbeat: Path) -> int:
        """Whose heartbeat a file is."""
        return int(heartbeat.name.removeprefix("rank-"))

    def samples(self, rank: int) -> Path:
        """The record of samples of one rank."""
        return self.path / "samples" / f"rank-{rank:05d}.jsonl"

    def visualizations(self, step: int, data: str = "", shows: str = "") -> Path:
        """A picture of what the objective makes, or one of the kind `shows` of what a checkpoint makes of data."""
        about = f"-{_in_a_name(data)}-{shows}" if shows else ""
        return self.path / "visualizations" / f"step-{step:08d}{about}.png"

    def visualizations_of(self, data: str, shows: str, *, but: int) -> dict[int, Path]:
        """The pictures of a kind of all checkpoints, by step, but that of the step `but`."""
        suffix = self.visualizations(0, data, shows).name.removeprefix(f"step-{0:08d}")
        found = (self.path / "visualizations").glob(f"step-*{suffix}")
        steps = {path.name.removeprefix("step-").removesuffix(suffix): path for path in found}
        return {int(step): path for step, path in steps.items() if step.isdecimal() and int(step) != but}

    def record(self) -> list[str]:
        """Names of all files that a remote storage keeps of the run, those first that tell of others.

        The recipe, which makes it a run, tells of all; files that say how much has reached MLflow, of the event log.
        """
        tell = (self.recipe, self.report, self.cursor, self.sent, self.rejected, self.evaluations, self.journal)
        told = [path for folder in _FOLDERS for path in sorted((self.path / folder).glob("*")) if path.is_file()]
        return [self.relative(path) for path in (*tell, *told, self.stored_at) if path.is_file()]

    def is_record(self, name: str) -> bool:
        """Whether the record of a run has files of that name, given relative to its directory."""
        folder, _, file = name.rpartition("/")
        is_below = folder in _FOLDERS and bool(_RUN_ID.fullmatch(file))
        return is_below or name in map(self.relative, (*self._about_scores, *self._besides))

    def is_listed(self, name: str) -> bool:
        """Whether the file tells which checkpoints the run has and what they are worth."""
        return name in map(self.relative, self._about_scores)

    def is_about_progress(self, name: str) -> bool:
        """Whether the file tells how the run stands: one that `is_listed`, its event log, or who drives it."""
        return self.is_listed(name) or name in map(self.relative, (self.journal, self.driver_lease))

    @property
    def _about_scores(self) -> tuple[Path, ...]:
        return self.recipe, self.evaluations, self.cursor, self.stored_at

    @property
    def _besides(self) -> tuple[Path, ...]:
        return self.report, self.sent, self.rejected, self.journal

    def relative(self, path: Path) -> str:
        """How events name a file of the run."""
        return path.relative_to(self.path).as_posix()

    def inside(self, relative: str) -> Path:
        """The file that an event names.

        Raises:
            ValueError: It lies outside the run directory.
        """
        path = (self.path / relative).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise ValueError(f"{relative!r} is outside the run directory")
        return path


def runs_in(storage: Path) -> list[RunDir]:
    """The runs of a storage directory, by name; names begin with the recipe, then the time."""
    return sorted((RunDir(path.parent) for path in storage.glob(f"*/{RECIPE}")), key=lambda run: run.run_id)


def _in_a_name(word: str) -> str:
    """As much of a word as the name of a file of the record may hold."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", word)[:40]


def is_run_id(name: str) -> bool:
    """Whether a run can have that name: no path leads out of a storage by it."""
    return bool(_RUN_ID.fullmatch(name))


def checked_run_id(run_id: str) -> str:
    """`run_id`, if a run can have that name.

    Raises:
        RequestError: It can not.
    """
    if not is_run_id(run_id):
        wanted = "expected a letter or digit, then up to 99 letters, digits, '.', '_' and '-'"
        raise RequestError(f"--run-id {shlex.quote(run_id)}: {wanted} (it names a directory)")
    return run_id


def find_run(run_id: str, storage: Path) -> RunDir:
    """The run of that name.

    Raises:
        RequestError: There is none; names the closest one, or the newest.
    """
    run = RunDir(storage / run_id)
    if "=" in run_id:
        raise RequestError(f"{run_id}: a setting, and the run comes first: pretrain resume RUN_ID {run_id}")
    if not run_id or not run.is_run:
        known = [found.run_id for found in runs_in(storage)]
        hint = nearest(run_id, known) or f"; there are: {listed(known[-8:])}"
        raise RequestError(f"run {run_id or '(empty)'}: not in {shown_storage(storage.absolute())}{hint}")
    return run


def new_run_id(name: str) -> str:
    """A name for a run that no other has: that of its recipe, the time, and four digits by chance."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def shown_run(run_dir: RunDir) -> str:
    """Where a run is, for people."""
    storage = run_dir.path.parent
    place = shown_storage(storage)
    return str(run_dir.path) if place == str(storage) else f"{place}/{run_dir.run_id}, its working copy {run_dir.path}"


def resume_command(run_dir: RunDir) -> str:
    """What to type, in this directory, to go on with a run."""
    storage = run_dir.path.parent
    place = "" if storage == Path("runs").absolute() else f" --storage {shlex.quote(shown_storage(storage))}"
    return f"pretrain resume {run_dir.run_id}{place}"


def stopped_line(run_dir: RunDir, step: int) -> str:
    """Where a run stands that was stopped on request, and how to go on."""
    return f"stopped after step {step}, with a checkpoint; go on with: {resume_command(run_dir)}"
