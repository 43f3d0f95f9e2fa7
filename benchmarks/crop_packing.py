"""What crop packing and sub-batch stochastic depth save: a student's pass, forward and backward, in one process.

Four ways take turns over the same crops of a ViT with DINOv3's blocks: `passes` runs global and local crops one after
the other through the blocks as timm has them, `packed` both in one pass (`backbones.images.packed_blocks`); each with
all samples (rate 0) and with stochastic depth: by zeroing branches that were computed (timm's `DropPath`), or by
leaving samples out. The figures are CPU-seconds of the process, medians over rounds, and the peak of its memory in a
process of its own per way.

    python benchmarks/crop_packing.py [--model vit_small_patch16_dinov3_qkvb] [--images 4] [--rounds 5] [--short]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

RATE = 0.3
WAYS = ("passes", "packed", "passes, DropPath", "packed, sub-batches")
LOCAL = 8


def step_of(way: str, model: str, images: int) -> Callable[[], None]:
    """A step of one way."""
    import torch

    from backbones.images.packed_blocks import BlockDraw, Crops
    from backbones.registry import create_backbone

    torch.manual_seed(0)
    options = {"drop_path_rate": RATE} if way == "passes, DropPath" else {}
    backbone: Any = create_backbone(model, image_size=224, options=options)
    crops = [torch.randn(2 * images, 3, 224, 224), torch.randn(LOCAL * images, 3, 96, 96)]
    if way.startswith("packed"):
        backbone.pack_blocks()

    def chosen(count: int) -> torch.Tensor:
        return torch.randperm(count)[: max(1, int(count * (1 - RATE)))]

    def draws() -> list[list[BlockDraw]]:
        if way == "packed":
            return []
        return [[BlockDraw(None, chosen(len(each)), chosen(len(each))) for each in crops] for _ in backbone.vit.blocks]

    def step() -> None:
        backbone.zero_grad(set_to_none=True)
        if way.startswith("packed"):
            streams = backbone.streams([Crops(each) for each in crops], draws())
            features = [backbone.read_out(stream, (1, 1)) for stream in streams]
        else:
            features = [backbone.features(each) for each in crops]
        loss = sum(each.cls.square().mean() + each.patches.square().mean() for each in features)
        loss.backward()

    return step


def peak_mib() -> int:
    """Of this program; `getrusage` would count what the process held that it was forked from."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_dinov3_qkvb")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    if arguments.peak_of:
        step_of(arguments.peak_of, arguments.model, arguments.images)()
        print(peak_mib())
        return
    steps = {way: step_of(way, arguments.model, arguments.images) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(1 + (2 if arguments.short else arguments.rounds)):
        for way, step in steps.items():
            began = time.process_time()
            step()
            if number:  # the first round warms up
                seconds[way].append(time.process_time() - began)
    base = seconds["passes"]
    print(
        f"{arguments.model}, {arguments.images} images, 2 x 224 + {LOCAL} x 96: CPU-s per step (spread), beside passes"
    )
    for way in WAYS:
        ratio = statistics.median(own / other for own, other in zip(seconds[way], base, strict=True))
        sizes = ["--model", arguments.model, "--images", str(arguments.images)]
        peak = subprocess.run(
            [sys.executable, __file__, "--peak-of", way, *sizes], capture_output=True, text=True, check=True
        )
        low, high, middle = min(seconds[way]), max(seconds[way]), statistics.median(seconds[way])
        print(f"{way:22} {middle:7.2f} ({low:.2f}-{high:.2f})  {ratio:.3f}  peak {peak.stdout.strip()} MiB")


if __name__ == "__main__":
    main()
