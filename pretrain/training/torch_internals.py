"""What this package uses of torch that torch does not document; `tests/pretrain/test_torch_internals.py` touches all.

* `TCPStore(master_listen_fd=...)`: a socket that listens already. The documented form listens on every address.
* `torch._foreach_norm`: the norms of many tensors by few kernels. The documented form, `torch.nn.utils.get_total_norm`,
  keeps to the tensors' type, and bf16 has three digits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

__all__ = ["loopback_store", "norms_of"]


def norms_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of each of some tensors on one device, (n,) float32; at least one tensor."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))


def loopback_store(rank: int, world_size: int) -> Any:
    """Where ranks on one machine meet: a store that listens on 127.0.0.1 only, at MASTER_PORT.

    None, torch's default, for ranks on several machines and under torchrun, which has a store of its own.
    """
    if os.environ["MASTER_ADDR"] != "127.0.0.1" or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    port, listening = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        listening = server.detach()
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, world_size, rank == 0, master_listen_fd=listening
    )
