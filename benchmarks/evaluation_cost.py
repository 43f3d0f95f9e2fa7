"""What the evaluation of one checkpoint by linear and kNN costs: CPU-seconds and wall time of imports, features, heads.

The checkpoint is a random backbone of the size of `mae_cifar10`; each round is a process of its own. A head is timed by
a second evaluation, which finds the features of the first.

    python benchmarks/evaluation_cost.py [DATA] [--threads 1] [--rounds 3] [--short]

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
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_evaluated(arguments.data.absolute(), arguments.child, arguments.threads)))
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
    from backbones.io import save_backbone
    from backbones.registry import create_backbone
    from evaluation.data import EvaluationData
    from evaluation.runner import evaluate
    from evaluation.threads import Threads

    backbone = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=4, options={"depth": 6})
    save_backbone(storage / "backbone.safetensors", backbone.weights(), backbone.spec)
    asked = {"data": EvaluationData("data", data), "store": storage, "threads": Threads(num_threads), "device": "cpu"}
    timed("features", evaluate, storage, PROTOCOLS[0], **asked)
    for protocol in PROTOCOLS:
        timed(protocol, evaluate, storage, protocol, force=True, **asked)
    # The first evaluation had a head as well.
    cpu, wall = (costs["features"][idx] - costs[PROTOCOLS[0]][idx] for idx in (0, 1))
    costs["features"] = (cpu, wall)
    costs["all"] = (sum(cpu for cpu, _ in costs.values()), sum(wall for _, wall in costs.values()))
    return costs


def _import() -> None:
    import backbones.images.vit  # noqa: F401
    import evaluation.runner  # noqa: F401


if __name__ == "__main__":
    main()
