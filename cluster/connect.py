"""Connect to Ray: a private instance bound to the loopback interface, or a cluster that is already there.

A private instance listens on 127.0.0.1 only, and asks for a token that was drawn for it and lies in memory alone: other
users of the machine can reach its ports and do nothing there.

Ray reads the address and the token's variables when it is imported, which may have happened long ago (a notebook, a
plug-in). So what it made of them is set as well, by three names that Ray does not document and that
`tests/cluster/test_connect.py` touches: `ray_constants.ENABLE_RAY_CLUSTER`, `Config.initialize` and
`AuthenticationTokenLoader.reset_cache`. An instance that got another address all the same is taken down again.

A private instance also does without three services that Ray starts for people who look after a cluster: the dashboard's
server, which runs even when no dashboard is wanted, the autoscaler's monitor, and the one that sends what workers print
to the driver, where they write into files of the run. They took 4 CPU-seconds of every start and some of every hour.
Only methods of `Node`, which Ray does not document, start them; the same test looks for the processes.

Its processes get memory in huge pages, where the kernel gives those to who asks: glibc's malloc returns large blocks to
the kernel, and every training step pays for the zeros of new ones again. It reads its settings when a process begins,
so they are in the environment before; on a given cluster they are its owner's to set, where `ray start` runs.

A given cluster may ask for a token as well. Whether it takes ours is asked first, by `GcsClient`, which Ray does not
document: Ray itself takes a wrong token for a cluster that is not there, and with none it ends the process.

What is not here: placing workers (`cluster.workers`), evaluation tasks (`cluster.tasks`), where tokens are looked for
(`cluster.authentication`).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.authentication import AuthenticationProblem, find_token, missing, refused

__all__ = ["EVALUATION_SLOT", "AlreadyConnected", "Cluster", "NotStarted", "connect", "gpus_per_worker", "is_alive"]

EVALUATION_SLOT = "evaluation_slot"  # custom Ray resource: bounds the evaluations that run beside the trainers
OBJECT_STORE_BYTES = 200 * 2**20  # only functions, settings and small results travel through Ray; data does not
ANSWER_S = 5.0  # for an address of a cluster to answer
LOOPBACK = "127.0.0.1"
START_TRIES = 3  # of a private instance
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES_OF_MALLOC = "glibc.malloc.hugetlb"


class NotStarted(RuntimeError):
    """A private instance of Ray has not come up; one line."""


class AlreadyConnected(RuntimeError):
    """This process uses a Ray of its own, and a process has one connection."""


@dataclass(frozen=True)
class Cluster:
    """A live connection.

    Attributes:
        private: This process started the instance and takes it down again.
        has_evaluation_slots: Nodes declare `EVALUATION_SLOT`.
    """

    address: str
    private: bool
    num_gpus: float
    has_evaluation_slots: bool


def _quiet_environment() -> None:
    """Settings that Ray reads at import or start-up; values that the user has set win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call after the end must not start another Ray


