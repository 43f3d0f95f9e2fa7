"""What it costs to make a batch ready: from encoded photos to what the network takes, beside other libraries.

CPU time per image of one process with one thread: reading, decoding, crops, colors, stacking, normalization. Ours is in
two parts, what a loader process does and what is left to the training step. All make the same crops of the same photos
with the same odds; blur, hue and the order of colors are each library's own. Rounds go through all rows.

    mae     one random resized crop of 224 pixels
    dino    2 x 224 + 8 x 96 crops with color jitter, gray, blur and solarization

Peers that are not installed are skipped with a line: torchvision comes with timm; lightly, lightly-train are in the
extra `bench` or in an environment of their own.

    python benchmarks/batch_cost.py [mae] [dino] [--data DIR] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_cases import SampleSet

GROUPS = {"mae": 64, "dino": 16}  # images per batch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)  # shares of the area

Make = Callable[[], list[float]]  # one batch: CPU seconds of each part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", default=list(GROUPS), help=" | ".join(GROUPS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/photos_caltech"), help="shards of JPEGs")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if not list(arguments.data.glob("*.tar")):
        parser.error(f"{arguments.data}: no shards (*.tar); name their folder with --data")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
    import torch
    from data_cases import open_set

    torch.set_num_threads(1)
    with ExitStack() as stack:
        samples = open_set(arguments.data, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for group in arguments.groups:
            report(group, GROUPS[group], measure(rows(group, samples, GROUPS[group]), arguments.rounds))


def rows(group: str, samples: SampleSet, batch_size: int) -> dict[str, Make]:
    """What makes a batch, by library."""
    transforms = {"torchvision": torchvision_transform, "lightly": lightly_transform}
    found: dict[str, Make] = {"pretrain": ours(group, samples, batch_size)}
    for name, transform in transforms.items():
        if is_installed(name):
            found[f"{name} {version(name)}"] = peer(transform(group), open_pil, samples, batch_size)
    if group == "dino" and is_installed("lightly-train"):
        from lightly_train._data.file_helpers import open_image_numpy

        found[f"lightly-train {version('lightly-train')}"] = peer(
            lightly_train_transform(), open_image_numpy, samples, batch_size
        )
    return found


def is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        print(f"{name}: not measured: it is not installed")
        return False
    return True


def ours(group: str, samples: SampleSet, batch_size: int) -> Make:
    """Our stream, and what the objective does first; with the defaults of a recipe."""
    from data_cases import dino_views

    from backbones.registry import create_backbone
    from data_pipelines.streaming.stream import Stream
    from data_pipelines.views.specs import views_from
    from objectives.parts.multicrop import crops_of

    views = dino_views("linear") if group == "dino" else views_from([{"name": "image", "size": 224}])
    sizes = {"global_batch_size": batch_size, "micro_batch_size": batch_size, "rank": 0, "world_size": 1, "seed": 0}
    stream = Stream(samples.dataset, views, **sizes, resampler="torch")
    batches = iter(stream)
    backbone = create_backbone("vit_tiny_patch16_224", image_size=224)

    def make() -> list[float]:
        times = [time.process_time()]
        batch = next(batches)
        times.append(time.process_time())
        batch = stream.finish(batch)
        for images in crops_of(batch) if group == "dino" else [batch["image"]]:
            backbone.normalized(images)
        times.append(time.process_time())
        return [times[1] - times[0], times[2] - times[1]]

    return make


def peer(transform: Callable[[Any], Any], opened: Callable[[Path], Any], samples: SampleSet, batch_size: int) -> Make:
    """Files in a shuffled order, opened, transformed and stacked as torch's loader does."""
    import torch
    from torch.utils.data import default_collate

    files = sorted(samples.files.glob("all/*.jpg"))

    def chosen() -> Iterator[Path]:
        while True:
            yield from (files[i] for i in torch.randperm(len(files)).tolist())

    order = chosen()

    def make() -> list[float]:
        began = time.process_time()
        default_collate([transform(opened(next(order))) for _ in range(batch_size)])
        return [time.process_time() - began]

    return make


def open_pil(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def torchvision_transform(group: str) -> Callable[[Any], Any]:
    """Its second version, on uint8 tensors, which is its fastest way."""
    import torch
    from torchvision.transforms import v2

    start = [v2.PILToTensor()]
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]

    def crop(size: int, scale: tuple[float, float], *more: Any) -> Any:
        cut = v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([*start, cut, v2.RandomHorizontalFlip(), *more, *end])

    if group == "mae":
        return crop(224, (0.2, 1.0))
    jitter = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)]
    blur = v2.GaussianBlur(9, sigma=(0.1, 2.0))
    first, second, further = (v2.RandomApply([blur], p=p) for p in (1.0, 0.1, 0.5))
    crops = [crop(224, GLOBAL, *jitter, first), crop(224, GLOBAL, *jitter, second, v2.RandomSolarize(128, p=0.2))]
    crops += [crop(96, LOCAL, *jitter, further)] * 8
    return lambda image: [make(image) for make in crops]


def lightly_transform(group: str) -> Callable[[Any], Any]:
    from lightly.transforms import DINOTransform, MAETransform

    return MAETransform() if group == "mae" else DINOTransform(n_local_views=8)


def lightly_train_transform() -> Callable[[Any], Any]:
    from lightly_train._methods.dino import dino_transform as its

    crop, local_crop = its.DINORandomResizedCropArgs, its.DINOLocalViewRandomResizedCropArgs
    local = its.DINOLocalViewTransformArgs(
        num_views=8, random_resize=local_crop(min_scale=LOCAL[0], max_scale=LOCAL[1])
    )
    transform = its.DINOTransform(its.DINOTransformArgs(random_resize=crop(min_scale=GLOBAL[0]), local_view=local))
    return lambda image: transform({"image": image})


def measure(makers: dict[str, Make], rounds: int) -> dict[str, list[list[float]]]:
    """CPU seconds of (row, round, part); two rounds come before, which do not count."""
    found: dict[str, list[list[float]]] = {name: [] for name in makers}
    for number in range(-2, rounds):
        for name, make in makers.items():
            times = make()
            if number >= 0:
                found[name].append(times)
    return found


def report(group: str, batch_size: int, found: dict[str, list[list[float]]]) -> None:
    print(
        f"{group}: CPU-ms per image, median (least-most) of {len(next(iter(found.values())))} batches of {batch_size}"
    )
    for name, batches in found.items():
        totals = sorted(sum(parts) / batch_size * 1e3 for parts in batches)
        parts = [statistics.median(part) / batch_size * 1e3 for part in zip(*batches, strict=True)]
        split = " = loader {:.2f} + step {:.2f}".format(*parts) if len(parts) == 2 else ""
        print(f"  {name:24} {statistics.median(totals):6.2f} ({totals[0]:.2f}-{totals[-1]:.2f}){split}", flush=True)


if __name__ == "__main__":
    main()
