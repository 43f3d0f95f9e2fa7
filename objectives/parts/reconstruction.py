"""What GMML and SiT share: a head from patch tokens to pixels, the error of the masked ones, and pictures of both.

S. Atito et al., 2022, arXiv:2205.14986. NOT here: which pixels are masked (`objectives.parts.block_corruption`).

Legend: n images, C channels, S side in pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backbones.features import Features
from backbones.images.base import Backbone
from objectives.base import Progress
from objectives.configs import CorruptionConfig
from objectives.distributed import mean_over_ranks
from objectives.errors import ObjectiveError
from objectives.health import effective_rank, patch_cosine
from objectives.parts.block_corruption import BlockCorruption, Corruption

__all__ = [
    "MAX_PICTURES",
    "ReconstructionHead",
    "block_corruption",
    "colours",
    "feature_metrics",
    "initialise_class_token",
    "initialise_linear",
    "masked_l1",
    "pictures_of",
    "reconstruction_finding",
    "reconstruction_metrics",
    "require_colours",
    "summary",
    "to_rgb",
]

MAX_PICTURES = 8


class ReconstructionHead(nn.Module):
    """Three layers per patch token, then a transposed convolution that paints each token's patch."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim, patch = backbone.embed_dim, backbone.patch_size
        layers = [(nn.Linear(dim, dim), nn.GELU()) for _ in range(3)]  # the last one has its GELU, too
        self.mlp = nn.Sequential(*[module for pair in layers for module in pair])
        self.paint = nn.ConvTranspose2d(dim, backbone.in_chans, kernel_size=patch, stride=patch)
        initialise_linear(self)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised pixels: (n, N, D) tokens of a grid of patches -> (n, C, S, S)."""
        return self.paint(self.mlp(patches).mT.unflatten(2, grid))


def initialise_linear(module: nn.Module) -> None:
    """N(0, 0.02^2) for the matrices of linear layers and zeros for their biases, as the authors have it."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def initialise_class_token(backbone: Backbone) -> None:
    """N(0, 0.02^2), as the authors have it; timm draws it with a deviation of 1e-6. Everything else is alike."""
    token = getattr(backbone.network, "cls_token", None)
    if isinstance(token, nn.Parameter):
        nn.init.normal_(token, std=0.02)


def block_corruption(config: CorruptionConfig, backbone: Backbone) -> BlockCorruption:
    """The corruption that the settings ask for.

    Raises:
        ObjectiveError: blocks of this alignment do not fit the image.
    """
    return BlockCorruption(
        size=backbone.image_size,
        align=config.align,
        share=config.share,
        fill=config.fill,
        alien_p=config.alien_p,
        alien_share=config.alien_share,
    )


def colours(config: CorruptionConfig, **changes: float) -> dict[str, dict[str, float]]:
    """The entry "photometric" of a view with these changes, as far as the settings want them."""
    wanted = {name: value for name, value in changes.items() if config.blur or name != "blur_p"}
    return {"photometric": wanted} if config.photometric else {}


def require_colours(config: CorruptionConfig, backbone: Backbone) -> None:
    """Refuse colour changes of images that are not RGB.

    Raises:
        ObjectiveError: they are asked for.
    """
    if config.photometric and backbone.in_chans != 3:
        raise ObjectiveError(
            f"objective.photometric changes colours, and the backbone takes {backbone.in_chans} channels; "
            "set objective.photometric=false"
        )


def masked_l1(prediction: Tensor, target: Tensor, is_masked: Tensor) -> Tensor:
    """Mean absolute error over the masked numbers of all images.

    Images differ in how many they are, so the sum over a rank's masked numbers is divided by the mean count of the
    ranks: the mean of the ranks' losses then is that of one process. (The authors average ranks of unequal counts.)

    Args:
        prediction, target: (n, C, S, S).
        is_masked: (n, 1, S, S) bool.
    """
    with torch.autocast(target.device.type, enabled=False):
        error = (prediction.to(target.dtype) - target).abs() * is_masked
        return error.sum() / _mean_count(is_masked, target)


