"""Steps of a recipe over one batch that is made here, without a run around them: what most parts measure."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from gpu_parts.questions import Check, Row

__all__ = ["SMALL_HEADS", "SMALL_VIT", "Training", "batch_of", "joined", "losses", "recipe_of", "wait_for"]

SMALL_VIT = ("backbone.image_size=32", "backbone.options={depth: 1, embed_dim: 64, num_heads: 1}")
SMALL_HEADS = {
    "mae": ("objective.decoder_dim=32", "objective.decoder_depth=1", "objective.decoder_heads=2"),
    "dino": ("objective.num_prototypes=64", "objective.head_hidden_dim=64", "objective.local_size=16"),
}
SMALL_HEADS["dinov3"] = (
    *SMALL_HEADS["dino"],
    "objective.patch_num_prototypes=64",
    "objective.patch_head_hidden_dim=64",
)


@cache
def joined(device: str) -> Any:
    """The device of this process, which is in a process group of its own: NCCL on CUDA, gloo on a CPU."""
    from pretrain.training.engine import init_distributed, pick_device

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(place)
    found = pick_device(device)
    init_distributed(found)
    return found


def recipe_of(check: Check, name: str, num_samples: int, overrides: Sequence[str]) -> Any:
    """The (first stage of a) shipped recipe for one worker and steps of so many samples."""
    from pretrain.config.load import load_plan

    common = [
        "data.root=unused", "evaluation.enabled=false", f"train.device={check.device}", "train.workers=1",
        f"train.global_batch_size={num_samples}", f"train.micro_batch_size={num_samples}", "train.accumulation=1",
    ]  # fmt: skip
    return load_plan(name, [*common, *overrides], check_files=False).stages[0].recipe


@cache
def sample(kind: str) -> Mapping[str, bytes]:
    """A sample without meaning, as a shard holds it: a photo, a cloud, a radiance grid, or a volume beside a photo."""
    from PIL import Image

    rng, photo, file = np.random.default_rng(0), io.BytesIO(), io.BytesIO()
    if kind == "image":
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(photo, "JPEG", quality=95)
        return {"jpg": photo.getvalue()}
    if kind == "point_mae":
        np.save(file, rng.normal(size=(1024, 3)).astype(np.float32))
        return {"points.npy": file.getvalue()}
    if kind == "nerf_mae":
        np.save(file, rng.uniform(0, 1, (4, 36, 36, 36)).astype(np.float16))
        return {"grid.npy": file.getvalue()}
    np.savez(file, image=rng.integers(0, 256, (40, 48, 40), np.uint8))
    return {**sample("image"), "npz": file.getvalue()}


def batch_of(recipe: Any, objective: Any) -> tuple[dict[str, Any], Sequence[Any]]:
    """A micro-batch as a loader makes it (pixels uint8, drawn colors beside them), on the host, and its views."""
    import torch

    from data_pipelines.views.maker import ViewMaker
    from data_pipelines.views.specs import views_from

    num_samples, kind = recipe.train.micro_batch_size, recipe.objective.name
    content = sample(kind if recipe.backbone.kind != "image" else "image")
    maker = ViewMaker(views_from(objective.views()), frozenset(content), resampler=recipe.data.resampler)
    made = [maker(content, seed) for seed in range(min(num_samples, 32))]
    batch = maker.collate(list(itertools.islice(itertools.cycle(made), num_samples)))
    return batch | {"seed": torch.arange(num_samples), "sample_id": torch.arange(num_samples)}, maker.views


class Training:
    """A recipe under the engine, with one batch that comes again and again, from page-locked memory of the host."""

    def __init__(self, check: Check, recipe: Any) -> None:
        import torch

        from pretrain.training.engine import Engine
        from pretrain.training.initial_weights import initial_weights
        from pretrain.training.inputs import Transfer
        from pretrain.training.model import build_objective

        device = joined(check.device)
        torch.manual_seed(0)
        with initial_weights(recipe.train.zero_stage, device):
            objective = with_frozen_teacher(build_objective(recipe))
            self.engine = Engine(objective, recipe, device)
        torch.manual_seed(1)
        objective.begin(self.engine.read_weights)
        self.engine.set_schedule(1e-3, 0.05)
        batch, self.views = batch_of(recipe, objective)
        self.batch = {name: x.pin_memory() for name, x in batch.items()} if device.type == "cuda" else batch
        self.transfer, self.device, self.num_steps = Transfer(device), device, recipe.train.steps

    def step(self, number: int | None = None, *, is_logged: bool = False) -> Any:
        """One step, in the middle of a run unless a number says otherwise."""
        from data_pipelines.views.photometric import finish
        from objectives.base import Progress

        number = self.num_steps // 2 if number is None else number
        batch = finish(self.transfer(self.batch), self.views)
        return self.engine.step([batch], Progress(number, self.num_steps, is_logged))

    def seconds(self, num_steps: int) -> float:
        """Of a step, mean over some."""
        wait_for(self.device)
        began = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        wait_for(self.device)
        return (time.perf_counter() - began) / num_steps


def with_frozen_teacher(objective: Any) -> Any:
    """With random weights where a checkpoint would fill a teacher; the same every time."""
    import torch

    from backbones.registry import create_backbone

    with torch.random.fork_rng(devices=[]):
        for companion in objective.companions().values():
            if companion.filled == "checkpoint":
                options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
                companion.outline(create_backbone("vit_tiny_patch16_224", image_size=32, options=options).spec)
    return objective


def wait_for(device: Any) -> None:
    """Until a GPU has done all that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def losses(check: Check, recipe: Any, num_steps: int) -> Row:
    """Loss and gradient norm of the first steps over one batch."""
    training = Training(check, recipe)
    results = [training.step(number, is_logged=True) for number in range(num_steps)]
    if not all(result.applied for result in results):
        raise FloatingPointError("a step was not finite")
    found = {
        "loss": [float(result.loss) for result in results],
        "grad_norm": [float(result.metrics["grad_norm"]) for result in results],
    }
    training.engine.close()
    return found
