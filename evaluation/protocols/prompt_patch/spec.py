"""The facts of segmentation from one patch; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="prompt_patch",
    summary="patches of one region against those of others by cosine similarity; one patch as a prompt for its region",
    target="evaluation.protocols.prompt_patch.score:score",
    version=2,  # 2: iou_otsu
    tokens="patches",
    label="seg.png",
    metrics=(
        Metric("auroc", headline=True),  # of pairs of patches: the same region against different classes
        Metric("auroc_ci_low", better=None),
        Metric("auroc_ci_high", better=None),
        Metric("val_auroc"),  # of the training images that the threshold is chosen on
        Metric("intra", "", better=None),  # mean cosine of pairs of one region
        Metric("inter", "", better=None),  # mean cosine of pairs of different classes
        Metric("iou"),  # of prompted regions, by patches, at the chosen threshold
        Metric("iou_pixels"),  # the same by pixels
        Metric("iou_oracle"),  # by patches, at the best threshold of each region
        Metric("iou_otsu"),  # by patches, at Otsu's threshold of each prompt, which needs no training images
        Metric("val_iou"),
        Metric("auroc_position", better=None),  # of how near two patches are, the same for every backbone
    ),
    params=MappingProxyType(
        {
            "thresholds": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
            "least_patches": 4,  # of a region that is prompted
            "least_share": 0.5,  # of the pixels of a patch that belongs to a region
            "train_images": 500,  # at most, evenly spaced
        }
    ),
    usual_for=(),
)
