"""The training loop without Ray: two gloo processes, killed and resumed, and under torchrun itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.files import sha256
from pretrain.checkpoints import copies
from pretrain.checkpoints import store as checkpoint
from pretrain.record.events import CheckpointPublished, Metrics, Resumed, Warned
from pretrain.record.journal import read_events

pytestmark = pytest.mark.integration

Launch = Callable[..., Any]
Losses = Callable[[Path], dict[int, float]]
Samples = Callable[[Path], dict[int, dict[int, list[int]]]]


class Code:
    """Makes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def forge(file: Path, trace: Path) -> None:
    """Put code beside what DeepSpeed wrote."""
    torch.save({**torch.load(file, weights_only=False), "more": Code(trace)}, file)


def test_loop__killed_and_resumed_equals_uninterrupted(launch: Launch, losses: Losses, whole: Path) -> None:
    expected = losses(whole)
    assert sorted(expected) == list(range(1, 13))
    assert expected[12] < expected[1]

    broken = launch("broken")
    broken.kill_after_step(6)
    launch("broken").wait()
    assert losses(broken.run_dir) == expected  # bit for bit, steps trained twice included

    events = read_events(broken.run_dir / "journal.jsonl")[0]
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.step == resumed.optimizer_step == 4
    assert resumed.tensors == resumed.tensors_total > 20
    assert resumed.samples_seen == 4 * 32
    final = [(run / "checkpoints/step-00000012/backbone.safetensors").read_bytes() for run in (whole, broken.run_dir)]
    assert final[0] == final[1]


def test_loop__killed_while_a_checkpoint_is_written_goes_on_from_one_that_is_whole(
    launch: Launch, losses: Losses, whole: Path
) -> None:
    """Written beside training, the one of step 8 may or may not be published when a later step is done."""
    options = ("checkpoints.asynchronous=true", "train.zero_stage=2", "train.keep_last=9")
    broken = launch("beside", *options)
    broken.kill_after_step(9)
    launch("beside", *options).wait()
    assert losses(broken.run_dir) == pytest.approx(losses(whole), rel=1e-6)  # of another ZeRO stage

    events = read_events(broken.run_dir / "journal.jsonl")[0]
    published = [event.step for event in events if isinstance(event, CheckpointPublished)]
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.step in (4, 8) and resumed.tensors == resumed.tensors_total > 20
    assert published[-1] == 12 and set(published) | {resumed.step} == {0, 4, 8, 12}
    for found in checkpoint.published(broken.run_dir):
        checkpoint.verify(copies.local(found))
    assert not list((broken.run_dir / "checkpoints").glob(".*"))


def test_loop__goes_on_with_another_number_of_ranks(
    launch: Launch, losses: Losses, samples: Samples, whole: Path
) -> None:
    """Two ranks, then one, then two again: exactly the samples that remain, and nearly the same losses."""
    options = ("data.record_samples=true", "evaluation.baseline=false")
    launch("parts", *options).kill_after_step(6)  # checkpoints are taken every 4 steps
    launch("parts", *options, "train.workers=1", ranks=1).kill_after_step(10)
    parts = launch("parts", *options)
    parts.wait()

    (wanted,) = samples(whole).values()
    found = samples(parts.run_dir)
    assert set(found[2]) | set(found[1]) == set(wanted) == set(range(1, 13))
    assert all(ids == wanted[step] for steps in found.values() for step, ids in steps.items())
    events = read_events(parts.run_dir / "journal.jsonl")[0]
    resumed = [event for event in events if isinstance(event, Resumed)]
    assert [(event.step, event.saved_world_size) for event in resumed] == [(4, 2), (8, 1)]
    assert all(event.tensors == event.tensors_total for event in resumed)
    expected = losses(whole)
    for event in events:
        if isinstance(event, Metrics):
            assert event.values["loss"] == pytest.approx(expected[event.step], rel=1e-4)


def test_loop__damaged_or_forged_checkpoint_is_refused_by_name(launch: Launch) -> None:
    """Also one whose files are as its manifest lists them, and run code where they are unpickled."""
    first = launch("damaged", "train.steps=4", "train.zero_stage=3")  # whose files DeepSpeed writes
    first.wait()
    found = checkpoint.latest(first.run_dir)
    assert found is not None
    state = next((copies.local(found) / "training_state/deepspeed").glob("*optim_states.pt"))
    whole = state.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    again = launch("damaged")
    assert again.exit_codes() == [1, 1]
    assert f"{state.name}: contents differ from the SHA-256" in again.log.read_text()

    state.write_bytes(whole)
    forge(state, first.run_dir / "executed")
    manifest = found.manifest()
    name = state.relative_to(copies.local(found)).as_posix()
    manifest["files"][name] = {"sha256": sha256(state), "bytes": state.stat().st_size}
    found.storage.mark(f"{found.name}/checkpoint.json", json.dumps(manifest).encode())
    alone = launch("damaged", "train.workers=1", ranks=1)  # reshards: every file is read by rank 0
    assert alone.exit_codes() == [1]
    assert "training_state: holds something else than tensors, numbers and texts" in alone.log.read_text()
    assert not (first.run_dir / "executed").exists()


