"""Pictures of a batch as one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pretrain.record.pictures import ROWS, text_of
from pretrain.training.image_grid import GAP_PX, write_image_grid


def test_write_image_grid__rows_of_any_size_beside_white(tmp_path: Path) -> None:
    pictures = {"images": torch.zeros(2, 3, 6, 6), "slices": torch.full((3, 1, 9, 11), 0.5)}
    write_image_grid(tmp_path / "new" / "grid.png", pictures)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert text_of(tmp_path / "new" / "grid.png", ROWS) == "images, slices"
    assert grid.shape == (6 + 9 + 2 * GAP_PX, 3 * (11 + GAP_PX), 3)
    assert not grid[:6, :6].any() and (grid[:6, 2 * (6 + GAP_PX) :] == 255).all()
    assert (grid[6 + GAP_PX : 6 + GAP_PX + 9, :11] == 128).all()
