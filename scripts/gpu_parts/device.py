"""The machine itself: what it is, its collectives, and copies to the GPU."""

from __future__ import annotations

import os
import statistics
import sys
import time

from gpu_parts.questions import Check, Row
from gpu_parts.training import joined, wait_for

__all__ = ["machine", "nccl", "transfer"]


def machine(check: Check, case: str) -> Row:
    """What is measured here."""
    import deepspeed
    import torch

    device = joined(check.device)
    row: Row = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        row |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "nccl": nccl}
        row |= {"memory_gb": total / 1e9, "free_gb": free / 1e9}
    return row


def nccl(check: Check, case: str) -> Row:
    """The collectives of a training step, whose answers in a group of one are known."""
    import torch
    import torch.distributed as dist

    joined(check.device)
    x = torch.arange(1 << 20, dtype=torch.bfloat16 if case == "bf16" else torch.float32, device="cuda") % 251
    results = {name: torch.zeros_like(x) for name in ("all_gather", "reduce_scatter")}
    results |= {name: x.clone() for name in ("all_reduce", "broadcast")}
    dist.all_reduce(results["all_reduce"])
    dist.broadcast(results["broadcast"], 0)
    dist.all_gather_into_tensor(results["all_gather"], x)
    dist.reduce_scatter_tensor(results["reduce_scatter"], x)
    wrong = [name for name, result in results.items() if not torch.equal(result, x)]
    row: Row = {"backend": dist.get_backend(), "collectives": sorted(results)}
    return row | {"error": f"other numbers from {', '.join(wrong)}"} if wrong or row["backend"] != "nccl" else row


def transfer(check: Check, case: str) -> Row:
    """A batch to the device: does the host go on meanwhile, and are the numbers those that were sent."""
    import torch

    from pretrain.training.inputs import Transfer

    device = joined(check.device)
    source = torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8)
    batch = {"image": source.pin_memory() if case == "pinned" else source}
    bring, host, whole = Transfer(device), [], []
    for _ in range(10):
        wait_for(device)
        began = time.perf_counter()
        moved = bring(batch)
        host.append(time.perf_counter() - began)
        wait_for(device)
        whole.append(time.perf_counter() - began)
    row: Row = {"mb": source.nbytes / 1e6, "host_ms": statistics.median(host) * 1e3}
    row |= {"copied_ms": statistics.median(whole) * 1e3, "gb_per_s": source.nbytes / statistics.median(whole) / 1e9}
    if not torch.equal(moved["image"].cpu(), source):
        return row | {"error": "other numbers arrived"}
    if case == "pinned" and row["host_ms"] > row["copied_ms"] / 2:
        return row | {"error": "the host waits for the copy of a page-locked batch"}
    return row
