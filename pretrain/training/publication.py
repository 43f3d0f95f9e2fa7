"""Checkpoints are published beside training: it waits for a copy in memory, not for disks and stores.

When a checkpoint is due, each rank copies what it has to write into memory of the host and goes on. One thread per rank
writes the copy, digests it on the way and hands it to the storage. These threads never meet in a collective, which
would mix with those of training: they leave each other notes in the storage (`begun`, then `rank-00001.done` with
names, sizes and digests), and rank 0's publishes when it has read those of all ranks.

At most one publication is under way: one that is due waits for the one before, and there all ranks agree on how that
has ended. The last checkpoint of a stage, that of a run that is stopped, and all of them where
`checkpoints.asynchronous` is false or memory is short, are waited for. What fails beside training (a full disk, a store
that is away) is a warning, and the next one that is due tries again; nothing published before is touched. What is
waited for and fails ends the run. In ZeRO stage 3 training waits for DeepSpeed's files, which only DeepSpeed can write,
and goes on while they are digested and handed over.

Not here: what is in a checkpoint (`pretrain.training.state`), the files (`pretrain.checkpoints.store`).
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from data_pipelines.streaming.stream import Stream
from pretrain.checkpoints import store
from pretrain.checkpoints.leftovers import Leftovers
from pretrain.config.stages import Stage
from pretrain.machine import free_memory
from pretrain.record.disk import DiskFull, naming_disk, require_room
from pretrain.record.events import CheckpointPublished, Event, Warned
from pretrain.record.remote_runs import drives_no_more, push_record
from pretrain.record.run_dir import RunDir
from pretrain.training import state
from pretrain.training.engine import Engine
from pretrain.training.tensor_files import HostBuffer

__all__ = ["Publisher"]

_Share = dict[str, dict[str, Any]]  # of one rank, as `store.hand_over` gives it
Found = TypeVar("Found")

log = logging.getLogger(__name__)

GRACE_S = 60.0  # that a process which ends by an error gives a publication under way
SPARE = 0.2  # of the memory that is free is left alone
FIRST_LOOK_S, LONGEST_LOOK_S = 0.02, 1.0  # between two looks for notes


class Publisher:
    """Publishes the checkpoints of a stage; every rank has one, and all call `take` alike.

    Args:
        run: Which run.
        stage: At work; its recipe is saved along.
        engine: What to save.
        stream: Whose position is saved.
        origin: What the run started from, for `checkpoint.json`; None: from scratch.
        emit: Takes what is to be told of publications.
    """

    def __init__(
        self,
        run: RunDir,
        stage: Stage,
        engine: Engine,
        stream: Stream,
        origin: Mapping[str, Any] | None = None,
        emit: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._run, self._stage, self._engine, self._stream = run, stage, engine, stream
        self._origin, self._emit = origin, emit
        self._buffer = HostBuffer(engine.device)
        self._writing: _Writing | None = None
        self._is_told = True  # of `_writing`
        self._has_failed = False  # since the last one that was published
        self._is_short = False  # of memory; said once
        if dist.get_rank() == 0:
            store.discard_unpublished(run.path)  # of processes that have ended
        self._leftovers = Leftovers(run.path) if dist.get_rank() == 0 else None
        attempt = [secrets.token_hex(4)]
        dist.broadcast_object_list(attempt, src=0)  # all ranks: what they write together has one name
        self._attempt = attempt[0]

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is still under way, where an error ends the stage, gets a while; no collective."""
        if self._writing is not None:
            if error is None or isinstance(error, Exception):  # Ctrl-C, at last, does not wait
                self._writing.join(GRACE_S)
            self._writing.abort()
            self.tell()

    def take(self, step: int, *, training_state: bool = True, is_last: bool = False) -> None:
        """Publish a checkpoint after `step` steps of the run, beside training where that may be. A collective.

        Args:
            step: Steps of the run that are done.
            training_state: False for the backbone alone (that of step 0, which nobody resumes from).
            is_last: Nothing follows that could publish again: wait, and fail if it fails.

        Raises:
            DiskFull: There is no room for it, and it was waited for.
            CheckpointError: It could not be published otherwise.
        """
        self._settle(is_needed=False)  # the one before
        staged = None
        if training_state and self._engine.stage == 3:  # whose files are DeepSpeed's
            with naming_disk(self._run.path, _name(step), self._engine.state_bytes()):
                staged = store.stage(self._run.path, step, dist.get_rank(), self._attempt)
                self._engine.save(staged / store.TRAINING_STATE)
        contents = state.contents(self._engine, self._stage.recipe, training_state=training_state)
        is_asked = self._stage.recipe.checkpoints.asynchronous
        is_beside = is_asked and not is_last and self._has_room(step, contents)
        if is_beside:
            contents = contents._replace(files=self._buffer.copy(contents.files))
        place = (self._run.path, self._stage, self._engine, self._stream, step)
        manifest = state.manifest(*place, contents.heads, self._origin)
        leftovers = self._leftovers
        self._writing = _Writing(self._run.path, step, self._attempt, contents, manifest, staged, leftovers)
        self._is_told = False
        self._writing.start()
        if not is_beside:
            self._settle(is_needed=is_last or not is_asked)

    def tell(self) -> None:
        """Emit what has become of the publication under way, once; between two steps, no collective."""
        if self._writing is not None and not self._is_told and not self._writing.is_alive():
            self._report(self._writing, self._writing.problem)

    def _settle(self, *, is_needed: bool) -> None:
        """Wait for the publication under way; all ranks learn how it ended. A collective.

        Raises:
            DiskFull, CheckpointError: It failed, and is needed.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            _agree(writing.begun())
            writing.go_ahead()
            writing.complete(_agree(writing.written()))
            _agree(writing.published())
            problem = None
        except _Failed as failed:
            problem = failed.problem
            writing.abort()
        writing.join()
        if problem is not None and is_needed:
            raise (DiskFull if problem.is_disk else store.CheckpointError)(problem.text)
        if not self._is_told:
            self._report(writing, problem)

    def _report(self, writing: _Writing, problem: _Problem | None) -> None:
        self._is_told = True
        if problem is None:
            self._has_failed = False
            path = self._run.relative(store.checkpoint_path(self._run.path, writing.step))
            self._emit(CheckpointPublished(step=writing.step, path=path))
        elif not self._has_failed:
            self._has_failed = True
            text = f"{_name(writing.step)} was not published: {problem.text}; training goes on and tries the next one"
            self._emit(Warned(step=writing.step, about="checkpoint", text=text))

    def _has_room(self, step: int, contents: state.Contents) -> bool:
        """Whether the memory of every rank takes a copy, as all ranks of a machine allocate theirs. A collective."""
        missing = self._buffer.missing(contents.files)
        wanted = missing * int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        answers: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(answers, wanted <= (1 - SPARE) * free_memory() or not missing)  # all ranks wait, or none
        if not all(answers) and not self._is_short:
            self._is_short = True
            copy = f"no memory for a copy of the training state ({missing / 1e9:.1f} GB per worker)"
            text = f"{copy}: training waits while a checkpoint is written"
            self._emit(Warned(step=step, about="checkpoint_memory", text=text))
        return all(answers)


class _Problem(NamedTuple):
    """Why a publication failed, as one rank tells the others."""

    text: str
    is_disk: bool


class _Failed(Exception):
    """A publication has, on some rank."""

    def __init__(self, problem: _Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def _agree(answer: _Problem | _Share | None) -> list[Any]:
    """The answers of all ranks. A collective.

    Raises:
        _Failed: One is a problem; on all ranks.
    """
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, answer)  # all ranks: go on, or give up alike
    for each in answers:
        if isinstance(each, _Problem):
            raise _Failed(each)
    return answers


class _Aborted(Exception):
    """Another rank has failed."""


class _Writing(threading.Thread):
    """The publication of one checkpoint, as far as it is this rank's. Rank 0's is over when it is published.

    It learns of the other ranks by their notes, or sooner from its own rank when they meet at a border of two steps.
    A daemon: a process that is to end at once does not wait for it.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        attempt: str,
        contents: state.Contents,
        manifest: Mapping[str, Any],
        staged: Path | None,
        leftovers: Leftovers | None,
    ) -> None:
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.step = step
        self.problem: _Problem | None = None
        self._run_dir, self._attempt, self._contents, self._manifest = run_dir, attempt, contents, manifest
        self._staged, self._leftovers = staged, leftovers
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", self._num_ranks))  # that write to the same disk
        self._storage = store.storage_of(run_dir)
        self._has_begun, self._has_written, self._has_news = threading.Event(), threading.Event(), threading.Event()
        self._is_aborted = self._may_hand_over = False
        self._share: _Share = {}
        self._shares: list[_Share] | None = None  # of all ranks

    def begun(self) -> _Problem | None:
        """Wait until rank 0 has made room in the storage, which the others wait for; what went wrong."""
        if self._rank == 0:
            self._has_begun.wait()
            return self.problem
        return None

    def go_ahead(self) -> None:
        """Rank 0 has begun."""
        self._may_hand_over = True
        self._has_news.set()

    def written(self) -> _Problem | _Share:
        """Wait until the storage has this rank's files; what they are, or what went wrong."""
        self._has_written.wait()
        return self.problem or self._share

    def complete(self, shares: list[_Share]) -> None:
        """All ranks have written."""
        self._shares = shares
        self._has_news.set()

    def published(self) -> _Problem | None:
        """Wait until all is over; what went wrong."""
        self.join()
        return self.problem

    def abort(self) -> None:
        """Leave it: another rank has failed."""
        self._is_aborted = True
        self._has_news.set()

    def run(self) -> None:
        """Write, hand over, and on rank 0 publish."""
        try:
            with naming_disk(self._run_dir, _name(self.step), self._num_bytes):
                if self._rank == 0:
                    self._require_unpublished()
                    store.begin(self._storage, self.step, self._attempt)
                    store.note(self._storage, self.step, self._attempt, "begun", {})
                self._has_begun.set()
                self._share = self._hand_over()
                store.note(self._storage, self.step, self._attempt, _done(self._rank), self._share)
                self._has_written.set()
                if self._rank == 0:
                    self._publish()
        except Exception as error:  # whatever a disk or a store's client raises: it is told to all ranks
            if not isinstance(error, OSError | DiskFull | store.CheckpointError | _Aborted):
                log.warning("%s", _name(self.step), exc_info=True)
            text = (
                str(error)
                if isinstance(error, DiskFull | store.CheckpointError)
                else f"{type(error).__name__}: {error}"
            )
            self.problem = _Problem(text, isinstance(error, DiskFull))
            self._clean()
        finally:
            self._has_begun.set()
            self._has_written.set()

    @property
    def _num_bytes(self) -> int:
        return sum(file.num_bytes for file in self._contents.files.values())

    def _hand_over(self) -> _Share:
        staged = self._staged or store.stage(self._run_dir, self.step, self._rank, self._attempt)
        self._staged = staged
        require_room(staged, _name(self.step), self._num_bytes * self._neighbors)
        digests = {}
        for name, file in self._contents.files.items():
            self._require_going_on()
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            digests[name] = file.write(staged / name)
        for name, text in self._contents.texts.items():
            (staged / name).write_bytes(text)
        if self._rank > 0:
            self._wait_for(lambda: self._may_hand_over or "begun" in self._notes())
        return store.hand_over(self._storage, self.step, staged, self._attempt, digests)

    def _publish(self) -> None:
        shares = self._wait_for(self._find_shares)
        self._require_unpublished()
        run = RunDir(self._run_dir)
        if drives_no_more(run):
            raise store.CheckpointError("another machine drives the run now; left alone")
        push_record(run)  # first: a remote storage never has a checkpoint of steps that its event log does not tell of
        store.publish(self._storage, self.step, self._manifest, shares, self._attempt)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Of processes that were killed; what is published is published, whether that succeeds or not."""
        if self._leftovers is None:
            return
        try:
            self._leftovers.remove()
        except Exception as error:  # of a store that is away: the next publication tries it again
            log.warning("what is left of a checkpoint that was not published could not be removed: %s", error)

    def _require_unpublished(self) -> None:
        """A process that was given up and lives on must not replace what those who took over have published."""
        found = store.find_published(self._run_dir, self.step)
        if found is not None and found.has_training_state:
            raise store.CheckpointError(
                f"{found.location}: published meanwhile by other workers of this run; left alone"
            )

    def _find_shares(self) -> list[_Share] | None:
        """Of all ranks, when all have written."""
        if self._shares is not None:
            return self._shares
        notes, names = self._notes(), [_done(rank) for rank in range(self._num_ranks)]
        return [notes[name] for name in names] if notes.keys() >= set(names) else None

    def _notes(self) -> dict[str, Any]:
        return store.notes(self._storage, self.step, self._attempt)

    def _wait_for(self, look: Callable[[], Found | None]) -> Found:
        """What `look` finds at last."""
        pause_s = FIRST_LOOK_S
        while not (found := look()):
            self._has_news.wait(pause_s)
            self._has_news.clear()
            self._require_going_on()
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return found

    def _require_going_on(self) -> None:
        if self._is_aborted:
            raise _Aborted("another worker failed")

    def _clean(self) -> None:
        """Make room; what cannot be removed now goes when a group of workers begins."""
        try:
            if self._staged is not None:
                store.unstage(self._staged)
            if self._rank == 0:
                store.discard(self._storage, self.step, self._attempt)
        except Exception as error:  # of a store that is away: what failed first is what people have to know
            log.warning("%s: its remains could not be removed: %s", _name(self.step), error)


def _name(step: int) -> str:
    return f"the checkpoint of step {step}"


def _done(rank: int) -> str:
    return f"rank-{rank:05d}.done"
