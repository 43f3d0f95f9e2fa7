"""What moving an EMA teacher costs, under ZeRO 1 to 3: few large collectives, or shares, against one per parameter.

A teacher of a ViT-B/16 (86 million numbers) follows its student on two gloo ranks of one thread each. "one by one"
reads each parameter with DeepSpeed's own `safe_get_full_fp32_param` and moves it by itself, whole; "together" is
`Teacher.update` with `Engine.read_weights`: under ZeRO 3 each rank moves its share of the teacher by its share of the
student. Both run in turn in the same processes; the figures are medians.

    python benchmarks/teacher_update.py [--rounds 5] [--precision fp32|bf16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, MOMENTUM = 2, 0.996


def _on_rank(rank: int, port: int, rounds: int, precision: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    from pretrain.training.engine import init_distributed

    init_distributed(torch.device("cpu"))
    for stage in (1, 2, 3):
        times = _measured(stage, rounds, precision)
        if rank == 0:
            medians = {name: statistics.median(values) for name, values in times.items()}
            one, together = medians["one by one"], medians["together"]
            figures = f"one by one {one:.2f} s, together {together:.2f} s, {one / together:.2f} x"
            print(f"ZeRO {stage} {precision}: {figures}", flush=True)
    dist.destroy_process_group()


def _measured(stage: int, rounds: int, precision: str) -> dict[str, list[float]]:
    """Seconds of each way, `rounds` times in turn after one that does not count."""
    from deepspeed.utils import safe_get_full_fp32_param

    from backbones.images.config import ImageConfig
    from objectives.dino.config import DINOConfig
    from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
    from pretrain.training.engine import Engine
    from pretrain.training.model import build_objective

    recipe = Recipe(
        name="teacher",
        objective=DINOConfig(num_prototypes=1024),
        backbone=ImageConfig("vit_base_patch16_224"),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(
            steps=1, global_batch_size=RANKS, micro_batch_size=1, accumulation=1, workers=RANKS,
            checkpoint_every=1, zero_stage=stage, precision=precision,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    teacher = engine.objective.teacher
    assert teacher is not None

    def read_one(parameter: Any) -> torch.Tensor:
        is_here = stage < 3 and parameter.dtype == torch.float32
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad and not is_here else None
        whole = parameter if master is None else master
        return whole.detach().float().reshape(getattr(parameter, "ds_shape", parameter.shape))

    whole = [(source, torch.zeros(target.shape)) for source, target in teacher._pairs]

    @torch.no_grad()
    def one_by_one() -> None:
        for source, target in whole:
            target.lerp_(read_one(source), 1 - MOMENTUM)

    ways = {"one by one": one_by_one, "together": lambda: teacher.update(MOMENTUM, engine.read_weights)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, update in ways.items():
            dist.barrier()
            began = time.perf_counter()
            update()
            dist.barrier()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--port", type=int, default=29517)
    arguments = parser.parse_args()
    mp.spawn(_on_rank, args=(arguments.port, arguments.rounds, arguments.precision), nprocs=RANKS)


if __name__ == "__main__":
    main()
