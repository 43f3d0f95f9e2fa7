"""From `pretrain run` to the first training step: wall time broken down, and CPU-seconds of all processes until then.

python benchmarks/startup.py [RECIPE] [key=value ...] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from job_cost import kind_of

from pretrain.record.events import Startup
from pretrain.record.journal import read_events
from pretrain.record.run_dir import runs_in

PARTS = {
    "placed_s": "Ray up, workers placed",
    "imported_s": "torch and timm imported",
    "joined_s": "DeepSpeed imported, ranks joined",
    "built_s": "model, DeepSpeed engine",
    "first_batch_s": "stream, random backbone saved, first batch",
    "first_step_s": "first step",
    "total_s": "all",
}


def one_start(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Start a run, read its start-up record, add the CPU time of the process tree, stop it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pretrain", "run", recipe, f"storage={scratch}", *overrides]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.time()
        while True:
            runs = runs_in(Path(scratch))
            events = read_events(runs[0].journal)[0] if runs else []
            found = [event for event in events if isinstance(event, Startup)]
            if found:
                break
            if run.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with exit code {run.returncode} before its first step")
            time.sleep(0.05)
        shell_s = time.time() - began
        cpu: dict[str, float] = {}
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
            times = process.cpu_times()
            kind = kind_of(process)
            cpu[kind] = cpu.get(kind, 0.0) + times.user + times.system + times.children_user + times.children_system
        run.terminate()
        run.wait()
    return {**found[0].to_json(), "shell_s": shell_s, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(one_start(arguments.recipe, arguments.overrides))
        print(f"round {number + 1}: {rounds[-1]['shell_s']:.1f} s wall", flush=True)
    for key, what in PARTS.items():
        print(f"{statistics.median(record[key] for record in rounds):6.1f} s  {what}")
    for kind in sorted({kind for record in rounds for kind in record["cpu"]}):
        print(f"{statistics.median(record['cpu'].get(kind, 0.0) for record in rounds):6.1f} CPU-s  {kind}")


if __name__ == "__main__":
    main()
