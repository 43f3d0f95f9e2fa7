"""Held-out volumes of which blocks are hidden, and what the encoder and the decoder of a checkpoint fill in.

Which blocks are hidden follows from the seed and the number of the sample alone, so that it is the same for every
checkpoint, and the same number of them in every volume.

Not here: how large blocks are and how many are hidden (`evaluation.extraction.voxels`), scores (its protocols).

Legend: B batch, n samples, C channels, (X, Y, Z) voxels, (a, b, c) blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backbones.voxels.padding import inside
from data_pipelines.order import key, permutation
from evaluation.extraction.forward import Samples, Taken, measured
from evaluation.extraction.recipe import Extraction
from evaluation.protocol import EvaluationError
from evaluation.threads import Threads

if TYPE_CHECKING:  # timm takes seconds to import
    from backbones.voxels.reconstruction import Reconstruction

__all__ = ["Decoded", "Filled", "hidden_blocks", "load_reconstruction", "require_decoder"]


class Filled(NamedTuple):
    """A batch of volumes in natural units: bytes and values of a window as in [0, 1], density as alpha."""

    values: Tensor  # (B, C, X, Y, Z), 0 in padding
    predicted: Tensor  # (B, C, X, Y, Z), what the decoder says; of use where something was hidden
    is_hidden: Tensor  # (B, X, Y, Z) bool
    is_inside: Tensor  # (B, X, Y, Z) bool: no padding


@dataclass(frozen=True)
class Decoded:
    """Held-out samples, and how hidden parts of them are filled in.

    Attributes:
        samples: In their order.
        model: On `device`, in evaluation mode.
        recipe: As `feature_recipe` makes it, of "decoded": size, blocks, and the share of them that is hidden.
        seed: Of what is hidden.
    """

    samples: Samples
    model: Reconstruction
    extraction: Extraction
    recipe: Mapping[str, Any]
    seed: int
    batch_size: int
    device: torch.device
    threads: Threads

    def measure(self, of_filled: Callable[[Filled], Taken]) -> Taken:
        """What `of_filled` says of all samples, (n, ...) by name.

        Raises:
            EvaluationError: what it says is not finite; names the sample.
            DataError: a sample cannot be read or decoded; names it.
        """
        return measured(
            self.samples,
            self.extraction,
            self.recipe,
            lambda batch, numbers: of_filled(self._fill(batch, numbers)),
            batch_size=self.batch_size,
            device=self.device,
            threads=self.threads,
        )

    def _fill(self, batch: Mapping[str, Tensor], numbers: range) -> Filled:
        values = self.model.encoder.scaled(batch["volume"], batch["size"])
        is_inside = inside(batch["size"], values.shape[2:])
        block, cube = int(self.recipe["block"]), self.model.cube
        if block % cube:
            raise EvaluationError(f"blocks of {block} voxels cannot be hidden from tokens of {cube} voxels")
        blocks = hidden_blocks(self.seed, numbers, [side // block for side in values.shape[2:]], self.recipe["hidden"])
        cubes = _spread(blocks.to(values.device), block // cube, [side // cube for side in values.shape[2:]])
        return Filled(values, self.model(values, cubes), _spread(cubes, cube, values.shape[2:]), is_inside)


def hidden_blocks(seed: int, numbers: range, grid: Sequence[int], share: float) -> Tensor:
    """(B, a, b, c) bool: as large a share as whole blocks make of those of each sample, one at least.

    Args:
        seed: of the evaluation.
        numbers: of the samples.
        grid: (a, b, c); a rest behind the last block is never hidden.
        share: of the blocks.
    """
    total = math.prod(grid)
    is_hidden = np.zeros((len(numbers), total), bool)
    for row, number in enumerate(numbers):
        is_hidden[row, permutation(total, key(seed, number))[: max(1, int(total * share))]] = True
    return torch.from_numpy(is_hidden).unflatten(1, tuple(grid))


def _spread(volumes: Tensor, factor: int, sides: Sequence[int]) -> Tensor:
    """(B, a, b, c) bool with each value `factor` times along each axis, False behind: (B, *sides)."""
    for axis in (1, 2, 3):
        volumes = volumes.repeat_interleave(factor, axis)
    x, y, z = (want - have for want, have in zip(sides, volumes.shape[1:], strict=True))
    return functional.pad(volumes, [0, z, 0, y, 0, x])


def require_decoder(protocol: str, owner: str, heads: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint, or an objective, without a decoder of hidden voxels.

    Args:
        protocol: that needs it.
        owner: how the message calls what has none.
        heads: the spec of its heads, as `backbones.io.heads_spec`.

    Raises:
        EvaluationError: there are none, or they are others.
    """
    if "decoder" not in (heads or {}):
        raise EvaluationError(
            f"protocol {protocol!r} needs a decoder of hidden voxels beside the backbone, and {owner} has none; "
            "checkpoints of objective nerf_mae have it, and of volume_mae with norm_pix_loss=false"
        )


def load_reconstruction(checkpoint: Path) -> Reconstruction:
    """The encoder and the decoder of a checkpoint, in evaluation mode.

    Raises:
        BackboneError: they are missing or damaged, or do not fit each other.
    """
    from backbones.io import load_backbone, load_heads
    from backbones.voxels.reconstruction import reconstruction_of

    return reconstruction_of(load_backbone(checkpoint), *load_heads(checkpoint))
