"""Faults of a run on a head and several raylets: each is noticed, the run goes on, and nothing of its result is lost.

A run suffers several in turn; what it has lost of the cluster after each is replaced, so that it always has two workers
and its losses can be compared, bit for bit, with those of a run that nobody disturbed, without Ray. The table of
`docs/faults.md` is what these tests print (`-rP`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil
import pytest

from data_pipelines.files import write_atomically
from pretrain.record.events import Event, Finished, Metrics, Start, Startup
from pretrain.record.journal import read_events
from tests.faulty_objective import register
from tests.integration.conftest import RECIPE, Loop, read_losses, read_samples, wait_until
from tests.loopback_cluster import LoopbackCluster, loopback_cluster

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 10
FIRST = EVERY + 3  # the step in which the first fault comes; the next ones come EVERY steps later each
SETTINGS = (f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.keep_last=2", "train.pictures_every=0")
SETTINGS += ("evaluation.enabled=false", "data.record_samples=true")
PATIENCE_S = 900  # for whatever has to come, on a busy machine
HEADROOM = 5 * 2**30  # bytes that this machine may take more before a node ends its worker


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackCluster]:
    """A head and two raylets with room for one worker each. A silence of some ten seconds is the death of a node."""
    site = tmp_path_factory.mktemp("site")
    register(site)
    checks = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "5"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(site)]))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with loopback_cluster(
            "a", "b", **{f"RAY_health_check_{name}": text for name, text in checks.items()}
        ) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def undisturbed(warm_start: BaseContext, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """The same run on two ranks without Ray; it begins while a cluster is started."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.yaml").write_text(RECIPE)
    loop = Loop(warm_start, folder / "small.yaml", folder / "runs" / "whole", SETTINGS, 2)
    yield loop
    for process in loop.processes:
        process.kill()
        process.join()


class Run:
    """A run on the cluster, in processes of its own."""

    def __init__(self, nodes: LoopbackCluster, folder: Path) -> None:
        self.nodes, self._folder = nodes, folder
        self._storage, self._log = folder / "storage", folder / "run.log"
        self._recipe = folder / "faulty.yaml"
        self._recipe.write_text(RECIPE.replace("{name: mae,", f"{{name: faulty, control: {folder},"))
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self, setting: str) -> None:
        self.hold(FIRST)
        place = (f"storage={self._storage}", f"cluster.address={self.nodes.address}")
        self._start("run", str(self._recipe), *place, *SETTINGS, setting)

    def resume(self) -> None:
        self._start("resume", self.run_dir.name, "--storage", str(self._storage))

    def _start(self, *command: str) -> None:
        with self._log.open("a") as file:
            self.process = subprocess.Popen([sys.executable, "-m", "pretrain", *command], stdout=file, stderr=file)

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def hold(self, step: int) -> None:
        """Let the run wait in that step, with rank 1 in a collective, and in no other."""
        write_atomically(self._folder / "hold", str(step).encode())

    def order(self, rank: int, word: str) -> None:
        write_atomically(self._folder / "order", f"{rank} {word}".encode())

    @property
    def run_dir(self) -> Path:
        (found,) = self._storage.glob("small-*")
        return found

    @property
    def said(self) -> str:
        return self._log.read_text()

    def groups(self) -> list[list[Event]]:
        """What each group of workers has told, from its start on."""
        found: list[list[Event]] = []
        for event in [event for path in self._storage.glob("small-*/journal.jsonl") for event in read_events(path)[0]]:
            if isinstance(event, Start):
                found.append([])
            if found:
                found[-1].append(event)
        return found

    def steps(self, group: int) -> list[Metrics]:
        """Those that a group has done so far, none when it has not begun."""
        groups = self.groups()
        return [event for event in groups[group] if isinstance(event, Metrics)] if group < len(groups) else []

    def pid(self, rank: int) -> int:
        start = self.groups()[-1][0]
        assert isinstance(start, Start)
        return start.pids[rank]

    def node(self, rank: int) -> str:
        return self.nodes.node_of(self.pid(rank))

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> float:
        """Unix time at which it was seen."""
        wait_until(condition, timeout_s, self._log)
        return time.time()


@pytest.fixture
def run(nodes: LoopbackCluster, tmp_path: Path) -> Iterator[Run]:
    found = Run(nodes, tmp_path)
    yield found
    found.kill()


@dataclass(frozen=True)
class Fault:
    """What happens, and what is to be seen of it.

    Attributes:
        bring: Makes it happen to a run that waits in a step.
        says: What the driver says when it has noticed, a regular expression.
        ends: Exit code of the command that ends of it, and is followed by `pretrain resume`; None: it goes on.
        loses: Steps since the last checkpoint are done again.
        spare: A node that comes before, with those variables; None: no node is lost.
        returns: The node of rank 0 goes on when the next group is at work.
        stacks: What those of rank 1 show.
    """

    bring: Callable[[Run], None]
    says: str
    ends: int | None = None
    loses: bool = True
    spare: Callable[[], dict[str, str]] | None = None
    returns: bool = False
    stacks: str = ""


def _signal_worker(number: int) -> Callable[[Run], None]:
    return lambda run: os.kill(run.pid(1), number)


