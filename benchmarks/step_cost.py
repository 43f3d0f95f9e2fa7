"""What a step costs in the engine beside plain torch loops: one process, one thread, the same batches in memory.

Three ways take turns: `engine` is the training engine as a recipe configures it; `loop` the same objective in a plain
loop of forward, backward, clipping and fused AdamW; `lean` (MAE only) such a loop around a masked autoencoder written
here in fifty lines: patches are embedded after they were chosen, and the head sees masked ones only. The figures are
CPU-seconds of the process, medians over rounds; a ratio above 1 says that the engine takes less than that loop.

    python benchmarks/step_cost.py [--rounds 7] [--cases mae_224 mae_cifar10 dino_cifar10] [key=value ...] [--short]

Without --cases, those of photos, which come with the package; the others read ../shared/data.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PHOTOS = Path(__file__).resolve().parents[1] / "pretrain" / "demo_data" / "grocery"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH, NUM_BATCHES, TOTAL_STEPS = 32, 4, 100_000
SECONDS = 2.0  # about what each way takes in a round

CASES = {  # name -> recipe, overrides
    "mae_224": ("mae_photos", ["backbone.image_size=224", "backbone.patch_size=16", "backbone.options={}"]),
    "mae_cifar10": ("mae_cifar10", []),
    "dino_cifar10": ("dino_cifar10", []),
}
CASES_OF_SHARED_DATA = {  # name -> recipe, overrides, folder
    "point_mae_psb": ("point_mae_psb", [], "points_psb"),
    "volume_mae_hippocampus": ("volume_mae_hippocampus", [], "volumes_hippocampus"),
}
CASES |= {
    name: (recipe, [f"data.root={SHARED / folder}", f"data.train={SHARED / folder}/train-*.tar", *overrides])
    for name, (recipe, overrides, folder) in CASES_OF_SHARED_DATA.items()
}
OVERRIDES = [
    f"data.root={PHOTOS}", f"data.train={PHOTOS}/train-*.tar", "data.loader_workers=0", "evaluation.enabled=false",
    "train.workers=1", f"train.global_batch_size={BATCH}", "train.accumulation=1",
]  # fmt: skip

Batch = dict[str, Any]
Step = Callable[[Batch, bool], object]  # one step over a batch; whether it is a logged one


def lean_mae(recipe: Any) -> Any:
    """A masked autoencoder of the recipe's sizes, as small and as fast as plain modules make it; takes uint8 images."""
    import timm
    import torch
    from timm.models.vision_transformer import Block
    from torch import Tensor, nn

    class LeanMAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = dict(recipe.backbone.options)
            size = {"img_size": recipe.backbone.image_size, "patch_size": recipe.backbone.patch_size}
            self.vit: Any = timm.create_model(recipe.backbone.name, num_classes=0, **size, **options)
            width, self.patch = self.vit.embed_dim, self.vit.patch_embed.patch_size[0]
            dim, (rows, columns) = recipe.objective.decoder_dim, self.vit.patch_embed.grid_size
            self.num_patches, self.kept = rows * columns, int(rows * columns * (1 - recipe.objective.mask_ratio))
            self.embed, self.token = nn.Linear(width, dim), nn.Parameter(torch.zeros(1, 1, dim))
            self.register_buffer("positions", torch.randn(1 + self.num_patches, dim) * 0.02)
            heads, depth = recipe.objective.decoder_heads, recipe.objective.decoder_depth
            self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True) for _ in range(depth)])
            self.norm, self.predict = nn.LayerNorm(dim), nn.Linear(dim, self.patch**2 * 3)

        def forward(self, images: Tensor) -> Tensor:
            x = images.float().mul_(1 / 127.5).sub_(1)  # (B, C, H, W)
            batch, channels, height, width = x.shape
            p = self.patch
            patches = x.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
            patches = patches.reshape(batch, self.num_patches, -1)  # (B, N, L)
            order = torch.rand(batch, self.num_patches).argsort(1)  # (B, N)
            keep, drop = order[:, : self.kept], order[:, self.kept :]
            pick = torch.arange(batch)[:, None]
            projection = self.vit.patch_embed.proj
            tokens = nn.functional.linear(patches[pick, keep], projection.weight.flatten(1), projection.bias)
            tokens = tokens + self.vit.pos_embed[0, 1:][keep]  # (B, K, D)
            cls = (self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(batch, -1, -1)
            encoded = self.vit.norm(self.vit.blocks(torch.cat([cls, tokens], 1)))  # (B, 1 + K, D)
            places = self.positions[torch.cat([torch.zeros(batch, 1, dtype=keep.dtype), keep + 1], 1)]
            masked = self.token + self.positions[drop + 1]  # (B, M, E)
            decoded = self.blocks(torch.cat([self.embed(encoded) + places, masked], 1))
            prediction = self.predict(self.norm(decoded[:, -drop.shape[1] :]))  # (B, M, L)
            target = patches[pick, drop]
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            return (prediction - (target - mean) / (variance + 1e-6).sqrt()).square().mean()

    return LeanMAE()


def torch_loop(recipe: Any, module: Any, groups: Any, loss_of: Callable[[Batch, bool], Any]) -> Step:
    """A plain loop's step: forward, backward, clipping where the recipe clips, fused AdamW."""
    import torch

    clip_grad, betas = recipe.optimizer.clip_grad, tuple(recipe.optimizer.betas)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=betas, fused=True)

    def step(batch: Batch, is_logged: bool) -> None:
        loss_of(batch, is_logged).backward()
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ways_of(recipe: Any) -> tuple[dict[str, Step], Iterator[Batch]]:
    """The ways to train the recipe, and batches without end."""
    import torch

    from data_pipelines.streaming.stream import StreamState
    from objectives.base import Progress
    from pretrain.training.engine import Engine
    from pretrain.training.inputs import build_stream
    from pretrain.training.model import build_objective

    def progress(is_logged: bool) -> Progress:
        return Progress(50_000, TOTAL_STEPS, is_logged)

    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    engine.set_schedule(1e-4, 0.05)
    objective = build_objective(recipe)

    def objective_loss(batch: Batch, is_logged: bool) -> Any:
        return objective(batch, progress(is_logged)).loss

    inner = torch_loop(recipe, objective, objective.param_groups(0.05), objective_loss)

    def loop(batch: Batch, is_logged: bool) -> None:
        inner(batch, is_logged)
        objective.after_step(progress(is_logged), lambda parameters: [p.detach() for p in parameters])

    ways: dict[str, Step] = {"engine": lambda batch, logged: engine.step([batch], progress(logged)), "loop": loop}
    if recipe.objective.name == "mae":
        lean = lean_mae(recipe)
        ways["lean"] = torch_loop(recipe, lean, lean.parameters(), lambda batch, _: lean(batch["image"]))
    stream = build_stream(recipe, objective, 0, StreamState(0, 0))
    batches = [stream.finish(batch) for batch in itertools.islice(iter(stream), NUM_BATCHES)]
    return ways, itertools.cycle(batches)


