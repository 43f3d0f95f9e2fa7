"""A private instance as others on the machine see it; how many GPUs each worker gets, without a cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cluster.connect as connect_module
from cluster.connect import Cluster, NotStarted, _start_patiently, _with_huge_pages, connect, gpus_per_worker

_LOOK_AT_A_PRIVATE_INSTANCE = """
import json, os, sys
if sys.argv[1] == "ray first":
    import ray
import psutil
from cluster.connect import AlreadyConnected, connect

def tunables():
    began_with = open("/proc/self/environ").read().split(chr(0))
    return [entry for entry in began_with if entry.startswith("GLIBC_TUNABLES=")]

before = dict(os.environ)
with connect(None, num_cpus=1, num_gpus=0, evaluation_slots=1):
    import ray
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    connections = [connection for process in processes for connection in process.net_connections("inet")]
    print(json.dumps({
        "listens on": sorted({c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == "LISTEN"}),
        "token": os.environ["RAY_AUTH_TOKEN"],
        "commands": " ".join(" ".join(process.cmdline()) for process in processes),
        "tunables": ray.get(ray.remote(tunables).options(num_cpus=0).remote()),
        "answer": ray.get(ray.remote(lambda: "a worker").options(num_cpus=0).remote()),
    }))
    os.environ["RAY_AUTH_TOKEN"] = "guessed"
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    try:
        ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address).get_all_node_info(timeout=10)
        print(json.dumps("no token is needed"))
    except Exception as error:
        print(json.dumps(str(error)))
    try:
        with connect(None, num_cpus=1, num_gpus=0, evaluation_slots=1):
            pass
    except AlreadyConnected as error:
        print(json.dumps(str(error)))
kept = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_worker_niceness", "GLIBC_TUNABLES"}
print(json.dumps([name for name in kept if os.environ.get(name) != before.get(name)]))
print(json.dumps(ray._private.ray_constants.ENABLE_RAY_CLUSTER))
"""


TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(("fails", "raised"), [(0, None), (2, None), (3, NotStarted)])
def test_start_patiently__again_where_ray_was_too_slow(fails: int, raised: type[Exception] | None) -> None:
    """What an attempt has started is ended: it would take the time of the next one."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(["sleep", "600"], start_new_session=True))
        if len(started) <= fails:
            raise Exception(TIMED_OUT)

    earlier = subprocess.Popen(["sleep", "600"])
    try:
        if raised is None:
            _start_patiently(start)
        else:
            with pytest.raises(raised, match="3 times within 30 s each"):
                _start_patiently(start)
        assert len(started) == min(fails + 1, 3) and earlier.poll() is None
        assert [process.poll() is None for process in started] == [False] * fails + [True] * (len(started) - fails)
    finally:
        for process in (earlier, *started):
            process.kill()


def test_start_patiently__another_error_is_the_end() -> None:
    tries = []

    def start() -> None:
        tries.append(1)
        raise ValueError("no such resource")

    with pytest.raises(ValueError, match="no such resource"):
        _start_patiently(start)
    assert tries == [1]


@pytest.mark.parametrize("order", ["ray first", "ray last"])
def test_connect__a_private_instance_is_for_its_owner_alone_whoever_imported_ray(order: str, tmp_path: Path) -> None:
    """Ray reads address and token at import; the home directory stays empty, and a later connection is as before."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", _LOOK_AT_A_PRIVATE_INSTANCE, order]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen, guessed, twice, left, rewrites = (
        json.loads(line) for line in done.stdout.splitlines() if line[:1] in '{["tf'
    )
    assert seen["listens on"] == ["127.0.0.1"] and seen["answer"] == "a worker"
    for service in ("dashboard.py", "log_monitor.py", "monitor.py"):  # of the commands that start them
        assert service not in seen["commands"], "a service that nobody asks here"
    assert "raylet" in seen["commands"]
    expected = _with_huge_pages(environment.get("GLIBC_TUNABLES", ""))
    assert seen["tunables"] == [f"GLIBC_TUNABLES={expected}"], "glibc reads it before a worker is one"
    assert len(seen["token"]) == 64 and seen["token"] not in seen["commands"]
    assert "oken" in guessed and guessed != "no token is needed"
    assert twice.startswith("this process is connected to Ray already") and "ray.shutdown()" in twice
    assert left == [] and rewrites is True
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kernel", "tunables", "expected"),
    [
        ("always [madvise] never", "", "glibc.malloc.hugetlb=1"),
        ("[always] madvise never", "glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("always madvise [never]", "glibc.malloc.check=3", "glibc.malloc.check=3"),
        (None, "", ""),
    ],
)
def test_with_huge_pages__where_the_kernel_gives_them_and_the_user_has_not_decided(
    kernel: str | None, tunables: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect_module, "_HUGE_PAGES", tmp_path / "enabled")
    if kernel is not None:
        (tmp_path / "enabled").write_text(f"{kernel}\n")
    assert _with_huge_pages(tunables) == expected


def _cluster(num_gpus: float, *, private: bool = False) -> Cluster:
    return Cluster("127.0.0.1" if private else "head:6379", private, num_gpus, has_evaluation_slots=private)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(("device", "num_gpus"), [("auto", 4.0), ("cuda", 4.0), ("auto", 9.0)])
def test_gpus_per_worker__one_for_each_where_there_are_enough(device: str, num_gpus: float, private: bool) -> None:
    assert gpus_per_worker(_cluster(num_gpus, private=private), device, 4) == (1.0, None)


@pytest.mark.parametrize("num_gpus", [0.0, 1.0, 8.0])
def test_gpus_per_worker__none_for_cpu(num_gpus: float) -> None:
    assert gpus_per_worker(_cluster(num_gpus), "cpu", 4) == (0.0, None)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_per_worker__fewer_than_workers_are_refused_with_both_numbers(device: str) -> None:
    with pytest.raises(ValueError) as caught:
        gpus_per_worker(_cluster(3.0), device, 4)
    assert str(caught.value) == (
        "train.workers=4: the cluster at head:6379 has 3 GPUs, not one for each worker; use train.workers=3, "
        "cluster.gpus_per_worker=1 (wait until more have joined), or train.device=cpu"
    )
    with pytest.raises(ValueError, match=r"this machine has 1 GPU, .*; use train.workers=1, or train.device=cpu$"):
        gpus_per_worker(_cluster(1.0, private=True), device, 4)


def test_gpus_per_worker__a_cluster_without_any_trains_on_cpus_and_says_so() -> None:
    gpus, note = gpus_per_worker(_cluster(0.0), "auto", 4)
    assert gpus == 0.0 and note is not None and "\n" not in note
    assert "no GPU in the cluster at head:6379: training on CPUs" in note and "cluster.gpus_per_worker=1" in note
    assert gpus_per_worker(_cluster(0.0, private=True), "auto", 4) == (0.0, None)  # the start line names the device


def test_gpus_per_worker__cuda_waits_for_a_cluster_and_not_for_this_machine() -> None:
    assert gpus_per_worker(_cluster(0.0), "cuda", 4) == (
        1.0,
        "no GPU in the cluster at head:6379 yet: waiting for 4 to join",
    )
    with pytest.raises(ValueError, match=r"train\.device=cuda: this machine has no GPU"):
        gpus_per_worker(_cluster(0.0, private=True), "cuda", 4)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_connect__a_closed_address_is_told_at_once(scheme: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{probe.getsockname()[1]}"
    with (
        pytest.raises(ConnectionError, match="Connection refused"),
        connect(address, num_cpus=1, num_gpus=None, evaluation_slots=1),
    ):
        raise AssertionError("there is no Ray")
