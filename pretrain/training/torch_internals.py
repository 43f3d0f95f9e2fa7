"""What this package uses of torch that torch does not document; `tests/pretrain/test_torch_internals.py` touches all.

* `TCPStore(master_listen_fd=...)`: a socket that listens already. The documented form listens on every address.
* `torch.autocast` on the meta device: it refuses that, where it would have nothing to do.
* `torch._foreach_norm`: the norms of many tensors by few kernels. The documented form, `torch.nn.utils.get_total_norm`,
  keeps to the tensors' type, and bf16 has three digits.
* `TorchDispatchMode`, and what an operation's schema says of it: whatever is done to a tensor passes there.
* `StorageWeakRef` and `UntypedStorage._new_with_weak_ptr`: the memory of a tensor, as long as somebody else has it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "WeakStorage", "loopback_store", "norms_of", "without_numbers", "written_by"]


class WeakStorage:
    """The memory of a tensor, which this does not keep alive."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._reference = StorageWeakRef(storage)

    def storage(self) -> torch.UntypedStorage | None:
        """None when nothing has it any more."""
        found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self._reference.cdata)
        return found


def written_by(operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation may write to; of others than torch's own, all of them."""
    if operation.namespace != "aten":
        return [*arguments, *options.values()]
    by_name = {argument.name: argument for argument in operation._schema.arguments}
    given = [*zip(operation._schema.arguments, arguments, strict=False)]  # some are left out
    given += [(by_name[name], value) for name, value in options.items() if name in by_name]
    return [value for argument, value in given if _is_written(argument)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


@contextmanager
def without_numbers() -> Iterator[None]:
    """In this context a model runs on the meta device as it would elsewhere.

    Autocasting does nothing there, and attention keeps what its fused kernels keep, no matrix of all pairs.
    """
    autocast: Any = torch.autocast

    def possible(device_type: str, *arguments: Any, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **options)

    torch.autocast = possible  # type: ignore[assignment,misc]
    try:
        with _FusedAttention():
            yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            return _Attention.apply(*arguments[:3])
        return function(*arguments, **(options or {}))


class _Attention(torch.autograd.Function):
    """The shapes of fused attention: (..., H, N, d) in the layout (..., N, H, d), and a float32 number per row."""

    @staticmethod
    def forward(context: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        *batch, num_heads, num_queries, _ = query.shape
        output = query.new_empty(*batch, num_queries, num_heads, values.shape[-1]).transpose(-3, -2)
        context.save_for_backward(query, keys, values, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


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
