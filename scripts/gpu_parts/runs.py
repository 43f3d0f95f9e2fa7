"""Runs through torchrun and the training loop: does one train, and does one that is killed resume."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

from gpu_parts.questions import Check, Row, difference, verdict
from gpu_parts.training import SMALL_HEADS, SMALL_VIT

__all__ = ["loop", "resume"]

RESUMED = 1e-4  # relative, of the first ten losses after a resume; kernels that add in any order differ by some 1e-6


class Run:
    """A run through torchrun and the training loop, in a directory of its own."""

    def __init__(self, check: Check, name: str, recipe: str, overrides: Sequence[str]) -> None:
        from pretrain.record.run_dir import RunDir

        small = [*SMALL_VIT, *SMALL_HEADS[recipe.partition("_")[0]]] if check.quick else []
        common = [
            f"data.train={check.data}", "data.root=unused", "data.record_samples=true", "evaluation.enabled=false",
            "train.workers=1", f"train.device={check.device}", "train.log_every=1",
            "backbone.name=vit_small_patch16_224", "optimizer.base_lr=null", "optimizer.lr=1.0e-3",
            "optimizer.warmup_steps=5",
        ]  # fmt: skip
        self.dir = RunDir(check.out / "runs" / name)
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
            *("-m", "pretrain.worker", recipe, *common, *small, *overrides, "--run-dir", str(self.dir.path)),
        ]
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)

    def again(self) -> None:
        """The same command once more."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def finish(self) -> None:
        """Wait for its end."""
        if code := self._process.wait():
            raise RuntimeError(
                f"the run {self.dir.path} ended with exit code {code}; see {self.dir.path.parents[1]}/log"
            )

    def events(self) -> list[Any]:
        from pretrain.record.journal import read_events

        return read_events(self.dir.journal)[0]

    def metrics(self, name: str) -> dict[int, float]:
        """By step; of a step that was trained twice, the second time counts."""
        from pretrain.record.events import Metrics

        return {event.step: event.values[name] for event in self.events() if isinstance(event, Metrics)}

    def samples(self) -> dict[int, list[list[int]]]:
        """What each step was given, each time that it was trained."""
        found: dict[int, list[list[int]]] = {}
        for line in self.dir.samples(0).read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).append(record["ids"])
        return found

    def kill_after(self, step: int) -> None:
        """Kill the worker as soon as the checkpoint of a step is there."""
        from pretrain.record.events import CheckpointPublished, Start

        while self.is_running():
            events = self.events() if self.dir.journal.exists() else []
            if any(isinstance(event, CheckpointPublished) and event.step == step for event in events):
                start = next(event for event in events if isinstance(event, Start))
                psutil.Process(start.pids[0]).kill()
                break
            time.sleep(0.01)
        if self._process.wait() == 0:
            raise RuntimeError("the run was done before it could be killed")


def loop(check: Check, case: str) -> Row:
    """The loop in bf16, ZeRO 1, on real photos: are 50 losses finite, do they fall, how long does it wait for data."""
    num_steps, num_samples = (12, 8) if check.quick else (50, {"mae": 256, "dino": 64}[case])
    overrides = [
        "train.precision=bf16", "train.zero_stage=1", f"train.steps={num_steps}", f"train.checkpoint_every={num_steps}",
        f"train.global_batch_size={num_samples}",
    ]  # fmt: skip
    run = Run(check, f"loop-{case}", f"{case}_photos", overrides)
    run.finish()
    loss = list(run.metrics("loss").values())
    later = num_steps // 3  # what loader processes prepared while the model was built is used up
    row = {
        "samples_per_s": statistics.median(list(run.metrics("samples_per_s").values())[later:]),
        "data_wait_fraction": statistics.median(list(run.metrics("data_wait_fraction").values())[later:]),
        "memory_mb": max(run.metrics("memory_mb").values()),
        "loss_first": statistics.mean(loss[:5]),
        "loss_last": statistics.mean(loss[-5:]),
    }
    if len(loss) != num_steps or not all(map(math.isfinite, loss)):
        return row | {"error": f"{len(loss)} of {num_steps} steps have a loss, or one is not finite", "loss": loss}
    if case == "mae" and not row["loss_last"] < row["loss_first"]:  # that of DINO need not fall so early
        return row | {"error": "the loss has not fallen", "loss": loss}
    return row


def resume(check: Check, case: str) -> Row:
    """A run that is killed behind its checkpoint and goes on, beside one that nobody disturbs; float32 without TF32."""
    num_steps, every, num_samples = (60, 20, 4 if check.quick else 128)
    overrides = [
        "train.precision=fp32", "train.tf32=false", f"train.steps={num_steps}", f"train.checkpoint_every={every}",
        f"train.global_batch_size={num_samples}",
    ]  # fmt: skip
    whole = Run(check, "whole", "mae_photos", overrides)
    killed = Run(check, "killed", "mae_photos", overrides)
    killed.kill_after(every)
    reached = max(killed.samples())
    killed.again()
    killed.finish()
    whole.finish()
    losses, expected = killed.metrics("loss"), whole.metrics("loss")

    def between(first: int, last: int) -> float:
        """The largest difference in steps first + 1 to last."""
        steps = range(first + 1, last + 1)
        return difference([losses[step] for step in steps], [expected[step] for step in steps])

    row = {
        "killed_in_step": reached,
        "difference_before": between(0, every),  # how far two runs part anyway
        "difference": between(every, every + 10),
        "difference_at_the_end": between(num_steps - 1, num_steps),
        "is_bit_equal": losses == expected,
    }
    given = whole.samples()
    if (
        any(ids != given[step][0] for step, times in killed.samples().items() for ids in times)
        or len(given) != num_steps
    ):
        return row | {"error": "the run that was resumed saw other samples"}
    return verdict(row, "difference", RESUMED)
