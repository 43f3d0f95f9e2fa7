"""Patch features and attention as pictures: components as colors, what a patch is like, where the class token looks.

Attention of the class token shows objects in M. Caron et al., 2021, arXiv:2104.14294, figure 1; principal components
of patch tokens as red, green and blue are from M. Oquab et al. (DINOv2), 2023, arXiv:2304.07193, figure 1; the
similarity of one patch to all others, in which features that lose their locality become blotches, is from O. Simeoni
et al. (DINOv3), 2025, arXiv:2508.10104, section 4.

Legend: n pictures, N patches, D width, H attention heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "attention_maps",
    "component_shares",
    "middle_patch",
    "most_different_patch",
    "principal_colors",
    "similarity_colors",
    "similarity_maps",
    "similarity_ranges",
]

_CLIPPED = 0.02  # share of the patches at either end of a component that is shown as fully dark or bright
# From 0 to 1: violet, blue, green, yellow, as in matplotlib's viridis. Red is none of them.
_HEAT = (
    (0.267, 0.004, 0.329),
    (0.231, 0.322, 0.545),
    (0.129, 0.569, 0.549),
    (0.369, 0.788, 0.384),
    (0.992, 0.906, 0.145),
)
_MARK = (1.0, 0.0, 0.0)
_LEAST_RANGE = 1e-5  # of the cosines of a map: what differs by less is rounding


def principal_colors(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three principal components over all patches of all pictures, as red, green and blue.

    Args:
        patches: (n, N, D) with n N >= 3 and D >= 3.

    Returns:
        (n, 3, rows, columns) in [0, 1].
    """
    shares = component_shares(patches.flatten(0, 1))  # (n N, 3)
    return shares.unflatten(0, (len(patches), *grid)).permute(0, 3, 1, 2)


def component_shares(rows: Tensor) -> Tensor:
    """The first three principal components of rows (M, D), M and D at least 3, each from its least to its greatest.

    Returns:
        (M, 3) in [0, 1]; 0 where a run that has blown up gives no number.
    """
    rows = rows.double()
    rows = rows.where(rows.isfinite().all(), 0)  # of a run that has blown up: black, where `eigh` would raise
    rows = rows - rows.mean(0)
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)  # (D, 3), the strongest first
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # (1, 3)
    scores = rows @ (axes * largest.sign())  # (M, 3); the sign makes the colours the same from run to run
    low, high = (scores.quantile(share, dim=0) for share in (_CLIPPED, 1 - _CLIPPED))
    return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()


def middle_patch(grid: tuple[int, int]) -> int:
    """Number of the patch in the middle."""
    rows, columns = grid
    return rows // 2 * columns + columns // 2


def most_different_patch(patches: Tensor, patch_idx: int) -> Tensor:
    """Which patch (n,) of each picture makes the widest angle with that of this number; `patches` are (n, N, D)."""
    return _cosine(patches, torch.full((len(patches),), patch_idx, device=patches.device)).argmin(1)


def similarity_maps(patches: Tensor, grid: tuple[int, int], patch_idx: Tensor | None = None) -> Tensor:
    """Cosine of the angle between one patch, which is marked in red, and each other one.

    Each map has a scale of its own, or those of encoders whose patches are all alike would be of one color: violet is
    the lowest cosine in it, yellow the highest. `similarity_ranges` says which these are.

    Args:
        patches: (n, N, D) with N = rows x columns.
        patch_idx: (n,) the patch of each picture; None: the one in the middle.

    Returns:
        (n, 3, rows, columns) in [0, 1].
    """
    if patch_idx is None:
        patch_idx = torch.full((len(patches),), middle_patch(grid), device=patches.device)
    return similarity_colors(patches, patch_idx).unflatten(1, grid).permute(0, 3, 1, 2)


def similarity_colors(tokens: Tensor, token_idx: Tensor) -> Tensor:
    """The same of tokens (n, N, D) that lie anywhere, for one of each sample (n,): (n, N, 3) in [0, 1]."""
    cosines, ranges = _cosine(tokens, token_idx), similarity_ranges(tokens, token_idx)
    low, high = ranges[:, :1], ranges[:, 1:]
    share = ((cosines - low) / (high - low).clamp_min(_LEAST_RANGE)).clamp(0, 1)
    place = share * (len(_HEAT) - 1)  # (n, N), along the colours
    below = place.floor().clamp_max(len(_HEAT) - 2)
    colours = torch.tensor(_HEAT, device=tokens.device)
    maps = torch.lerp(colours[below.long()], colours[below.long() + 1], (place - below)[..., None])  # (n, N, 3)
    maps[torch.arange(len(maps)), token_idx] = torch.tensor(_MARK, device=tokens.device)
    return maps


def similarity_ranges(tokens: Tensor, token_idx: Tensor) -> Tensor:
    """The lowest and the highest cosine (n, 2) between one token of each sample (n,) and its others; 1 of none."""
    cosines = _cosine(tokens, token_idx)
    if cosines.shape[1] == 1:
        return torch.ones(len(cosines), 2, device=cosines.device)
    is_other = torch.ones_like(cosines, dtype=torch.bool)
    is_other[torch.arange(len(cosines)), token_idx] = False
    others = cosines[is_other].unflatten(0, (len(cosines), -1))  # (n, N - 1)
    return torch.stack((others.amin(1), others.amax(1)), 1)


def attention_maps(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the heads (n, H, N), as bright as the greatest of each picture: (n, 3, rows, columns) in [0, 1]."""
    mean = attention.float().mean(1)  # (n, N)
    bright = mean / mean.amax(1, keepdim=True)
    return bright.unflatten(1, grid).unsqueeze(1).expand(-1, 3, -1, -1)


def _cosine(patches: Tensor, patch_idx: Tensor) -> Tensor:
    """(n, N) of patch `patch_idx` (n,) of each picture with all; 0 where a run that has blown up gives no number."""
    unit = functional.normalize(patches.float(), dim=-1)  # (n, N, D)
    chosen = unit[torch.arange(len(unit)), patch_idx]  # (n, D)
    return (unit @ chosen[..., None])[..., 0].nan_to_num(0.0, 0.0, 0.0)
