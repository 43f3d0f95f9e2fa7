"""For tests of any room: processes that start at once, and the same work in several of them that talk through gloo."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.training.engine import init_distributed

# What a worker imports, and what DeepSpeed imports while it builds an engine.
WORKER_IMPORTS = ["deepspeed", "timm", "torchvision", "pretrain.worker", "pretrain.training.engine"]
WORKER_IMPORTS += ["pretrain.reporting.terminal", "deepspeed.runtime.zero.muon.original_muon"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside a checkout, which users do not have."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder


@pytest.fixture(scope="session")
def warm_start() -> Iterator[BaseContext]:
    """Processes of this context are forks of one that has imported what a worker does, and has done nothing else.

    Each worker of a test would else spend most of its time on these imports. Their environment is that of the first
    process: give them `os.environ`.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(WORKER_IMPORTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    yield context


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory: pytest.TempPathFactory, warm_start: BaseContext) -> Callable[..., Any]:
    """`run_on_ranks(n, work, *arguments)`: what `work(*arguments)`, a module's own function, returns on rank 0 of n.

    The ranks are fresh processes of one thread each, in a process group; the answer comes as JSON.
    """

    def run(world_size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (dict(os.environ), world_size, port, folder, work, arguments)
        mp.start_processes(_on_rank, arguments, nprocs=world_size, start_method=warm_start.get_start_method())
        return json.loads((folder / "found.json").read_text())

    return run


def _on_rank(
    rank: int,
    environment: dict[str, str],
    world_size: int,
    port: int,
    folder: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(environment | {name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
    torch.set_num_threads(1)
    with (folder / f"log-{rank}").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        init_distributed(torch.device("cpu"))
        gc.freeze()  # DeepSpeed collects garbage for every engine, and need not look at all that was imported
        found = work(*arguments)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket `data` on a server of our own, and a file system to fill it with."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    if filesystem.exists("data"):
        filesystem.rm("data", recursive=True)
    filesystem.mkdir("data")
    return filesystem
