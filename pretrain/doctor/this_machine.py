"""This machine: Python and packages, GPUs, what is compiled, cores, shared memory, open files.

torch and DeepSpeed are asked in processes of their own: a driver that hangs or crashes takes nothing with it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.doctor.finding import ANSWER_S, Finding, Level, size
from pretrain.machine import this_machine

__all__ = ["cores", "deepspeed_ops", "gpus", "open_files", "packages", "python", "shared_memory"]

SHM_FEW, SHM_NONE = 1 << 30, 64 << 20  # bytes; 64 MiB is what Docker and Kubernetes give unasked
FILES_FEW = 4096
PACKAGES = ("ray", "torch", "deepspeed", "mlflow", "timm")
_CGROUP = Path("/sys/fs/cgroup")
_LATE = f"not within {ANSWER_S:.0f} s"

_ASK_TORCH = """
import json, torch
found = {"cuda": torch.version.cuda, "available": torch.cuda.is_available(), "count": torch.cuda.device_count()}
if found["available"]:
    torch.zeros(1, device="cuda")
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["names"] = [torch.cuda.get_device_name(index) for index in range(found["count"])]
print(json.dumps(found))
"""
_ASK_DEEPSPEED = """
import json
from deepspeed.ops.op_builder.all_ops import ALL_OPS
found = {}
for name in ("fused_adam", "cpu_adam"):
    builder = ALL_OPS[name]
    found[name] = bool(builder.is_compatible(verbose=False))
print(json.dumps(found))
"""


def python() -> Finding:
    version = platform.python_version()
    level: Level = "ok" if sys.version_info[:2] <= (3, 12) else "warn"
    remedy = "" if level == "ok" else "tested with Python 3.11 and 3.12; nodes of a cluster need the same"
    return Finding("python", level, f"{version} at {sys.executable}", remedy)


def packages() -> Finding:
    """Versions that are installed, and whether they are those that this package asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("pretrain") or []]
    except metadata.PackageNotFoundError:  # run from its sources
        wanted = []
    ranges = {item.name: item.specifier for item in wanted if item.marker is None or item.marker.evaluate()}
    versions: list[str] = []
    wrong: list[str] = []
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        versions.append(f"{name} {version}")
        if name in ranges and not ranges[name].contains(version, prereleases=True):
            wrong.append(f"{name} {version} is not {ranges[name]}")
    if wrong:
        return Finding("packages", "fail", ", ".join(wrong), "install what requirements/runtime.txt pins")
    return Finding("packages", "ok", ", ".join(versions))


def gpus() -> Finding:
    """Whether torch computes on the GPUs that there are; `train.device=auto` would train on CPUs without them."""
    there = this_machine().gpus
    found = _asked(_ASK_TORCH)
    if isinstance(found, str):
        is_late = found == _LATE  # many GPUs take as long to begin with on a busy machine
        level: Level = "fail" if there and not is_late else "warn"
        return Finding(
            "gpus", level, f"torch gives no answer: {found}", "see python -c 'import torch; torch.cuda.init()'"
        )
    if found["available"]:
        names = ", ".join(sorted(set(found["names"])))
        text = f"{found['count']} x {names}, CUDA {found['cuda']}, NCCL {found['nccl']}"
        if there is not None and found["count"] < there:
            return Finding("gpus", "fail", f"{text}, but the machine has {there}", "look at nvidia-smi for the others")
        return Finding("gpus", "ok", text)
    if there:
        build = f"is built for CUDA {found['cuda']}" if found["cuda"] else "is built for CPUs"
        remedy = "install a torch that fits the driver (nvidia-smi), or say train.device=cpu"
        return Finding("gpus", "fail", f"{there} in the machine, and torch, which {build}, sees none", remedy)
    return Finding("gpus", "ok", "none: train.device=auto means cpu here")


def deepspeed_ops() -> Finding:
    found = _asked(_ASK_DEEPSPEED)
    if isinstance(found, str):
        return Finding("deepspeed", "warn", f"gives no answer: {found}", "see ds_report")
    tools = [name for name in ("gcc", "ninja") if shutil.which(name) is None]
    said = ", ".join(f"{name} {'yes' if is_there else 'no'}" for name, is_there in found.items())
    missing = f"; {' and '.join(tools)} missing, with which they are compiled" if tools else ""
    return Finding("deepspeed", "ok", f"compiled optimizers: {said}{missing} (torch's are used unless asked for)")


def cores() -> Finding:
    """Cores that processes see against what a container may use."""
    machine = this_machine()
    quota, memory = _cgroup_cpus(), _cgroup_memory()
    text = str(machine) + (f", at most {quota:g} at a time" if quota is not None else "")
    text += f", {memory / 2**30:.1f} GiB" if memory is not None else ""
    if quota is not None and quota < machine.cpus:
        remedy = f"give train.workers and data.loader_workers by hand, for {max(1, int(quota))} cores"
        return Finding("cores", "warn", text, remedy)
    return Finding("cores", "ok", text)


def shared_memory() -> Finding:
    try:
        total = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        return Finding("shared memory", "fail", f"/dev/shm: {error.strerror}", "mount a tmpfs at /dev/shm")
    text = f"/dev/shm has {size(total)}"
    remedy = "docker: --shm-size=8g; Kubernetes: an emptyDir with medium: Memory at /dev/shm (pretrain manifest has it)"
    level: Level = "fail" if total <= SHM_NONE else "warn" if total < SHM_FEW else "ok"
    return Finding("shared memory", level, text, "" if level == "ok" else remedy)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} at a time" if soft != resource.RLIM_INFINITY else "no bound"
    if soft == resource.RLIM_INFINITY or soft >= FILES_FEW:
        return Finding("open files", "ok", text)
    most = "65536" if hard == resource.RLIM_INFINITY else str(min(hard, 65536))
    return Finding("open files", "warn", text, f"ulimit -n {most} before Ray is started")


def _cgroup_cpus() -> float | None:
    """Cores that the container of this process may use at a time; None: no bound."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):  # the first version of cgroups
        micros = int((_CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        return None if micros < 0 else micros / int((_CGROUP / "cpu" / "cpu.cfs_period_us").read_text())
    return None


def _cgroup_memory() -> int | None:
    """Bytes that the container or machine of this process has; None: unknown."""
    import psutil  # type: ignore[import-untyped]

    total = int(psutil.virtual_memory().total)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(total, int((_CGROUP / name).read_text()))
    return total


def _asked(code: str) -> dict[str, Any] | str:
    """What a process of its own prints as JSON, or why it did not."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return _LATE
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        said = answer.stderr.strip().splitlines()
        return said[-1] if said else f"exit code {answer.returncode}"
    found: dict[str, Any] = json.loads(lines[-1])
    return found
