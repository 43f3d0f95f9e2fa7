"""The parts of `gpu_check`: what each asks of the product, made of the product's own functions.

`losses`, `Training` and `Run` are the ways to train something: the first steps of a recipe over one batch, any number
of steps over one batch, and a run through torchrun and the loop. A part answers for one case with a row of numbers.

Not here: how parts are asked, and what becomes of one that fails (`gpu_check`).
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

Row = dict[str, Any]

# A small recipe of every objective. Its own learning rate matters not: the two steps of `losses` have one of their own.
OBJECTIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mae": ("mae_cifar10", ()),
    "dino": ("dino_cifar10", ()),
    "dinov3": ("dinov3_cifar10", ("objective.gram_weight=1.0", "objective.gram_from=teacher", "objective.gram_step=0")),
    "sit": ("sit_cifar10", ()),
    "gmml": ("gmml_cifar10", ()),
    "selfpatch": ("selfpatch_cifar10", ()),
    "distillation": ("dino_cifar10", ("objective={name: distillation, teacher_dim: 32}", "teacher_from=unused")),
    "point_mae": ("point_mae_psb", ()),
    "nerf_mae": ("nerf_mae_synthetic", ()),
    "volume_mae": ("volume_mae_hippocampus", ()),
    "uni4eye": ("uni4eye_hippocampus", ()),
}
PARITY = 1e-4  # relative, of losses and gradient norms in float32 without TF32; between two CPUs 1e-6 were seen
ZERO = 1e-4  # relative, of losses in float32 between ZeRO stages
RESUMED = 1e-4  # relative, of the first ten losses after a resume; kernels that add in any order differ by some 1e-6

# Cases of `speed`: recipe, samples per step, overrides. Dimensions are those of the papers.
MODELS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "mae-vits16": ("mae_vitb16_imagenet", 256, ("backbone.name=vit_small_patch16_224",)),
    "dino-vits16": ("dino_vits16_imagenet", 64, ()),
    "mae-vitb16": ("mae_vitb16_imagenet", 256, ()),
    "dino-vitb16": ("dino_vits16_imagenet", 64, ("backbone.name=vit_base_patch16_224",)),
    "dinov3-vitb16": ("dinov3_vitl16_in1k", 64, ("backbone.name=vit_base_patch16_dinov3_qkvb",)),
    "mae-vitl16": ("mae_vitb16_imagenet", 128, ("backbone.name=vit_large_patch16_224",)),
}
COMPILED = ("mae-vits16", "mae-vitb16", "dino-vits16")
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


@dataclass(frozen=True)
class Check:
    """How the parts are asked.

    Attributes:
        device: `cuda` or `cpu`.
        quick: Small models and few steps.
        out: Directory of the answers.
        data: Shards of photos.
    """

    device: str
    quick: bool
    out: Path
    data: str

    def rows(self, part: str) -> dict[str, Row]:
        """What an earlier part found, by case; nothing where it has not run."""
        path = self.out / f"{part}.json"
        return {row["case"]: row for row in json.loads(path.read_text())["cases"]} if path.exists() else {}


@dataclass(frozen=True)
class Part:
    """A question.

    Attributes:
        measure: Answers it for one case; an "error" in the answer, or an exception, says that this one failed.
        cases: Each is asked for itself.
        limit_s: For all of them.
        needs_cuda: It means nothing without.
        on_cpu: It computes on the CPU, whatever the device of the check.
    """

    measure: Callable[[Check, str], Row]
    cases: Sequence[str]
    limit_s: float
    needs_cuda: bool = False
    on_cpu: bool = False


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


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; NaN if there is one, infinite between lists of other lengths."""
    if len(found) != len(expected) or not found:
        return math.inf
    each = [abs(a - b) / max(abs(b), 1e-12) if math.isfinite(a - b) else math.nan for a, b in zip(found, expected)]  # noqa: B905
    return math.nan if any(map(math.isnan, each)) else max(each)


