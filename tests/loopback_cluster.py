"""A Ray cluster of several nodes on this machine: a head at 127.0.0.2 and raylets at 127.0.0.3, .4 and so on.

Addresses other than 127.0.0.1, because Ray replaces that one by the machine's outward address. Every process of the
cluster is a child of this one's session, and is killed with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HEAD = "127.0.0.2"
# Ray's workers are at niceness 15 unless told: beside anything else they would starve.
_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
TRIES = 3
# `ray start`, but that the node has more than 30 seconds to come up, which no setting of Ray changes and a busy machine
# brings about, and without services for people who look after a cluster, whose start takes longer than all the rest.
_START = """
import time
import ray._private.services as services
from ray._private.node import Node
def get_node(*place, ask=services.get_node, until=time.monotonic() + 300):
    while True:
        try:
            return ask(*place)
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
services.get_node = get_node
for service in ("start_monitor", "start_log_monitor", "start_api_server"):
    setattr(Node, service, lambda node, **options: None)
from ray.scripts.scripts import main
main()
"""


class LoopbackCluster:
    """Nodes by name: `head`, and those that `add` made.

    Attributes:
        address: For `ray.init` and `cluster.address`.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        """
        Args:
            folder: Takes Ray's files; its path is short, for sockets lie in it.
            variables: Of the head's environment, such as the times of its health checks.
        """
        self._folder, self._next = folder, 3
        self.nodes: dict[str, set[int]] = {}  # process ids
        self._ips: dict[str, str] = {"head": HEAD}
        with socket.socket() as probe:
            probe.bind((HEAD, 0))
            port = probe.getsockname()[1]
        self.address = f"{HEAD}:{port}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0"]
        self._start("head", [*head, "--object-store-memory=100000000"], variables)

    def add(self, name: str, *, cpus: int = 1, **variables: str) -> None:
        """
        Args:
            name: Of a node that is not there.
            cpus: What it declares.
            variables: Of its environment, such as what its memory monitor heeds.
        """
        self._ips[name] = f"127.0.0.{self._next}"
        self._next += 1
        arguments = [f"--address={self.address}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        self._start(name, arguments, variables)

    def _start(self, name: str, arguments: list[str], variables: Mapping[str, str]) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= _ENVIRONMENT | dict(variables)
        place = [f"--node-ip-address={self._ips[name]}", "--disable-usage-stats"]
        place += [f"--temp-dir={self._folder}"] if name == "head" else []
        command = [sys.executable, "-c", _START, "start", *arguments, *place]
        for attempt in range(TRIES):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
            if done.returncode == 0:
                break
            _send(signal.SIGKILL, self._processes_at(self._ips[name]))
            assert attempt + 1 < TRIES, done.stdout[-2000:] + done.stderr[-2000:]
        self.nodes[name] = self._processes_at(self._ips[name])
        assert self.nodes[name]

    def _processes_at(self, address: str) -> set[int]:
        """Those that Ray has started for the node of an address, by their command lines."""
        found = set()
        for process in psutil.process_iter(["cmdline"]):
            text = " ".join(process.info["cmdline"] or [])
            if str(self._folder) in text and (
                f"node_ip_address={address}" in text or f"node-ip-address={address}" in text
            ):
                found.add(process.pid)
        return found

    def node_of(self, pid: int) -> str:
        """Name of the node that a worker runs on."""
        family = {process.pid for process in [psutil.Process(pid), *psutil.Process(pid).parents()]}
        (name,) = [name for name, processes in self.nodes.items() if processes & family]
        return name

    def node_id(self, name: str) -> str:
        """What Ray calls a node, by the command line of its raylet."""
        words = [word for pid in self.nodes[name] for word in psutil.Process(pid).cmdline()]
        return next(word for word in words if word.startswith("--node_id=")).partition("=")[2]

    def signal(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to every process of a node, its workers among them: what a machine does that is gone."""
        _send(number, self.nodes[name])

    def drain(self, node_id: str, *, within_s: int) -> None:
        """As an autoscaler or a handler of spot notices does."""
        arguments = ["drain-node", f"--address={self.address}", f"--node-id={node_id}"]
        arguments += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        arguments += [f"--deadline-remaining-seconds={within_s}"]
        environment = os.environ | _ENVIRONMENT
        command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)

    def close(self) -> None:
        for name in self.nodes:
            self.signal(name, signal.SIGCONT)
            self.signal(name)


@contextmanager
def loopback_cluster(*names: str, **variables: str) -> Iterator[LoopbackCluster]:
    """A head, with these variables in its environment, and nodes of one CPU each; they end with the block."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = LoopbackCluster(Path(folder), **variables)
        try:
            for name in names:
                cluster.add(name)
            yield cluster
        finally:
            cluster.close()


def _send(number: int, pids: set[int]) -> None:
    """A signal to processes, as far as they are there, and to all that come from them."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    for process in [*processes, *(child for parent in processes for child in parent.children(recursive=True))]:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def wait_for(condition: Any, timeout_s: float, what: str) -> float:
    """Seconds until `condition()` is true."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, what
        time.sleep(0.1)
    return time.monotonic() - begun
