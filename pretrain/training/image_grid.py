"""Pictures of a training batch as one PNG: a row per kind of picture, a column per image."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_pipelines.files import write_atomically
from pretrain.record.pictures import ROWS

__all__ = ["write_image_grid"]

GAP_PX = 2


def write_image_grid(path: Path, pictures: dict[str, torch.Tensor]) -> None:
    """Write one PNG that names its rows, as text of the name `ROWS`; it appears whole or not at all.

    Args:
        path: The file; its directory is made if missing.
        pictures: Kind -> (n, C, H, W) in [0, 1]; other than three channels are shown by their mean. Kinds may differ in
            size and number.
    """
    rows = [torch.cat([_rgb(image) for image in images], dim=2) for images in pictures.values()]  # (3, H, n * W)
    widest = max(row.shape[2] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, widest - row.shape[2]), value=1.0) for row in rows]
    grid = torch.cat(rows, dim=1).mul(255).round().byte().permute(1, 2, 0)  # (rows * H, n * W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    names = PngInfo()
    names.add_text(ROWS, ", ".join(pictures))
    Image.fromarray(grid.numpy()).save(png, format="PNG", pnginfo=names)
    write_atomically(path, png.getvalue())


def _rgb(image: torch.Tensor) -> torch.Tensor:
    image = image.detach().float().cpu().clamp(0, 1)
    image = image if image.shape[0] == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    return torch.nn.functional.pad(image, (0, GAP_PX, 0, GAP_PX), value=1.0)
