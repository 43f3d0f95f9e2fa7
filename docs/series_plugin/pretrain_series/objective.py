"""Predict hidden stretches of a series from the rest of it.

Legend: B batch, C channels, T points in time, N tokens, M hidden ones, p points of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.features import take_tokens
from objectives.base import Objective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.masking import random_mask, random_noise
from pretrain_series.encoder import SeriesEncoder

__all__ = ["MaskedSeries", "MaskedSeriesConfig"]


@dataclass
class MaskedSeriesConfig:
    """What a recipe may set below `objective:`."""

    name: str = "masked_series"
    mask_ratio: float = field(default=0.5, metadata={"range": (0.01, 0.99), "help": "share of the tokens hidden"})


class MaskedSeries(Objective):
    """Mean squared error of the hidden points."""

    Config: ClassVar[type] = MaskedSeriesConfig
    backbone: SeriesEncoder

    def __init__(self, backbone: SeriesEncoder, config: MaskedSeriesConfig) -> None:
        super().__init__()
        if backbone.kind != "series":
            raise ObjectiveError(
                f"objective {config.name!r} needs series; backbone {backbone.spec['name']!r} is of kind "
                f"{backbone.kind!r}: use backbone.kind=series"
            )
        self.config = config
        self.backbone = backbone
        self.predict = nn.Linear(backbone.embed_dim, backbone.in_chans * backbone.patch_size)

    def views(self) -> list[dict[str, Any]]:
        """The series as it is stored, "series"."""
        return [{"name": "series", "kind": "array", "field": "series.npy"}]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch with "series" (B, C, T) and "seed" (B,); `progress` is not used."""
        series = batch["series"]
        predicted, drop_idx = self._predict(series, batch["seed"])
        with torch.autocast(series.device.type, enabled=False):
            target = take_tokens(self._stretches(series), drop_idx)  # (B, M, C p)
            loss = (take_tokens(predicted, drop_idx).to(target.dtype) - target).square().mean()
            explained = 1 - loss.detach() / target.var(unbiased=False)
        return Output(loss, {"loss": loss.detach(), "explained": explained})

    def _predict(self, series: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """All stretches (B, N, C p) from a series (B, C, T) whose hidden ones (B, M) are 0."""
        num_tokens = series.shape[-1] // self.backbone.patch_size
        mask = random_mask(random_noise(seed, num_tokens), self.config.mask_ratio)
        hidden = mask.is_masked.repeat_interleave(self.backbone.patch_size, 1).unsqueeze(1)  # (B, 1, T)
        return self.predict(self.backbone.tokens(series.masked_fill(hidden, 0)).tokens), mask.drop_idx

    def _stretches(self, series: Tensor) -> Tensor:
        """(B, C, T) -> (B, N, C p)."""
        return series.unflatten(2, (-1, self.backbone.patch_size)).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 of what is there and what is predicted: a row of pixels per channel, its brightness the value."""
        series = batch["series"][:8]
        predicted, _ = self._predict(series, batch["seed"][:8])
        unfolded = predicted.unflatten(2, (self.backbone.in_chans, -1)).transpose(1, 2).flatten(2)  # (n, C, T)
        shown = {"series": series, "predicted": unfolded}
        return {caption: _rows(values.float()) for caption, values in shown.items()}


def _rows(values: Tensor) -> Tensor:
    """(n, C, T) to (n, 3, 8 C, T) in [0, 1]."""
    bright = (0.5 + values / 4).clamp(0, 1).repeat_interleave(8, 1)  # (n, 8 C, T)
    return bright.unsqueeze(1).expand(-1, 3, -1, -1)
