"""Linear classifiers on patch tokens whose pooling is trained with them: what `attentive` and `ggem` share.

Tokens are standardised channel by channel by those of all training images. A probe is a pooling and a softmax layer,
trained by AdamW with a cosine to zero. There is one for each learning rate and each fold that is left out, and
all are trained side by side, so that each batch is read once. The learning rate is chosen on training images only; the
reported probe has that one and was trained on all of them.

Legend: n images, B batch, N patch tokens, D width, E pooled width, C classes, G learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome, top1_metrics, top_k_accuracy
from evaluation.pooling import STD_FLOOR
from evaluation.protocol import EvaluationError
from evaluation.protocols.linear.score import batch_rows
from evaluation.selection import NEVER_HELD_OUT, by_setting, choose_cell, hold_out, how_held_out, stratified_folds

__all__ = ["Pooling", "num_groups", "probed"]

CHUNK = 256  # images of which tokens are in memory at a time

Parameters = dict[str, Tensor]
Patches = npt.NDArray[np.float16]  # (n, rows, cols, D)


class Pooling(Protocol):
    """How tokens become one vector."""

    @property
    def rates(self) -> Mapping[str, float]:
        """Of parameters that learn so many times as fast as others, and without weight decay, by name."""

    def start(self, dim: int, generator: torch.Generator) -> tuple[Parameters, int]:
        """Parameters at first, by name, and E."""

    def __call__(self, tokens: Tensor, parameters: Parameters) -> Tensor:
        """(B, E) of standardised tokens (B, N, D)."""


def num_groups(dim: int) -> int:
    """How many heads, or groups of channels, tokens of this width have: of 64 channels each, as ViTs have them."""
    return max(groups for groups in range(1, max(1, dim // 64) + 1) if dim % groups == 0)


def probed(
    train: Dense[Tensor],
    test: Dense[Tensor],
    pooling: Pooling,
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> tuple[Outcome, Parameters]:
    """Trains and tests; see the module for what is chosen on what. Also the parameters of the reported probe.

    Raises:
        EvaluationError: there are fewer than 2 training images.
    """
    if len(train.labels) < 2:
        raise EvaluationError(f"a probe of tokens needs at least 2 training images, got {len(train.labels)}")
    lrs = params["lrs"]
    fold = stratified_folds(train.labels, num_folds=params["folds"], seed=seed)  # (n,)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    is_val = fold != NEVER_HELD_OUT
    tokens = _Tokens.of(train.patches, device)
    probes = _fit(tokens, train, pooling, fold, num_folds, num_classes=num_classes, params=params, seed=seed)
    hits, loss = torch.zeros(len(lrs), dtype=torch.int64), torch.zeros(len(lrs), dtype=torch.float64)
    for cell in range(len(lrs)):
        for held_out in range(num_folds):
            rows = (fold == held_out).nonzero().flatten()
            logits, truth = _logits(tokens, train.patches, rows, pooling, probes[cell][held_out]), train.labels[rows]
            hits[cell] += (logits.argmax(1) == truth).sum()
            loss[cell] += F.cross_entropy(logits.double(), truth, reduction="sum")
    cell, at_edge = choose_cell(hits, loss)
    chosen = probes[cell][num_folds]
    logits = _logits(tokens, test.patches, torch.arange(len(test.labels)), pooling, chosen)
    predicted = logits.argmax(1)
    outcome = Outcome(
        metrics={
            **top1_metrics(predicted, test.labels, num_classes),
            "val_top1": float(hits[cell]) / int(is_val.sum()),
        },
        details={
            "lr": lrs[cell],
            "at_grid_edge": at_edge,
            "val_top1_by_lr": by_setting(lrs, hits, int(is_val.sum())),
            "selection": how_held_out(fold, num_folds),
            **({"top5": top_k_accuracy(logits, test.labels, 5)} if num_classes > 5 else {}),
        },
        per_sample=predicted == test.labels,
    )
    return outcome, chosen


@dataclass(frozen=True)
class _Tokens:
    """How tokens are read: standardised by all training tokens; constant channels become 0."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    @classmethod
    def of(cls, patches: Patches, device: torch.device) -> _Tokens:
        total = torch.zeros(2, patches.shape[-1], dtype=torch.float64, device=device)
        for rows in torch.arange(len(patches)).split(CHUNK):
            tokens = torch.from_numpy(patches[rows.numpy()]).to(device).double().flatten(0, -2)
            total += torch.stack((tokens.sum(dim=0), tokens.square().sum(dim=0)))
        mean, square = total / (patches.size / patches.shape[-1])
        std = (square - mean.square()).clamp(min=0).sqrt()
        return cls(mean.float(), torch.where(std > STD_FLOOR, 1 / std.clamp(min=STD_FLOOR), 0).float())

    def read(self, patches: Patches, rows: Tensor) -> Tensor:
        """(B, N, D) float32 of these images."""
        tokens = torch.from_numpy(patches[rows.numpy()]).to(self.mean.device).float().flatten(1, -2)
        return (tokens - self.mean) * self.scale


def _fit(
    tokens: _Tokens,
    train: Dense[Tensor],
    pooling: Pooling,
    fold: Tensor,
    num_folds: int,
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
) -> list[list[Parameters]]:
    """Trained parameters for each learning rate and each fold left out, the last of which left nothing out."""
    device, num_rows = tokens.mean.device, len(train.labels)
    start, width = pooling.start(train.patches.shape[-1], torch.Generator().manual_seed(seed))
    start |= {"weight": torch.zeros(width, num_classes), "bias": torch.zeros(num_classes)}
    probes = [
        [
            {name: value.to(device).clone().requires_grad_() for name, value in start.items()}
            for _ in range(num_folds + 1)
        ]
        for _ in params["lrs"]
    ]
    groups = [
        {
            "params": [probe[name]],
            "base_lr": lr * pooling.rates.get(name, 1.0),
            "weight_decay": 0.0 if name in pooling.rates or name == "bias" else params["weight_decay"],
        }
        for lr, row in zip(params["lrs"], probes, strict=True)
        for probe in row
        for name in probe
    ]
    descent = torch.optim.AdamW(groups, lr=0.0)
    batch_size = min(params["batch_size"], num_rows)
    steps = max(params["min_steps"], params["epochs"] * (num_rows // batch_size))
    for step, rows in enumerate(batch_rows(num_rows, batch_size, steps, seed)):
        for group in descent.param_groups:
            group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, y = tokens.read(train.patches, rows), train.labels[rows].to(device)
        descent.zero_grad()
        for row in probes:
            for left_out, probe in enumerate(row):  # a fold of the last one is nobody's
                is_used = (fold[rows] != left_out).to(device)
                if is_used.any():
                    F.cross_entropy(_scores(x[is_used], pooling, probe), y[is_used]).backward()
        descent.step()
    return [[{name: value.detach() for name, value in probe.items()} for probe in row] for row in probes]


def _scores(x: Tensor, pooling: Pooling, probe: Parameters) -> Tensor:
    """(B, C) of standardised tokens (B, N, D)."""
    return pooling(x, probe) @ probe["weight"] + probe["bias"]


def _logits(tokens: _Tokens, patches: Patches, rows: Tensor, pooling: Pooling, probe: Parameters) -> Tensor:
    """Scores (n, C) of these images, on the CPU."""

    def parts() -> Iterator[Tensor]:
        for some in rows.split(CHUNK):
            yield _scores(tokens.read(patches, some), pooling, probe).cpu()

    with torch.no_grad():
        return torch.cat(list(parts()))
