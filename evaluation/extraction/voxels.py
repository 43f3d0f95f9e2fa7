"""Volumes and voxel grids for a backbone: brought to the size that it was built for, never resampled.

An axis that is longer is cut on both sides, so that its middle stays; one that is shorter gets zeros behind its end, as
in training. A voxel keeps its meaning so, in millimeters and as a class. Labels are laid down the same way. Tokens of
these zeros alone count in no mean. Of an encoder in stages the maps of all stages are given.

To be filled in, three quarters of the blocks of a volume are hidden, as NeRF-MAE hides them: of 16 voxels along an edge
in volumes of 160. Smaller volumes have smaller blocks, so that some are left to see. Neither depends on how a
checkpoint was trained, else no two could be compared.

Not here: running the backbone (`evaluation.extraction.forward`), the scale of values (the backbone's).

Legend: (X, Y, Z) axes as stored, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backbones.voxels.base import StagedVoxelEncoder, VoxelEncoder
from data_pipelines.decode import array_names, decode_array
from data_pipelines.field_kinds import input_array
from data_pipelines.views.kinds.volumes import as_volume
from evaluation.data import IGNORED
from evaluation.extraction.recipe import Extraction, Size
from evaluation.protocol import EvaluationError, Protocol

if TYPE_CHECKING:
    from backbones.encoder import Encoder

__all__ = ["VOXELS", "brought_to"]

HIDDEN = 0.75  # of all blocks
BLOCKS = {96: 16, 32: 8, 1: 4}  # voxels along the longest side from which on -> along the edge of a block

Number = TypeVar("Number", bound=np.generic)


def brought_to(size: Sequence[int], values: npt.NDArray[Number], fill: float) -> npt.NDArray[Number]:
    """`values` with its last axes of this size: their middle where they are longer, `fill` behind where shorter."""
    for axis, want in enumerate(size, start=values.ndim - len(size)):
        have = values.shape[axis]
        start = max(0, have - want) // 2
        values = values.take(range(start, min(start + want, have)), axis=axis)
        missing = [(0, max(0, want - have)) if other == axis else (0, 0) for other in range(values.ndim)]
        values = np.pad(values, missing, constant_values=fill)
    return values


def _recipe(spec: Protocol, architecture: Mapping[str, Any], size: Size | None) -> dict[str, Any]:
    if size is not None:
        raise EvaluationError(f"image_size {size}: is of images, and the backbone encodes voxels; leave it out")
    settings = architecture["settings"]
    voxels = [int(side) for side in settings["size"]]
    facts = {"voxels": voxels, "in_chans": int(settings.get("in_chans", 1)), "fit": "middle, zeros behind"}
    if spec.tokens == "pooled":
        return facts | {"mean": "without padding"}
    if spec.tokens == "patches":
        return facts | {"maps": "of all stages"}
    if spec.tokens == "encoder":
        return facts
    block = next(edge for side, edge in BLOCKS.items() if max(voxels) >= side)
    if block % (patch_size := int(settings.get("patch_size", 1))):
        raise EvaluationError(
            f"protocol {spec.name!r} hides blocks of {block} voxels in volumes of {voxels}, which patches of "
            f"{patch_size} voxels (backbone.patch_size) do not tile; use a patch size that divides {block}"
        )
    if math.prod(side // block for side in voxels) < 2:
        raise EvaluationError(f"protocol {spec.name!r} needs volumes of two blocks of {block} voxels, not {voxels}")
    return facts | {"block": block, "hidden": HIDDEN}


def _prepare(content: Any, recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """ "volume" (C, X, Y, Z) of the recipe's size, bytes as bytes, other numbers as float32; "size" (3,) without zeros
    behind.
    """
    volume = as_volume(_array(content, recipe))
    if len(volume) != recipe["in_chans"]:
        raise EvaluationError(
            f"volume of shape {volume.shape} has {len(volume)} channels; the backbone takes {recipe['in_chans']}"
        )
    if volume.dtype != np.uint8:
        volume = volume.astype(np.float32)
        if not np.isfinite(volume).all():
            raise EvaluationError("the volume has values that are not finite")
    size = [min(have, want) for have, want in zip(volume.shape[1:], recipe["voxels"], strict=True)]
    return {"volume": torch.from_numpy(brought_to(recipe["voxels"], volume, 0)), "size": torch.tensor(size)}


def _maps(encoder: Encoder, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Tokens (B, x, y, z, D) of each stage, the finest first; of an encoder without stages those that it has."""
    assert isinstance(encoder, VoxelEncoder)  # the kind of its file says so
    x = encoder.normalized(batch["volume"], batch["size"])
    if isinstance(encoder, StagedVoxelEncoder):
        return encoder.stages(x)
    return [encoder.features(x).tokens.unflatten(1, encoder.grid_at(x.shape[2:]))]


def _lay(labels: npt.NDArray[np.int64], content: Any, recipe: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    shape = as_volume(_array(content, recipe)).shape[1:]
    if labels.shape != shape:
        raise EvaluationError(f"labels of shape {labels.shape} do not lie on the volume of shape {shape}")
    return brought_to(recipe["voxels"], labels, IGNORED)


def _array(content: Any, recipe: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The array that the backbone was trained on, where that is not known "image", or the only one beside labels.

    Raises:
        EvaluationError: an npz has several others.
        DataError: it cannot be decoded.
    """
    names, trained = array_names(content), recipe.get("array")
    if (name := input_array(names, trained)) is not None:
        return decode_array(content, name or None)
    wanted = f"{trained!r}, which the backbone was trained on" if trained else "'image'"
    raise EvaluationError(
        f"npz has no array {wanted}, and several others: {', '.join(names)}; give the one to be read that name"
    )


VOXELS = Extraction(
    inputs=("volume.npy", "volume.npz", "grid.npy", "npz"),
    tokens=("pooled", "patches", "encoder", "decoded"),
    recipe=_recipe,
    prepare=_prepare,
    axes=3,
    lay=_lay,
    maps=_maps,
)
