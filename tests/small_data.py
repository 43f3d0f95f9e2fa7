"""Small data sets for objectives of other kinds than photos, made anew in each process and the same in all of them."""

from __future__ import annotations

import atexit
import io
import json
import math
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["clouds", "grids", "photos_and_volumes", "shape_cloud", "volumes", "write_shard"]

NUM_CLOUDS, NUM_POINTS = 64, 128


def shape_cloud(rng: np.random.Generator, label: int, num_points: int = NUM_POINTS) -> npt.NDArray[np.float32]:
    """Points of a sphere, a box, a cylinder or a torus, of random extent and turned about z: (num_points, 3)."""
    u, v = rng.uniform(0, 1, (2, num_points))
    around, height = 2 * math.pi * u, 2 * v - 1
    if label == 0:
        ring = np.sqrt(1 - height**2)
        points = np.stack([ring * np.cos(around), ring * np.sin(around), height], 1)
    elif label == 1:
        points = rng.uniform(-1, 1, (num_points, 3))
        points[np.arange(num_points), rng.integers(3, size=num_points)] = rng.choice([-1.0, 1.0], num_points)
    elif label == 2:
        points = np.stack([np.cos(around), np.sin(around), height], 1)
    else:
        tube = 2 * math.pi * v
        ring = 1 + 0.35 * np.cos(tube)
        points = np.stack([ring * np.cos(around), ring * np.sin(around), 0.35 * np.sin(tube)], 1)
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    points = points * rng.uniform(0.5, 1.0, 3) @ turn.T
    return (points + rng.normal(0, 0.02, points.shape)).astype(np.float32)


@cache
def clouds() -> Path:
    """Clouds of 128 points, `points.npy` and `cls`: 64 in train-000000.tar, 16 others in test-000000.tar."""

    def sample(idx: int) -> Mapping[str, bytes]:
        rng = np.random.default_rng(idx)
        return {"points.npy": _npy(shape_cloud(rng, idx % 4)), "cls": str(idx % 4).encode()}

    return _folder(sample, NUM_CLOUDS, NUM_CLOUDS // 4)


@cache
def grids() -> Path:
    """Radiance grids of a ball, `grid.npy` (4, X, Y, Z) of 12 to 18 voxels a side: 64 in train-000000.tar."""

    def sample(idx: int) -> Mapping[str, bytes]:
        rng = np.random.default_rng(idx)
        distance = _distance(rng, rng.integers(12, 19, 3))
        alpha = (1 - distance).clip(0, 1)
        colors = np.broadcast_to(rng.uniform(0, 1, (3, 1, 1, 1)), (3, *alpha.shape)) * (alpha > 0)
        return {"grid.npy": _npy(np.concatenate([colors, alpha[None]]).astype(np.float16))}

    return _folder(sample, 64, 16)


@cache
def volumes() -> Path:
    """Scans of a bright ball in noise, `npz` with image and label (X, Y, Z) uint8: 64 in train-000000.tar."""

    def sample(idx: int) -> Mapping[str, bytes]:
        rng = np.random.default_rng(idx)
        distance = _distance(rng, rng.integers(12, 19, 3))
        image = (60 + 120 * (1 - distance).clip(0, 1) + rng.normal(0, 10, distance.shape)).clip(0, 255)
        file = io.BytesIO()
        np.savez_compressed(file, image=image.astype(np.uint8), label=(distance < 1).astype(np.uint8))
        return {"npz": file.getvalue()}

    return _folder(sample, 64, 16, ("ground", "ball"))


@cache
def photos_and_volumes() -> Path:
    """Samples with a photo of a bright disc of some color, `jpg`, and a volume as in `volumes`, `npz`.

    The folder is also what is below it as `images` and `volumes`.
    """

    def sample(idx: int) -> Mapping[str, bytes]:
        rng = np.random.default_rng(idx)
        distance = _distance(rng, rng.integers(12, 19, 3))
        image = (60 + 120 * (1 - distance).clip(0, 1) + rng.normal(0, 10, distance.shape)).clip(0, 255)
        volume, picture = io.BytesIO(), io.BytesIO()
        np.savez_compressed(volume, image=image.astype(np.uint8), label=(distance < 1).astype(np.uint8))
        rows, columns = np.meshgrid(np.arange(48), np.arange(48), indexing="ij")
        disc = np.hypot(rows - rng.uniform(10, 38), columns - rng.uniform(10, 38)) < rng.uniform(6, 16)
        colors = np.where(disc[..., None], rng.integers(100, 256, 3), rng.integers(0, 100, 3))
        Image.fromarray(colors.astype(np.uint8)).save(picture, "JPEG", quality=95)
        return {"jpg": picture.getvalue(), "npz": volume.getvalue()}

    folder = _folder(sample, 64, 16, ("ground", "ball"))
    for name in ("images", "volumes"):
        (folder / name).symlink_to(folder)
    return folder


def _distance(rng: np.random.Generator, sides: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """How far each voxel is from the middle of a ball somewhere in a volume, 1 at its surface."""
    axes = np.meshgrid(*(np.arange(side) for side in sides), indexing="ij")
    middle, radius = rng.uniform(0.3, 0.7, 3) * sides, rng.uniform(4, 7)
    return np.sqrt(sum((axis - at) ** 2 for axis, at in zip(axes, middle, strict=True))) / radius


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """A tar of samples: key -> field -> bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in samples.items():
            for field, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _folder(
    sample: Callable[[int], Mapping[str, bytes]], num_train: int, num_test: int, classes: Sequence[str] = ()
) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="small-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numbers = range(num_train + num_test)
    for split, chosen in (("train", numbers[:num_train]), ("test", numbers[num_train:])):
        write_shard(folder / f"{split}-000000.tar", {f"{idx:04d}": sample(idx) for idx in chosen})
    if classes:
        (folder / "dataset.json").write_text(json.dumps({"classes": classes}))
    return folder


def _npy(array: npt.NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
