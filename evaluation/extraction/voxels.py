"""Volumes and voxel grids for a backbone: brought to the size that it was built for, never resampled.

An axis that is longer is cut on both sides, so that its middle stays; one that is shorter gets zeros behind its end, as
in training. A voxel keeps its meaning so, in millimeters and as a class. Labels are laid down the same way.

Not here: running the backbone (`evaluation.extraction.forward`), the scale of values (the backbone's).

Legend: (X, Y, Z) axes as stored, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.decode import decode_array, decode_arrays
from data_pipelines.views.kinds.volumes import as_volume
from evaluation.data import IGNORED
from evaluation.extraction.recipe import Extraction, Size
from evaluation.protocol import EvaluationError, Protocol

__all__ = ["VOXELS", "brought_to"]

IMAGE = "image"  # the array of an npz that has several

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
    return {
        "voxels": [int(side) for side in settings["size"]],
        "in_chans": int(settings.get("in_chans", 1)),
        "fit": "middle, zeros behind",
    }


def _prepare(content: Any, recipe: Mapping[str, Any]) -> Tensor:
    """A volume (C, X, Y, Z) of the recipe's size: bytes as bytes, other numbers as float32."""
    volume = as_volume(_array(content))
    if len(volume) != recipe["in_chans"]:
        raise EvaluationError(
            f"volume of shape {volume.shape} has {len(volume)} channels; the backbone takes {recipe['in_chans']}"
        )
    if volume.dtype != np.uint8:
        volume = volume.astype(np.float32)
        if not np.isfinite(volume).all():
            raise EvaluationError("the volume has values that are not finite")
    return torch.from_numpy(brought_to(recipe["voxels"], volume, 0))


def _lay(labels: npt.NDArray[np.int64], content: Any, recipe: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    shape = as_volume(_array(content)).shape[1:]
    if labels.shape != shape:
        raise EvaluationError(f"labels of shape {labels.shape} do not lie on the volume of shape {shape}")
    return brought_to(recipe["voxels"], labels, IGNORED)


def _array(content: Any) -> npt.NDArray[Any]:
    """The array that is called "image", or the only one.

    Raises:
        DataError: an npz of several arrays has none of that name, or it cannot be decoded.
    """
    arrays = decode_arrays(content)
    if IMAGE in arrays:
        return arrays[IMAGE]
    return next(iter(arrays.values())) if len(arrays) == 1 else decode_array(content, IMAGE)


VOXELS = Extraction(
    inputs=("volume.npy", "volume.npz", "grid.npy", "npz"),
    tokens=("pooled", "patches"),
    recipe=_recipe,
    prepare=_prepare,
    axes=3,
    lay=_lay,
)
