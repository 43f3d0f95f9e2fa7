"""Small arrays as they are stored, of the same shape in every sample: a camera pose, say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data_pipelines.randomness import ViewRandom
from data_pipelines.views.base import ARRAY_FIELDS, ArrayReading, Reading, View

__all__ = ["ArrayView"]


@dataclass(frozen=True)
class ArrayView(View):
    """An array as stored.

    Attributes:
        name: entry of the batch.
        field: npy or npz to read.
        array: which array of an npz.
    """

    kind: ClassVar[str] = "array"

    field: str
    array: str | None = None

    def reads(self, fields: frozenset[str]) -> Reading:
        field = self.chosen_field(self.field, (), fields)
        self.require_suffix(field, ARRAY_FIELDS)
        return ArrayReading(field, self.array)

    def entries(self, content: Any, rng: ViewRandom, drawn: None) -> dict[str, Tensor]:
        return {self.name: torch.from_numpy(np.array(content))}

    def _check(self, where: str) -> None:
        """Any field may hold an array."""
