"""Real processes: a small recipe on the demo photos, and a launcher that starts the training loop as torchrun would."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from pretrain.record.events import Metrics, Start
from pretrain.record.journal import read_events
from pretrain.worker import main

RECIPE = """
name: small
objective: {name: mae, decoder_dim: 48, decoder_depth: 1, decoder_heads: 3}
backbone: {name: vit_tiny_patch16_224, image_size: 32, patch_size: 8, options: {depth: 2, embed_dim: 48, num_heads: 3}}
data: {train: "package:demo_data/grocery/train-*.tar", loader_workers: 1}
optimizer: {base_lr: 2.0e-3, warmup_steps: 2, clip_grad: 1.0}
train: {steps: 12, global_batch_size: 32, micro_batch_size: 8, workers: 2, log_every: 1, checkpoint_every: 4}
evaluation:
  data: {grocery: "package:demo_data/grocery"}
  tasks: [{protocol: knn, data: grocery}]
  select: knn/grocery/top1
tracking: {experiment: tests, model_name: small}
checkpoints: {asynchronous: false}  # so that a run that is killed after a step goes on from a known one
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


class Loop:
    """`python -m pretrain.worker` in `ranks` processes of its own, as torchrun starts it: the training loop, no Ray."""

    def __init__(self, start: BaseContext, recipe: Path, run_dir: Path, overrides: tuple[str, ...], ranks: int) -> None:
        self.run_dir = run_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run_dir.mkdir(parents=True, exist_ok=True)
        self.log = run_dir / "loop.log"
        command = [str(recipe), *overrides, "--run-dir", str(run_dir)]
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            self.processes.append(start.Process(target=_run_worker, args=(command, environment, self.log)))
            self.processes[-1].start()

    def wait(self, timeout_s: float = 240) -> None:
        assert set(self.exit_codes(timeout_s)) == {0}, self.log.read_text()[-3000:]

    def exit_codes(self, timeout_s: float = 240) -> list[int | None]:
        """Of all ranks, once they have ended; None for one that has not after `timeout_s`."""
        for process in self.processes:
            process.join(timeout_s)
        return [process.exitcode for process in self.processes]

    def kill_after_step(self, step: int, timeout_s: float = 240) -> None:
        """SIGKILL all ranks once the event log has the metrics of `step`."""
        wait_until(lambda: self._newest_step() >= step, timeout_s, self.log)
        for process in self.processes:
            process.kill()
            process.join()

    def _newest_step(self) -> int:
        """Of the metrics that this process group has written."""
        events = read_events(self.run_dir / "journal.jsonl")[0]
        begun = max((i for i, event in enumerate(events) if isinstance(event, Start)), default=len(events))
        return max((event.step for event in events[begun:] if isinstance(event, Metrics)), default=0)


def _run_worker(command: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = ["pretrain.worker", *command]
    main()


def read_losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss; a step that was trained twice must have had the same loss twice."""
    found: dict[int, float] = {}
    for event in read_events(run_dir / "journal.jsonl")[0]:
        if isinstance(event, Metrics):
            assert found.setdefault(event.step, event.values["loss"]) == event.values["loss"]
    return found


def read_samples(run_dir: Path) -> dict[int, dict[int, list[int]]]:
    """World size -> step -> sorted ids of the samples of that step, where all ranks had come to record it."""
    shares: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(dict)
    for path in (run_dir / "samples").glob("rank-*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            shares[record["world_size"], record["step"]][path.name] = record["ids"]
    found: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for (world_size, step), ranks in shares.items():
        if len(ranks) == world_size:
            found[world_size][step] = sorted(itertools.chain(*ranks.values()))
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.exists() else "nothing was written"
        time.sleep(0.05)


@pytest.fixture
def launch(warm_start: BaseContext, recipe: Path, tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    started: list[Loop] = []

    def start(name: str, *overrides: str, ranks: int = 2) -> Loop:
        started.append(Loop(warm_start, recipe, tmp_path / "runs" / name, overrides, ranks))
        return started[-1]

    yield start
    for loop in started:
        for process in loop.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def whole(warm_start: BaseContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of the recipe on two ranks that nobody disturbed; it recorded its samples."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(RECIPE)
    loop = Loop(warm_start, folder / "small.yaml", folder / "runs" / "whole", ("data.record_samples=true",), 2)
    loop.wait()
    return loop.run_dir


@pytest.fixture
def losses() -> Callable[[Path], dict[int, float]]:
    return read_losses


@pytest.fixture
def samples() -> Callable[[Path], dict[int, dict[int, list[int]]]]:
    return read_samples


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool], float, Path], None]:
    return wait_until
