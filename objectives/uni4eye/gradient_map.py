"""Where brightness changes: the mean of the absolute Sobel derivatives along the axes, of images and of volumes.

Uni4Eye (L. Cai et al., 2022, arXiv:2203.04614, section 2.2) predicts such maps beside images, since lesions are edges.
Each derivative is divided by what its kernel makes of a step from 0 to 1, so that a map of values in [0, 1] lies in
[0, 1] as well.

Legend: B batch, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["gradient_map"]

_SMOOTH = (0.25, 0.5, 0.25)
_DERIVE = (-0.5, 0.0, 0.5)  # of a step from 0 to 1 it makes 1/2 on either side, of a rise over two pixels 1


@torch.no_grad()
def gradient_map(values: Tensor) -> Tensor:
    """Of the mean of the channels, which goes on beyond its edges: (B, C, H, W) or (B, C, X, Y, Z) -> (B, 1, ...)."""
    brightness = values.mean(1, keepdim=True)  # (B, 1, ...)
    axes = range(2, brightness.ndim)
    derivatives = []
    for along in axes:
        slope = brightness
        for axis in axes:
            slope = _filtered(slope, _DERIVE if axis == along else _SMOOTH, axis)
        derivatives.append(2 * slope.abs())
    return torch.stack(derivatives).mean(0)


def _filtered(values: Tensor, weights: tuple[float, ...], axis: int) -> Tensor:
    """Correlation with three weights along an axis."""
    padding = [0] * (2 * (values.ndim - 2))
    at = 2 * (values.ndim - 1 - axis)
    padding[at] = padding[at + 1] = 1
    wide = functional.pad(values, padding, mode="replicate")
    before, here, behind = (wide.narrow(axis, start, values.shape[axis]) for start in range(3))
    return weights[0] * before + weights[1] * here + weights[2] * behind
