"""Run one function on a group of Ray actors, restarted as a whole when one of them fails.

The function is started as `torchrun` would start it: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT are set and nothing else is done, so that the same training loop runs with and without Ray. It runs in the
main thread of its process, where it may handle signals.

A placement group holds the places, one actor per place; public names of Ray only. Not here: what the function does and
how it finds its last checkpoint after a restart (it looks for itself).
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.connect import Cluster
from cluster.nodes import draining, free, room

__all__ = ["End", "Members", "Place", "WorkerGroup", "WorkersFailed", "classify", "environments", "run_workers"]

WATCH_S = 1.0  # between two looks at the group from outside
PLACE_S = 10.0  # for the places of a group, before fewer workers are tried
SETTLE_S = 1.0  # after the first rank has ended, so that the cause is seen beside what it brings about in others
LONGEST_PAUSE_S = 60.0
_FOREVER_S = 10.0**9
_LOST_PEER = re.compile(r"Connection (?:closed|reset) by peer(?: \[[^]]+\]:\d+)?")  # as gloo says it


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers, what each of them gets, and how often the group may be restarted.

    Attributes:
        sizes: Numbers of actors that can run the function together, the most first. Each start takes the first for
            which there is room, and waits for the last.
        cpus_per_worker, gpus_per_worker: What Ray reserves for each.
        max_failures: Restarts without progress between them.
        fatal: Exceptions of the function that no restart can mend; they end the run at once.
    """

    sizes: tuple[int, ...]
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int
    fatal: tuple[type[BaseException], ...] = ()


class WorkersFailed(RuntimeError):
    """The group ended and is not started again; the last line says why in one sentence, above it is the traceback.

    What the function raised, if it did, is the cause.
    """

    def __init__(self, end: End, attempts: int) -> None:
        tries = f" (attempt {attempts})" if attempts > 1 else ""
        super().__init__(f"{end.traceback}\n{end.reason}{tries}".strip())


@dataclass(frozen=True)
class End:
    """How a group ended.

    Attributes:
        kind: `fatal`: a restart would end the same way; `preempted`: a machine was taken away; `again`: all returned,
            to be started again; `failed`: the rest.
        rank: The worker to blame.
        reason: One line for people.
        traceback: Of the function, where it raised.
        cause: What it raised.
    """

    kind: Literal["fatal", "preempted", "failed", "again"]
    rank: int
    reason: str
    traceback: str = ""
    cause: BaseException | None = None


def run_workers(
    cluster: Cluster,
    function: Callable[[dict[str, Any]], bool],
    settings: dict[str, Any],
    group: WorkerGroup,
    *,
    progress: Callable[[], Hashable] = lambda: None,
    starting: Callable[[], None] = lambda: None,
    restarting: Callable[[End, float], None] = lambda end, pause_s: None,
    watch: Callable[[Members], End | None] = lambda members: None,
) -> None:
    """Run `function(settings)` on every worker of the group and wait until all have returned.

    Args:
        cluster: A live connection.
        function: Importable by the workers; finds its rank in the environment. Returns whether the group is to start
            again; it is when any rank says so.
        settings: Passed to the function as it is.
        group: Size and resources. When a worker dies or raises, the whole group starts again.
        progress: What has been reached, for example the newest checkpoint. Failures are counted anew when it changes.
        starting: Called before each start of the group.
        restarting: Told of each restart: how the group ended, and the seconds until it starts again.
        watch: Asked about once a second while the function runs: whether the group has to be ended, and why. Ray
            notices a process that has died, none that hangs.

    Raises:
        WorkersFailed: A `fatal` exception, or more than `max_failures` failures without progress.
    """
    attempts, failures, reached = 0, 0, progress()
    while True:
        attempts += 1
        starting()
        end = _attempt(cluster, function, settings, group, watch)
        if end is None:
            return
        if end.kind == "again":
            continue
        if progress() != reached:
            failures, reached = 0, progress()
        failures += end.kind != "preempted"
        if end.kind == "fatal" or failures > group.max_failures:
            raise WorkersFailed(end, attempts) from end.cause
        pause_s = min(2.0 ** (failures - 1), LONGEST_PAUSE_S) if failures > 1 else 0.0
        restarting(end, pause_s)
        time.sleep(pause_s)


