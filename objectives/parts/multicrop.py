"""The crops of DINO and SelfPatch: two global views and several small local ones, each in its own colours.

M. Caron et al., 2021, arXiv:2104.14294, section 3.1; augmentations of BYOL (arXiv:2006.07733) with multi-crop (SwAV,
arXiv:2006.09882). NOT here: cutting and colouring them (`data_pipelines.views`,
`data_pipelines.views.photometric`).

Legend: B batch, L local views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backbones.images.base import ImageEncoder
from objectives.errors import ObjectiveError
from objectives.parts.photometric import FIRST, FURTHER, SECOND, photometric, require_colors
from objectives.parts.settings import MultiCropConfig
from objectives.requirements import require_sizes

__all__ = ["GLOBAL_VIEWS", "crops_of", "local_size", "multi_crop_views", "require_crops"]

GLOBAL_VIEWS = ("global_1", "global_2")
_LOCAL_VIEW = "local"
_LOCAL_SHARE = 3 / 7  # the paper's 96 of 224 pixels
_PHOTOMETRIC = {"global_1": FIRST, "global_2": SECOND, "local": FURTHER}


def local_size(backbone: ImageEncoder, config: MultiCropConfig) -> int:
    """Side of a local crop in pixels."""
    patch = backbone.patch_size
    return config.local_size or max(1, round(backbone.image_size * _LOCAL_SHARE / patch)) * patch


def require_crops(backbone: ImageEncoder, config: MultiCropConfig, min_patches: int = 1) -> None:
    """Refuses crops that the backbone cannot take.

    Args:
        min_patches: patches that a side of each crop must have.

    Raises:
        ObjectiveError: a size is no whole number of patches, too small, or not for this backbone; or colours are to be
            changed and the images have none.
    """
    patch = backbone.patch_size
    sizes = [backbone.image_size, *([local_size(backbone, config)] if config.num_local else [])]
    if sizes[-1] % patch:
        raise ObjectiveError(
            f"objective.local_size {sizes[-1]} is not a multiple of the backbone's patch of {patch} pixels"
        )
    if min(sizes) < min_patches * patch:
        raise ObjectiveError(
            f"a crop of {min(sizes)} pixels has fewer than {min_patches} x {min_patches} patches of {patch} pixels; "
            "use a larger objective.local_size or a smaller backbone.patch_size"
        )
    require_sizes(backbone, config.name, *sizes)
    require_colors(config, backbone)


def multi_crop_views(backbone: ImageEncoder, config: MultiCropConfig) -> list[dict[str, Any]]:
    """The views "global_1" and "global_2", and "local" unless there are none."""
    views = {name: {"size": backbone.image_size, "scale": tuple(config.global_scale)} for name in GLOBAL_VIEWS}
    if config.num_local:
        scale, size = tuple(config.local_scale), local_size(backbone, config)
        views[_LOCAL_VIEW] = {"size": size, "count": config.num_local, "scale": scale}
    return [
        {"name": name, **view, "hflip": config.hflip, **photometric(config, _PHOTOMETRIC[name])}
        for name, view in views.items()
    ]


def crops_of(batch: dict[str, Tensor]) -> list[Tensor]:
    """A batch's crops by resolution, view by view: globals (2 B, C, H, W) and, if there are any, locals (L B, C, h, w).

    One tensor per resolution is one pass through a network.
    """
    crops = [torch.cat([batch[name] for name in GLOBAL_VIEWS])]
    if _LOCAL_VIEW in batch:
        crops.append(batch[_LOCAL_VIEW].flatten(0, 1))
    return crops
