"""A scene of three spheres, photographed by ray casting, and its pictures and cameras in every layout that is read.

Independent of the code under test: pixels become rays by look-at axes, not by matrices of a reader.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float64]

SPHERES = (  # center, radius, color
    ((0.0, 0.0, 0.0), 0.6, (0.85, 0.25, 0.2)),
    ((0.75, 0.15, 0.35), 0.3, (0.2, 0.7, 0.3)),
    ((-0.3, -0.75, -0.35), 0.35, (0.2, 0.35, 0.85)),
)
FOCAL = 1.25  # widths of a picture


class Photograph(NamedTuple):
    pixels: npt.NDArray[np.uint8]  # (H, W, 4)
    position: Array  # (3,)
    right: Array  # (3,) axes of the camera in the world
    up: Array
    ahead: Array

    @property
    def opengl(self) -> Array:
        """(4, 4) camera-to-world, y up, looking along -z."""
        return np.vstack([np.column_stack([self.right, self.up, -self.ahead, self.position]), [0, 0, 0, 1]])

    @property
    def opencv(self) -> Array:
        """(4, 4) camera-to-world, y down, looking along +z."""
        return np.vstack([np.column_stack([self.right, -self.up, self.ahead, self.position]), [0, 0, 0, 1]])


def photographs(count: int = 24, size: int = 32, distance: float = 4.0, spheres: Any = SPHERES) -> list[Photograph]:
    """Views from a spiral around the origin."""
    taken = []
    for number in range(count):
        height = 0.85 - 1.5 * (number + 0.5) / count
        angle = number * math.pi * (3 - math.sqrt(5))
        flat = math.sqrt(1 - height**2)
        position = distance * np.array([flat * math.cos(angle), flat * math.sin(angle), height])
        ahead = -position / distance
        right = np.cross(ahead, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        up = np.cross(right, ahead)
        taken.append(Photograph(_cast(position, right, up, ahead, size, spheres), position, right, up, ahead))
    return taken


def _cast(position: Array, right: Array, up: Array, ahead: Array, size: int, spheres: Any) -> npt.NDArray[np.uint8]:
    """The nearest sphere along the ray of each of 4 x 4 points in a pixel."""
    fine = 4 * size
    across = (np.arange(fine) + 0.5) / fine - 0.5
    rays = ahead + (across[None, :, None] * right - across[:, None, None] * up) / FOCAL
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    nearest, layer = np.full((fine, fine), np.inf), np.zeros((fine, fine, 4))
    for center, radius, color in spheres:
        toward = position - np.array(center)
        half = rays @ toward
        root = half**2 - (toward @ toward - radius**2)
        depth = np.where(root > 0, -half - np.sqrt(np.maximum(root, 0)), np.inf)
        normal = (position + np.where(root > 0, depth, 0)[..., None] * rays - center) / radius
        shade = 0.75 + 0.25 * np.sign(np.sin(5 * normal[..., 2]) * np.cos(5 * normal[..., 0]))
        seen = depth < nearest
        layer[seen] = np.dstack([shade[..., None] * color, np.ones((fine, fine))])[seen]
        nearest = np.minimum(nearest, depth)
    blocks = layer.reshape(size, 4, size, 4, 4)
    alpha = blocks[..., 3].mean(axis=(1, 3))
    color = blocks[..., :3].sum(axis=(1, 3)) / np.maximum(16 * alpha, 1)[..., None]
    return (np.dstack([color, alpha]) * 255).round().astype(np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_blender(folder: Path, taken: list[Photograph], num_val: int = 0) -> Path:
    """As the Blender sets; the last `num_val` photographs are the split val."""
    for split, part in (("train", taken[: len(taken) - num_val]), ("val", taken[len(taken) - num_val :])):
        if not part:
            continue
        (folder / split).mkdir(parents=True)
        frames = []
        for number, photo in enumerate(part):
            (folder / split / f"r_{number}.png").write_bytes(png(photo.pixels))
            frames.append({"file_path": f"./{split}/r_{number}", "transform_matrix": photo.opengl.tolist()})
        described = {"camera_angle_x": 2 * math.atan(0.5 / FOCAL), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(described))
    return folder


def write_nerfstudio(folder: Path, taken: list[Photograph], axes: str = "opengl", **facts: Any) -> Path:
    """As nerfstudio and instant-ngp."""
    (folder / "images").mkdir(parents=True)
    size, frames = len(taken[0].pixels), []
    for number, photo in enumerate(taken):
        (folder / "images" / f"{number:03d}.png").write_bytes(png(photo.pixels))
        pose = photo.opengl if axes == "opengl" else photo.opencv
        frames.append({"file_path": f"images/{number:03d}.png", "transform_matrix": pose.tolist()})
    lens = {"fl_x": FOCAL * size, "fl_y": FOCAL * size, "cx": size / 2, "cy": size / 2, "w": size, "h": size, "k1": 0.0}
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", **lens, **facts, "frames": frames}))
    return folder


def write_colmap(folder: Path, taken: list[Photograph], model: str = "PINHOLE") -> Path:
    """As COLMAP's model converter, text."""
    (folder / "images").mkdir(parents=True)
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    size = len(taken[0].pixels)
    lens = {"PINHOLE": (FOCAL * size,) * 2, "SIMPLE_PINHOLE": (FOCAL * size,)}[model]
    numbers = " ".join(map(str, (size, size, *lens, size / 2, size / 2)))
    (sparse / "cameras.txt").write_text(f"# CAMERA_ID, MODEL\n# Number of cameras: 1\n7 {model} {numbers}\n")
    lines = [f"# Number of images: {len(taken)}, mean observations per image: 0"]
    for number, photo in enumerate(taken):
        (folder / "images" / f"photo {number:03d}.png").write_bytes(png(photo.pixels))
        to_camera = np.stack([photo.right, -photo.up, photo.ahead])
        words = [*_quaternion(to_camera), *(-to_camera @ photo.position)]
        lines += [f"{number + 1} {' '.join(map(repr, map(float, words)))} 7 photo {number:03d}.png", ""]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_npz(path: Path, taken: list[Photograph]) -> Path:
    """As `tiny_nerf_data.npz`, colors on white."""
    pixels = np.stack([photo.pixels for photo in taken]).astype(np.float32) / 255
    images = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    poses = np.stack([photo.opengl for photo in taken]).astype(np.float32)
    np.savez(path, images=images, poses=poses, focal=np.array(FOCAL * images.shape[2]))
    return path


def write_tar(path: Path, folder: Path) -> Path:
    """The files of a scene below a folder of its name."""
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=folder.name)
    return path


def _quaternion(rotation: Array) -> tuple[float, float, float, float]:
    """(w, x, y, z) by the eigenvector of Bar-Itzhack (2000), which needs no cases."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    k = np.array(
        [
            [xx - yy - zz, yx + xy, zx + xz, yz - zy],
            [yx + xy, yy - xx - zz, zy + yz, zx - xz],
            [zx + xz, zy + yz, zz - xx - yy, xy - yx],
            [yz - zy, zx - xz, xy - yx, xx + yy + zz],
        ]
    )
    x, y, z, w = np.linalg.eigh(k / 3)[1][:, -1]
    return -w, x, y, z
