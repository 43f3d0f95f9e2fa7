"""The facts of linear depth; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="depth",
    summary="standardisation and one linear layer on frozen patch tokens, to 256 bins of distance",
    target="evaluation.protocols.depth.score:score",
    version=1,
    tokens="patches",
    label="depth.png",
    metrics=(
        Metric("rmse", "m", better="lower", headline=True),
        Metric("rmse_ci_low", "m", better=None),
        Metric("rmse_ci_high", "m", better=None),
        Metric("abs_rel", better="lower"),
        Metric("delta1"),  # share of pixels that are wrong by a factor of less than 1.25
        Metric("val_rmse", "m", better="lower"),
        # Of the mean distance of each pixel over the training images, the same for every backbone.
        Metric("rmse_position_prior", "m", better=None),
        Metric("abs_rel_position_prior", better=None),
        Metric("delta1_position_prior", better=None),
    ),
    params=MappingProxyType(
        {
            "min_m": 0.001,
            "max_m": (10.0, 80.0),  # the first that all but `far_share` of the training distances are below
            "far_share": 0.01,
            "num_bins": 256,
            "lrs": (3e-3, 1e-2, 3e-2, 1e-1),
            "weight_decay": 1e-4,
            "betas": (0.9, 0.99),
            "init_std": 0.01,
            "batch_size": 8,
            "min_steps": 240,
            "epochs": 8,
            "warmup": 0.05,
            "level_first": 0.05,  # share of the steps whose loss is of the level of all distances alone
            "pixels_per_image": 4096,  # drawn once per training image
            "pixels_per_step": 1024,  # of these, per image and step
            "folds": 3,
            "holdout_from": 2000,
        }
    ),
    usual_for=(),
)
