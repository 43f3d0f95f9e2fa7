"""Names of torch that it does not document: an upgrade that changes one fails here."""

from __future__ import annotations

import socket
from typing import Any

import psutil
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pretrain.training.torch_internals import (
    DispatchMode,
    WeakStorage,
    loopback_store,
    norms_of,
    without_numbers,
    written_by,
)


def test_norms_of__are_float32_whatever_the_tensors_are() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 30, generator=generator), torch.randn(1000, generator=generator).bfloat16()]
    found = norms_of([*tensors, torch.zeros(3), torch.ones(0)])
    assert found.dtype == torch.float32
    expected = torch.stack([tensor.double().square().sum().sqrt() for tensor in tensors]).float()
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(2)]), rtol=1e-6, atol=0)
    assert norms_of([torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan])]).isfinite().tolist() == [False, False]


def test_loopback_store__listens_on_the_loopback_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    store = loopback_store(0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    listening = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_loopback_store__is_left_to_torch_on_several_machines_and_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    assert loopback_store(0, 2) is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert loopback_store(0, 2) is None


def test_without_numbers__autocasting_and_attention_are_as_elsewhere() -> None:
    query, keys = torch.empty(2, 3, 5, 8, device="meta", requires_grad=True), torch.empty(2, 3, 7, 8, device="meta")
    kept: list[torch.Size] = []
    with without_numbers(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        with torch.autocast("meta", enabled=False), torch.autocast("cpu", torch.bfloat16):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        attended = scaled_dot_product_attention(query, keys, keys)
    assert attended.shape == query.shape and attended.transpose(1, 2).is_contiguous()
    assert (2, 3, 5, 7) not in kept and kept  # of all pairs
    with pytest.raises(RuntimeError):
        torch.autocast("meta", torch.bfloat16)


def test_dispatch_mode__sees_operations_and_what_they_write() -> None:
    seen: list[tuple[str, int]] = []

    class Listening(DispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            written = written_by(function, args, kwargs or {})
            seen.append((function._schema.name, sum(value is x for value in written)))
            return function(*args, **(kwargs or {}))

    x = torch.zeros(3)
    with Listening():
        x.normal_()
        torch.add(x, 1, out=x)
        x.t_()
        _ = x + 1
    assert seen == [("aten::normal_", 1), ("aten::add", 1), ("aten::t_", 1), ("aten::add", 0)]


def test_weak_storage__ends_with_its_tensor() -> None:
    x = torch.zeros(3)
    weak = WeakStorage(x.untyped_storage())
    found = weak.storage()
    assert found is not None and found.data_ptr() == x.data_ptr()
    del x, found
    assert weak.storage() is None
