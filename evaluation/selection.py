"""Splits of the training images on which hyper-parameters are chosen, the choice itself, and which samples people see.

No choice here ever depends on a test image. Folds are balanced over classes, or keep whole video sequences together
where neighbouring frames would leak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import torch
from torch import Tensor

__all__ = [
    "LEAST_BLOCKS",
    "NEVER_HELD_OUT",
    "blocks_named",
    "blocks_of",
    "by_setting",
    "choose_cell",
    "hold_out",
    "how_held_out",
    "random_folds",
    "sequence_folds",
    "spread",
    "stratified_folds",
]

LEAST_BLOCKS = 10  # from fewer an interval is wider than what it tells
NEVER_HELD_OUT = -1  # fold of rows that every head may be fitted on


def stratified_folds(labels: Tensor, *, num_folds: int, seed: int) -> Tensor:
    """Assigns each row a fold in 0..num_folds-1 (n,) int64, every class spread evenly over the folds."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]  # shuffled within each class, classes one after the other
    fold = torch.empty(len(labels), dtype=torch.int64)
    fold[by_class] = torch.arange(len(labels)) % num_folds
    return fold


def random_folds(num_rows: int, *, num_folds: int, seed: int) -> Tensor:
    """Assigns each row a random fold (n,) int64, fold sizes equal to within one."""
    return stratified_folds(torch.zeros(num_rows, dtype=torch.int64), num_folds=num_folds, seed=seed)


def sequence_folds(sequences: Sequence[str], *, num_folds: int) -> Tensor:
    """Assigns whole sequences to at most `num_folds` folds of similar size; (n,) int64.

    Longest sequence first into the smallest fold, so the result depends on names and lengths only.
    """
    lengths = Counter(sequences)
    sizes = [0] * min(num_folds, len(lengths))
    home: dict[str, int] = {}
    for name, length in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        home[name] = sizes.index(min(sizes))
        sizes[home[name]] += length
    return torch.tensor([home[name] for name in sequences])


def blocks_of(sequences: Sequence[str | None]) -> Tensor | None:
    """Which samples are left out together where an interval is estimated: (n,) int64; None: each is its own.

    Frames of a sequence resemble each other, so that an interval over frames is too narrow. Of `LEAST_BLOCKS` sequences
    or more each is one block; fewer are cut into as many blocks of frames that follow each other.

    Args:
        sequences: of each sample in their order; samples without one stand alone.
    """
    if not any(sequences):
        return None
    places: dict[str, list[int]] = {}
    for place, name in enumerate(sequences):
        places.setdefault(f"alone {place}" if name is None else f"sequence {name}", []).append(place)
    per_sequence = -(-LEAST_BLOCKS // len(places))
    block, number = torch.empty(len(sequences), dtype=torch.int64), 0
    for members in places.values():
        for part in torch.tensor(members).tensor_split(min(per_sequence, len(members))):
            block[part], number = number, number + 1
    return block


def blocks_named(groups: Tensor | None) -> str:
    """What an interval over `blocks_of` images is over, for people."""
    return "images" if groups is None else f"{int(groups.max()) + 1} blocks of frames"


def hold_out(fold: Tensor, *, holdout_from: int) -> tuple[Tensor, int]:
    """What is held out of so many rows: each fold in turn, or of a large set the first fold alone.

    Args:
        fold: (n,) of each row; not changed.
        holdout_from: rows from which on one fold says enough.

    Returns:
        fold (n,), `NEVER_HELD_OUT` in rows that every head is fitted on; and how many folds are held out.
    """
    if len(fold) >= holdout_from:
        fold = fold.where(fold <= 0, NEVER_HELD_OUT)
    return fold, int(fold.max()) + 1


def how_held_out(fold: Tensor, num_folds: int) -> str:
    """What `hold_out` returned, for people: "5-fold", or "held-out 400 of 2000"."""
    return f"{num_folds}-fold" if num_folds > 1 else f"held-out {int((fold != NEVER_HELD_OUT).sum())} of {len(fold)}"


def by_setting(grid: Sequence[float], values: Tensor, total: float = 1.0) -> dict[str, float]:
    """Score of each setting of a grid, for people: `{"0.1": 0.5}`; counts become shares of `total`."""
    return {str(setting): value / total for setting, value in zip(grid, values.tolist(), strict=True)}


def choose_cell(score: Tensor, loss: Tensor) -> tuple[int, bool]:
    """Returns (index of the highest score, ties to the lowest loss; whether the grid ends there too early).

    The grid ends too early when the chosen cell is its first or last and beats its only neighbour.
    """
    ranked = sorted(range(len(score)), key=lambda cell: (-float(score[cell]), float(loss[cell])))
    best, last = ranked[0], len(score) - 1
    neighbour = {0: 1, last: last - 1}.get(best)
    at_edge = neighbour is not None and last > 0 and float(score[best]) > float(score[neighbour])
    return best, at_edge


def spread(num_samples: int, at_most: int) -> list[int]:
    """Numbers of the samples that people are shown, the same for every checkpoint.

    One by chance out of each of `at_most` stretches: neighbors may be of one class, or frames of one video, and at
    equal distances one class may return, where they follow each other in turn.
    """
    count, chance = min(num_samples, at_most), Random(0)
    bounds = [index * num_samples // count for index in range(count + 1)]
    return [chance.randrange(*stretch) for stretch in pairwise(bounds)]
