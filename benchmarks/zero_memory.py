"""What a worker's memory holds in each ZeRO stage: counted for a ViT-S, computed for a ViT-7B.

Counted on two gloo ranks, in fresh processes for each stage, when the optimizer is about to step. Every tensor is
counted once, by its storage, and each type of number beside what `pretrain.training.memory` computes. The peak of
resident memory is that of the whole training, with activations and gloo's own buffers, less what the process had before
the model was built; what is freed is given back at once for it. The objective is DINOv3 with its own heads of 65 536
prototypes, a teacher and a Gram anchor; crops of 64 and 32 pixels keep activations small.

Computed are two stages of the recipe `dinov3_vit7b`, besides activations: what `pretrain run --dry-run` says.

    python benchmarks/zero_memory.py [--stages 0 1 2 3] [--precisions fp32 bf16] [--short]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, BATCH, STEPS = 2, 2, 2
GLOBAL, LOCAL, NUM_LOCAL = 64, 32, 8
KINDS = ("weights", "gradients", "masters", "moments", "companions", "buffers", "other")
COUNTED = {
    "weights": ["weights"], "masters and moments": ["masters", "moments"], "teacher and anchor": ["companions"],
    "gradients, copies, buffers": ["gradients", "buffers", "other"],
}  # fmt: skip
MASTERS = ("single_partition_of_fp32_groups", "fp32_groups", "fp32_groups_flat", "fp32_partitioned_groups_flat")
WORKERS = (8, 32, 256)


def recipe_of(stage: int, precision: str) -> Any:
    from backbones.images.config import ImageConfig
    from objectives.dinov3.config import DINOv3Config
    from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig

    return Recipe(
        name="zero_memory",
        objective=DINOv3Config(local_size=LOCAL, num_local=NUM_LOCAL, gram_weight=1.0, gram_from="teacher"),
        backbone=ImageConfig("vit_small_patch16_dinov3", GLOBAL),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(
            steps=STEPS, global_batch_size=RANKS * BATCH, micro_batch_size=BATCH, accumulation=1, workers=RANKS,
            checkpoint_every=STEPS, zero_stage=stage, precision=precision,
        ),
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    shapes = {"global_1": (BATCH, 3, GLOBAL, GLOBAL), "global_2": (BATCH, 3, GLOBAL, GLOBAL)}
    shapes["local"] = (NUM_LOCAL, BATCH, 3, LOCAL, LOCAL)
    views = {name: torch.randint(0, 256, shape, dtype=torch.uint8) for name, shape in shapes.items()}
    return views | {"seed": torch.arange(BATCH) + BATCH * dist.get_rank()}


def tensors_in(values: Iterable[Any], depth: int = 4) -> Iterable[torch.Tensor]:
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif depth and isinstance(value, list | tuple | dict):
            yield from tensors_in(value.values() if isinstance(value, dict) else value, depth - 1)


def held(engine: Any) -> dict[str, int]:
    """Bytes of all tensors of this process by what they are for."""
    wrapped = engine._engine.optimizer
    optimizer = getattr(wrapped, "optimizer", wrapped)
    parameters = list(engine.objective.parameters())
    masters = list(tensors_in(group["params"] for group in optimizer.param_groups))
    masters += tensors_in(vars(wrapped).get(name) for name in MASTERS)
    companions: list[torch.Tensor] = []
    for companion in engine.objective.companions().values():
        for parameter in companion.module.parameters():
            companions += [parameter.data, companion.share_of(parameter)]
    gradients = [tensor.grad for tensor in [*parameters, *masters] if tensor.grad is not None]
    gradients += tensors_in(vars(wrapped).get(name) for name in ("averaged_gradients", "all_grad_tensors"))
    gradients += tensors_in([getattr(wrapped, "grad_partitions_flat_buffer", None)])
    gradients += tensors_in(getattr(parameter, "grad_accum", None) for parameter in parameters)
    buckets = [vars(bucket) for bucket in getattr(wrapped, "ipg_buckets", {}).values()]
    whole = [*parameters, *tensors_in(getattr(parameter, "ds_tensor", None) for parameter in parameters)]
    by_kind = {
        "companions": companions, "weights": whole, "gradients": gradients, "masters": masters,
        "moments": tensors_in(list(optimizer.state.values())), "buffers": tensors_in(buckets),
        "other": [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)],
    }  # fmt: skip
    seen: set[int] = set()
    sizes = dict.fromkeys(KINDS, 0)
    for kind, tensors in by_kind.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu" and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _on_rank(rank: int, port: int, stage: int, precision: str, found: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    from objectives.base import Progress
    from pretrain.training.engine import Engine, init_distributed
    from pretrain.training.model import build_objective

    init_distributed(torch.device("cpu"))
    recipe = recipe_of(stage, precision)
    before = resident_bytes()
    torch.manual_seed(0)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    engine.objective.begin(engine.read_weights)
    fullest: dict[str, int] = {}
    update = engine._guard._step

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal fullest
        fullest = max(fullest, held(engine), key=lambda sizes: sum(sizes.values()))
        return update(*arguments, **options)

    engine._guard._step = counted
    for number in range(STEPS):
        engine.set_schedule(1e-4, 0.05, number)
        assert engine.step([batch()], Progress(number, STEPS, is_logged=False)).applied
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if rank == 0:
        found.write_text(json.dumps({"held": fullest, "peak": peak - before}))
    dist.destroy_process_group()


def measure(stages: list[int], precisions: list[str]) -> None:
    """Prints one row per setting, MB per rank."""
    from pretrain.training.memory import memory_of
    from pretrain.training.preflight import outline

    print(f"ViT-S/16, DINOv3 with teacher and anchor, {RANKS} gloo ranks, MB per rank while the optimizer steps")
    print("| | " + " | ".join(COUNTED) + " | sum | estimate | at the fullest moment, estimate | peak resident |")
    for precision, stage in itertools.product(precisions, stages):
        if (precision, stage) == ("bf16", 0):
            continue  # refused by the checks of a recipe
        recipe = recipe_of(stage, precision)
        memory = memory_of(recipe, outline(recipe), torch.device("cpu"))
        estimate = memory.weights + memory.optimizer + memory.companions + memory.update
        with socket.socket() as probe, tempfile.TemporaryDirectory() as scratch:
            probe.bind(("127.0.0.1", 0))
            port, found = probe.getsockname()[1], Path(scratch) / "found.json"
            probe.close()
            mp.spawn(_on_rank, (port, stage, precision, found), nprocs=RANKS)
            values = json.loads(found.read_text())
        counted = [sum(values["held"][kind] for kind in kinds) for kinds in COUNTED.values()]
        row = [*counted, sum(counted), estimate, memory.total, values["peak"]]
        print(f"| {precision}, ZeRO {stage} | " + " | ".join(f"{value / 1e6:.0f}" for value in row) + " |", flush=True)


def compute() -> None:
    """Prints GB per GPU for the recipe's stages, by ZeRO stage and number of GPUs."""
    from pretrain.config.load import load_plan
    from pretrain.training.memory import memory_of
    from pretrain.training.preflight import outline

    plan = load_plan("dinov3_vit7b", ["data.root=unused"], check_files=False)
    print("| GB per GPU | " + " | ".join(f"{workers} GPUs" for workers in WORKERS) + " |")
    for stage in plan.stages[:2]:
        objective = outline(stage.recipe)
        for zero_stage in (1, 2, 3):
            cells = []
            for workers in WORKERS:
                train = replace(stage.recipe.train, workers=workers, zero_stage=zero_stage)
                memory = memory_of(replace(stage.recipe, train=train), objective, torch.device("cuda"))
                fullest = max(memory.backward, memory.update)
                parts = (memory.weights, memory.optimizer, memory.companions, fullest)
                cells.append(f"{memory.total / 1e9:.0f} ({' + '.join(f'{part / 1e9:.1f}' for part in parts)})")
            print(f"| {stage.name}, ZeRO {zero_stage} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--short", action="store_true", help="fp32 only")
    parser.add_argument("--only", choices=["measure", "compute"], help="one of the two tables")
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # for the ranks: no memory is held that no tensor has
    if arguments.only != "compute":
        measure(arguments.stages, ["fp32"] if arguments.short else arguments.precisions)
    if arguments.only != "measure":
        compute()


if __name__ == "__main__":
    main()
