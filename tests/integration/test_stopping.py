"""A run that is asked to stop publishes a checkpoint after the step at work, exits with 75 and goes on from there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.checkpoints import store
from pretrain.record.events import Finished, Regrouping, Resumed, Start, Stopped
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir
from pretrain.training.stopping import ask_to_regroup

pytestmark = pytest.mark.integration

Launch = Callable[..., Any]
Losses = Callable[[Path], dict[int, float]]
RARELY = ("train.checkpoint_every=12", "evaluation.baseline=false")  # no checkpoint is due before the end


def _ask_by_file(loop: Any) -> None:
    RunDir(loop.run_dir).stop_request.touch()


def _ask_by_signal(loop: Any) -> None:
    os.kill(loop.processes[1].pid, signal.SIGTERM)  # one rank only


def _ask_all(loop: Any) -> None:
    """As a scheduler does with every process of a step: the loader processes hear it as well."""
    for process in [child for rank in loop.processes for child in psutil.Process(rank.pid).children(recursive=True)]:
        process.terminate()
    for process in loop.processes:
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)  # an echo, not a second request


@pytest.mark.parametrize("ask", [_ask_by_file, _ask_by_signal, _ask_all])
def test_stop__all_ranks_end_after_the_same_step_and_nothing_is_lost(
    ask: Callable[[Any], None], launch: Launch, losses: Losses, wait_for: Callable[..., None], whole: Path
) -> None:
    loop = launch("stopped", *RARELY)
    wait_for(lambda: max(losses(loop.run_dir), default=0) >= 3, 240, loop.log)
    ask(loop)
    assert loop.exit_codes() == [75, 75]
    event = read_events(loop.run_dir / "journal.jsonl")[0][-1]
    assert isinstance(event, Stopped) and 3 <= event.step < 12
    newest = store.latest(loop.run_dir)
    assert newest is not None and newest.step == event.step

    launch("stopped", *RARELY).wait()  # the request was for the run that it has stopped
    assert losses(loop.run_dir) == losses(whole)
    events = read_events(loop.run_dir / "journal.jsonl")[0]
    assert [found.step for found in events if isinstance(found, Resumed)] == [event.step]
    assert isinstance(events[-1], Finished)


def test_stop__to_begin_again_with_other_ranks_waits_for_the_next_checkpoint(
    launch: Launch, losses: Losses, wait_for: Callable[..., None], whole: Path
) -> None:
    settings = ("train.workers=[1,2]", "evaluation.baseline=false")
    loop = launch("regrouped", *settings)
    wait_for(lambda: max(losses(loop.run_dir), default=0) >= 1, 240, loop.log)
    ask_to_regroup(RunDir(loop.run_dir), "checkpoint", "room for one")
    assert loop.exit_codes() == [75, 75]
    event = read_events(loop.run_dir / "journal.jsonl")[0][-1]
    assert isinstance(event, Regrouping) and event.why == "room for one" and event.step in (4, 8)

    launch("regrouped", *settings, ranks=1).wait()
    events = read_events(loop.run_dir / "journal.jsonl")[0]
    assert [found.world_size for found in events if isinstance(found, Start)] == [2, 1]
    assert sorted(losses(loop.run_dir)) == list(range(1, 13)) and isinstance(events[-1], Finished)
    found, wanted = losses(loop.run_dir), losses(whole)
    assert all(found[step] == pytest.approx(wanted[step], rel=1e-4) for step in wanted)


def test_stop__asked_before_the_last_step_ends_the_run_as_finished(launch: Launch) -> None:
    """A request that comes too late changes nothing: what is done is done."""
    loop = launch("late", "train.steps=1", "optimizer.warmup_steps=0")
    loop.wait()
    RunDir(loop.run_dir).stop_request.touch()
    again = launch("late", "train.steps=1", "optimizer.warmup_steps=0")
    again.wait()
    assert isinstance(read_events(loop.run_dir / "journal.jsonl")[0][-1], Finished)
