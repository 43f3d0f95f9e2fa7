"""Robustness of frozen features against a few spoiled patches, and how far they see beyond texture.

Some patches of each test image are replaced by noise, by their mean color, or by their own pixels in another order
(after Gu, Tresp, Qin 2021, arXiv:2111.10659). The image is then classified by its nearest clean training images, as by
`knn`, on standardised [CLS, mean of patches]. Beside accuracies stand cosines, which need no labels: of the class
token, and of the tokens whose patches were left as they are, which say how far a spoiled patch spreads. Last, all
patches are put out of order: an encoder that still knows the class has used texture and no structure. Nothing is
chosen. What is spoiled follows from the seed and the number of the sample, and fewer patches are a part of more.

Legend: B batch, n images, N patches, C channels, D width, (p, q) pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Taken
from evaluation.extraction.frozen import Frozen
from evaluation.metrics import Outcome, wilson_interval
from evaluation.pooling import scaling
from evaluation.protocol import EvaluationError
from evaluation.protocols.knn.score import vote

__all__ = ["CORRUPTIONS", "drawing", "score", "spoiled", "to_images", "to_patches"]

_CLEAN, _PERMUTED = "clean", "permuted"


def score(
    train: Frozen, test: Frozen, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Runs the encoder over the training images and, for each corruption, over the test images.

    Raises:
        EvaluationError: images have a single patch.
    """
    encoder: Any = test.encoder
    bank = train.measure(lambda batch, _: {"vector": _vector(encoder.tokens(batch))})["vector"].to(device)
    mean, scale = scaling(bank)
    bank, bank_labels = (bank - mean) * scale, _classes(train)

    def classes_of(features: Any) -> Tensor:
        settings: dict[str, Any] = {"num_classes": num_classes, "ks": [params["k"]], "device": device}
        queries = (_vector(features) - mean) * scale
        return vote(bank, bank_labels, queries, temperature=params["temperature"], **settings)[params["k"]].argmax(1)

    def take(batch: Tensor, numbers: range) -> Taken:
        grid = encoder.grid_at(*batch.shape[-2:])
        num_patches = grid[0] * grid[1]
        patches = to_patches(batch.cpu(), grid)  # (B, N, C, p, q)
        orders = torch.stack([_permuted(num_patches, drawing(seed, number)) for number in numbers])  # (B, N)
        clean = encoder.tokens(batch)
        taken = {_CLEAN: classes_of(clean)}
        for how in params["corruptions"]:
            for count in (count for count in params["patches"] if count < num_patches):
                seen = spoiled(patches, orders[:, :count], how, [drawing(seed, number, how) for number in numbers])
                features = encoder.tokens(to_images(seen, grid).to(batch.device))
                is_left = torch.ones(len(batch), num_patches, dtype=torch.bool).scatter_(1, orders[:, :count], False)
                alike = F.cosine_similarity(features.tokens.float(), clean.tokens.float(), dim=-1).cpu()  # (B, N)
                taken |= {
                    f"{how} {count}": classes_of(features),
                    f"{how} {count} cosine": _cosine(features, clean),
                    f"{how} {count} unchanged": (alike * is_left).sum(1) / is_left.sum(1),
                }
        if len(taken) == 1:
            raise EvaluationError("robustness needs images of more patches than are spoiled; give a larger image_size")
        moved = encoder.tokens(to_images(patches[torch.arange(len(batch))[:, None], orders], grid).to(batch.device))
        return {**taken, _PERMUTED: classes_of(moved), f"{_PERMUTED} cosine": _cosine(moved, clean)}

    found = test.measure(take)
    labels = _classes(test)
    cases = [name.removesuffix(" cosine") for name in found if name.endswith(" cosine") and _PERMUTED not in name]

    def top1(name: str) -> float:
        return float((found[name] == labels).double().mean())

    def mean_of(suffix: str) -> float:
        return sum(float(found[f"{name} {suffix}"].double().mean()) for name in cases) / len(cases)

    perturbed = sum(top1(name) for name in cases) / len(cases)
    low, high = wilson_interval(perturbed * len(labels), len(labels))
    return Outcome(
        metrics={
            "top1_perturbed": perturbed,
            "top1_perturbed_ci_low": low,
            "top1_perturbed_ci_high": high,
            "top1_clean": top1(_CLEAN),
            "drop": top1(_CLEAN) - perturbed,
            "cosine": mean_of("cosine"),
            "cosine_unchanged": mean_of("unchanged"),
            "top1_permuted": top1(_PERMUTED),
            "cosine_permuted": float(found[f"{_PERMUTED} cosine"].double().mean()),
        },
        details={
            "by_case": {
                name: {
                    "top1": top1(name),
                    "cosine": float(found[f"{name} cosine"].double().mean()),
                    "cosine_unchanged": float(found[f"{name} unchanged"].double().mean()),
                }
                for name in cases
            }
        },
        per_sample=torch.stack([found[name] == labels for name in cases]).double().mean(dim=0),
    )


def _classes(split: Frozen) -> Tensor:
    if not isinstance(split.labels, Tensor):  # label="cls" gives no other
        raise AssertionError("maps where classes were asked for")
    return split.labels


def _vector(features: Any) -> Tensor:
    """[CLS, mean of patches] (B, D or 2 D) float32."""
    parts = [features.mean] if features.cls is None else [features.cls, features.mean]
    return torch.cat([part.float() for part in parts], dim=1)


def _cosine(features: Any, clean: Any) -> Tensor:
    return F.cosine_similarity(features.pooled.float(), clean.pooled.float(), dim=-1)  # (B,)


def drawing(seed: int, number: int, how: str = "places") -> np.random.Generator:
    """Random numbers of one sample for one purpose, whatever batch it is in.

    numpy's, which takes all of these as its seed; torch's would take the lowest 32 bits.
    """
    return np.random.default_rng([seed, number, ("places", *CORRUPTIONS).index(how)])


def _permuted(count: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.permutation(count))


def _noise(patches: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, patches.shape, np.uint8))


def _mean_color(patches: Tensor, rng: np.random.Generator) -> Tensor:
    return patches.float().mean(dim=(-2, -1), keepdim=True).round().to(torch.uint8).expand_as(patches)


def _mixed_pixels(patches: Tensor, rng: np.random.Generator) -> Tensor:
    order = _permuted(patches.shape[-2] * patches.shape[-1], rng)
    return patches.flatten(-2)[..., order].reshape(patches.shape)


# What becomes of patches (m, C, p, q) uint8.
CORRUPTIONS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _mean_color,  # of so small a part, what blurring ends in
    "shuffle": _mixed_pixels,
}


def spoiled(patches: Tensor, places: Tensor, how: str, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Patches (B, N, C, p, q) of which those at `places` (B, m) are spoiled, by random numbers of each image."""
    result = patches.clone()
    for image, where, rng in zip(result, places, rngs, strict=True):
        image[where] = CORRUPTIONS[how](image[where], rng)
    return result


def to_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, C, p, q) of images (B, C, H, W), row by row."""
    rows, cols = grid
    height, width = images.shape[-2] // rows, images.shape[-1] // cols
    cut = images.unflatten(3, (cols, width)).unflatten(2, (rows, height))  # (B, C, rows, p, cols, q)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def to_images(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, H, W) of what `to_patches` has made of it."""
    return patches.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
