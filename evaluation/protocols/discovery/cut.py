"""The normalized cut of the patches of one image, and the object that it leaves (TokenCut, arXiv:2202.11539).

Not here: which features of the patches, boxes and scores (`evaluation.protocols.discovery.score`).

Legend: (h, w) patch grid, N = h w patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Cut", "normalized_cut"]


class Cut(NamedTuple):
    """An image in two parts."""

    side: npt.NDArray[np.bool_]  # (h, w), of the patch that stands out most
    found: npt.NDArray[np.bool_]  # (h, w), what of the side hangs together with that patch
    eigenvalue: float  # the second least of the normalized Laplacian: near 0, the parts have little in common
    edge_density: float  # share of pairs, those of a patch with itself included, that are more alike than tau


def normalized_cut(tokens: npt.NDArray[np.float64], grid: Sequence[int], *, tau: float, eps: float) -> Cut:
    """Cut the graph whose edges weigh 1 between patches with a cosine above `tau`, and `eps` between others.

    The second eigenvector v of (D - W) v = lambda D v is D^-1/2 u, with u the second greatest of D^-1/2 W D^-1/2, which
    takes a fraction of the time. Patches above the mean of v are one side, those below it the other; the side of the
    greatest |v| is the object. Where no patch differs from another, the object is the whole image.

    Args:
        tokens: (N, D), rows in the order of the grid.
        grid: (h, w).
    """
    from scipy.ndimage import label

    lengths = np.linalg.norm(tokens, axis=1, keepdims=True)
    unit = tokens / np.maximum(lengths, np.finfo(np.float64).tiny)
    is_edge = unit @ unit.T > tau  # (N, N)
    density = float(is_edge.mean())
    everything = np.ones(tuple(grid), bool)
    if len(tokens) < 3 or is_edge.all():
        return Cut(everything, everything, 1.0, density)
    weights = np.where(is_edge, 1.0, eps)
    scale = weights.sum(axis=1) ** -0.5  # (N,)
    second, vector = _second_greatest(weights * scale[:, None] * scale)
    vector = vector * scale
    is_above = vector > vector.mean()
    seed = int(np.abs(vector).argmax())
    side = (is_above == is_above[seed]).reshape(tuple(grid))
    parts, _ = label(side)  # neighbours are those above, below, left and right
    found = parts == parts.ravel()[seed]
    return Cut(side, found, 1 - second, density)


def _second_greatest(matrix: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
    """Eigenvalue and eigenvector (N,) of a symmetric matrix (N, N), of three rows at least."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    size = len(matrix)
    start = np.random.default_rng(0).standard_normal(size)  # else scipy draws another one each time
    try:
        values, vectors = eigsh(matrix, k=2, which="LA", v0=start)
    except ArpackNoConvergence:  # eigenvalues that are almost equal: slower, and sure
        values, vectors = eigh(matrix, subset_by_index=[size - 2, size - 1])
    second = int(values.argmin())
    return float(values[second]), vectors[:, second]
