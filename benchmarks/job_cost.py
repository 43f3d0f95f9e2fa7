"""CPU-seconds of a whole job, of all its processes, from the command line to the prompt, beside the bare loop's.

The bare loop (`overhead.bare_steps`) does the same steps in one process, with its own imports: what a job costs more is
the product around it. Rounds alternate; the figures are medians.

    python benchmarks/job_cost.py [RECIPE] [key=value ...] [--steps 60] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

POLL_S = 0.05
ALONE = ("train.workers=1", "evaluation.enabled=false", "evaluation.baseline=false")
KINDS = {  # a text in the command line of a process -> what it is; the first that fits
    "gcs_server": "Ray: gcs_server",
    "raylet/raylet": "Ray: raylet",
    "log_monitor": "Ray: log monitor",
    "dashboard/agent": "Ray: agents",
    "runtime_env/agent": "Ray: agents",
    "dashboard": "Ray: dashboard",
    "autoscaler": "Ray: monitor",
    "ray::IDLE": "Ray: idle workers",
    "default_worker": "Ray: idle workers",
    "ray::": "training workers and their loaders",
    "pretrain": "driver and its parent process",
}


def kind_of(process: psutil.Process) -> str:
    """What a process of a job is, by its command line."""
    line = " ".join(process.cmdline())
    return next((kind for text, kind in KINDS.items() if text in line), "others")


def job_cost(command: list[str]) -> tuple[dict[str, float], float]:
    """Run a command to its end; CPU-seconds of its process tree by kind, and seconds of wall time.

    What a process uses after the last look at it, 0.05 s before its end at most, is not seen.
    """
    began = time.monotonic()
    seen: dict[int, tuple[str, float]] = {}
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would fill up and halt the job
        root = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while root.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):  # it has just ended
                    times = process.cpu_times()
                    seen[process.pid] = kind_of(process), times.user + times.system
            time.sleep(POLL_S)
        if root.wait():
            errors.seek(0)
            said = errors.read()[-2000:]
            raise SystemExit(f"{' '.join(command)} ended with exit code {root.returncode}:\n{said}")
    cpu: dict[str, float] = {}
    for kind, seconds in seen.values():
        cpu[kind] = cpu.get(kind, 0.0) + seconds
    return cpu, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mae_cifar10")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = [f"train.steps={arguments.steps}", "optimizer.warmup_steps=10", *ALONE, *arguments.overrides]
    jobs: list[dict[str, float]] = []
    bare: list[float] = []
    walls: list[float] = []
    for _ in range(arguments.rounds):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import overhead; "
        code += f"overhead.bare_steps({arguments.recipe!r}, {settings!r})"
        bare.append(sum(job_cost([sys.executable, "-c", code])[0].values()))
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pretrain", "run", arguments.recipe, *settings, f"storage={scratch}"]
            cpu, wall_s = job_cost(command)
        jobs.append(cpu)
        walls.append(wall_s)
    for kind in sorted({kind for job in jobs for kind in job}):
        print(f"{kind:40} {statistics.median(job.get(kind, 0.0) for job in jobs):7.1f} CPU-s")
    totals = [sum(job.values()) for job in jobs]
    spread = f"{min(totals):.1f}-{max(totals):.1f}"
    print(f"{'job':40} {statistics.median(totals):7.1f} CPU-s ({spread}), {statistics.median(walls):.1f} s")
    print(f"{'bare loop':40} {statistics.median(bare):7.1f} CPU-s ({min(bare):.1f}-{max(bare):.1f})")
    print(f"{'beyond the bare loop':40} {statistics.median(totals) - statistics.median(bare):7.1f} CPU-s")


if __name__ == "__main__":
    main()
