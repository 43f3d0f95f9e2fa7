"""Point clouds for a backbone, as Point-MAE evaluates: normalized to the unit sphere, then farthest-point sampling.

The whole cloud is centered on its mean and divided by the largest distance to it; then points are chosen of which each
is the farthest from all before it, the first one being point 0 (Point-MAE's code: the data set normalizes, the runner
samples). Points at the very center are never chosen, as the operator that it samples with has it. All in float32,
nothing is drawn at random, and there is neither augmentation nor mask.

Not here: running the backbone (`evaluation.extraction.forward`).

Legend: N points of a stored cloud, P points that the backbone takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.decode import decode_array
from data_pipelines.views.kinds.points import farthest_points, shape_in_float32
from evaluation.extraction.recipe import Extraction, Size
from evaluation.protocol import EvaluationError, Protocol

__all__ = ["POINTS"]

DEFAULT_NUM_POINTS = 1024  # of an encoder whose settings name no number
CENTER = 1e-3  # squared distance to the center up to which a point is chosen as the first one only
Cloud = npt.NDArray[np.float32]


def _recipe(spec: Protocol, architecture: Mapping[str, Any], size: Size | None) -> dict[str, Any]:
    if size is not None:
        raise EvaluationError(f"image_size {size}: is of images, and the backbone encodes points; leave it out")
    settings = architecture.get("settings", {})
    return {
        "num_points": int(settings.get("num_points", DEFAULT_NUM_POINTS)),
        "normalize": "unit sphere",
        "choose": "farthest from point 0",
    }


def _prepare(content: Any, recipe: Mapping[str, Any]) -> Tensor:
    """A cloud (P, 3 + F) float32 with the features that it is stored with."""
    values = decode_array(content)
    if values.ndim != 2 or values.shape[1] < 3:
        raise EvaluationError(f"array of shape {values.shape} is no cloud (N, 3 or more columns)")
    if len(values) < recipe["num_points"]:
        raise EvaluationError(f"the cloud has {len(values)} points; the backbone takes {recipe['num_points']}")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as not finite
        cloud = values.astype(np.float32)  # before distances: the squares of half precision are worth nothing
    cloud[:, :3] = _in_unit_sphere(shape_in_float32(values[:, :3]))
    if not np.isfinite(cloud).all():
        raise EvaluationError("the cloud has values that are not finite")
    return torch.from_numpy(cloud[_chosen(cloud[:, :3], recipe["num_points"])])


def _in_unit_sphere(xyz: Cloud) -> Cloud:
    xyz = xyz - xyz.mean(axis=0)
    radius = float(np.sqrt((xyz**2).sum(axis=1).max()))
    return xyz / np.float32(radius)


def _chosen(xyz: Cloud, num_points: int) -> npt.NDArray[np.int64]:
    """Indices (num_points,) by farthest-point sampling from point 0."""
    may_be_chosen = (xyz**2).sum(axis=1) > CENTER
    may_be_chosen[0] = True
    candidates = may_be_chosen.nonzero()[0]
    return candidates[farthest_points(xyz[candidates], num_points, first=0)]


POINTS = Extraction(
    inputs=("points.npy", "points.npz", "npy", "npz"),
    tokens=("pooled", "encoder"),
    recipe=_recipe,
    prepare=_prepare,
    axes=0,
    pooling=("max", "mean"),
)
