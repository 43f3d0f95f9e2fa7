"""What every encoder is, whatever it encodes: the contract that knows no modality.

Checkpoints, export, loading and extraction of features rely on nothing else. A kind of input ("image", "points", ...)
has a subclass that adds what its objectives need, such as `backbones.images.base.ImageEncoder`; a plug-in registers one
of its own, see `backbones.registry`. NOT here: lookup by kind and name (`backbones.registry`), files (`backbones.io`).

Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from backbones.errors import BackboneError
from backbones.features import Features

__all__ = ["Encoder", "Normalization"]


class Normalization(NamedTuple):
    """How an encoder brings what a view shows to a mean of about 0 and a deviation of about 1.

    Attributes:
        apply: Of a batch (B, C, ...) as the view gives it.
        settings: Of the backbone, that decide it.
    """

    apply: Callable[[Tensor], Tensor]
    settings: tuple[str, ...]


class Encoder(nn.Module, ABC):
    """A network from a batch of samples to `Features`.

    A subclass for a kind of its own is built as `Class(config)` from an instance of `Config`.

    Attributes:
        kind: what it encodes; a recipe chooses it with `backbone.kind`.
        Config: dataclass of its settings, with `kind` and `name` among them; what a recipe may set below `backbone:`.
        spec: plain JSON-able dict from which `backbones.registry.from_spec` builds the same architecture.
        embed_dim: D.
        has_cls: `Features.cls` is a token.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    spec: dict[str, Any]
    embed_dim: int
    has_cls: bool = False

    def __init__(self, config: Any = None) -> None:
        """`config`, an instance of `Config`, becomes the spec; a subclass that is given none sets `spec` itself."""
        super().__init__()
        if is_dataclass(config) and not isinstance(config, type):
            settings = asdict(config)
            library = f"{type(self).__module__}:{type(self).__qualname__}"
            self.spec = {"kind": self.kind, "library": library, "name": settings["name"], "settings": settings}

    @abstractmethod
    def tokens(self, batch: Any) -> Features:
        """Features of a batch as data pipelines give it, before any normalization.

        Args:
            batch: what a view of this kind holds: of images the uint8 tensor (B, C, H, W), of point clouds the float
                tensor (B, N, 3 + F), of volumes the tensor (B, C, X, Y, Z), of arrays the float tensor.
        """

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """How many tokens a sample of a batch has, along each axis where they lie on a grid.

        Args:
            shape: of one sample of what `tokens` takes, without B.

        Returns:
            None where it is not known without a sample, which is the default.

        Raises:
            BackboneError: the encoder does not take samples of this shape.
        """
        return None

    def channels_of(self, kind: str) -> int:
        """Channels that it takes of what views of a kind show ("image", "volume"): `in_chans`, where it has that."""
        return int(getattr(self, "in_chans", 1))

    def normalization(self, kind: str) -> Normalization | None:
        """Of what views of a kind show ("image", "volume"); None where there is none, which is the default."""
        return None

    @property
    def network(self) -> nn.Module:
        """The module whose state dict is exported: the encoder itself, unless it wraps one of another library."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the output."""
        return next(self.network.parameters()).dtype

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter of `network`: 0 for the stem, then by layer, a final norm with the last.

        Raises:
            BackboneError: the encoder does not say, which is the default.
        """
        raise BackboneError(
            f"backbone {self.spec['name']!r} does not say which layers it has; set optimizer.layer_decay=1"
        )

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of `network`, by its own names: what is exported."""
        return dict(self.network.state_dict())

    def fitted(self, name: str, tensor: Tensor) -> Tensor | None:
        """A weight of another encoder brought to the shape that `name` has here.

        Args:
            name: one of the names of `weights()`.
            tensor: of another shape than the weight of that name.

        Returns:
            A tensor of that shape, for example positions resampled to the grid of this encoder; None where there is no
            meaningful one, which is the default.
        """
        return None
