"""The facts of the reconstruction of hidden blocks; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="masked_reconstruction",
    summary="three quarters of the blocks of held-out volumes hidden, and filled in by the checkpoint's own decoder",
    target="evaluation.protocols.masked_reconstruction.score:score",
    version=1,
    tokens="decoded",
    label=None,
    metrics=(
        Metric("psnr", "dB", headline=True),  # of hidden voxels; of radiance grids, of the colors of occupied ones
        Metric("psnr_ci_low", "dB", better=None),
        Metric("psnr_ci_high", "dB", better=None),
        Metric("val_psnr", "dB"),  # of the samples that choose, every other one
        Metric("psnr_constant", "dB", better=None),  # of the best constant, chosen on the very voxels that are scored
        Metric("psnr_neighbors", "dB", better=None),  # of the mean of what is visible of the adjacent blocks
        # Of radiance grids alone: mean squared errors of alpha, of hidden voxels inside the grids.
        Metric("alpha_error", "", better="lower"),
        Metric("alpha_error_ci_low", "", better=None),
        Metric("alpha_error_ci_high", "", better=None),
        Metric("val_alpha_error", "", better="lower"),
        Metric("alpha_error_constant", "", better=None),
        Metric("alpha_error_neighbors", "", better=None),
        Metric("alpha_error_occupied", "", better="lower"),
        Metric("alpha_error_empty", "", better="lower"),
    ),
    params=MappingProxyType({"occupied_alpha": 0.01}),
)
