"""What an encoder makes of the tokens of a few test clouds or volumes, on one sheet.

Rows, from above: what the encoder was given; the first three principal components of all its tokens after the final
norm, as red, green and blue; how alike all tokens are to the first one of a cloud, or the middle one of a volume; and
the same for the token that is least like that one, each sample from the lowest to the highest cosine in it.

Clouds are seen from two sides, every point in the color of the token that lies nearest to it; volumes are cut across
each axis, in the middle.

Not here: images (`evaluation.pictures.tokens`).

Legend: n samples, N tokens, D width, P points, (X, Y, Z) voxels of a volume, (x, y, z) tokens along its axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import default_collate

from backbones.images.pictures import (
    component_shares,
    most_different_patch,
    similarity_colors,
    similarity_ranges,
)
from backbones.io import load_backbone
from evaluation.data import EvaluationData
from evaluation.extraction.recipe import Reads, extraction_of
from evaluation.pictures.sheets import Pixels, encoded, on_tiles, sheet
from evaluation.pictures.tokens import cosines_in_words
from evaluation.registry import protocol
from evaluation.selection import spread
from evaluation.threads import Threads

if TYPE_CHECKING:
    from backbones.features import Features

__all__ = ["SPACES", "cloud_views", "middle_slices", "space_sheet", "token_colors"]

SPACES = {"points": "clouds", "voxels": "slices"}  # kind of backbone -> kind of picture
MAX_CLOUDS, MAX_VOLUMES = 4, 3  # of two and of three tiles each
TILE_PX, POINT_PX = 96, 3
AZIMUTHS, ELEVATION = (np.deg2rad(30), np.deg2rad(120)), np.deg2rad(20)  # from where clouds are seen
BACK = 24  # gray behind a cloud
PREPARED_FOR = "spectrum"  # a protocol of pooled features: samples are prepared for all of these alike

Floats = npt.NDArray[np.float32]


def space_sheet(
    checkpoint: Path,
    architecture: Mapping[str, Any],
    data: EvaluationData,
    *,
    reads: Reads,
    device: torch.device,
    threads: Threads,
) -> bytes:
    """A PNG of test samples, see the module.

    Args:
        architecture: of an encoder of points or voxels, as the file of `checkpoint` has it.
        reads: as `evaluation.runner.evaluate` takes it.

    Raises:
        EvaluationError, BackboneError, DataError: what is there cannot be read or does not go together.
    """
    is_cloud = architecture["kind"] == "points"
    extraction = extraction_of(architecture["kind"]).reading(reads)
    recipe: dict[str, Any] = {**extraction.recipe(protocol(PREPARED_FOR), architecture, None), "array": reads.array}
    held_out = data.open_held_out(extraction.inputs)
    field = held_out.require_field(*extraction.inputs)
    numbers = spread(held_out.num_samples, MAX_CLOUDS if is_cloud else MAX_VOLUMES)
    batch = default_collate([extraction.prepare(held_out.read(number)[field], recipe) for number in numbers])
    encoder = threads.run(load_backbone, checkpoint).to(device).eval()
    features = threads.run(_features, encoder, batch, device)
    first = 0 if features.grid is None else _middle(features.grid)
    rows, caption = token_colors(features, first)
    if is_cloud:
        assert features.coords is not None  # tokens of clouds lie on no grid
        points, centers = batch[..., :3].numpy(), features.coords.float().cpu().numpy()
        tiles = [cloud_views(points, centers, colors) for colors in (None, *rows)]
    else:
        voxels = _shades(batch["volume"].numpy())
        tiles = [middle_slices(voxels), *(middle_slices(_on_voxels(colors, features, voxels.shape)) for colors in rows)]
    zoom = max(1, TILE_PX // tiles[0].shape[1])
    tiles = [on_tiles(tile.repeat(zoom, 1).repeat(zoom, 2), (tile.shape[1] * zoom,) * 2) for tile in tiles]
    return encoded(sheet(tiles), tiles[0].shape[1:3], caption)


@torch.inference_mode()
def _features(encoder: Any, batch: Any, device: torch.device) -> Features:
    moved = {name: part.to(device) for name, part in batch.items()} if isinstance(batch, dict) else batch.to(device)
    found: Features = encoder.tokens(moved)
    return found


def _middle(grid: Sequence[int]) -> int:
    """Number of the token in the middle of a grid, which is row-major."""
    return int(np.ravel_multi_index([side // 2 for side in grid], grid))


@torch.inference_mode()
def token_colors(features: Features, first: int) -> tuple[list[Floats], str]:
    """Components, similarity to token `first`, and to the one least like it: (n, N, 3) in [0, 1] each; and the caption.

    Tokens of padding are black, and decide neither colors nor the scale.
    """
    tokens = features.tokens.float()  # (n, N, D)
    is_valid = features.is_valid if features.is_valid is not None else torch.ones_like(tokens[..., 0], dtype=torch.bool)
    components = torch.zeros(*tokens.shape[:2], 3, device=tokens.device)
    components[is_valid] = component_shares(tokens[is_valid])
    chosen = torch.full((len(tokens),), first, device=tokens.device)
    # A token of padding takes the place of the chosen one, which is beside the range of the others.
    known = torch.where(is_valid[..., None], tokens, tokens[:, first : first + 1])
    apart = most_different_patch(known, first)
    rows = [components]
    ranges = []
    for token_idx in (chosen, apart):
        alike = tokens.where(is_valid[..., None], _another(tokens, is_valid, token_idx))
        rows.append(similarity_colors(alike, token_idx) * is_valid[..., None])
        ranges.append(similarity_ranges(alike, token_idx))
    return [row.cpu().numpy() for row in rows], cosines_in_words(*ranges)


def _another(tokens: Tensor, is_valid: Tensor, token_idx: Tensor) -> Tensor:
    """Of each sample a token (n, 1, D) with data that is not `token_idx` (n,), where there is one."""
    is_other = is_valid.clone()
    is_other[torch.arange(len(tokens)), token_idx] = False
    return tokens[torch.arange(len(tokens)), is_other.int().argmax(1)][:, None]


def cloud_views(points: Floats, centers: Floats, colors: Floats | None) -> Pixels:
    """Clouds (n, P, 3) from two sides, one beside the other: (2 n, h, h, 3). Near points hide far ones.

    Args:
        centers: where tokens are, (n, N, 3).
        colors: of the tokens, (n, N, 3) in [0, 1]; None: points are gray, near ones brighter.
    """
    tiles = []
    for number, cloud in enumerate(points):
        if colors is not None:
            nearest = ((cloud[:, None] - centers[number][None]) ** 2).sum(-1).argmin(1)  # (P,)
            of_points = colors[number][nearest]
        for azimuth in AZIMUTHS:
            column, row, near = _seen_from(cloud, azimuth)
            shades = np.repeat(0.35 + 0.65 * (near[:, None] + 1) / 2, 3, axis=1) if colors is None else of_points
            tiles.append(_scattered(column, row, near, shades))
    return np.stack(tiles)


def _seen_from(cloud: Floats, azimuth: float) -> tuple[Floats, Floats, Floats]:
    """To the right, down, and towards the viewer, (P,) each in [-1, 1]; the second coordinate points up."""
    extent = max(float(np.linalg.norm(cloud, axis=1).max()), 1e-12)
    x, y, z = (cloud / extent).T
    right, ahead = x * np.cos(azimuth) + z * np.sin(azimuth), z * np.cos(azimuth) - x * np.sin(azimuth)
    up, near = y * np.cos(ELEVATION) - ahead * np.sin(ELEVATION), ahead * np.cos(ELEVATION) + y * np.sin(ELEVATION)
    return right, -up, near


def _scattered(column: Floats, row: Floats, near: Floats, shades: npt.NDArray[Any]) -> Pixels:
    """One tile, a square of a few pixels for each point."""
    canvas = np.full((TILE_PX, TILE_PX, 3), BACK, np.uint8)
    order = np.argsort(near)
    reach = TILE_PX - POINT_PX
    places = ((np.stack([row, column]) * 0.98 / 2 + 0.5) * reach).round().astype(int)[:, order]
    pixels = np.round(shades[order] * 255).astype(np.uint8)
    for down in range(POINT_PX):
        for right in range(POINT_PX):
            canvas[places[0] + down, places[1] + right] = pixels
    return canvas


def middle_slices(volumes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Volumes (n, X, Y, Z, 3) cut in the middle of each axis: (3 n, h, h, 3), h the longest side, 0 behind others."""
    longest = max(volumes.shape[1:4])
    tiles = []
    for volume in volumes:
        for axis in range(3):
            plane = volume.take(volume.shape[axis] // 2, axis=axis)
            free = [(0, longest - side) for side in plane.shape[:2]]
            tiles.append(np.pad(plane, [*free, (0, 0)]))
    return np.stack(tiles)


def _on_voxels(colors: Floats, features: Features, shape: Sequence[int]) -> Floats:
    """Colors of tokens (n, N, 3) on the voxels that they are of: (n, X, Y, Z, 3)."""
    assert features.grid is not None  # tokens of volumes lie on one
    on_grid = colors.reshape(len(colors), *features.grid, 3)
    for axis, (have, want) in enumerate(zip(features.grid, shape[1:4], strict=True), start=1):
        on_grid = on_grid.take(np.arange(want) * have // want, axis=axis)
    return on_grid


def _shades(volumes: npt.NDArray[Any]) -> Floats:
    """Volumes (n, C, X, Y, Z) as people see them, (n, X, Y, Z, 3) in [0, 1].

    Of four channels the first three are colors and the last one says how opaque they are; else the first one is gray,
    in each sample from its second to its 98th percentile.
    """
    values = volumes.astype(np.float32)
    if values.shape[1] == 4:
        top = 255.0 if volumes.dtype == np.uint8 else 1.0
        colors = np.clip(values[:, :3] / top, 0, 1) * np.clip(values[:, 3:] / top, 0, 1)
        return np.moveaxis(colors, 1, -1)
    gray = values[:, 0]
    low, high = (np.percentile(gray, share, axis=(1, 2, 3), keepdims=True) for share in (2, 98))
    return np.repeat(np.clip((gray - low) / np.maximum(high - low, 1e-12), 0, 1)[..., None], 3, axis=-1)
