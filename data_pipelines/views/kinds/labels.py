"""Class indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data_pipelines.decode import decode_label
from data_pipelines.randomness import ViewRandom
from data_pipelines.views.base import Decoding, Reading, View

__all__ = ["LabelView"]


@dataclass(frozen=True)
class LabelReading(Reading):
    """ASCII digits."""

    def decode(self, data: bytes, decoding: Decoding) -> int:
        return decode_label(data)


@dataclass(frozen=True)
class LabelView(View):
    """A class index, int64: `name` is the entry of the batch, `field` holds ASCII digits (`cls` unless given)."""

    kind: ClassVar[str] = "label"

    field: str | None = None

    def reads(self, fields: frozenset[str]) -> Reading:
        return LabelReading(self.chosen_field(self.field, ("cls",), fields))

    def entries(self, content: int, rng: ViewRandom, drawn: None) -> dict[str, Tensor]:
        return {self.name: torch.tensor(content)}

    def _check(self, where: str) -> None:
        """Any field may hold a label."""
