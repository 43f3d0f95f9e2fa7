"""What a reader finds of each picture, and the picture itself: RGBA at the size to fit to, with its camera.

Pictures are taken as stored: programs that compute cameras do not look at the EXIF orientation. Where they are reduced,
color counts as far as it is opaque, so that the color below transparent parts reaches no edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipelines.decode import Photo, decode_rgba
from data_pipelines.errors import DataError
from data_pipelines.radiance.cameras import Camera

__all__ = ["Lens", "Shot", "camera_of", "reduced", "reduced_size"]

Pixels = npt.NDArray[np.uint8]  # (H, W, 4), straight alpha


class Lens(NamedTuple):
    """What is known of a lens before the picture is seen."""

    intrinsics: Callable[
        [int, int], tuple[float, float, float, float]
    ]  # width, height of the picture -> fx, fy, cx, cy
    width: int | None = None  # that the picture has to have
    height: int | None = None


@dataclass(frozen=True)
class Shot:
    """One picture of a scene, as a file describes it."""

    picture: str  # name of its file in the scene
    where: str  # it is described: file and frame, for messages
    pose: npt.NDArray[np.float64]  # (4, 4) camera-to-world, OpenGL axes
    lens: Lens
    split: str | None  # that the source puts it in; None where it has no splits


def camera_of(shot: Shot, data: bytes) -> Camera:
    """The camera of a shot, once its picture is there.

    Raises:
        DataError: `data` is no picture, or has another size than its camera; or the lens has no positive focal length.
    """
    try:
        photo = Photo(data, exif_rotation=False)
    except DataError as error:
        raise DataError(f"{shot.where}: {shot.picture}: {error}") from None
    width, height = shot.lens.width or photo.width, shot.lens.height or photo.height
    if (width, height) != (photo.width, photo.height):
        raise DataError(
            f"{shot.where}: {shot.picture} has {photo.width} x {photo.height} pixels, its camera {width} x {height}; "
            "use the pictures that the cameras were computed from, or scale w, h and the focal length with them"
        )
    return checked_camera(shot, width, height)


def checked_camera(shot: Shot, width: int, height: int) -> Camera:
    """The camera of a shot for a picture of known size.

    Raises:
        DataError: its focal length is not positive.
    """
    fx, fy, cx, cy = shot.lens.intrinsics(width, height)
    if fx <= 0 or fy <= 0:
        raise DataError(f"{shot.where}: a focal length of {min(fx, fy):g} pixels is not allowed; it must be above 0")
    return Camera(width, height, fx, fy, cx, cy, shot.pose)


def reduced_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height with a shorter side of at most `size`."""
    shorter = min(width, height)
    if shorter <= size:
        return width, height
    return max(size, round(width * size / shorter)), max(size, round(height * size / shorter))


def reduced(content: bytes | Pixels, size: int) -> Pixels:
    """The pixels of a picture, (H, W, 4), the shorter side at most `size`.

    Raises:
        DataError: it does not decode.
    """
    pixels = decode_rgba(content) if isinstance(content, bytes) else content
    height, width = pixels.shape[:2]
    target = reduced_size(width, height, size)
    if target == (width, height):
        return pixels
    image = Image.fromarray(pixels).resize(target, Image.Resampling.BOX)  # Pillow weighs colors by their alpha
    return np.asarray(image)
