"""Centering and sharpening of a teacher's logits, which keep self-distillation from collapsing.

M. Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, arXiv:2104.14294, section 3.1:

    targets = softmax((logits - c) / temperature),    c <- m * c + (1 - m) * mean(logits)

Subtracting the center alone leads to the uniform distribution, a low temperature alone to a single prototype for
everything; together they balance.

Legend: K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from objectives.distributed import mean_over_ranks

__all__ = ["Center"]


class Center(nn.Module):
    """Running mean of a teacher's logits, as a float32 buffer `value` (K,).

    `observe` belongs into an objective's forward and changes no state; `update` belongs into its `after_step`. What was
    observed for a step that is never applied is forgotten with the first observation for another step.
    """

    value: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_prototypes))
        self._step = -1  # the step that was observed last
        self._sum = torch.zeros(0)  # sum of this step's logits (K), then the number of rows: (K + 1,)

    def targets(self, logits: Tensor, temperature: float) -> Tensor:
        """Distributions over prototypes, (..., K) -> (..., K), at least float32."""
        return ((logits.to(self.value.dtype) - self.value) / temperature).softmax(-1)

    @torch.no_grad()
    def observe(self, logits: Tensor, step: int) -> None:
        """Adds logits (..., K) to what the center will move towards after `step`."""
        rows = logits.flatten(0, -2)  # (n, K)
        total = rows.sum(0, dtype=self.value.dtype)
        seen = functional.pad(total, (0, 1), value=len(rows))  # (K + 1,), without a copy from the host
        self._sum = seen if step != self._step else self._sum + seen
        self._step = step

    @torch.no_grad()
    def update(self) -> None:
        """Moves towards the mean of what all ranks have observed in the step. A collective."""
        total = mean_over_ranks(self._sum)
        self.value.lerp_(total[:-1] / total[-1], 1 - self.momentum)
        self._step = -1
