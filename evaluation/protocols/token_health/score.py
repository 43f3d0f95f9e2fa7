"""What patch tokens look like, without labels: alarms for dense tasks that pooled scores do not show.

Two things go wrong with patch tokens while classification still improves. They become alike, which is called
over-smoothing and is why dense tasks get worse late in training; and some of them, in the background, grow to many
times the length of the others and no longer say what is at their place (Darcet et al. 2023, arXiv:2309.16588). Lengths
are those of the token stream before the final norm, which would make them equal. Prefix tokens (CLS, registers) are no
patches. Measured on the test images; nothing is fitted.

Legend: B batch, n images, L layers, P prefix tokens, N patch tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Taken
from evaluation.extraction.frozen import Frozen
from evaluation.metrics import Outcome, jackknife
from evaluation.protocol import EvaluationError

__all__ = ["cls_cosine", "outlier_threshold", "pair_cosine", "score"]

MAD_TO_DEVIATION = 1.4826  # of normally distributed numbers
LEAST_EXCESS = 0.01  # of the median: where all lengths are equal but for rounding nothing is an outlier


def score(
    train: Frozen, test: Frozen, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Runs the encoder over the test images; `train`, labels and `seed` decide nothing.

    Raises:
        EvaluationError: the layers of the encoder cannot be read, or images have fewer than 2 patches.
    """
    encoder: Any = test.encoder
    if not encoder.num_layers:
        raise EvaluationError(f"token_health reads the layers of plain ViTs; backbone {encoder.spec['name']!r} is none")
    num_prefix, has_cls = encoder.num_prefix_tokens, encoder.has_cls

    def take(batch: Tensor, _: range) -> Taken:
        features = encoder.features(encoder.preprocess(batch), layers=range(1, encoder.num_layers + 1))
        streams = [stream.float() for stream in features.levels]  # L of (B, P + N, D)
        if streams[0].shape[1] - num_prefix < 2:
            raise EvaluationError("token_health needs images of at least 2 patches; give a larger image_size")
        lengths = [stream[:, num_prefix:].norm(dim=-1) for stream in streams]  # L of (B, N)
        taken = {
            "cosine": pair_cosine(features.tokens.float()),  # (B,)
            "cosine_by_layer": torch.stack(
                [pair_cosine(stream[:, num_prefix:]) for stream in streams], dim=1
            ),  # (B, L)
            "longest_by_layer": torch.stack([length.amax(dim=1) for length in lengths], dim=1),
            "median_by_layer": torch.stack([length.median(dim=1).values for length in lengths], dim=1),
            "lengths": lengths[-1],
        }
        if has_cls:
            taken["cls_cosine"] = cls_cosine(features.cls.float(), features.tokens.float())
            taken["cls_cosine_by_layer"] = torch.stack(
                [cls_cosine(stream[:, 0], stream[:, num_prefix:]) for stream in streams], dim=1
            )
        return taken

    found = test.measure(take)
    lengths = found["lengths"]
    threshold = outlier_threshold(lengths, params["deviations"])
    metrics = {
        "patch_cosine": float(found["cosine"].double().mean()),
        "outlier_share": float((lengths > threshold).double().mean()),
        "max_over_median": float(lengths.max()) / max(_median(lengths), 1e-12),
    }
    if has_cls:
        metrics["cls_patch_cosine"] = float(found["cls_cosine"].double().mean())
    counts = torch.stack((found["cosine"].double(), torch.ones(len(test), dtype=torch.float64)), dim=1)  # (n, 2)
    if (interval := jackknife(counts, lambda sums: sums[..., 0] / sums[..., 1])) is not None:
        value, margin = interval
        metrics |= {"patch_cosine_ci_low": value - margin, "patch_cosine_ci_high": value + margin}
    means = {name: found[name].double().mean(dim=0).tolist() for name in found if name.endswith("cosine_by_layer")}
    return Outcome(
        metrics=metrics,
        details={
            "outlier_threshold": threshold,
            **{name.replace("cosine", "patch_cosine"): values for name, values in means.items()},
            "longest_by_layer": found["longest_by_layer"].amax(dim=0).tolist(),
            "median_length_by_layer": found["median_by_layer"].median(dim=0).values.tolist(),
        },
        per_sample=found["cosine"],
    )


def pair_cosine(tokens: Tensor) -> Tensor:
    """Mean cosine (B,) over all pairs of different tokens (B, N, D) of an image.

    The sum over all pairs is the squared length of the sum of directions, of which each token with itself gives 1.
    """
    directions, num_tokens = F.normalize(tokens, dim=-1), tokens.shape[1]
    return (directions.sum(dim=1).square().sum(dim=-1) - num_tokens) / (num_tokens * (num_tokens - 1))


def cls_cosine(cls: Tensor, tokens: Tensor) -> Tensor:
    """Mean cosine (B,) of the class token (B, D) with the patches (B, N, D) of its image."""
    return F.cosine_similarity(cls[:, None], tokens, dim=-1).mean(dim=1)


def outlier_threshold(lengths: Tensor, deviations: float) -> float:
    """Above which a length is an outlier among all: median + so many deviations, estimated from the median distance."""
    median = _median(lengths)
    deviation = MAD_TO_DEVIATION * _median((lengths - median).abs())
    return median + max(deviations * deviation, LEAST_EXCESS * median)


def _median(values: Tensor) -> float:
    """With the mean of both middle ones, as usual."""
    return float(np.median(values.numpy()))
