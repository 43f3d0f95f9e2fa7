"""A frozen encoder that a student learns from, of any architecture: it is known when its weights are.

NOT here: what is learned from it (the objectives), where its weights come from (`teacher_from` of a recipe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from backbones.errors import BackboneError
from backbones.images.base import ImageEncoder
from backbones.registry import from_spec
from objectives.companions import Companion
from objectives.errors import ObjectiveError

__all__ = ["FrozenBackbone"]


class FrozenBackbone(Companion):
    """An image encoder in float32 and evaluation mode; training states refer to the file that its weights are in."""

    title = "frozen teacher"
    remedy = "name the model that the file is of: timm:NAME@FILE"

    def __init__(self, student: ImageEncoder, sizes: Sequence[int]) -> None:
        """Begins without a network, until it is outlined.

        Args:
            student: whose images it sees.
            sizes: of these images, pixels per side.
        """
        super().__init__(nn.Module(), filled="checkpoint", moves="frozen", saved="reference")
        self._in_chans, self._sizes = student.in_chans, tuple(sizes)

    @property
    def backbone(self) -> ImageEncoder:
        """The network.

        Raises:
            ObjectiveError: it has none yet.
        """
        if not isinstance(self.module, ImageEncoder):
            raise ObjectiveError("the frozen teacher has no weights yet: give them with teacher_from")
        return self.module

    def outline(self, spec: Mapping[str, Any]) -> None:
        """Become the encoder that `spec` describes.

        Raises:
            ObjectiveError: nothing tells which one, it is none of images, or does not take those of the student.
        """
        if "name" not in spec:
            raise ObjectiveError("nothing in the file says which model it is; a timm model is timm:NAME@FILE")
        try:
            encoder = from_spec(spec)
        except BackboneError as error:
            raise ObjectiveError(str(error)) from error
        if not isinstance(encoder, ImageEncoder):
            raise ObjectiveError(f"the teacher {spec['name']!r} is of kind {encoder.kind!r}, and encodes no images")
        if encoder.in_chans != self._in_chans:
            raise ObjectiveError(
                f"the teacher {spec['name']!r} sees {encoder.in_chans} channels, the student {self._in_chans}; set "
                f"backbone.in_chans={encoder.in_chans}"
            )
        for size in self._sizes:
            try:
                encoder.grid_at(size, size)
            except BackboneError as error:
                raise ObjectiveError(f"the teacher cannot take images of {size} px: {error}") from error
        self.module = encoder.requires_grad_(False).eval()