@dataclass(frozen=True)
class Members:
    """A group at work.

    Attributes:
        size: Its workers.
        nodes: Ids of the nodes that they are on.
        bundle: What Ray reserves for each.
        sizes: Of `WorkerGroup`.
    """

    size: int
    nodes: frozenset[str]
    bundle: Mapping[str, float]
    sizes: tuple[int, ...]

    @property
    def leaving(self) -> frozenset[str]:
        """Those of its nodes that are about to be taken away."""
        return self.nodes & draining()

    @property
    def larger(self) -> int | None:
        """The size that there is room for, if the group could have more workers than now."""
        if self.size == self.sizes[0]:
            return None
        most = min(self.size + free(self.bundle), room(self.bundle))
        return next((size for size in self.sizes if self.size < size <= most), None)


@dataclass(frozen=True)
class Place:
    """Where one worker is: its node, the address and GPUs that it sees there, and a port that was free."""

    node: str
    address: str
    gpus: tuple[str, ...]
    port: int


class _Worker:
    """One process of the group."""

    def place(self) -> Place:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        node = ray.get_runtime_context().get_node_id()
        return Place(node, ray.util.get_node_ip_address(), tuple(gpus), port)

    def run(
        self, function: Callable[[dict[str, Any]], bool], settings: dict[str, Any], environment: dict[str, str]
    ) -> bool:
        os.environ.update(environment)
        return function(settings)


def _attempt(
    cluster: Cluster,
    function: Callable[[dict[str, Any]], bool],
    settings: dict[str, Any],
    group: WorkerGroup,
    watch: Callable[[Members], End | None],
) -> End | None:
    """One life of the group; None when every worker has returned and none wants another."""
    bundle = {"CPU": group.cpus_per_worker, "GPU": group.gpus_per_worker}
    bundle = {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}  # Ray refuses empty ones
    size, places = _reserved(bundle, group.sizes)
    workers: list[Any] = []
    try:
        workers = [
            ray.remote(_Worker)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=group.gpus_per_worker,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=index),
            )
            .remote()
            for index in range(size)
        ]
        try:
            found = ray.get([worker.place.remote() for worker in workers])
        except RayError as error:
            return classify({0: error}, group.fatal)
        ranked = [workers[index] for index in by_node(found)]
        variables = environments([found[index] for index in by_node(found)], loopback=cluster.private)
        running = {
            worker.run.remote(function, settings, environment): rank
            for rank, (worker, environment) in enumerate(zip(ranked, variables, strict=True))
        }
        members = Members(size, frozenset(place.node for place in found), bundle, group.sizes)
        return _ended(running, group.fatal, lambda: watch(members))
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(places)


def _reserved(bundle: Mapping[str, float], sizes: Sequence[int]) -> tuple[int, PlacementGroup]:
    """Places for as many workers as there is room for, of the sizes that can be; waits for the last of them.

    A size is not tried for which all machines together have no room, unless it is the last: a group that waits is what
    an autoscaler sees.
    """
    for size in sizes:
        if size != sizes[-1] and size > room(bundle):
            continue
        places = placement_group([dict(bundle)] * size, strategy="PACK")
        if places.wait(timeout_seconds=_FOREVER_S if size == sizes[-1] else PLACE_S):
            return size, places
        remove_placement_group(places)
    raise AssertionError("the last size is waited for")


