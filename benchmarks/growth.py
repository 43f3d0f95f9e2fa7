"""What grows with the length of a run or the number of runs: CPU-seconds by size, each part beside the next larger.

    driver       a run of N checkpoints with two evaluations each: the driver's own work from event to event
    leaderboard  the command, for N runs of 20 checkpoints and two evaluations each
    report       the page of a run of N checkpoints, two evaluations each, and 20 logged steps between two of them
    tracking     the sender's own work for N checkpoints and their evaluations; MLflow's answers are made up
    shards       opening N shards of 2 MB that have no index, by 1 to 4 ranks at once

python benchmarks/growth.py [PART ...] [--short] [--rounds 3]

A part is linear when its last column, the cost per unit, stays the same from row to row.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evaluation.protocol import CI_SUFFIXES, Metric, described
from pretrain.config.load import load_plan, to_yaml
from pretrain.config.stages import Plan
from pretrain.record.events import CheckpointPublished, Evaluated, Finished, Metrics
from pretrain.record.journal import Journal
from pretrain.record.run_dir import RunDir
from pretrain.screen import escaping_console

TASKS = ("knn", "linear")
SETTINGS = (
    "evaluation.tasks=[{protocol: knn, data: grocery}, {protocol: linear, data: grocery}]",
    "evaluation.select=knn/grocery/top1",
    "train.checkpoint_every=10",
)
BOUNDS = [Metric(f"top1{suffix}", better=None) for suffix in CI_SUFFIXES]
VALUES = ("loss", "lr", "weight_decay", "grad_norm", "samples_per_s", "step_s", "data_wait_fraction", "memory_mb")
DESCRIBED = tuple(asdict(metric) for metric in described([Metric("top1"), *BOUNDS]))
SMALLEST = [sys.executable, "-c", "import data_pipelines.shards.dataset"]


def plan_of(folder: Path, checkpoints: int) -> Plan:
    return load_plan("demo", [*SETTINGS, f"train.steps={10 * checkpoints}", f"storage={folder}"])


def score(step: int, protocol: str) -> Evaluated:
    top1 = 0.3 + (step * 7919 % 1000) / 2000
    metrics = {"top1": top1, "top1_ci_low": top1 - 0.02, "top1_ci_high": top1 + 0.02}
    return Evaluated(
        step=step, protocol=protocol, data="grocery", metrics=metrics, key=f"{protocol}-{step}", seconds=1.0,
        cached=False, num_test=200, described=DESCRIBED,
    )  # fmt: skip


def publish(run: RunDir, step: int) -> CheckpointPublished:
    """A checkpoint as small as one can be; it has to be listed and pruned like any other."""
    directory = run.path / "checkpoints" / f"step-{step:08d}"
    (directory / "training_state").mkdir(parents=True)
    (directory / "training_state" / "state.pt").write_bytes(b"state")
    for name in ("backbone.safetensors", "recipe.yaml"):
        (directory / name).write_bytes(b"")
    (directory / "checkpoint.json").write_text(json.dumps({"format": 1, "step": step, "files": {}, "versions": {}}))
    return CheckpointPublished(step=step, path=run.relative(directory))


def metrics(step: int) -> Metrics:
    return Metrics(step=step, values={name: 1.0 + 1 / (step + 1) for name in VALUES})


class Evaluations:
    """Answers for Ray: what is submitted has ended at the next look."""

    def __init__(self) -> None:
        self._waiting: list[Any] = []

    def submit(self, label: Any, *call: Any, **options: Any) -> None:
        self._waiting.append(label)

    def finished(self) -> Iterator[tuple[Any, list[Evaluated], None]]:
        waiting, self._waiting = self._waiting, []
        for checkpoint, tasks in waiting:
            yield (checkpoint, tasks), [score(checkpoint.step, task.protocol) for task in tasks], None


def driver(checkpoints: int, folder: Path) -> float:
    """CPU-seconds of following the events, queueing, collecting, recording, showing and pruning."""
    from pretrain.driver.drive import Driver
    from pretrain.driver.trackers import open_mirrors

    run = RunDir(folder / "run")
    run.path.mkdir()
    driving = Driver(plan_of(folder, checkpoints), run, time.time())
    driving.terminal.console = escaping_console(io.StringIO(), width=160)
    driving._mirrors = open_mirrors(driving.plan, run, ())
    queue: Any = Evaluations()
    evaluating = driving._evaluating(queue, {})
    took = 0.0
    with Journal(run.journal) as journal:
        for step in range(10, 10 * checkpoints + 1, 10):
            journal.write(metrics(step))
            journal.write(publish(run, step))
            began = time.process_time()
            if driving._follow():
                evaluating.queue_due()
            evaluating.collect()
            took += time.process_time() - began
    return took


def leaderboard(runs: int, folder: Path) -> float:
    """CPU-seconds of the command with its imports."""
    recipe = to_yaml(plan_of(folder, 20).recipe)
    for number in range(runs):
        run = RunDir(folder / f"run-{number:04d}")
        run.path.mkdir()
        run.recipe.write_text(recipe)
        with Journal(run.evaluations) as journal:
            for step in range(0, 200, 10):
                for protocol in TASKS:
                    journal.write(replace(score(step + number, protocol), step=step))
    return cpu_of([[sys.executable, "-m", "pretrain", "leaderboard", "--storage", str(folder)]])


def report(checkpoints: int, folder: Path) -> float:
    from pretrain.reporting.page import write_report

    run = RunDir(folder / "run")
    run.path.mkdir()
    run.recipe.write_text(to_yaml(plan_of(folder, checkpoints).recipe))
    with Journal(run.journal) as journal, Journal(run.evaluations) as evaluations:
        for step in range(20 * checkpoints):
            journal.write(metrics(step))
        for step in range(20, 20 * checkpoints + 1, 20):
            journal.write(publish(run, step))
            for protocol in TASKS:
                evaluations.write(score(step, protocol))
    began = time.process_time()
    write_report(run.path)
    return time.process_time() - began


def tracking(checkpoints: int, folder: Path) -> float:
    """CPU-seconds of a sender that finds a few new lines at each look, as beside a run."""
    from pretrain.tracking.client import Version
    from pretrain.tracking.sync import Tracker

    class Answers:
        """Of a server that takes no time."""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments, **options: None

        def register(self, checkpoint: Path, step: int, *rest: Any) -> Version:
            return Version("m-" + "0" * 32, str(step // 10))

    run = RunDir(folder / "run")
    run.path.mkdir()
    tracker = Tracker(
        run.path, uri="http://nowhere", experiment="e", recipe_yaml="", params={}, tags={}, model_name="m",
        select="knn/grocery/top1", exported=lambda path, step: (path, str(path)),
    )  # fmt: skip
    tracker._mlflow = answers = Answers()  # type: ignore[assignment]
    took = 0.0
    with Journal(run.journal) as journal, Journal(run.evaluations) as evaluations:
        for step in range(10, 10 * checkpoints + 1, 10):
            journal.write(metrics(step))
            journal.write(CheckpointPublished(step=step, path="checkpoints/x"))
            for protocol in TASKS:
                evaluations.write(score(step, protocol))
            began = time.process_time()
            tracker._mlflow = answers  # type: ignore[assignment]
            tracker._push()
            took += time.process_time() - began
        journal.write(Finished(step=10 * checkpoints))
    return took


def shards(number: int, folder: Path, *, ranks: int) -> float:
    """CPU-seconds of all ranks beyond their imports."""
    content = os.urandom(20_000)
    for shard in range(number):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for sample in range(100):
                member = tarfile.TarInfo(f"{shard:06d}_{sample}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = str(folder / "train-*.tar")
    code = f"from data_pipelines.shards.dataset import open_dataset; open_dataset({source!r})"
    imports = cpu_of([SMALLEST] * ranks)
    cache = {"PRETRAIN_CACHE": str(folder / "cache")}
    return cpu_of([[sys.executable, "-c", code]] * ranks, **cache) - imports


def cpu_of(commands: Sequence[Sequence[str]], **environment: str) -> float:
    """CPU-seconds of commands that run at once."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = [
        subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL) for command in commands
    ]
    if any([process.wait() for process in running]):
        raise SystemExit(f"{' '.join(commands[0])} has failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def sizes_of(part: str, short: bool) -> list[tuple[str, int, Callable[[Path], float]]]:
    """(what a row is called, its units, what is measured in an empty folder)."""
    if part == "shards":
        number = 50 if short else 200
        return [
            (f"{number} shards, {ranks} ranks", number, lambda folder, ranks=ranks: shards(number, folder, ranks=ranks))
            for ranks in (1, 2, 3, 4)
        ]
    measure = {"driver": driver, "leaderboard": leaderboard, "report": report, "tracking": tracking}[part]
    unit = "runs" if part == "leaderboard" else "checkpoints"
    counts = (20, 50, 200) if part == "leaderboard" else (100, 1000, 5000)
    return [
        (f"{count} {unit}", count, lambda folder, count=count: measure(count, folder))
        for count in counts[: 2 if short else 3]
    ]


PARTS = ("driver", "leaderboard", "report", "tracking", "shards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--short", action="store_true", help="smaller sizes, one round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    for part in arguments.parts or PARTS:
        rows = sizes_of(part, arguments.short)
        found: dict[str, list[float]] = {name: [] for name, _, _ in rows}
        for _ in range(1 if arguments.short else arguments.rounds):
            for name, _, measure in rows:
                with tempfile.TemporaryDirectory(prefix="growth-") as folder:
                    found[name].append(measure(Path(folder)))
        print(f"\n{part}", flush=True)
        for name, units, _ in rows:
            middle, low, high = statistics.median(found[name]), min(found[name]), max(found[name])
            print(f"  {name:26} {middle:8.2f} CPU-s ({low:.2f}-{high:.2f})  {1000 * middle / units:8.2f} ms per unit")


if __name__ == "__main__":
    main()
