"""What ZeRO stages cost on CPUs: the same steps in each stage, in turn, on two gloo ranks of one thread each.

The figures are CPU-milliseconds of a step on both ranks together, medians over rounds.

    python benchmarks/zero_stages.py [--rounds 5] [--stages 0 1] [--cases mae_cifar10 dino_cifar10] [--short]
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import statistics
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step_cost import BATCH, CASES, OVERRIDES, Batch, Step, timed

RANKS, STEPS = 2, 8


def _on_rank(rank: int, port: int, rounds: int, stages: list[int], cases: list[str]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    from pretrain.training.engine import init_distributed

    init_distributed(torch.device("cpu"))
    for case in cases:
        times = _measured(case, rounds, stages)
        if rank == 0:
            first = times[stages[0]]
            print(f"{case}, {RANKS} x batch {BATCH}, {rounds} rounds of {STEPS} steps, CPU-ms a step on both ranks")
            for stage, values in times.items():
                ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
                spread = f"{min(values):.0f}-{max(values):.0f}"
                print(f"  ZeRO {stage} {statistics.median(values):7.0f} ({spread}), {ratio:.3f}", flush=True)
    dist.destroy_process_group()


def _measured(case: str, rounds: int, stages: list[int]) -> dict[int, list[float]]:
    """CPU-milliseconds of a step on all ranks by stage, `rounds` times in turn after one that does not count."""
    from data_pipelines.streaming.stream import StreamState
    from pretrain.config.load import load_recipe
    from pretrain.training.engine import Engine
    from pretrain.training.inputs import build_stream
    from pretrain.training.model import build_objective

    recipe_name, own = CASES[case]
    sizes = [f"train.workers={RANKS}", f"train.global_batch_size={RANKS * BATCH}"]
    steps: dict[int, Step] = {}
    for stage in stages:
        recipe = load_recipe(recipe_name, [*OVERRIDES, *own, *sizes, f"train.zero_stage={stage}"])
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        engine.set_schedule(1e-4, 0.05)
        steps[stage] = partial(_step, engine)
    stream = build_stream(recipe, engine.objective, dist.get_rank(), StreamState(0, 0))
    batches = itertools.cycle([stream.finish(batch) for batch in itertools.islice(iter(stream), 4)])
    times: dict[int, list[float]] = {stage: [] for stage in stages}
    for number in range(rounds + 1):
        for stage in stages if number % 2 else reversed(stages):
            dist.barrier()
            spent = torch.tensor(timed(steps[stage], batches, STEPS))
            dist.all_reduce(spent)
            if number:
                times[stage].append(float(spent))
    return times


def _step(engine: Any, batch: Batch, is_logged: bool) -> None:
    from objectives.base import Progress

    engine.step([batch], Progress(500, 1000, is_logged))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1], choices=[0, 1, 2, 3])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["mae_cifar10", "dino_cifar10"])
    parser.add_argument("--short", action="store_true", help="two rounds")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rounds = min(arguments.rounds, 2) if arguments.short else arguments.rounds
    mp.spawn(_on_rank, (port, rounds, arguments.stages, arguments.cases), nprocs=RANKS)


if __name__ == "__main__":
    main()
