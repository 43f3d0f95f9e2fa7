"""Samples and a frozen encoder, for protocols that look inside it or change what it is given.

Not here: features that are taken once for all protocols (`evaluation.extraction.forward`), which are to be preferred
where they are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from data_pipelines.errors import DataError
from evaluation.data import DepthMaps, LabelMaps
from evaluation.extraction.forward import Samples, Taken, measured, moved
from evaluation.extraction.recipe import Extraction
from evaluation.protocol import EvaluationError
from evaluation.threads import Threads

if TYPE_CHECKING:  # timm takes seconds to import
    from backbones.encoder import Encoder

__all__ = ["Frozen"]


@dataclass(frozen=True)
class Frozen:
    """One split that the encoder has not been run over yet.

    Attributes:
        samples: In their order.
        encoder: On `device`, in evaluation mode.
        labels: Class indices (n,) int64, zeros for a protocol without labels; or maps at their own size.
        recipe: As `feature_recipe` makes it, of "encoder".
    """

    samples: Samples
    encoder: Encoder
    labels: LabelMaps | DepthMaps | Tensor
    extraction: Extraction
    recipe: Mapping[str, Any]
    batch_size: int
    device: torch.device
    threads: Threads

    def __len__(self) -> int:
        return self.samples.num_samples

    def measure(self, take: Callable[[Any, range], Taken]) -> Taken:
        """What `take` makes of all samples, (n, ...) by name, on the CPU.

        Args:
            take: called as `take(batch, numbers)` in inference mode, with what `Encoder.tokens` takes, on `device`, and
                the numbers of its samples. Several may run at once, in threads. It answers with (B, ...) by name.

        Raises:
            EvaluationError: what it says is not finite; names the sample.
            DataError: a sample cannot be read or decoded; names it.
        """
        return measured(
            self.samples,
            self.extraction,
            self.recipe,
            take,
            batch_size=self.batch_size,
            device=self.device,
            threads=self.threads,
        )

    def batch(self, numbers: Sequence[int]) -> Any:
        """What `Encoder.tokens` takes of these samples, in this order, on `device`.

        Raises:
            EvaluationError, DataError: a sample cannot be read or decoded; names it.
        """
        field, prepared = self.samples.require_field(*self.extraction.inputs), []
        for number in numbers:
            try:
                prepared.append(self.extraction.prepare(self.samples.read(number)[field], self.recipe))
            except (DataError, EvaluationError) as error:
                raise type(error)(f"{self.samples.where(number)}: {error}") from error
        return moved(default_collate(prepared), self.device)
