"""Cameras in JSON: `transforms_train.json` of the Blender sets, `transforms.json` of nerfstudio and instant-ngp.

Both hold frames with a `file_path` and a camera-to-world `transform_matrix`. The Blender sets (Mildenhall et al. 2020)
give a horizontal angle of view and a file per split; the others give focal lengths and the optical center in pixels,
for all frames or frame by frame, and may name the frames of each split (`train_filenames`, `val_filenames`).
Pictures must be free of distortion: coefficients other than 0 and models other than a pinhole are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.parsing import parse_json
from data_pipelines.radiance.cameras import as_pose, focal_of_angle
from data_pipelines.radiance.photos import Lens, Shot
from data_pipelines.radiance.scene_files import SceneFiles

__all__ = ["BLENDER", "NERFSTUDIO", "blender_shots", "nerfstudio_shots"]

BLENDER, NERFSTUDIO = "transforms_train.json", "transforms.json"
_SPLITS = ("train", "val", "test")
_PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")  # if undistorted
_DISTORTIONS = ("k1", "k2", "k3", "k4", "p1", "p2")
_UNDISTORT = "undistort the pictures first (colmap image_undistorter) and write their new camera"


def blender_shots(files: SceneFiles, axes: str) -> Iterator[Shot]:
    """The frames of `transforms_train.json`, and of `transforms_val.json` or else `transforms_test.json`.

    Raises:
        DataError: A file is no such JSON, or a frame of it is wrong.
    """
    held_out = next((split for split in ("val", "test") if files.has(f"transforms_{split}.json")), None)
    for split in filter(None, ("train", held_out)):
        name = f"transforms_{split}.json"
        yield from _shots(files, name, axes, lambda _, split=split: split if held_out else None)


def nerfstudio_shots(files: SceneFiles, axes: str) -> Iterator[Shot]:
    """The frames of `transforms.json`; raises as `blender_shots`."""
    described = _described(files, NERFSTUDIO)
    splits = {
        str(path): split
        for split in _SPLITS
        for path in (described.get(f"{split}_filenames") or ())
        if isinstance(described.get(f"{split}_filenames"), list)
    }
    yield from _shots(files, NERFSTUDIO, axes, lambda path: splits.get(path, "unused") if splits else None)


def _shots(files: SceneFiles, name: str, axes: str, split_of: Any) -> Iterator[Shot]:
    described = _described(files, name)
    frames = described.get("frames")
    if not isinstance(frames, list) or not frames:
        raise DataError(f"{files.where(name)}: frames is {_kind(frames)}; it must be a list of frames")
    for number, frame in enumerate(frames):
        where = f"{files.where(name)}: frame {number}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise DataError(f"{where} has no file_path; give each frame a file_path and a transform_matrix")
        where = f"{where} ({frame['file_path']})"
        if "transform_matrix" not in frame:
            raise DataError(f"{where} has no transform_matrix; give its camera-to-world matrix")
        if frame.get("mask_path"):
            raise DataError(f"{where} has a mask_path, which is not read; write the mask as alpha of the picture")
        pose = as_pose(frame["transform_matrix"], axes, where)
        picture = files.picture(frame["file_path"], where)
        yield Shot(picture, where, pose, _lens({**described, **frame}, where), split_of(frame["file_path"]))


def _described(files: SceneFiles, name: str) -> dict[str, Any]:
    try:
        described = parse_json(files.read(name))
    except ValueError as error:
        raise DataError(f"{files.where(name)}: not valid JSON: {error}") from None
    if not isinstance(described, dict):
        raise DataError(f"{files.where(name)}: holds {_kind(described)}; it must be an object with frames")
    return described


def _lens(facts: Mapping[str, Any], where: str) -> Lens:
    """What a frame and its file say about the lens; the frame wins."""
    model = facts.get("camera_model", "PINHOLE")
    if model not in _PINHOLES or facts.get("is_fisheye"):
        shown = "is_fisheye" if facts.get("is_fisheye") else f"camera_model {model!r}"
        raise DataError(f"{where}: {shown} is not supported, only pinholes are; {_UNDISTORT}")
    for coefficient in _DISTORTIONS:
        if _number(facts, coefficient, where, 0.0) != 0:
            raise DataError(f"{where}: distortion {coefficient}={facts[coefficient]} is not supported; {_UNDISTORT}")
    width, height = _number(facts, "w", where), _number(facts, "h", where)
    fx, fy = _number(facts, "fl_x", where), _number(facts, "fl_y", where)
    angle_x, angle_y = _number(facts, "camera_angle_x", where), _number(facts, "camera_angle_y", where)
    for key, angle in (("camera_angle_x", angle_x), ("camera_angle_y", angle_y)):
        if angle is not None and not 0 < angle < math.pi:
            raise DataError(f"{where}: {key}={angle:g} is no angle of view in radians; it lies between 0 and 3.14")
    if fx is None and angle_x is None:
        raise DataError(f"{where}: neither fl_x nor camera_angle_x is given; write the focal length in pixels as fl_x")

    def fill(picture_width: int, picture_height: int) -> tuple[float, float, float, float]:
        across = fx if fx is not None else focal_of_angle(angle_x or 0.0, picture_width)
        if fy is not None:
            down = fy
        else:
            down = across if fx is not None or angle_y is None else focal_of_angle(angle_y, picture_height)
        cx, cy = _number(facts, "cx", where, picture_width / 2), _number(facts, "cy", where, picture_height / 2)
        return across, down, float(cx or 0.0), float(cy or 0.0)

    return Lens(fill, None if width is None else round(width), None if height is None else round(height))


def _number(facts: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float | None:
    value = facts.get(key, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {key}={value!r} is no number; correct it")
    return float(value)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}" if value else "empty"
