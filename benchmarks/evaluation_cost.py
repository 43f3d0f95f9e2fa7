"""What the evaluation of one checkpoint by linear and kNN costs: CPU-seconds and wall time of imports, features, heads.

The checkpoint is a random backbone of the size of `mae_cifar10`; each round is a process of its own. A head is timed by
a second evaluation, which finds the features of the first.

    python benchmarks/evaluation_cost.py [DATA] [--threads 1] [--rounds 3] [--short]
    python benchmarks/evaluation_cost.py [DATA] --suites     of each suite, with features taken once, and anew for each
    python benchmarks/evaluation_cost.py --heads             ten linear heads trained together, and one by one

DATA holds train-*.tar and test-*.tar with classes; default: the photos that come with the package, at 32 pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROCERY = Path(__file__).parents[1] / "pretrain" / "demo_data" / "grocery"
PROTOCOLS = ("linear", "knn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=GROCERY)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one round")
    parser.add_argument("--suites", action="store_true")
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_evaluated(arguments.data.absolute(), arguments.child, arguments.threads)))
        return
    if arguments.heads:
        _heads(1 if arguments.short else arguments.rounds)
        return
    if arguments.suites:
        _suites(arguments.data.absolute(), arguments.threads)
        return
    rounds = []
    for _ in range(1 if arguments.short else arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, str(arguments.data), f"--threads={arguments.threads}"]
            done = subprocess.run([*command, f"--child={scratch}"], check=True, capture_output=True, text=True)
        rounds.append(json.loads(done.stdout))
    for part in rounds[0]:
        cpu, wall = ([costs[part][idx] for costs in rounds] for idx in (0, 1))
        spread = f"({min(cpu):.2f}-{max(cpu):.2f})"
        print(f"{part:12} {statistics.median(cpu):7.2f} CPU-s {spread:>16} {statistics.median(wall):7.2f} s")


def _evaluated(data: Path, storage: Path, num_threads: int) -> dict[str, tuple[float, float]]:
    """(CPU-seconds, seconds) of each part, in this process."""
    costs = {}

    def timed(part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        function(*arguments, **options)
        costs[part] = (time.process_time() - cpu, time.perf_counter() - wall)

    timed("imports", _import)
    from evaluation.data import EvaluationData
    from evaluation.runner import evaluate
    from evaluation.threads import Threads

    _save_backbone(storage)
    asked = {"data": EvaluationData("data", data), "store": storage, "threads": Threads(num_threads), "device": "cpu"}
    timed("features", evaluate, storage, PROTOCOLS[0], **asked)
    for protocol in PROTOCOLS:
        timed(protocol, evaluate, storage, protocol, force=True, **asked)
    # The first evaluation had a head as well.
    cpu, wall = (costs["features"][idx] - costs[PROTOCOLS[0]][idx] for idx in (0, 1))
    costs["features"] = (cpu, wall)
    costs["all"] = (sum(cpu for cpu, _ in costs.values()), sum(wall for _, wall in costs.values()))
    return costs


def _suites(data: Path, num_threads: int) -> None:
    """Prints CPU-seconds of each suite: its protocols one after the other, in one storage and in one each."""
    _import()
    from evaluation.data import EvaluationData
    from evaluation.runner import evaluate
    from evaluation.suites import SUITES
    from evaluation.threads import Threads
    from pretrain.evaluations import suitable_protocols

    threads, of_protocol = Threads(num_threads), dict[tuple[str, bool], float]()

    def cost(protocol: str, checkpoint: Path, store: Path) -> float:
        began = time.process_time()
        evaluate(checkpoint, protocol, EvaluationData("data", data), store=store, threads=threads, device="cpu")
        return time.process_time() - began

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        _save_backbone(checkpoint)
        for suite in SUITES:
            protocols = suitable_protocols(checkpoint, data, suite)
            for protocol in protocols:  # larger suites have the smaller ones in them
                if (protocol, True) not in of_protocol:
                    of_protocol[protocol, True] = cost(protocol, checkpoint, Path(scratch) / "together")
                    of_protocol[protocol, False] = cost(protocol, checkpoint, Path(scratch) / protocol)
                    together, alone = (of_protocol[protocol, shared] for shared in (True, False))
                    print(f"  {protocol:20} {together:7.1f} CPU-s, alone {alone:7.1f}", flush=True)
            together, alone = (sum(of_protocol[protocol, shared] for protocol in protocols) for shared in (True, False))
            print(
                f"{suite:10} {len(protocols):2} protocols {together:7.1f} CPU-s, each by itself {alone:7.1f}",
                flush=True,
            )


def _heads(rounds: int) -> None:
    """Prints CPU-seconds of ten learning rates on features as of 2000 photos: in one pass, and in ten.

    A head of each rate, and as many as are trained where a part or five are left out in turn to choose the rate by.
    """
    import torch

    from evaluation.protocols.linear.score import fit_heads
    from evaluation.selection import stratified_folds

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 384, generator=generator), torch.arange(2000) % 10
    fold = stratified_folds(y, num_folds=5, seed=0)
    lrs = [10.0 ** (-third / 3) for third in range(10)]
    settings: dict[str, Any] = {"momentum": 0.9, "steps": 300, "batch_size": 256, "num_classes": 10, "seed": 0}

    def cost(num_folds: int, *grids: list[float]) -> float:
        began = time.process_time()
        for grid in grids:
            fit_heads(x, y, fold=fold, num_folds=num_folds, lrs=grid, **settings)
        return time.process_time() - began

    for num_folds in (0, 1, 5):
        pairs = [(cost(num_folds, lrs), cost(num_folds, *([lr] for lr in lrs))) for _ in range(rounds)]
        together, one_by_one = (statistics.median(costs) for costs in zip(*pairs, strict=True))
        shares = ", ".join(f"{fast / slow:.2f}" for fast, slow in pairs)
        told = f"together {together:6.2f} CPU-s, one by one {one_by_one:6.2f} CPU-s, shares {shares}"
        print(f"{10 * (num_folds + 1):2} heads, {num_folds} folds: {told}", flush=True)


def _save_backbone(folder: Path) -> None:
    """A random one of the size of `mae_cifar10`, as a checkpoint has it."""
    from backbones.io import save_backbone
    from backbones.registry import create_backbone

    backbone = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=4, options={"depth": 6})
    save_backbone(folder / "backbone.safetensors", backbone.weights(), backbone.spec)


def _import() -> None:
    import backbones.images.vit  # noqa: F401
    import evaluation.runner  # noqa: F401


if __name__ == "__main__":
    main()