def _signal_node(number: int) -> Callable[[Run], None]:
    """To the one of the first rank, which writes the journal and publishes."""
    return lambda run: run.nodes.signal(run.node(0), number)


def _order(word: str) -> Callable[[Run], None]:
    return lambda run: run.order(1, word)


def _exhaust_memory(run: Run) -> None:
    """Of the node that heeds it."""
    run.order(next(rank for rank in (0, 1) if run.node(rank).startswith("node drained")), "allocate")


def _kill_driver(run: Run) -> None:
    assert run.process is not None
    (driver,) = psutil.Process(run.process.pid).children()
    driver.kill()


def _drain(run: Run) -> None:
    run.nodes.drain(run.nodes.node_id(run.node(0)), within_s=15)


def _tight() -> dict[str, str]:
    memory = psutil.virtual_memory()
    if memory.available < 2 * HEADROOM:
        pytest.skip(f"{memory.available >> 30} GiB of memory are free, {2 * HEADROOM >> 30} are needed")
    return {"RAY_memory_usage_threshold": f"{(memory.total - memory.available + HEADROOM) / memory.total:.4f}"}


SILENT = r"no sign of life for 2\d s"
DIED = r"worker \d (died: |has lost another one).*the workers start again"
FAULTS = {
    "worker killed": Fault(_signal_worker(signal.SIGKILL), DIED),
    "worker stopped": Fault(_signal_worker(signal.SIGSTOP), SILENT),
    "sleep in a step": Fault(_order("sleep"), SILENT, stacks="in _obey"),
    "worker asked to end": Fault(_signal_worker(signal.SIGTERM), r"stopped after step \d+", 75, loses=False),
    "wrong setting": Fault(_order("refuse"), "training failed: ValueError: no step fits this setting", 1),
    "driver killed": Fault(_kill_driver, r"was ended from outside \(SIGKILL\)", 1),
    "node silent": Fault(_signal_node(signal.SIGSTOP), DIED, spare=dict, returns=True),
    "node drained": Fault(_drain, "a machine is taken away", loses=False, spare=_tight),
    "memory exhausted": Fault(_exhaust_memory, r"worker \d died: .*memory.*the workers start again"),
    "node killed": Fault(_signal_node(signal.SIGKILL), DIED, spare=dict),
}
WORKERS = ("worker killed", "worker stopped", "sleep in a step")
ENDS = ("worker asked to end", "wrong setting", "driver killed")
NODES = ("node silent", "node drained", "memory exhausted", "node killed")


@pytest.mark.parametrize(
    ("names", "hang_after_s"), [(NODES, 600), (ENDS, 600), (WORKERS, 20)], ids=["nodes", "ends", "workers"]
)
def test_faults__cost_steps_and_no_sample_and_no_bit(
    undisturbed: Loop, run: Run, names: tuple[str, ...], hang_after_s: int
) -> None:
    run.begin(f"train.hang_after_s={hang_after_s}")
    for number, name in enumerate(names):
        _suffer(run, number, name)
    run.hold(0)
    assert run.end() == 0, run.said[-3000:]

    starts = [group[0] for group in run.groups()]
    assert [start.world_size for start in starts if isinstance(start, Start)] == [2] * (len(names) + 1)
    assert isinstance(run.groups()[-1][-1], Finished)
    undisturbed.wait(PATIENCE_S)
    assert read_losses(run.run_dir) == read_losses(undisturbed.run_dir)  # one line for each step, or equal ones
    assert read_samples(run.run_dir) == read_samples(undisturbed.run_dir)


def _suffer(run: Run, number: int, name: str) -> None:
    """The fault of that number: group `number` ends of it, and the next one does steps."""
    fault, step = FAULTS[name], FIRST + number * EVERY
    run.wait_for(lambda: [event.step for event in run.steps(number)][-1:] == [step - 1], PATIENCE_S)
    if fault.spare is not None:
        run.nodes.add(name, **fault.spare())
    said, worker, node = len(run.said), run.pid(0), run.node(0)
    fault.bring(run)
    brought = time.time()
    run.hold(step + EVERY)
    noticed = run.wait_for(lambda: re.search(fault.says, run.said[said:]) is not None, PATIENCE_S) - brought
    if fault.ends is not None:
        assert run.end() == fault.ends
        assert len(run.groups()) == number + 1  # a restart mends none of these
        run.resume()
    run.wait_for(lambda: bool(run.steps(number + 1)), PATIENCE_S)
    first, last = run.steps(number + 1)[0], run.steps(number)[-1]
    (startup,) = [event for event in run.groups()[number + 1] if isinstance(event, Startup)]
    assert startup.total_s <= first.time - brought  # counted from the restart
    again = last.step + 1 - first.step
    print(f"{name}: noticed after {noticed:.1f} s, a step after {first.time - brought:.1f} s, {again} steps again")
    assert 0 < again < EVERY if fault.loses else again == 0
    if fault.returns:
        run.nodes.signal(node, signal.SIGCONT)
        run.wait_for(lambda: not psutil.pid_exists(worker), PATIENCE_S)
    if fault.stacks:
        assert fault.stacks in (run.run_dir / "logs" / "worker-1.stacks").read_text()
