"""The facts of fine-tuning; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="finetune",
    summary="the whole encoder and a linear layer trained for a few epochs, deep layers faster than those below",
    target="evaluation.protocols.finetune.score:score",
    version=1,
    tokens="encoder",
    label="cls",
    kinds=("image",),
    usual_for=(),
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
    ),
    params=MappingProxyType(
        {
            "lr": 5e-4,  # of the layer on top; MAE's 2e-3 for batches of 1024, by the square root
            "batch_size": 64,
            "epochs": 10,
            "min_steps": 200,
            "warmup": 0.05,  # of the steps, as MAE's 5 of 100 epochs
            "layer_decay": 0.65,  # MAE's of ViT-B; .75 of larger ones
            "weight_decay": 0.05,
            "betas": (0.9, 0.999),
            "label_smoothing": 0.1,
        }
    ),
)