def timed(step: Step, batches: Iterator[Batch], num_steps: int, is_logged: bool = False) -> float:
    """CPU-milliseconds per step."""
    began = time.process_time()
    for _ in range(num_steps):
        step(next(batches), is_logged)
    return (time.process_time() - began) / num_steps * 1e3


def measure(name: str, overrides: list[str], rounds: int) -> None:
    """Prints one line per way."""
    from pretrain.config.load import load_recipe

    recipe_name, own = CASES[name]
    recipe = load_recipe(recipe_name, [*OVERRIDES, *own, *overrides])
    ways, batches = ways_of(recipe)
    for step in ways.values():
        timed(step, batches, 3)  # allocations, optimizer state
    num_steps = max(1, round(SECONDS * 1e3 / timed(ways["loop"], batches, 2)))
    times: dict[str, list[float]] = {way: [] for way in ways}
    logged = []
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        for way in order:
            times[way].append(timed(ways[way], batches, num_steps))
        logged.append(timed(ways["engine"], batches, max(1, num_steps // 4), is_logged=True))
    own_ms = statistics.median(times["engine"])
    print(f"{name}, batch {BATCH}, ZeRO {recipe.train.zero_stage}, {rounds} rounds of {num_steps} steps, CPU-ms a step")
    for way, values in times.items():
        middle = statistics.median(values)
        paired = statistics.median(other / mine for other, mine in zip(values, times["engine"], strict=True))
        spread = f"{min(values):.1f}-{max(values):.1f}"
        print(f"  {way:8s} {middle:8.1f} ({spread}), engine's speed beside it: {paired:.3f}", flush=True)
    print(f"  a logged step of the engine costs {statistics.median(logged) - own_ms:+.1f} more", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the recipes of all cases")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[name for name in CASES if name not in CASES_OF_SHARED_DATA]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="the small cases, three rounds")
    arguments = parser.parse_intermixed_args()
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "0")
    import torch
    import torch.distributed as dist

    from pretrain.training.engine import init_distributed

    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    rounds = min(arguments.rounds, 3) if arguments.short else arguments.rounds
    if not SHARED.is_dir() and not CASES_OF_SHARED_DATA.keys().isdisjoint(arguments.cases):
        parser.error(f"{', '.join(CASES_OF_SHARED_DATA)} need {SHARED}, which is not there")
    for name in arguments.cases:
        if not (arguments.short and name == "mae_224"):
            measure(name, arguments.overrides, rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
