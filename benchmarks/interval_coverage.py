"""How often 95 % intervals of mIoU hold the truth, where there are few images: the jackknife, and a bootstrap.

    python benchmarks/interval_coverage.py [--draws 2000] [--short]

A population of 3000 images of three classes, of different difficulty, has a known mIoU. Each draw is a test set of 5,
10 or 20 of them; counted is how often the interval of that set holds the mIoU of the population, and how wide it is.
The bootstrap takes percentiles of 1000 resampled test sets.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from evaluation.metrics import confusion_matrix, iou_per_class, jackknife_interval

NUM_CLASSES = 3
RESAMPLED = 1000


def population(generator: torch.Generator) -> Tensor:
    """Confusion matrices (3000, C, C) of images of 60 pixels."""
    images = []
    for _ in range(3000):
        truth = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 60, replacement=True, generator=generator)
        is_right = torch.rand(60, generator=generator) < torch.rand(1, generator=generator) * 0.7 + 0.25
        other = torch.randint(NUM_CLASSES, (60,), generator=generator)
        images.append(confusion_matrix(torch.where(is_right, truth, other), truth, NUM_CLASSES))
    return torch.stack(images)


def miou(counted: Tensor) -> Tensor:
    """(...) of confusion matrices (..., C, C)."""
    return iou_per_class(counted).nanmean(dim=-1)


def bootstrap_interval(images: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Percentiles of resampled test sets, of images (n, C, C)."""
    rows = torch.randint(len(images), (RESAMPLED, len(images)), generator=generator)
    low, high = miou(images[rows].sum(dim=1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--short", action="store_true", help="200 draws")
    arguments = parser.parse_args()
    draws = 200 if arguments.short else arguments.draws
    generator = torch.Generator().manual_seed(0)
    images = population(generator)
    wanted = float(miou(images.sum(dim=0)))
    print(f"mIoU of the population {wanted:.3f}, {draws} draws")
    print("images   jackknife: holds it, mean width   bootstrap: holds it, mean width")
    for num_images in (5, 10, 20):
        drawn = [images[torch.randint(len(images), (num_images,), generator=generator)] for _ in range(draws)]
        told = f"{num_images:6}"
        for intervals in (
            [jackknife_interval(one, miou) for one in drawn],
            [bootstrap_interval(one, generator) for one in drawn],
        ):
            held = sum(low <= wanted <= high for low, high in intervals) / draws
            width = sum(high - low for low, high in intervals) / draws
            told += f"   {held:17.1%}   {width:10.3f}"
        print(told, flush=True)


if __name__ == "__main__":
    main()