def verdict(row: Row, name: str, tolerance: float) -> Row:
    """The row, with its tolerance, and an error where the difference of that name is above it, or none."""
    row = row | {"tolerance": tolerance}
    return row if row[name] <= tolerance else row | {"error": f"{name} {row[name]:.2e} is above {tolerance:.0e}"}


class Run:
    """A run through torchrun and the training loop, in a directory of its own."""

    def __init__(self, check: Check, name: str, recipe: str, overrides: Sequence[str]) -> None:
        from pretrain.record.run_dir import RunDir

        small = [*SMALL_VIT, *SMALL_HEADS[recipe.partition("_")[0]]] if check.quick else []
        common = [
            f"data.train={check.data}", "data.root=unused", "data.record_samples=true", "evaluation.enabled=false",
            "train.workers=1", f"train.device={check.device}", "train.log_every=1",
            "backbone.name=vit_small_patch16_224", "optimizer.base_lr=null", "optimizer.lr=1.0e-3",
            "optimizer.warmup_steps=5",
        ]  # fmt: skip
        self.dir = RunDir(check.out / "runs" / name)
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
            *("-m", "pretrain.worker", recipe, *common, *small, *overrides, "--run-dir", str(self.dir.path)),
        ]
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)

    def again(self) -> None:
        """The same command once more."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def finish(self) -> None:
        """Wait for its end."""
        if code := self._process.wait():
            raise RuntimeError(
                f"the run {self.dir.path} ended with exit code {code}; see {self.dir.path.parents[1]}/log"
            )

    def events(self) -> list[Any]:
        from pretrain.record.journal import read_events

        return read_events(self.dir.journal)[0]

    def metrics(self, name: str) -> dict[int, float]:
        """By step; of a step that was trained twice, the second time counts."""
        from pretrain.record.events import Metrics

        return {event.step: event.values[name] for event in self.events() if isinstance(event, Metrics)}

    def samples(self) -> dict[int, list[list[int]]]:
        """What each step was given, each time that it was trained."""
        found: dict[int, list[list[int]]] = {}
        for line in self.dir.samples(0).read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).append(record["ids"])
        return found

    def kill_after(self, step: int) -> None:
        """Kill the worker as soon as the checkpoint of a step is there."""
        from pretrain.record.events import CheckpointPublished, Start

        while self.is_running():
            events = self.events() if self.dir.journal.exists() else []
            if any(isinstance(event, CheckpointPublished) and event.step == step for event in events):
                start = next(event for event in events if isinstance(event, Start))
                psutil.Process(start.pids[0]).kill()
                break
            time.sleep(0.01)
        if self._process.wait() == 0:
            raise RuntimeError("the run was done before it could be killed")


def machine(check: Check, case: str) -> Row:
    """What is measured here."""
    import deepspeed
    import torch

    device = joined(check.device)
    row: Row = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        row |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "nccl": nccl}
        row |= {"memory_gb": total / 1e9, "free_gb": free / 1e9}
    return row


def objective_recipe(check: Check, name: str) -> Any:
    recipe, overrides = OBJECTIVES[name]
    overrides = ("train.zero_stage=0", "train.precision=fp32", "train.tf32=false", *overrides)
    return recipe_of(check, recipe, 4 if check.quick else 16, overrides)


def reference(check: Check, case: str) -> Row:
    """Two steps of an objective on the CPU."""
    return losses(check, objective_recipe(check, case), 2)


def parity(check: Check, case: str) -> Row:
    """The same two steps on the device."""
    expected = check.rows("reference").get(case, {})
    if "loss" not in expected:
        raise RuntimeError(f"no reference: {expected.get('error', 'the part has not run')}")
    found = losses(check, objective_recipe(check, case), 2)
    each = {name: difference(found[name], expected[name]) for name in ("loss", "grad_norm")}
    largest = math.nan if any(map(math.isnan, each.values())) else max(each.values())
    note = {"note": "a CPU beside itself: zero, and says nothing of a GPU"} if check.device == "cpu" else {}
    return verdict(note | found | {"differences": each, "difference": largest}, "difference", PARITY)


def loop(check: Check, case: str) -> Row:
    """The loop in bf16, ZeRO 1, on real photos: are 50 losses finite, do they fall, how long does it wait for data."""
    num_steps, num_samples = (12, 8) if check.quick else (50, {"mae": 256, "dino": 64}[case])
    overrides = [
        "train.precision=bf16", "train.zero_stage=1", f"train.steps={num_steps}", f"train.checkpoint_every={num_steps}",
        f"train.global_batch_size={num_samples}",
    ]  # fmt: skip
    run = Run(check, f"loop-{case}", f"{case}_photos", overrides)
    run.finish()
    loss = list(run.metrics("loss").values())
    later = num_steps // 3  # what loader processes prepared while the model was built is used up
    row = {
        "samples_per_s": statistics.median(list(run.metrics("samples_per_s").values())[later:]),
        "data_wait_fraction": statistics.median(list(run.metrics("data_wait_fraction").values())[later:]),
        "memory_mb": max(run.metrics("memory_mb").values()),
        "loss_first": statistics.mean(loss[:5]),
        "loss_last": statistics.mean(loss[-5:]),
    }
    if len(loss) != num_steps or not all(map(math.isfinite, loss)):
        return row | {"error": f"{len(loss)} of {num_steps} steps have a loss, or one is not finite", "loss": loss}
    if case == "mae" and not row["loss_last"] < row["loss_first"]:  # that of DINO need not fall so early
        return row | {"error": "the loss has not fallen", "loss": loss}
    return row


def resume(check: Check, case: str) -> Row:
    """A run that is killed behind its checkpoint and goes on, beside one that nobody disturbs; float32 without TF32."""
    num_steps, every, num_samples = (60, 20, 4 if check.quick else 128)
    overrides = [
        "train.precision=fp32", "train.tf32=false", f"train.steps={num_steps}", f"train.checkpoint_every={every}",
        f"train.global_batch_size={num_samples}",
    ]  # fmt: skip
    whole = Run(check, "whole", "mae_photos", overrides)
    killed = Run(check, "killed", "mae_photos", overrides)
    killed.kill_after(every)
    reached = max(killed.samples())
    killed.again()
    killed.finish()
    whole.finish()
    losses, expected = killed.metrics("loss"), whole.metrics("loss")

    def between(first: int, last: int) -> float:
        """The largest difference in steps first + 1 to last."""
        steps = range(first + 1, last + 1)
        return difference([losses[step] for step in steps], [expected[step] for step in steps])

    row = {
        "killed_in_step": reached,
        "difference_before": between(0, every),  # how far two runs part anyway
        "difference": between(every, every + 10),
        "difference_at_the_end": between(num_steps - 1, num_steps),
        "is_bit_equal": losses == expected,
    }
    given = whole.samples()
    if (
        any(ids != given[step][0] for step, times in killed.samples().items() for ids in times)
        or len(given) != num_steps
    ):
        return row | {"error": "the run that was resumed saw other samples"}
    return verdict(row, "difference", RESUMED)


def nccl(check: Check, case: str) -> Row:
    """The collectives of a training step, whose answers in a group of one are known."""
    import torch
    import torch.distributed as dist

    joined(check.device)
    x = torch.arange(1 << 20, dtype=torch.bfloat16 if case == "bf16" else torch.float32, device="cuda") % 251
    results = {name: torch.zeros_like(x) for name in ("all_gather", "reduce_scatter")}
    results |= {name: x.clone() for name in ("all_reduce", "broadcast")}
    dist.all_reduce(results["all_reduce"])
    dist.broadcast(results["broadcast"], 0)
    dist.all_gather_into_tensor(results["all_gather"], x)
    dist.reduce_scatter_tensor(results["reduce_scatter"], x)
    wrong = [name for name, result in results.items() if not torch.equal(result, x)]
    row: Row = {"backend": dist.get_backend(), "collectives": sorted(results)}
    return row | {"error": f"other numbers from {', '.join(wrong)}"} if wrong or row["backend"] != "nccl" else row


@cache
def unsharded(check: Check) -> Row:
    return losses(check, zero_recipe(check, 0), 3)


def zero_recipe(check: Check, stage: int) -> Any:
    overrides = (f"train.zero_stage={stage}", "train.precision=fp32", "train.tf32=false")
    return recipe_of(check, "mae_cifar10", 16, overrides)


def zero(check: Check, case: str) -> Row:
    """Three steps of MAE in float32 in a ZeRO stage, beside those of stage 0."""
    found, expected = losses(check, zero_recipe(check, int(case)), 3), unsharded(check)
    return verdict(found | {"difference": difference(found["loss"], expected["loss"])}, "difference", ZERO)


@cache
def gemm_tflops(check: Check) -> float:
    """What a product of large bf16 matrices reaches in this process, in 10^12 operations per second."""
    import torch

    device, size = joined(check.device), 256 if check.quick else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def seconds(count: int) -> float:
        wait_for(device)
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        wait_for(device)
        return (time.perf_counter() - began) / count

    seconds(3)
    return 2 * size**3 / seconds(3 if check.quick else 30) / 1e12


def speed_recipe(check: Check, case: str, *, compiled: bool) -> Any:
    name, num_samples, overrides = MODELS[case]
    overrides = ("train.precision=bf16", "train.zero_stage=1", f"train.compile={str(compiled).lower()}", *overrides)
    if check.quick:
        num_samples, overrides = 4, (*overrides, *SMALL_VIT, *SMALL_HEADS[case.partition("-")[0]])
    return recipe_of(check, name, num_samples, overrides)


def speed(check: Check, case: str) -> Row:
    """Steps per second with bf16 under ZeRO 1 over one batch of bytes; copies and colors are part of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    training = Training(check, speed_recipe(check, case, compiled=False))
    counter = FlopCounterMode(display=False)
    with counter:
        training.step()
    row = timed(check, training)
    tflop = counter.get_total_flops() / 1e12  # of products of matrices, attention among them, forward and backward
    reached = tflop / (row["step_ms"] / 1e3)
    return row | {
        "tflop": tflop,
        "tflops": reached,
        "gemm_tflops": gemm_tflops(check),
        "mfu": reached / gemm_tflops(check),
    }


