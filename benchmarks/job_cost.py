"""CPU-seconds of a whole job, of all its processes, from the command line to the prompt, beside the bare loop's.

The bare loop (`overhead.bare_steps`) does the same steps in one process, with its own imports: what a job costs more is
the product around it. Rounds alternate; the figures are medians.

    python benchmarks/job_cost.py [RECIPE] [key=value ...] [--steps 60] [--rounds 3] [--short]
    python benchmarks/job_cost.py --peers --cifar10 DIR [--peer-python PYTHON] [--steps 50] [--rounds 2] [--short]

With `--peers` lightly-train and stable-pretraining take the place of the bare loop, by another interpreter where they
are installed apart (the extra `bench`). The job is one that all do: from a folder of JPEGs, the first of the shards in
DIR, to a backbone: a ViT-Ti/16 at 64 pixels, DINO with two crops of 64 and six of 32 pixels and 1 024 prototypes,
batches of 100, one thread and one loader process. Ours packs the pictures first; none evaluates. Before the rounds each
does a job of one step that does not count, so that byte code is there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

POLL_S = 0.05
PEERS = {"lightly-train": "lightly_train", "stable-pretraining": "stable_pretraining"}  # name -> its module
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


RECIPE = """
name: dino_job
objective: {name: dino, num_prototypes: 1024, num_local: 6, local_size: 32}
backbone: {name: vit_tiny_patch16_224, image_size: 64}
data: {root: "???", train: "${data.root}/train-*.tar", loader_workers: 1}
optimizer: {base_lr: 5.0e-4, warmup_steps: 0}
train: {steps: 50, micro_batch_size: 100, workers: 1, log_every: 10, pictures_every: 0}
evaluation: {enabled: false, baseline: false}
"""


class Cost(NamedTuple):
    """CPU-seconds of a process tree by kind, of them those until the first and after the last step; wall time."""

    cpu: dict[str, float]
    start: float
    end: float
    wall_s: float

    @property
    def total(self) -> float:
        return sum(self.cpu.values())


def kind_of(process: psutil.Process) -> str:
    """What a process of a job is, by its command line."""
    line = " ".join(process.cmdline())
    return next((kind for text, kind in KINDS.items() if text in line), "others")


def never() -> bool:
    return False


def job_cost(command: list[str], has_begun: Callable[[], bool] = never, is_done: Callable[[], bool] = never) -> Cost:
    """Run a command to its end; `has_begun` says whether its first step is done, `is_done` whether its last is.

    What a process uses after the last look at it, 0.05 s before its end at most, is not seen.
    """
    began = time.monotonic()
    seen: dict[int, tuple[str, float]] = {}
    start = done = float("nan")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would fill up and halt the job
        root = psutil.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment | {"OMP_NUM_THREADS": "1"}
        )
        while root.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):  # it has just ended
                    times = process.cpu_times()
                    seen[process.pid] = kind_of(process), times.user + times.system
            if start != start and has_begun():
                start = sum(seconds for _, seconds in seen.values())
            if done != done and is_done():
                done = sum(seconds for _, seconds in seen.values())
            time.sleep(POLL_S)
        if root.wait():
            errors.seek(0)
            said = errors.read()[-2000:]
            raise SystemExit(f"{' '.join(command)} ended with exit code {root.returncode}:\n{said}")
    cpu: dict[str, float] = {}
    for kind, seconds in seen.values():
        cpu[kind] = cpu.get(kind, 0.0) + seconds
    return Cost(cpu, start, sum(cpu.values()) - done, time.monotonic() - began)


def our_job(pictures: Path, scratch: Path, batch: int, steps: int) -> Cost:
    """`pretrain run` on a folder of pictures; its backbone is in the last checkpoint."""
    recipe, storage = scratch / "dino_job.yaml", scratch / "runs"
    recipe.write_text(RECIPE)
    settings = [
        f"data.root={pictures}",
        f"train.steps={steps}",
        f"train.checkpoint_every={steps}",
        f"storage={storage}",
    ]
    settings += [f"train.micro_batch_size={batch}", f"train.global_batch_size={batch}"]

    def has_begun() -> bool:
        return any('"kind": "startup"' in journal.read_text() for journal in storage.glob("*/journal.jsonl"))

    cost = job_cost([sys.executable, "-m", "pretrain", "run", str(recipe), *settings], has_begun)
    _require(storage.glob(f"*/checkpoints/step-{steps:08d}/backbone.safetensors"), "pretrain")
    return cost


def peer_job(peer: str, python: str, pictures: Path, scratch: Path, batch: int) -> Cost:
    """The same by a peer, in one epoch."""
    program = str(Path(__file__).with_name(f"peer_{peer.replace('-', '_')}.py"))
    started = scratch / "out.started"
    cost = job_cost([python, program, str(pictures), str(scratch / "out"), "--batch", str(batch)], started.exists)
    _require((scratch / "out" / "exported_models").iterdir(), peer)
    return cost


def _has_step(storage: Path, step: int) -> bool:
    """Whether the journal of the one run there has a record of this step."""
    return any(f'"step": {step},' in journal.read_text() for journal in storage.glob("*/journal.jsonl"))


def _require(files: Iterable[Path], whose: str) -> None:
    if not any(True for _ in files):
        raise SystemExit(f"{whose} has exported no backbone")


def unpack(shards: Path, folder: Path, number: int) -> None:
    """The first JPEGs of WebDataset shards as files of one folder."""
    folder.mkdir()
    for shard in sorted(shards.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if number and member.name.endswith(".jpg"):
                    (folder / member.name).write_bytes(tar.extractfile(member).read())
                    number -= 1
    if number:
        raise SystemExit(f"{shards}/train-*.tar: {number} JPEGs are missing")


def beside_peers(python: str, shards: Path, steps: int, rounds: int, batch: int = 100) -> None:
    """The jobs in turn, and a table."""
    peers = [peer for peer, module in PEERS.items() if _has(python, module)]
    for peer in PEERS.keys() - peers:
        print(f"{peer} skipped: {python} does not have it; install the extra bench, or give --peer-python")
    costs: dict[str, list[Cost]] = {name: [] for name in ("pretrain", *peers)}
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as place:
            scratch, todo = Path(place), steps if number else 1
            pictures = scratch / "pictures"
            unpack(shards, pictures, batch * todo)
            for name in costs:
                (scratch / name).mkdir()
                if name == "pretrain":
                    cost = our_job(pictures, scratch / name, batch, todo)
                else:
                    cost = peer_job(name, python, pictures, scratch / name, batch)
                if number:
                    costs[name].append(cost)
                counted = f"round {number}" if number else "not counted"
                print(f"{counted}: {name} {cost.total:.1f} CPU-s, {cost.start:.1f} to the first step", flush=True)
    print(f"{'CPU-s, median (spread)':24} {'whole job':>22} {'to the first step':>22}")
    for name, found in costs.items():
        cells = [_spread([cost.total for cost in found]), _spread([cost.start for cost in found])]
        print(f"{name:24} {cells[0]:>22} {cells[1]:>22}")


def _has(python: str, module: str) -> bool:
    look = f"from importlib.util import find_spec; assert find_spec({module!r}) and find_spec('timm')"
    return subprocess.run([python, "-c", look], capture_output=True).returncode == 0


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, help="default: 60; 50 beside peers")
    parser.add_argument("--rounds", type=int, help="default: 3; 2 beside peers")
    parser.add_argument("--short", action="store_true", help="one round of few steps")
    parser.add_argument("--peers", action="store_true", help="beside other libraries")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="the interpreter that has them")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="its shards, for --peers")
    arguments = parser.parse_intermixed_args()
    usual = ((5, 1) if arguments.short else (50, 2)) if arguments.peers else ((20, 1) if arguments.short else (60, 3))
    arguments.steps, arguments.rounds = arguments.steps or usual[0], arguments.rounds or usual[1]
    if arguments.peers:
        if arguments.cifar10 is None:
            parser.error("--peers needs --cifar10")
        beside_peers(arguments.peer_python, arguments.cifar10, arguments.steps, arguments.rounds)
        return
    settings = [f"train.steps={arguments.steps}", "optimizer.warmup_steps=10", *ALONE, *arguments.overrides]
    jobs: list[dict[str, float]] = []
    bare: list[float] = []
    walls: list[float] = []
    ends: list[float] = []
    for _ in range(arguments.rounds):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import overhead; "
        code += f"overhead.bare_steps({arguments.recipe!r}, {settings!r})"
        bare.append(job_cost([sys.executable, "-c", code]).total)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pretrain", "run", arguments.recipe, *settings, f"storage={scratch}"]
            cost = job_cost(command, is_done=lambda place=scratch: _has_step(Path(place), arguments.steps))
        jobs.append(cost.cpu)
        ends.append(cost.end)
        walls.append(cost.wall_s)
    for kind in sorted({kind for job in jobs for kind in job}):
        print(f"{kind:40} {statistics.median(job.get(kind, 0.0) for job in jobs):7.1f} CPU-s")
    totals = [sum(job.values()) for job in jobs]
    spread = f"{min(totals):.1f}-{max(totals):.1f}"
    print(f"{'job':40} {statistics.median(totals):7.1f} CPU-s ({spread}), {statistics.median(walls):.1f} s")
    print(f"{'of it, after the last step':40} {statistics.median(ends):7.1f} CPU-s ({min(ends):.1f}-{max(ends):.1f})")
    print(f"{'bare loop':40} {statistics.median(bare):7.1f} CPU-s ({min(bare):.1f}-{max(bare):.1f})")
    print(f"{'beyond the bare loop':40} {statistics.median(totals) - statistics.median(bare):7.1f} CPU-s")


if __name__ == "__main__":
    main()
