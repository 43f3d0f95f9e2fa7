"""The text model of COLMAP (Schonberger and Frahm 2016): `cameras.txt`, `images.txt` and `points3D.txt`.

A picture has a rotation (quaternion w, x, y, z) and a translation from the world to the camera, in the axes of OpenCV.
Models with distortion are refused: COLMAP's own `image_undistorter` writes pictures and a PINHOLE model that fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError
from data_pipelines.radiance.cameras import as_pose
from data_pipelines.radiance.photos import Lens, Shot
from data_pipelines.radiance.scene_files import SceneFiles

__all__ = ["MODELS", "colmap_points", "colmap_shots"]

MODELS = ("", "sparse/0/", "sparse/", "colmap/sparse/0/")  # folders in which a model lies, below that of the scene
_PICTURE_FOLDERS = ("images/", "")
_ANNOUNCED = re.compile(r"^# Number of (cameras|images|points): ([0-9]+)", re.MULTILINE)  # COLMAP counts at the top
_POINT_VALUES = 8  # POINT3D_ID X Y Z R G B ERROR, before pairs of IMAGE_ID POINT2D_IDX
_PARAMETERS = {"SIMPLE_PINHOLE": ("f", "cx", "cy"), "PINHOLE": ("fx", "fy", "cx", "cy")}

Array = npt.NDArray[np.float64]


def colmap_shots(files: SceneFiles, model: str) -> Iterator[Shot]:
    """The pictures of a model.

    Args:
        model: folder of it, one of `MODELS`.

    Raises:
        DataError: A line is not what COLMAP writes, a file is cut, or a camera has distortion.
    """
    lenses = _lenses(files, f"{model}cameras.txt")
    name = f"{model}images.txt"
    folder = next((folder for folder in _PICTURE_FOLDERS if not folder or files.holds_folder(folder.rstrip("/"))), "")
    # Every other line lists the points that a picture shows, and is empty for one that shows none.
    lines = _lines(files, name, lines_each=2)
    for number, line in lines[1::2]:
        if len(line.split()) % 3:
            raise DataError(
                f"{files.where(name)} line {number}: {len(line.split())} values, the points of an image have 3 each: "
                "X Y POINT3D_ID; the file is cut: export the model again"
            )
    for number, line in lines[::2]:
        where = f"{files.where(name)} line {number}"
        words = line.split(maxsplit=9)
        if len(words) != 10:
            raise DataError(
                f"{where}: {len(words)} values, an image has 10: IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME; "
                "export the model again"
            )
        pose = _pose(words[1:8], where)
        if words[8] not in lenses:
            raise DataError(
                f"{where}: camera {words[8]} is not in {files.where(f'{model}cameras.txt')}; export the model again"
            )
        yield Shot(files.picture(folder + words[9].strip(), where), where, pose, lenses[words[8]], None)


def colmap_points(files: SceneFiles, model: str) -> Array | None:
    """(n, 3) positions of the points of a model; None where it lists none.

    Raises:
        DataError: A line is not what COLMAP writes, or the file is cut.
    """
    name = f"{model}points3D.txt"
    if not files.has(name):
        return None
    points = []
    for number, line in _lines(files, name):
        words, where = line.split(), f"{files.where(name)} line {number}"
        if len(words) < _POINT_VALUES or len(words) % 2:
            raise DataError(
                f"{where}: {len(words)} values, a point has {_POINT_VALUES} and 2 for each image that shows it: "
                "POINT3D_ID X Y Z R G B ERROR, IMAGE_ID POINT2D_IDX; the file is cut: export the model again"
            )
        points.append(_numbers(words[1:4], 3, where))
    return np.array(points) if points else None


def _lenses(files: SceneFiles, name: str) -> dict[str, Lens]:
    lenses = {}
    for number, line in _lines(files, name):
        where = f"{files.where(name)} line {number}"
        words = line.split()
        model = words[1] if len(words) > 1 else ""
        if model not in _PARAMETERS:
            raise DataError(
                f"{where}: camera model {model!r} is not supported, {' and '.join(_PARAMETERS)} are; undistort the "
                "pictures first (colmap image_undistorter)"
            )
        names = _PARAMETERS[model]
        values = _numbers(words[2:], 2 + len(names), where)
        width, height = round(values[0]), round(values[1])
        fx, fy, cx, cy = values[2:] if model == "PINHOLE" else (values[2], *values[2:])
        lenses[words[0]] = Lens(lambda *_, found=(fx, fy, cx, cy): found, width, height)
    return lenses


def _pose(words: list[str], where: str) -> Array:
    """World-to-camera quaternion and translation to a camera-to-world matrix in OpenGL axes."""
    w, x, y, z, *translation = _numbers(words, 7, where)
    length = float(np.linalg.norm([w, x, y, z]))
    if abs(length - 1) > 1e-3:
        raise DataError(
            f"{where}: the quaternion has the length {length:.4g}, that of a rotation is 1; export the model again"
        )
    w, x, y, z = (value / length for value in (w, x, y, z))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = np.column_stack([rotation.T, -rotation.T @ np.array(translation)])
    return as_pose(pose, "opencv", where)


def _lines(files: SceneFiles, name: str, *, lines_each: int = 1) -> list[tuple[int, str]]:
    """Number, from 1, and text of every line but comments; empty ones count where an entry has several lines.

    Raises:
        DataError: It is no text, or a file that COLMAP wrote ends too early.
    """
    try:
        text = files.read(name).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{files.where(name)}: not UTF-8 text; export the model with --output_type TXT") from None
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.startswith("#") and (lines_each > 1 or line.strip())
    ]
    if announced := _ANNOUNCED.search(text):
        where = f"{files.where(name)} line {len(text.splitlines())}"
        noun, num_announced, num_found = announced[1], int(announced[2]), -(-len(lines) // lines_each)
        if num_found != num_announced:
            cut = "the file is cut: " if num_found < num_announced else ""
            raise DataError(
                f"{where}: ends after {num_found} {noun}, and its {announced[0]!r} announces {num_announced}; "
                f"{cut}export the model again, or correct that number"
            )
        if not text.endswith("\n"):
            raise DataError(f"{where}: the last line has no end, so the file is cut; export the model again")
    return lines


def _numbers(words: list[str], count: int, where: str) -> list[float]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) != count or not np.isfinite(values).all():
        raise DataError(f"{where}: {' '.join(words)[:60]!r} is not {count} numbers; export the model again")
    return values
