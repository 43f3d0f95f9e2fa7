"""For tests of any room: the same work in several processes on this machine that talk through gloo."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.training.engine import init_distributed


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`run_on_ranks(n, work, *arguments)`: what `work(*arguments)`, a module's own function, returns on rank 0 of n.

    The ranks are fresh processes of one thread each, in a process group; the answer comes as JSON.
    """

    def run(world_size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_on_rank, args=(world_size, port, folder, work, arguments), nprocs=world_size)
        return json.loads((folder / "found.json").read_text())

    return run


def _on_rank(
    rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
    torch.set_num_threads(1)
    with (folder / f"log-{rank}").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        init_distributed(torch.device("cpu"))
        found = work(*arguments)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.destroy_process_group()
