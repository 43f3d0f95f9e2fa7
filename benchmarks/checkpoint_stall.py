"""How long training stands still for a checkpoint: beside training, and waited for; as a share of a step.

MAE with a ViT-B/16 at 224 pixels, one worker, ZeRO 1 in fp32, random pictures; checkpoints go to a temporary folder.
Both ways take turns in one process. A stall is what `Publisher.take` takes; beside training also what the steps take
longer while a checkpoint is written. The first copy, which allocates its memory, is told apart.

    python benchmarks/checkpoint_stall.py [--backbone NAME] [--batch 8] [--rounds 3] [--steps 2] [--short]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="between two checkpoints")
    parser.add_argument("--short", action="store_true", help="a small backbone, two rounds")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.backbone, arguments.rounds = "vit_tiny_patch16_224", 2
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    with tempfile.TemporaryDirectory() as folder:
        _measure(Path(folder), arguments)


def _measure(folder: Path, arguments: argparse.Namespace) -> None:
    from objectives.base import Progress
    from pretrain.config.load import load_recipe
    from pretrain.config.stages import Stage
    from pretrain.record.run_dir import RunDir
    from pretrain.training.engine import Engine, init_distributed, pick_device
    from pretrain.training.model import build_objective
    from pretrain.training.publication import Publisher

    device = pick_device("auto")
    init_distributed(device)
    settings = [
        f"backbone.name={arguments.backbone}",
        "backbone.image_size=224",
        "backbone.patch_size=16",
        "backbone.options.depth=null",
    ]
    settings += ["train.zero_stage=1", "train.workers=1", f"train.global_batch_size={arguments.batch}"]
    settings += [f"train.micro_batch_size={arguments.batch}", "train.steps=1000"]
    recipe = load_recipe("demo", settings, check_files=False)
    engine = Engine(build_objective(recipe), recipe, device)
    stream: Any = SimpleNamespace(state_at=lambda _: SimpleNamespace(epoch=0, position=0), order_signature={})
    picture = torch.randint(0, 256, (arguments.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    batch = {"image": picture, "seed": torch.arange(arguments.batch, device=device)}
    done = 0

    def step() -> float:
        nonlocal done
        done += 1
        began = time.perf_counter()
        engine.set_schedule(1e-4, 0.05)
        engine.step([batch], Progress(done, 1000, is_logged=False))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def publisher_of(*, asynchronous: bool) -> Publisher:
        own = replace(recipe, checkpoints=replace(recipe.checkpoints, asynchronous=asynchronous))
        run = RunDir(folder / ("beside" if asynchronous else "waits"))
        return Publisher(run, Stage("", own), engine, stream)

    publishers = {asynchronous: publisher_of(asynchronous=asynchronous) for asynchronous in (True, False)}
    alone = [step() for _ in range(1 + arguments.rounds * arguments.steps)][1:]
    stalls: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    beside: list[float] = []
    for _ in range(1 + arguments.rounds):
        for asynchronous, publisher in publishers.items():
            began, cpu = time.perf_counter(), time.thread_time()
            publisher.take(done)
            stalls[asynchronous].append((time.perf_counter() - began, time.thread_time() - cpu))
            steps = [step() for _ in range(arguments.steps)]
            if asynchronous:
                beside += steps
                publisher._settle(is_needed=True)  # outside of what is measured: here a step may be shorter than it
    folders = sorted((folder / "beside" / "checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in folders[-1].rglob("*") if file.is_file())
    one = statistics.median(alone)
    print(f"{arguments.backbone}, batch {arguments.batch}, {device.type}: a checkpoint of {size / 1e9:.2f} GB")
    print(
        f"  step {one:.2f} s ({min(alone):.2f}-{max(alone):.2f}), "
        f"while one is written {statistics.median(beside):.2f} s"
    )
    for asynchronous, name in ((True, "beside training"), (False, "waited for")):
        first, *others = stalls[asynchronous]
        walls, cpus = zip(*others, strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        print(
            f"  {name:15} {wall:6.2f} s ({min(walls):.2f}-{max(walls):.2f}), {wall / one:.2f} of a step, "
            f"{cpu:.2f} CPU-s in the training thread; the first {first[0]:.2f} s"
        )


if __name__ == "__main__":
    main()
