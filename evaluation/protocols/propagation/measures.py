"""J and F of DAVIS 2017: how well the mask of one object in one frame fits (Perazzi et al. 2016).

Legend: (H, W) masks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["boundary_f", "region_iou"]

Mask = npt.NDArray[np.bool_]


def region_iou(guess: Mask, truth: Mask) -> float:
    """J: intersection over union of two masks; 1 if both are empty."""
    union = int((guess | truth).sum())
    return int((guess & truth).sum()) / union if union else 1.0


def boundary_f(guess: Mask, truth: Mask, radius: int) -> float:
    """F: F1 score of the pixels of two boundaries, of which those within `radius` pixels of the other one are hits.

    Without a boundary on either side it is 1, and on one side 0.
    """
    guessed, true = (np.argwhere(_boundary(mask)) for mask in (guess, truth))  # (points, 2)
    if not len(guessed) or not len(true):
        return float(len(guessed) == len(true))
    precision, recall = _share_near(guessed, true, radius), _share_near(true, guessed, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: Mask) -> Mask:
    """Pixels that differ from the one to the right, below, or on the diagonal between; the last corner is none."""
    beside = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = beside[:-1, 1:], beside[1:, :-1], beside[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def _share_near(points: npt.NDArray[np.intp], others: npt.NDArray[np.intp], radius: int) -> float:
    """Share of points at most `radius` away from the nearest of others."""
    from scipy.spatial import cKDTree

    # The bound is exclusive. Squares of distances are whole numbers, so none lies between the radius and this.
    distance, _ = cKDTree(others).query(points, distance_upper_bound=(radius**2 + 0.5) ** 0.5)
    return float(np.isfinite(distance).mean())
