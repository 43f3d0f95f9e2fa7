"""What an objective needs of a backbone beyond its interface, refused at construction in one line.

NOT here: which backbone can do what (`backbones.images.base`).
"""

from __future__ import annotations

from backbones.errors import BackboneError
from backbones.images.base import Backbone
from objectives.errors import ObjectiveError

__all__ = ["require", "require_sizes"]

# Flag of a backbone -> what it stands for, after "needs".
_CAPABILITIES = {
    "can_drop_patches": "a backbone that can leave patches out (a plain ViT)",
    "has_cls": "a backbone with a class token",
    "has_plain_blocks": "the outputs of the blocks of a plain ViT",
}


def require(backbone: Backbone, objective: str, *capabilities: str) -> None:
    """Refuses a backbone that lacks one of `capabilities`, which are flags of `backbones.images.base.Backbone`.

    Raises:
        ObjectiveError: naming the objective, what it needs, and the backbone.
    """
    for capability in capabilities:
        if not getattr(backbone, capability):
            raise ObjectiveError(
                f"objective {objective!r} needs {_CAPABILITIES[capability]}, which {backbone.spec['name']!r} is not "
                "or has not; use for example vit_tiny_patch16_224"
            )


def require_sizes(backbone: Backbone, objective: str, *sizes: int) -> None:
    """Refuses a backbone that cannot take square images of one of `sizes` (pixels per side).

    Raises:
        ObjectiveError: naming the objective, the size, and the backbone's reason.
    """
    for size in sizes:
        try:
            backbone.grid_at(size, size)
        except BackboneError as error:
            raise ObjectiveError(f"objective {objective!r} needs images of {size} px: {error}") from error