def _mean_count(is_masked: Tensor, target: Tensor) -> Tensor:
    """Masked numbers per rank; never 0."""
    return mean_over_ranks(is_masked.sum().to(target.dtype)).clamp_min(1) * target.shape[1]


@torch.no_grad()
def reconstruction_metrics(
    prediction: Tensor, target: Tensor, corruption: Corruption, features: Features
) -> dict[str, Tensor]:
    """Readings of a reconstruction and of the features that it is made from; none waits for the device.

    "masked_l1", and of it those images with a fill and those with another image's pixels ("masked_l1_fill",
    "masked_l1_alien"; all images where a micro-batch has none of the kind), "visible_l1", "masked_share" of the pixels.
    "explained": 1 - masked_l1 / that of predicting the mean colour; 0 = nothing learned.
    """
    is_masked = corruption.is_masked
    error = (prediction.to(target.dtype) - target).abs().mean(1, keepdim=True)  # (n, 1, S, S)
    masked = (error * is_masked).sum((1, 2, 3))  # (n,) sums
    counts = is_masked.sum((1, 2, 3))  # (n,)
    grey = (target.abs().mean(1, keepdim=True) * is_masked).sum()
    total, count = masked.sum(), counts.sum().clamp_min(1)

    def of_kind(is_kind: Tensor) -> Tensor:
        share = (masked * is_kind).sum() / (counts * is_kind).sum().clamp_min(1)
        return torch.where(is_kind.any(), share, total / count)

    return {
        "masked_l1": total / count,
        "masked_l1_fill": of_kind(~corruption.is_alien),
        "masked_l1_alien": of_kind(corruption.is_alien),
        "visible_l1": (error.sum() - total) / (~is_masked).sum().clamp_min(1),
        "masked_share": is_masked.to(target.dtype).mean(),
        "explained": 1 - total / grey.clamp_min(1e-12),
        **feature_metrics(features),
    }


@torch.no_grad()
def feature_metrics(features: Features) -> dict[str, Tensor]:
    """Whether there is something in the features: "effective_rank" of images, "patch_cosine" within an image."""
    return {"effective_rank": effective_rank(summary(features)), "patch_cosine": patch_cosine(features.patches)}


def reconstruction_finding(metrics: Mapping[str, float], progress: Progress) -> str | None:
    """The finding of `Objective.diagnose` about a reconstruction; None in a young run."""
    if progress.is_young:
        return None
    if metrics["explained"] < 0.01:
        return (
            f"masked pixels are predicted no better than by their mean colour (explained {metrics['explained']:.3f}); "
            "raise or lower optimizer.lr, or train longer"
        )
    if metrics["effective_rank"] < 1.05 or metrics["patch_cosine"] > 0.9999:
        return (
            f"features have collapsed: effective rank {metrics['effective_rank']:.2f} of different images, mean cosine "
            f"{metrics['patch_cosine']:.4f} between patches of an image; lower optimizer.lr"
        )
    return None


def summary(features: Features) -> Tensor:
    """One vector per image, (n, D): the class token, or the mean of the patches of an encoder without one."""
    return features.patches.mean(1) if features.cls is None else features.cls


def pictures_of(backbone: Backbone, target: Tensor, corruption: Corruption, prediction: Tensor) -> dict[str, Tensor]:
    """ "clean", "corrupted" and "reconstruction" (masked pixels predicted, others kept), (n, 3, S, S) in [0, 1]."""
    filled = torch.where(corruption.is_masked, prediction.to(target.dtype), target)
    shown = {"clean": target, "corrupted": corruption.apply(target), "reconstruction": filled}
    return {caption: to_rgb(backbone, images) for caption, images in shown.items()}


def to_rgb(backbone: Backbone, images: Tensor) -> Tensor:
    """Normalised (n, C, S, S) to (n, 3, S, S) in [0, 1]; the first three channels, or the first repeated."""
    images = (images * backbone.pixel_std + backbone.pixel_mean).clamp(0, 1)
    return images[:, :3] if backbone.in_chans >= 3 else images[:, :1].expand(-1, 3, -1, -1)
