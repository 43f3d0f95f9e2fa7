"""What this machine has for the workers of a private Ray, and whether they fit on it; asked without torch.

Not here: what a cluster has, which may grow (`cluster.connect.gpus_per_worker`), the memory that training takes
(`pretrain.training.memory`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.cores import usable_cores
from pretrain.config.schema import Recipe

__all__ = ["Machine", "Misfit", "free_memory", "misfit", "this_machine"]

_DEVICES = Path("/dev")
_CGROUP = Path("/sys/fs/cgroup")
_OTHERS = ("kfd", "dxg")  # drivers whose GPUs have no file each: AMD's, and that of Windows for Linux
# Trials have reasons for a few more workers than cores. More than that is worth a word, and where this many share a
# core, the recipe is meant for other machines.
_CROWDED, _HOPELESS, _FEW = 2, 4, 8
_ELSEWHERE = "--address of a cluster"


@dataclass(frozen=True)
class Machine:
    """What processes of this one may use.

    Attributes:
        cpus: Cores.
        gpus: None: there may be some that cannot be counted without their libraries.
    """

    cpus: int
    gpus: int | None

    def __str__(self) -> str:
        gpus = {None: "GPUs that are not counted", 0: "no GPU"}.get(self.gpus, _counted(self.gpus or 0, "GPU"))
        return f"{_counted(self.cpus, 'CPU')} and {gpus}"


@dataclass(frozen=True)
class Misfit:
    """What is wrong with the workers of a run on a machine.

    Attributes:
        text: One line, with the remedy.
        is_refused: It cannot be meant, or cannot work; otherwise it is slow.
    """

    text: str
    is_refused: bool


def this_machine() -> Machine:
    """Cores by the affinity of this process; GPUs of NVIDIA by their device files and `CUDA_VISIBLE_DEVICES`."""
    files = [path.name for path in _DEVICES.iterdir()] if _DEVICES.is_dir() else []
    found = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in files)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if found and visible is not None:
        found = min(found, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    is_known = not set(_OTHERS) & set(files)
    return Machine(usable_cores(), found if found or is_known else None)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container (cgroup v2) if that has a limit."""
    import psutil  # type: ignore[import-untyped]

    free = int(psutil.virtual_memory().available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def misfit(recipe: Recipe, machine: Machine) -> Misfit | None:
    """Why the workers of a run do not fit on a machine; None where they do, or run on a cluster.

    Args:
        recipe: Of the run.
        machine: Where the driver runs, and with a private Ray the workers as well.
    """
    train, cluster = recipe.train, recipe.cluster
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return None
    each = 1 if cluster.gpus_per_worker is None else cluster.gpus_per_worker
    if train.device != "cpu" and each:
        if machine.gpus is None or machine.gpus >= train.workers * each:
            return None
        if machine.gpus:
            fewer = f"train.workers={machine.gpus // each}, " if machine.gpus >= each else ""
            needed = "one GPU" if each == 1 else f"{each} GPUs"
            text = f"train.workers={train.workers}: this machine has {machine}, not {needed} for each worker"
            return Misfit(f"{text}; use {fewer}train.device=cpu, or {_ELSEWHERE}", True)
        if train.device == "cuda":
            text = "train.device=cuda: this machine has no GPU"
            return Misfit(f"{text}; use train.device=cpu or auto, or {_ELSEWHERE}", True)
    if train.workers <= _CROWDED * machine.cpus:
        return None
    text = f"train.workers={train.workers}: this machine has {machine}, and they would train on CPUs"
    is_refused = train.workers > max(_FEW, _HOPELESS * machine.cpus)
    return Misfit(f"{text}; use train.workers={machine.cpus}, or {_ELSEWHERE}", is_refused)


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