@contextmanager
def connect(address: str | None, *, num_cpus: int, num_gpus: int | None, evaluation_slots: int) -> Iterator[Cluster]:
    """Yield a connection to Ray and close it on exit.

    Args:
        address: Address of a running cluster (`host:port`, `ray://host:port`, `auto`), or None for a private instance.
            `RAY_ADDRESS` counts when no address is given.
        num_cpus: CPUs that the private instance declares; at least what the trainers ask for, so that they always fit.
        num_gpus: GPUs that the private instance declares; None: those that Ray finds.
        evaluation_slots: Evaluations that may run at the same time beside the trainers of the private instance.

    Raises:
        AlreadyConnected: This process is connected to Ray.
        AuthenticationProblem: The cluster at `address` asks for a token, and there is none, or not this one.
        ConnectionError: No cluster answers at `address`.
        NotStarted: The machine is too busy for a private instance.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    _quiet_environment()
    import ray

    if ray.is_initialized():
        raise AlreadyConnected(
            "this process is connected to Ray already and cannot have a second connection; call ray.shutdown() first"
        )
    if address:
        _require_listener(address)
        _require_token(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        try:
            yield _described(address, private=False)
        finally:
            ray.shutdown()
        return
    with _private_settings():
        try:
            with _without_services():
                _start_patiently(
                    lambda: ray.init(
                        address="local",
                        num_cpus=num_cpus,
                        num_gpus=num_gpus,
                        resources={EVALUATION_SLOT: float(evaluation_slots)},
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        object_store_memory=OBJECT_STORE_BYTES,
                        _node_ip_address=LOOPBACK,
                    )
                )
            if (found := ray.util.get_node_ip_address()) != LOOPBACK:
                raise RuntimeError(f"Ray gave its private instance the address {found}, not {LOOPBACK}; it was ended")
            yield _described(LOOPBACK, private=True)
        finally:
            ray.shutdown()


def _start_patiently(start: Callable[[], object]) -> None:
    """Start a private instance, and again where that has timed out: Ray gives it 30 s, which a busy machine may need.

    Raises:
        NotStarted: It has timed out each time.
    """
    import psutil  # type: ignore[import-untyped]

    for left in reversed(range(START_TRIES)):
        before = set(psutil.Process().children())
        try:
            start()
            return
        except Exception as error:  # Ray raises no other class
            if "timed out during startup" not in str(error):
                raise
            for process in set(psutil.Process().children()) - before:  # which would take from the next one
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait()
            if not left:
                problem = f"Ray has not started, {START_TRIES} times within 30 s each: this machine has no time for it"
                raise NotStarted(problem) from error


def _require_listener(address: str) -> None:
    """Ask whether anything listens at `host:port` or `ray://host:port`; Ray itself would try for more than a minute.

    Raises:
        ConnectionError: Nothing does, or not within `ANSWER_S`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto`, which Ray looks up on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from None


def _require_token(address: str) -> None:
    """Send our token, if there is one and nobody has said otherwise, and ask the cluster whether it takes it.

    Raises:
        AuthenticationProblem: It does not.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    token = None if mode == "disabled" else find_token()
    if token is not None and not mode:
        os.environ["RAY_AUTH_MODE"] = mode = "token"  # Ray would not look for one by itself
        _read_again()
    if mode == "token" and token is None:
        raise missing(address)
    if address.startswith("ray://") or ":" not in address:
        return  # of a client server and of `auto` nobody can ask; their own errors name the token
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address)
    except AuthenticationError:
        if mode == "disabled":
            problem = f"{address} asks for a token, and RAY_AUTH_MODE=disabled here sends none; set RAY_AUTH_MODE=token"
            raise AuthenticationProblem(problem) from None
        raise (missing(address) if token is None else refused(address, token)) from None


def _described(address: str, *, private: bool) -> Cluster:
    import ray

    resources: Mapping[str, float] = ray.cluster_resources()
    return Cluster(address, private, resources.get("GPU", 0.0), EVALUATION_SLOT in resources)


def _with_huge_pages(tunables: str) -> str:
    """`GLIBC_TUNABLES` with huge pages for malloc; as it is where the user has decided, or the kernel gives none."""
    try:
        kernel = _HUGE_PAGES.read_text()
    except OSError:  # a kernel without them
        return tunables
    if _HUGE_PAGES_OF_MALLOC in tunables or "[never]" in kernel:
        return tunables
    return f"{tunables}:{_HUGE_PAGES_OF_MALLOC}=1".removeprefix(":")


def _read_again() -> None:
    """Let Ray look at the variables of the environment once more."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _private_settings() -> Iterator[None]:
    """What a private instance needs, for this process and those that it starts; undone afterwards."""
    from ray._private import ray_constants

    private = {
        # Despite its name it controls the rewriting of addresses: unset, Ray replaces 127.0.0.1 by a routable one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # with none in the environment Ray writes one to the home directory
        # Ray starts its workers at niceness 15; here trainers run at ours and evaluations lower theirs.
        "RAY_worker_niceness": "0",
        "GLIBC_TUNABLES": _with_huge_pages(os.environ.get("GLIBC_TUNABLES", "")),
    }
    before = {name: os.environ.get(name) for name in private}
    rewrites_addresses = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(private)
    ray_constants.ENABLE_RAY_CLUSTER = False
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        ray_constants.ENABLE_RAY_CLUSTER = rewrites_addresses
        _read_again()


@contextmanager
def _without_services() -> Iterator[None]:
    """In this context a node that is started has none of the services that nobody asks here."""
    from ray._private.node import Node

    services = {name: getattr(Node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in services:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, start in services.items():
            setattr(Node, name, start)


def is_alive(cluster: Cluster) -> bool:
    """Whether there is a node that tasks can run on. Workers of a group outlive the raylet of a private instance."""
    import ray

    return any(node["Alive"] for node in ray.nodes())


def gpus_per_worker(cluster: Cluster, device: str, num_workers: int) -> tuple[float, str | None]:
    """How many GPUs each worker gets when nobody has said it, and what a person should know of that, in one line.

    One for each, or none where there are none; never a part of them without a word.

    Args:
        cluster: What is there now; one with an autoscaler may have no GPU yet.
        device: `auto`, `cpu` or `cuda`.
        num_workers: Workers that train together.

    Raises:
        ValueError: There are GPUs, but not one for each worker; or `cuda` on a machine that has none.
    """
    if device == "cpu":
        return 0.0, None
    gpus, where = int(cluster.num_gpus), "this machine" if cluster.private else f"the cluster at {cluster.address}"
    if gpus >= num_workers:
        return 1.0, None
    wait = "" if cluster.private else "cluster.gpus_per_worker=1 (wait until more have joined), "
    if gpus:
        count = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        remedy = f"use train.workers={gpus}, {wait}or train.device=cpu"
        raise ValueError(f"train.workers={num_workers}: {where} has {count}, not one for each worker; {remedy}")
    if device == "auto":
        note = f"no GPU in {where}: training on CPUs; cluster.gpus_per_worker=1 waits for GPUs to join"
        return 0.0, None if cluster.private else note
    if cluster.private:
        raise ValueError("train.device=cuda: this machine has no GPU that Ray sees; use train.device=cpu or auto")
    return 1.0, f"no GPU in {where} yet: waiting for {num_workers} to join"
