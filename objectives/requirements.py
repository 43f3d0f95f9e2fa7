"""What an objective needs of a backbone beyond its interface, refused at construction in one line.

NOT here: which backbone can do what (`backbones.images.base`).
"""

from __future__ import annotations

from typing import TypeVar

from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.images.base import ImageEncoder
from backbones.points.base import PointEncoder
from backbones.voxels.base import VoxelEncoder
from objectives.errors import ObjectiveError

__all__ = [
    "require",
    "require_kind",
    "require_mask_ratio",
    "require_sizes",
]

Kind = TypeVar("Kind", bound=Encoder)

# Kind of encoder -> what it encodes, and which settings choose one.
_KINDS: dict[type[Encoder], tuple[str, str]] = {
    ImageEncoder: ("images", "backbone.kind=image"),
    PointEncoder: ("point clouds", "backbone.kind=points backbone.name=point_transformer"),
    VoxelEncoder: ("voxels", "backbone.kind=voxels"),
}
# Flag of a backbone -> what an objective needs, and what is to be said of a backbone without it.
_CAPABILITIES = {
    "can_drop_patches": ("a backbone that can leave patches out", "cannot"),
    "has_cls": ("a class token", "has none"),
    "has_plain_blocks": ("the outputs of a plain ViT's blocks", "has no such blocks"),
}


def require_kind(backbone: Encoder, wanted: type[Kind], objective: str) -> Kind:
    """The backbone, if it encodes what an objective learns from.

    Args:
        backbone: any.
        wanted: `ImageEncoder`, `PointEncoder` or `VoxelEncoder`.
        objective: name, for the message.

    Raises:
        ObjectiveError: naming the objective, the backbone, and what it encodes.
    """
    if not isinstance(backbone, wanted):
        noun, remedy = _KINDS[wanted]
        raise ObjectiveError(
            f"objective {objective!r} needs {noun}; backbone {backbone.spec['name']!r} is of kind {backbone.kind!r}: "
            f"use {remedy}"
        )
    return backbone


def require(backbone: ImageEncoder, objective: str, *capabilities: str) -> None:
    """Refuses a backbone that lacks one of `capabilities`, which are flags of `backbones.images.base.ImageEncoder`.

    Raises:
        ObjectiveError: naming the objective, what it needs, and the backbone.
    """
    for capability in capabilities:
        if not getattr(backbone, capability):
            wanted, lack = _CAPABILITIES[capability]
            raise ObjectiveError(
                f"objective {objective!r} needs {wanted}; backbone {backbone.spec['name']!r} {lack}: use for example "
                "vit_tiny_patch16_224"
            )


def require_sizes(backbone: ImageEncoder, objective: str, *sizes: int) -> None:
    """Refuses a backbone that cannot take square images of one of `sizes` (pixels per side).

    Raises:
        ObjectiveError: naming the objective, the size, and the backbone's reason.
    """
    for size in sizes:
        try:
            backbone.grid_at(size, size)
        except BackboneError as error:
            raise ObjectiveError(f"objective {objective!r} needs images of {size} px: {error}") from error


def require_mask_ratio(mask_ratio: float, num_patches: int) -> None:
    """Refuses a share of masked patches that leaves none to see or none to predict.

    Raises:
        ObjectiveError: naming the share and the number of patches.
    """
    if not 0 < int(num_patches * (1 - mask_ratio)) < num_patches:
        raise ObjectiveError(
            f"objective.mask_ratio {mask_ratio} leaves nothing to see or to predict of {num_patches} patches; "
            "choose it between 0 and 1, or a smaller patch size"
        )