def compiled(check: Check, case: str) -> Row:
    """The same with compiled blocks."""
    training = Training(check, speed_recipe(check, case, compiled=True))
    first_s = training.seconds(1)
    row, plain = timed(check, training), check.rows("speed").get(case, {})
    row["first_step_s"] = first_s
    if "step_ms" in plain:
        row |= {
            "times_as_fast": plain["step_ms"] / row["step_ms"],
            "mfu": plain["mfu"] * plain["step_ms"] / row["step_ms"],
        }
    return row


def timed(check: Check, training: Training) -> Row:
    """Images per second and peak memory of some three seconds of steps; the training is over then."""
    import torch

    is_cuda = training.device.type == "cuda"
    once = training.seconds(1 if check.quick else 3)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(training.device)
    step_s = training.seconds(2 if check.quick else max(10, round(3 / once)))
    num_samples = len(training.batch["seed"])
    row: Row = {"batch": num_samples, "step_ms": step_s * 1e3, "images_per_s": num_samples / step_s}
    if is_cuda:
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated(training.device) / 1e9
    training.engine.close()
    return row


def photometric(check: Check, case: str) -> Row:
    """Colors and blur of DINO's crops: milliseconds for a batch on host and device, and how far they agree."""
    import torch

    from data_pipelines.views.photometric import finish
    from pretrain.training.inputs import to_device
    from pretrain.training.model import build_objective

    device, recipe = joined(check.device), speed_recipe(check, "dino-vits16", compiled=False)
    batch, views = batch_of(recipe, build_objective(recipe))

    def milliseconds(content: Any, count: int) -> float:
        finish(content, views)
        wait_for(device)
        began = time.perf_counter()
        for _ in range(count):
            finish(content, views)
        wait_for(device)
        return (time.perf_counter() - began) / count * 1e3

    row: Row = {"batch": len(batch["seed"]), "host_threads": torch.get_num_threads(), "host_ms": milliseconds(batch, 2)}
    if device.type == "cpu":
        return row
    moved = to_device(batch, device)
    row["device_ms"] = milliseconds(moved, 20)
    there, here = finish(moved, views), finish(batch, views)
    away = torch.cat([(there[view.name].cpu() - here[view.name]).abs().flatten() for view in views])
    # A pixel at the solarize level may fall to either side of it.
    row["share_of_pixels_apart"] = float((away > 1e-5).double().mean())
    return verdict(row, "share_of_pixels_apart", 1e-4)


