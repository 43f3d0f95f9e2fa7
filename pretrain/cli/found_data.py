"""What the clouds, volumes and grids of a data set are, and which settings of a recipe follow from them.

A few dozen samples are read: how many points they have, how large they are and of which values. Not here: photos, the
recipe as text (`pretrain.cli.init`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import array_names, decode_array
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import LABEL_ARRAYS, input_array
from data_pipelines.shards.dataset import Dataset
from pretrain.errors import RequestError

__all__ = ["FoundArrays", "look_at_arrays"]

_POINT_FIELDS: tuple[str, ...] = ("points.npy", "points.npz")
_VOLUME_FIELDS: tuple[str, ...] = ("volume.npy", "volume.npz", "npz")
_LONGEST = 96  # voxels of a side that init plans; of longer volumes each step sees a part
_SMALL = 32  # voxels, below which blocks that evaluations hide have an edge of 4
_SWIN_TOKEN = 32  # voxels of a token of the last stage of the recipe's encoder
_PASSES = 300  # over clouds, as Point-MAE, and over volumes, as the recipe of a hundred
_FEW_GRIDS = 500  # below which grids are cuts of a few scenes, as a rule, and ten passes learn them by heart


@dataclass(frozen=True)
class FoundArrays:
    """What they are, and what of a recipe follows.

    Attributes:
        text: In words, without where they are.
        title: Of the objective, as its authors write it.
        passes: Over the data, the most that init plans.
        recipe: Whose settings are the ground.
        objective, backbone: Settings on top of it.
        name: Of the evaluation data.
        protocols: That fit, where there is something to score with.
        select: The score by which to choose.
    """

    text: str
    title: str
    passes: int
    recipe: str
    objective: Mapping[str, Any]
    backbone: Mapping[str, Any]
    name: str
    protocols: tuple[str, ...]
    select: str


def look_at_arrays(dataset: Dataset, samples: Sequence[Mapping[str, Any]], *, has_test: bool) -> FoundArrays | None:
    """None where samples have neither clouds nor volumes.

    Args:
        dataset: Of the training split.
        samples: Some of its samples.
        has_test: Whether there are held-out shards.

    Raises:
        RequestError: none of these samples can be read.
    """
    fields = dataset.fields
    if field := next((name for name in _POINT_FIELDS if name in fields), None):
        return _clouds(_arrays(samples, field), has_labels="cls" in fields and has_test)
    if "grid.npy" in fields:
        return _grids(_arrays(samples, "grid.npy"), len(dataset), has_test)
    if field := next((name for name in _VOLUME_FIELDS if name in fields), None):
        has_labels = bool({"seg.npy", "labels.npy"} & fields) or _has_label_array(samples, field)
        return _volumes(_arrays(samples, field), has_test, has_labels and bool(dataset.description.get("classes")))
    return None


def _clouds(clouds: Sequence[tuple[str, npt.NDArray[Any]]], *, has_labels: bool) -> FoundArrays:
    least, middle = min(len(cloud) for _, cloud in clouds), round(median(len(cloud) for _, cloud in clouds))
    num_points = min(1024, least)
    num_groups = max(2, min(64, num_points // 16))  # Point-MAE: 64 groups of 32 points of 1024
    return FoundArrays(
        f"clouds of {middle} points",
        "Point-MAE",
        _PASSES,
        "point_mae_psb",
        {},
        {"num_points": num_points, "num_groups": num_groups, "group_size": min(32, num_points)},
        "clouds",
        ("svm", "knn") if has_labels else (),
        "svm/clouds/val_top1",
    )


def _grids(grids: Sequence[tuple[str, npt.NDArray[Any]]], number: int, has_test: bool) -> FoundArrays:
    sides = _sides(grids)
    size = [max(_SWIN_TOKEN, min(_LONGEST, side // _SWIN_TOKEN * _SWIN_TOKEN)) for side in sides]
    return FoundArrays(
        f"radiance grids of {' x '.join(map(str, sides))} voxels",
        "NeRF-MAE",
        10 if number < _FEW_GRIDS else _PASSES,
        "nerf_mae_synthetic",
        {},
        {"size": size},
        "scenes",
        ("masked_reconstruction",) if has_test else (),
        "masked_reconstruction/scenes/val_alpha_error",
    )


def _volumes(volumes: Sequence[tuple[str, npt.NDArray[Any]]], has_test: bool, has_labels: bool) -> FoundArrays:
    sides = _sides(volumes)
    patch_size = 4 if max(sides) < _SMALL else 8
    size = [min(_LONGEST, -(-side // patch_size) * patch_size) for side in sides]
    array, first = volumes[0]
    in_chans = len(first) if first.ndim == 4 else 1
    mean, std = _moments([values for _, values in volumes], in_chans)
    protocols = ("voxel_segmentation",) * has_labels + ("masked_reconstruction",)
    score = "voxel_segmentation/volumes/val_dice" if has_labels else "masked_reconstruction/volumes/val_psnr"
    scale = {"in_chans": in_chans, "voxel_mean": mean, "voxel_std": std}
    return FoundArrays(
        f"volumes of {' x '.join(map(str, sides))} voxels",
        "MAE",
        _PASSES,
        "volume_mae_hippocampus",
        {"volume_array": array or None, "flip": [0.0, 0.0, 0.0]},
        {"size": size, "patch_size": patch_size, **scale},
        "volumes",
        protocols if has_test else (),
        score,
    )


def _arrays(samples: Sequence[Mapping[str, Any]], field: str) -> list[tuple[str, npt.NDArray[Any]]]:
    """Of each sample that can be read the array, with its name in an npz, as evaluation chooses it where there are
    several.
    """
    found = []
    for sample in samples:
        try:
            if (name := input_array(array_names(sample[field]))) is not None:
                found.append((name, decode_array(sample[field], name or None)))
        except DataError:
            continue
    if not found:
        raise RequestError(
            f"DATA: field {field} of the first samples cannot be read as one array; `pretrain data verify` names the "
            "damage; of several arrays of an npz that are no labels 'image' is read"
        )
    return found


def _has_label_array(samples: Sequence[Mapping[str, Any]], field: str) -> bool:
    try:
        return field == "npz" and not set(LABEL_ARRAYS).isdisjoint(array_names(samples[0][field]))
    except DataError:
        return False


def _sides(volumes: Sequence[tuple[str, npt.NDArray[Any]]]) -> list[int]:
    """Median of voxels along each axis.

    Raises:
        RequestError: an array is none.
    """
    shapes = [values.shape[-3:] for _, values in volumes]
    if any(len(shape) < 3 for shape in shapes):
        raise RequestError(f"DATA: arrays of shape {min(shapes, key=len)} are no volumes (X, Y, Z) or (C, X, Y, Z)")
    return [round(median(shape[axis] for shape in shapes)) for axis in range(3)]


def _moments(volumes: Sequence[npt.NDArray[Any]], channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, of bytes as in [0, 1]; to three digits."""
    values = [volume.reshape(channels, -1).astype(np.float64) / (255 if volume.dtype == np.uint8 else 1)
              for volume in volumes]  # fmt: skip
    joined = np.concatenate(values, axis=1)  # (channels, voxels)
    deviation = [std if std > 0 else 1.0 for std in joined.std(axis=1)]
    return [float(f"{mean:.3g}") for mean in joined.mean(axis=1)], [float(f"{std:.3g}") for std in deviation]