def _ended(
    running: Mapping[Any, int], fatal: tuple[type[BaseException], ...], watch: Callable[[], End | None]
) -> End | None:
    """Wait until all ranks have returned, or one has not: then for what the others say within a moment."""
    waiting = list(running)
    errors: dict[int, RayError] = {}
    again = False
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=1, timeout=SETTLE_S if errors else WATCH_S)
        if not ended and errors:
            break
        if not ended and (end := watch()) is not None:
            return end
        for reference in ended:
            try:
                again = bool(ray.get(reference)) or again
            except RayError as error:
                errors[running[reference]] = error
    if errors:
        return classify(errors, fatal)
    return End("again", 0, "") if again else None


def by_node(places: Sequence[Place]) -> list[int]:
    """Indices of the places such that those of a node follow one another, nodes in the order of their first place."""
    nodes = [place.node for place in places]
    return sorted(range(len(places)), key=lambda index: (nodes.index(nodes[index]), index))


def environments(places: Sequence[Place], *, loopback: bool) -> list[dict[str, str]]:
    """What torchrun would tell each rank of its place.

    Args:
        places: Of the ranks, in their order; those of a node follow one another.
        loopback: A private instance: ranks meet on 127.0.0.1.
    """
    nodes = Counter(place.node for place in places)
    seen: Counter[str] = Counter()
    found = []
    for rank, place in enumerate(places):
        variables = {
            "MASTER_ADDR": "127.0.0.1" if loopback else places[0].address,
            "MASTER_PORT": str(places[0].port),
            "RANK": str(rank),
            "LOCAL_RANK": str(seen[place.node]),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_WORLD_SIZE": str(nodes[place.node]),
        }
        if loopback:
            variables["GLOO_SOCKET_IFNAME"] = "lo"
        if place.gpus:  # all GPUs that the group has on this node: LOCAL_RANK picks the device, as under torchrun
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(_in_order(places, place.node))
        seen[place.node] += 1
        found.append(variables)
    return found


def _in_order(places: Iterable[Place], node: str) -> list[str]:
    """GPUs of the group on a node, in the order of the ranks."""
    return list(dict.fromkeys(gpu for place in places if place.node == node for gpu in place.gpus))


def classify(errors: Mapping[int, BaseException], fatal: tuple[type[BaseException], ...]) -> End:
    """How a group has ended, from what its ranks raised; at least one.

    When one rank dies its peers lose their connections, so a dead worker comes before what the others say; an exception
    that no restart can mend comes before all.
    """
    raised = {rank: error.cause for rank, error in errors.items() if isinstance(error, RayTaskError)}
    wrong = [rank for rank in sorted(raised) if isinstance(raised[rank], fatal)]
    dead = [rank for rank in sorted(errors) if isinstance(errors[rank], RayActorError)]
    rank = next(iter([*wrong, *dead, *sorted(errors)]))
    error = errors[rank]
    if rank in raised:
        reason = _one_line(_raised_by(rank, raised[rank]))
        return End("fatal" if wrong else "failed", rank, reason, str(error), raised[rank])
    preempted = isinstance(error, RayActorError) and error.preempted
    reason = _one_line(f"worker {rank} died: {_death(str(error))}")
    return End("preempted" if preempted else "failed", rank, reason)


def _raised_by(rank: int, error: BaseException) -> str:
    """What a rank has raised; of a silent machine its peers hear sooner than Ray."""
    if isinstance(error, RuntimeError) and (lost := _LOST_PEER.search(str(error))):
        return f"worker {rank} has lost another one, or its machine ({lost.group()})"
    name = type(error)
    return f"{name.__module__}.{name.__qualname__}: {error}".removeprefix("builtins.")


def _death(text: str) -> str:
    """Why an actor has died, of what Ray says of it: ids and addresses come first."""
    before, is_node, how = text.rpartition("the actor's node was ")
    if is_node:
        address = re.search(r"\tip: (\S+)", before)
        return f"its machine{f' {address[1]}' if address else ''} was {how}"
    return text.rpartition("Worker exit detail: ")[2]


def _one_line(text: str, length: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