def transfer(check: Check, case: str) -> Row:
    """A batch to the device: does the host go on meanwhile, and are the numbers those that were sent."""
    import torch

    from pretrain.training.inputs import Transfer

    device = joined(check.device)
    source = torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8)
    batch = {"image": source.pin_memory() if case == "pinned" else source}
    bring, host, whole = Transfer(device), [], []
    for _ in range(10):
        wait_for(device)
        began = time.perf_counter()
        moved = bring(batch)
        host.append(time.perf_counter() - began)
        wait_for(device)
        whole.append(time.perf_counter() - began)
    row: Row = {"mb": source.nbytes / 1e6, "host_ms": statistics.median(host) * 1e3}
    row |= {"copied_ms": statistics.median(whole) * 1e3, "gb_per_s": source.nbytes / statistics.median(whole) / 1e9}
    if not torch.equal(moved["image"].cpu(), source):
        return row | {"error": "other numbers arrived"}
    if case == "pinned" and row["host_ms"] > row["copied_ms"] / 2:
        return row | {"error": "the host waits for the copy of a page-locked batch"}
    return row


def profile(check: Check, case: str) -> Row:
    """What the model of `speed` with the least share of the machine's arithmetic spends its time on."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    found = {name: row["mfu"] for name, row in check.rows("speed").items() if "mfu" in row}
    if not found:
        raise RuntimeError("no model was timed by the part speed")
    slowest = min(found, key=lambda name: found[name])
    training = Training(check, speed_recipe(check, slowest, compiled=False))
    training.seconds(3)
    is_cuda = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profiled(activities=activities) as profiler:
        training.seconds(3)
    where, averages = "device" if is_cuda else "cpu", profiler.key_averages()
    key = f"self_{where}_time_total"  # microseconds
    (check.out / "profile.txt").write_text(averages.table(sort_by=key, row_limit=20, max_name_column_width=100))
    kernels = [event for event in averages if event.device_type.name == ("CUDA" if is_cuda else "CPU")]
    kernels = [event for event in kernels if not event.is_user_annotation]
    total = sum(getattr(event, key) for event in kernels)
    top = [
        {"name": event.key, "calls": event.count, "ms": getattr(event, key) / 1e3, "share": getattr(event, key) / total}
        for event in sorted(kernels, key=lambda event: -getattr(event, key))[:20]
    ]
    return {"model": slowest, "steps": 3, "top": top}


PARTS = {
    "machine": Part(machine, ("here",), 60),
    "reference": Part(reference, tuple(OBJECTIVES), 90, on_cpu=True),
    "parity": Part(parity, tuple(OBJECTIVES), 90),
    "loop": Part(loop, ("mae", "dino"), 120),
    "resume": Part(resume, ("mae",), 120),
    "speed": Part(speed, tuple(MODELS), 120),
    "compiled": Part(compiled, COMPILED, 120, needs_cuda=True),
    "zero": Part(zero, ("1", "2", "3"), 45),
    "nccl": Part(nccl, ("fp32", "bf16"), 30, needs_cuda=True),
    "transfer": Part(transfer, ("pinned", "pageable"), 30, needs_cuda=True),
    "photometric": Part(photometric, ("dino",), 30),
    "profile": Part(profile, ("slowest",), 45),
}