def test_loop__wrong_request_is_one_line_and_exit_code_2(launch: Launch) -> None:
    loop = launch("wrong", "train.stepz=4", ranks=1)
    assert loop.exit_codes(60) == [2]
    assert "train.steps" in loop.log.read_text()
    assert "Traceback" not in loop.log.read_text()
    loop = launch("crowded", ranks=1)  # the recipe has two
    assert loop.exit_codes(60) == [2]
    assert "error: train.workers=2: 1 processes were started; add train.workers=1" in loop.log.read_text()


def test_loop__a_training_state_of_other_settings_is_one_line(launch: Launch) -> None:
    alone = ("train.workers=1", "train.checkpoint_every=2", "optimizer.warmup_steps=0", "train.zero_stage=1")
    launch("other", *alone, "train.steps=2", ranks=1).wait()
    for text, said in (
        ("train.zero_stage=2", "taken with train.zero_stage=1, and it is 2 here"),
        ("train.precision=bf16", "taken with train.precision=fp32, and it is bf16 here"),
    ):
        again = launch("other", *alone, "train.steps=4", text, ranks=1)
        assert again.exit_codes(100) == [1]
        log = again.log.read_text()
        assert "Traceback" not in log and f"step-00000002: {said}" in log


def test_loop__a_run_that_learns_nothing_is_reported_and_stopped_if_asked(launch: Launch) -> None:
    stuck = ("optimizer.base_lr=1e-9", "train.steps=120", "train.checkpoint_every=120", "evaluation.baseline=false")
    loop = launch("stuck", *stuck, "train.stop_on_collapse=true", "train.workers=1", ranks=1)
    assert loop.exit_codes() == [1]
    (warning,) = [event for event in read_events(loop.run_dir / "journal.jsonl")[0] if isinstance(event, Warned)]
    assert (warning.about, warning.step) == ("collapse", 103)  # the third finding in a row, from step 101 on
    assert "no better than by their mean colour" in warning.text
    assert "stopped at step 103, train.stop_on_collapse is set: masked pixels" in loop.log.read_text()


def test_loop__losses_that_are_not_finite_end_the_run_with_the_reason(launch: Launch) -> None:
    """A learning rate that blows the weights up in the first step: every loss after it is infinite or not a number."""
    blown_up = ("optimizer.lr=1e30", "optimizer.base_lr=null", "optimizer.warmup_steps=0", "optimizer.clip_grad=null")
    loop = launch("blown", *blown_up, "train.max_skipped_steps=2", "evaluation.baseline=false")
    assert loop.exit_codes() == [1, 1]
    warnings = [event for event in read_events(loop.run_dir / "journal.jsonl")[0] if isinstance(event, Warned)]
    assert [(event.about, event.step) for event in warnings] == [("non_finite_loss", step) for step in (2, 3, 4)]
    last = "3 steps were skipped, at last: the loss of step 4 is not finite on ranks 0, 1; lower optimizer.lr"
    assert last in loop.log.read_text()
    assert not list((loop.run_dir / "checkpoints").glob("step-*"))


@pytest.mark.long
def test_torchrun__two_processes(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [
        "-m",
        "pretrain.worker",
        str(recipe),
        "train.steps=4",
        "train.zero_stage=2",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 4/4  loss" in done.stdout
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000004/checkpoint.json").read_text())
    assert (manifest["world_size"], manifest["zero_stage"], manifest["samples_seen"]) == (2, 2, 128)
    assert manifest["exported"] == "encoder"  # "teacher" where an objective has one


def test_loop__ends_with_one_line_when_a_loader_process_is_killed(
    launch: Launch, wait_for: Callable[..., None]
) -> None:
    """As by a kernel that is short of memory; whatever the training process does at that moment."""
    long_run = ("train.workers=1", "train.steps=100000", "train.checkpoint_every=100000")
    loop = launch("orphaned", *long_run, ranks=1)
    journal = loop.run_dir / "journal.jsonl"
    wait_for(lambda: journal.exists() and '"metrics"' in journal.read_text(), 60, loop.log)
    pid = loop.processes[0].pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert loop.exit_codes() == [1]
    log = loop.log.read_text()
    assert "Traceback" not in log
    assert [line for line in log.splitlines() if line.startswith("error: a loader process was lost (process ")], log
