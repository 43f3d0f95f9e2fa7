"""Batches on their way to a device."""

from __future__ import annotations

import pytest
import torch

from data_pipelines.views.photometric import PARAMS_SUFFIX
from pretrain.training.inputs import Transfer


def batch_of(number: int, *, pinned: bool = False) -> dict[str, torch.Tensor]:
    batch = {"image": torch.full((64, 3, 64, 64), number, dtype=torch.uint8), f"image{PARAMS_SUFFIX}": torch.ones(4, 7)}
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pinned else batch


def test_transfer__on_a_cpu_the_batch_is_what_it_was() -> None:
    batch = batch_of(3)
    moved = Transfer(torch.device("cpu"))(batch)
    assert moved.keys() == batch.keys() and all(moved[name] is batch[name] for name in batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams are CUDA's")
def test_transfer__on_a_gpu_each_batch_arrives_whole_before_it_is_used() -> None:
    device = torch.device("cuda", 0)
    transfer, busy = Transfer(device), torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(20):
        busy = busy @ busy / 64  # the device lags behind the host
        moved = transfer(batch_of(number, pinned=True))
        assert not moved[f"image{PARAMS_SUFFIX}"].is_cuda
        sums.append(moved["image"].float().mean())
        del moved
    assert [float(total) for total in sums] == list(map(float, range(20)))
