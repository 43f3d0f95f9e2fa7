"""Color changes and blur of crops: the table that two-view objectives share, and what it needs of the images.

BYOL's augmentations (Grill et al. 2020, arXiv:2006.07733, appendix B) with the numbers of DINO and SiT. NOT here:
applying them (`data_pipelines.views.photometric`).
"""

from __future__ import annotations

from backbones.images.base import ImageEncoder
from objectives.errors import ObjectiveError
from objectives.parts.settings import AugmentationConfig

__all__ = ["FIRST", "FURTHER", "SECOND", "photometric", "require_colors"]

_JITTER = {"jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gray_p": 0.2}
# The second view is rarely blurred and sometimes solarized, so that no two have the same statistics.
FIRST = _JITTER | {"blur_p": 1.0}
SECOND = _JITTER | {"blur_p": 0.1, "solarize_p": 0.2}
FURTHER = _JITTER | {"blur_p": 0.5}


def photometric(config: AugmentationConfig, changes: dict[str, float]) -> dict[str, dict[str, float]]:
    """The entry "photometric" of a view with these changes, without blur if the settings say so; else no entry."""
    return {"photometric": changes | ({} if config.blur else {"blur_p": 0.0})} if config.photometric else {}


def require_colors(config: AugmentationConfig, backbone: ImageEncoder) -> None:
    """Refuse color changes of images that are not RGB.

    Raises:
        ObjectiveError: they are asked for.
    """
    if config.photometric and backbone.in_chans != 3:
        raise ObjectiveError(
            f"objective.photometric changes colors, and the backbone takes {backbone.in_chans} channels; "
            "set objective.photometric=false"
        )
