"""How fast it trains, compiled and not, and where the time goes."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from gpu_parts.questions import Check, Row, verdict
from gpu_parts.training import SMALL_HEADS, SMALL_VIT, Training, batch_of, joined, recipe_of, wait_for

__all__ = ["COMPILED", "MODELS", "compiled", "photometric", "profile", "speed"]

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
