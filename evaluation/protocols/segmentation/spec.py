"""The facts of linear segmentation; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="segmentation",
    summary="standardisation and one linear layer on frozen patch tokens, logits upsampled to the label map",
    target="evaluation.protocols.segmentation.score:score",
    version=2,  # 2: the interval is a jackknife over images or blocks of frames; 1 was a bootstrap over images
    tokens="patches",
    label="seg.png",
    metrics=(
        Metric("miou", headline=True),
        Metric("miou_ci_low", better=None),
        Metric("miou_ci_high", better=None),
        Metric("pixel_accuracy"),
        Metric("val_miou"),
        Metric("miou_position_prior", better=None),  # of the labels alone, the same for every backbone
    ),
    params=MappingProxyType(
        {
            "lrs": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "weight_decay": 1e-3,
            "betas": (0.9, 0.999),
            "batch_size": 8,
            "min_steps": 200,
            "epochs": 8,
            "warmup": 0.05,
            "pixels_per_image": 4096,  # label pixels drawn once per training image
            "pixels_per_step": 1024,  # of these, per image and step
            "folds": 3,
            "holdout_from": 2000,
        }
    ),
)
