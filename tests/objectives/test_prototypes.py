"""DINO's head against the values of its authors' later code, whose weight norm with gain 1 is the same function."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from objectives.parts.prototypes import DINOHead

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dino.json").read_text())


def wave(shape: Sequence[int], a: float, c: float, scale: float) -> Tensor:
    """The numbers that the golden file describes, computed in float64 and cast to float32."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy((scale * np.sin(a * i + c * i * i)).reshape(tuple(shape)).astype(np.float32))


def test_dino_head__golden_values() -> None:
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8)
    ours = {"last_layer.weight": "prototypes"}
    with torch.no_grad():
        for number, name, shape in GOLDEN["parameters"]:
            scale = 0.3 if name.endswith("weight") else 0.05
            values = wave(shape, 0.31 + 0.1 * number, 0.0119 + 0.001 * number, scale)
            head.get_parameter(ours.get(name, name)).copy_(values)
        found = head(wave([5, 12], 0.77, 0.0143, 1.0))  # (5, 20)
    expected = GOLDEN["head"]
    torch.testing.assert_close(found[0], torch.tensor(expected["y_row0"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.square().sum(), torch.tensor(expected["y_sum_squares"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.abs().max(), torch.tensor(expected["max_abs_logit"]), rtol=1e-5, atol=0)
