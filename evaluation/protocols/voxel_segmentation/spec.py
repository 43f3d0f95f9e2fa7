"""The facts of linear segmentation of volumes; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="voxel_segmentation",
    summary="whitening and one linear layer on frozen tokens (of all stages), logits upsampled to the voxels",
    target="evaluation.protocols.voxel_segmentation.score:score",
    version=3,
    tokens="patches",
    label="seg.npy",
    metrics=(
        Metric("dice", headline=True),
        Metric("dice_ci_low", better=None),
        Metric("dice_ci_high", better=None),
        Metric("dice_per_volume"),  # mean over volumes of the mean over classes within each
        Metric("miou"),
        Metric("val_dice"),
        Metric("dice_position_prior", better=None),  # per-voxel majority of the training labels
    ),
    params=MappingProxyType(
        {
            "lrs": (3e-2, 1e-1, 3e-1, 1.0, 3.0),
            "weight_decay": 1e-3,
            "betas": (0.9, 0.999),
            "batch_size": 8,
            "min_steps": 300,
            "epochs": 8,
            "warmup": 0.05,
            "voxels_per_volume": 16384,  # label voxels drawn once per training volume
            "voxels_per_step": 2048,  # of these, per volume and step
            "folds": 3,
            "holdout_from": 2000,
        }
    ),
)
