"""Scenes: where they are, in which of four layouts, which of their views are fitted and which are held out.

    SCENE/transforms_train.json [transforms_val.json, transforms_test.json]    as the Blender sets
    SCENE/transforms.json                                                      as nerfstudio and instant-ngp
    SCENE/[sparse/0/]cameras.txt, images.txt [points3D.txt], images/           COLMAP's text model
    SCENE.npz with images (n, H, W, 3 or 4), poses (n, 4, 4), focal            as the tiny set of NeRF's authors
    SCENE.tar                                                                  one of the first three

Held out are views of the split `val`, or else `test`, that the source has; else every eighth by name (Mildenhall et al.
2019). At most eight of them are looked at, evenly spread.

Not here: pixels as tensors (`rays`), which part of the world is fitted (`boxes`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError, suggest
from data_pipelines.hidden import is_hidden
from data_pipelines.radiance.cameras import Camera, as_pose, nearest_up, up_turn
from data_pipelines.radiance.colmap import MODELS, colmap_points, colmap_shots
from data_pipelines.radiance.photos import Lens, Pixels, Shot, camera_of, checked_camera, reduced, reduced_size
from data_pipelines.radiance.scene_files import SceneFiles
from data_pipelines.radiance.transforms import BLENDER, NERFSTUDIO, blender_shots, nerfstudio_shots

__all__ = ["Scene", "View", "find_scenes", "read_scene", "scene_name"]

_HELD_OUT_EVERY = 8
_MAX_HELD_OUT = 8
_MIN_VIEWS = 3
_MARKERS = (BLENDER, NERFSTUDIO, *(f"{model}cameras.txt" for model in MODELS))
_LAYOUTS = "transforms_train.json, transforms.json, a COLMAP text model (cameras.txt, images.txt), a .npz or a .tar"
_NPZ = "images (n, height, width, 3 or 4), poses (n, 4, 4) and focal"


@dataclass(frozen=True)
class View:
    """One picture and its camera, in a world with z up; the pixels are not read yet."""

    name: str
    camera: Camera
    content: Pixels | None = None  # (H, W, 4), of an npz; files are read when their pixels are asked for


@dataclass
class Scene:
    """Views of one place.

    Attributes:
        name: without dots, for the keys of its samples.
        layout: `blender`, `nerfstudio`, `colmap` or `npz`.
        up: axis of the source that is +z here.
        points: (n, 3) that COLMAP found, in the world with z up.
        digest: SHA-256 over the files of cameras and over all pictures that are used.
    """

    name: str
    path: Path
    layout: str
    up: str
    train: list[View]
    held_out: list[View]
    points: npt.NDArray[np.float64] | None
    digest: str
    files: SceneFiles | None = field(default=None, repr=False)

    def pixels(self, view: View, size: int) -> tuple[Pixels, Camera]:
        """The picture of a view, (H, W, 4) uint8 with straight alpha, and its camera; shorter side at most `size`.

        Raises:
            DataError: it does not decode.
        """
        try:
            content = self.files.read(view.name) if view.content is None and self.files else view.content
            pixels = reduced(content if content is not None else b"", size)
        except DataError as error:
            raise DataError(f"{self.path}: {view.name}: {error}") from None
        return pixels, view.camera.resized(pixels.shape[1], pixels.shape[0])

    def num_pixels(self, size: int) -> int:
        """Pixels of the views to fit, the shorter sides at most `size`."""
        sizes = (reduced_size(view.camera.width, view.camera.height, size) for view in self.train)
        return sum(width * height for width, height in sizes)


def scene_name(path: Path) -> str:
    """`chair` for `data/chair.tar`; characters that a key of a sample cannot have become `_`."""
    stem = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "scene"


def find_scenes(source: Path) -> list[Path]:
    """The scenes of a source: itself, or the folders, tars and npz directly in it that look like scenes, by name.

    Raises:
        DataError: there is none, or two have the same name.
    """
    if not source.exists():
        names = [path.name for path in source.absolute().parent.iterdir()] if source.absolute().parent.is_dir() else []
        raise DataError(f"no such file or folder of scenes: {source}{suggest(source.name, names)}")
    if _is_scene(source):
        return [source]
    found = sorted(path for path in source.iterdir() if not is_hidden(path.name)) if source.is_dir() else []
    scenes = [path for path in found if _is_scene(path)]
    if not scenes:
        raise DataError(f"{source} is no scene and holds none; a scene has {_LAYOUTS}{_binary_model(source)}")
    names = [scene_name(path) for path in scenes]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        same = " and ".join(path.name for path in scenes if scene_name(path) == repeated)
        raise DataError(f"{source}: {same} are both called {repeated}; rename one of them, or move it away")
    return scenes


def read_scene(path: Path, *, axes: str = "opengl", up: str = "auto") -> Scene:
    """Read the cameras of a scene, and check that every picture it uses is there and has the size of its camera.

    Args:
        axes: of cameras in JSON and npz, `opengl` or `opencv`; COLMAP's are always those of OpenCV.
        up: axis of the source that points up, one of `settings.UPS`; `auto` is z, and for COLMAP, whose worlds have no
            such axis, the one nearest to the upper edges of the pictures.

    Raises:
        DataError: a file is missing, damaged, or says what cannot be; names file, frame, value and remedy.
    """
    scene = _from_npz(path, axes) if path.suffix == ".npz" else _from_files(SceneFiles(path, _MARKERS), axes)
    cameras = [view.camera for view in scene.train]
    scene.up = up if up != "auto" else nearest_up(cameras) if scene.layout == "colmap" else "z"
    turn = up_turn(scene.up)
    scene.train = [View(view.name, view.camera.turned(turn), view.content) for view in scene.train]
    scene.held_out = [View(view.name, view.camera.turned(turn), view.content) for view in scene.held_out]
    scene.points = None if scene.points is None else scene.points @ turn.T
    return scene


def _is_scene(path: Path) -> bool:
    if path.is_dir():
        return any((path / marker).is_file() for marker in _MARKERS)
    return path.suffix in (".npz", ".tar") and path.is_file()


def _binary_model(source: Path) -> str:
    """A hint where there is only what COLMAP writes by default."""
    binary = next((model for model in MODELS if (source / f"{model}cameras.bin").is_file()), None)
    if binary is None:
        return ""
    return f"; {binary}cameras.bin is binary: run colmap model_converter with --output_type TXT"


def _from_files(files: SceneFiles, axes: str) -> Scene:
    points, model = None, next((model for model in MODELS if files.has(f"{model}cameras.txt")), None)
    if files.has(BLENDER):
        layout, shots = "blender", list(blender_shots(files, axes))
    elif files.has(NERFSTUDIO):
        layout, shots = "nerfstudio", list(nerfstudio_shots(files, axes))
    elif model is not None:
        layout, shots = "colmap", list(colmap_shots(files, model))
        points = colmap_points(files, model)
    else:
        raise DataError(f"{files.path} holds no scene; a scene has {_LAYOUTS}")
    _require_distinct(shots)
    train, held_out = _divided(shots, str(files.path))
    sha = hashlib.sha256(f"{layout}\n".encode())
    views, seen = ([_view(shot, files, sha) for shot in part] for part in (train, held_out))
    if points is not None:
        sha.update(points.tobytes())
    return Scene(scene_name(files.path), files.path, layout, "z", views, seen, points, sha.hexdigest(), files)


def _view(shot: Shot, files: SceneFiles, sha: Any) -> View:
    data = files.read(shot.picture)
    camera = camera_of(shot, data)
    numbers = (camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy)
    sha.update(f"{shot.picture} {numbers}\n".encode() + camera.pose.tobytes() + hashlib.sha256(data).digest())
    return View(shot.picture, camera)


def _require_distinct(shots: Sequence[Shot]) -> None:
    """Refuse a picture that is listed twice: one copy would be fitted, and the other held out to judge the fit."""
    seen: dict[str, str] = {}
    for shot in shots:
        first = seen.setdefault(shot.picture, shot.where)
        if first is not shot.where:
            raise DataError(f"{shot.where}: its picture is that of {first} already; list each picture once")


def _divided(shots: Sequence[Shot], where: str) -> tuple[list[Shot], list[Shot]]:
    """Those to fit, and those of the held-out ones that are looked at."""
    if all(shot.split is None for shot in shots):
        ordered = sorted(shots, key=lambda shot: shot.picture)
        train = [shot for number, shot in enumerate(ordered) if number % _HELD_OUT_EVERY]
        held_out = ordered[::_HELD_OUT_EVERY]
    else:
        train = [shot for shot in shots if shot.split == "train"]
        held_out = next(filter(None, ([s for s in shots if s.split == split] for split in ("val", "test"))), [])
    _require_views(len(train), len(held_out), where)
    step = -(-len(held_out) // _MAX_HELD_OUT)
    return train, held_out[::step]


def _require_views(num_train: int, num_held_out: int, where: str) -> None:
    if num_train + num_held_out < _MIN_VIEWS or not num_train or not num_held_out:
        raise DataError(
            f"{where}: {num_train} views to fit and {num_held_out} to hold out; a scene needs {_MIN_VIEWS} or more, "
            "and some of both; add pictures"
        )


def _from_npz(path: Path, axes: str) -> Scene:
    data = path.read_bytes()
    try:
        arrays = decode_arrays(data)
    except DataError as error:
        raise DataError(f"{path}: {error}; it must hold {_NPZ}") from None
    if missing := [name for name in ("images", "poses", "focal") if name not in arrays]:
        raise DataError(f"{path}: has no array {missing[0]!r} but {', '.join(arrays)}; it must hold {_NPZ}")
    images, poses, focal = arrays["images"], arrays["poses"], arrays["focal"]
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise DataError(f"{path}: images has the shape {images.shape}; it must be (n, height, width, 3 or 4)")
    if len(poses) != len(images):
        raise DataError(f"{path}: {len(poses)} poses for {len(images)} images; give one of each")
    if focal.size != 1 or not 0 < focal.item() < math.inf:
        raise DataError(f"{path}: focal={focal.tolist()} is no length in pixels; give one number above 0")
    pixels = [_rgba(image, f"{path}: image {number}") for number, image in enumerate(images)]
    views = list(_views_of_npz(path, pixels, poses, float(focal.item()), axes))
    held_out = views[::_HELD_OUT_EVERY]
    train = [view for number, view in enumerate(views) if number % _HELD_OUT_EVERY]
    _require_views(len(train), len(held_out), str(path))
    held_out = held_out[:: -(-len(held_out) // _MAX_HELD_OUT)]
    digest = hashlib.sha256(f"npz {axes}\n".encode() + data).hexdigest()
    return Scene(scene_name(path), path, "npz", "z", train, held_out, None, digest)


def _views_of_npz(
    path: Path, pixels: Sequence[Pixels], poses: npt.NDArray[Any], focal: float, axes: str
) -> Iterator[View]:
    for number, (image, pose) in enumerate(zip(pixels, poses, strict=True)):
        name, (height, width) = f"image {number}", image.shape[:2]
        lens = Lens(lambda w, h: (focal, focal, w / 2, h / 2))
        where = f"{path}: {name}"
        yield View(
            name, checked_camera(Shot(name, where, as_pose(pose, axes, where), lens, None), width, height), image
        )


def _rgba(image: npt.NDArray[Any], where: str) -> Pixels:
    """(H, W, 4) uint8 of floats in [0, 1] or of bytes, opaque where there is no alpha."""
    if image.dtype != np.uint8:
        if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):
            values = f"{image.dtype} in [{image.min():g}, {image.max():g}]"
            raise DataError(f"{where}: holds {values}; images are uint8, or floats in [0, 1]")
        image = (image * 255).round().astype(np.uint8)
    return image if image.shape[-1] == 4 else np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
