"""Predict the mean colour of hidden patches, from the rest of the image.

Random patches are covered by a learned colour, the encoder sees the whole image, and a linear layer predicts from each
covered patch's token which colour it had on average. The form is that of Z. Xie et al., "SimMIM", arXiv:2111.09886;
the target is poorer than theirs, which are all pixels. It runs on any backbone.

Legend: B batch, n pictures, C channels, p pixels per side of a patch, N patches, M covered patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.base import Backbone
from backbones.features import take_tokens
from objectives.base import Objective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.masking import RandomMask, random_mask, random_noise

__all__ = ["Colour", "ColourConfig"]


@dataclass
class ColourConfig:
    """What a recipe may set below `objective:`; types, ranges and choices are checked before anything starts."""

    name: str = "colour"
    mask_ratio: float = field(default=0.6, metadata={"range": (0.01, 0.99), "help": "share of patches that is covered"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.4, 1.0],
        metadata={"range": (0.01, 1.0), "length": 2, "help": "smallest and largest share of the image of a crop"},
    )


class Colour(Objective):
    """Mean squared error of the colours of covered patches, in units of the backbone's normalised pixels."""

    Config: ClassVar[type] = ColourConfig

    def __init__(self, backbone: Backbone, config: ColourConfig) -> None:
        super().__init__()
        if not 0 < int(backbone.num_patches * (1 - config.mask_ratio)) < backbone.num_patches:
            raise ObjectiveError(
                f"objective.mask_ratio {config.mask_ratio} leaves nothing to see or to predict of "
                f"{backbone.num_patches} patches; choose another ratio or a smaller patch size"
            )
        self.config = config
        self.backbone = backbone
        self.cover = nn.Parameter(0.02 * torch.randn(backbone.in_chans, 1, 1))
        self.predict = nn.Linear(backbone.embed_dim, backbone.in_chans)

    def views(self) -> list[dict[str, Any]]:
        """One random resized crop, "image"."""
        return [{"name": "image", "size": self.backbone.image_size, "scale": tuple(self.config.crop_scale)}]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch with "image" (B, C, H, W) and "seed" (B,); `progress` is not used."""
        x = self.backbone.preprocess(batch["image"])
        mask = random_mask(random_noise(batch["seed"], self.backbone.num_patches), self.config.mask_ratio)
        predicted = take_tokens(self._predict(x, mask), mask.drop_idx)  # (B, M, C)
        with torch.autocast(x.device.type, enabled=False):  # losses are computed in float32, whatever the model's type
            colours = functional.avg_pool2d(x, self.backbone.patch_size).flatten(2).mT  # (B, N, C)
            target = take_tokens(colours, mask.drop_idx)  # (B, M, C)
            loss = (predicted.to(target.dtype) - target).square().mean()
            explained = 1 - loss.detach() / target.var((0, 1), unbiased=False).mean()
        return Output(loss, {"loss": loss.detach(), "explained": explained})

    def _predict(self, x: Tensor, mask: RandomMask) -> Tensor:
        """Colours of all patches (B, N, C) of images (B, C, H, W) whose masked patches are covered."""
        covered = self._covered(x, mask, self.cover)
        return self.predict(self.backbone.features(covered).patches)

    def _covered(self, x: Tensor, mask: RandomMask, cover: Tensor) -> Tensor:
        """Images (B, C, H, W) with the pixels of `cover` where patches are masked."""
        is_covered = mask.is_masked.unsqueeze(-1)  # (B, N, 1)
        return torch.where(self._enlarged(is_covered), cover.to(x), x)

    def _enlarged(self, patches: Tensor) -> Tensor:
        """Each patch's value at all of its pixels: (B, N, C) -> (B, C, H, W)."""
        cells = patches.mT.unflatten(2, self.backbone.grid)  # (B, C, rows, columns)
        return cells.repeat_interleave(self.backbone.patch_size, 2).repeat_interleave(self.backbone.patch_size, 3)

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """After a quarter of the run, better than always the mean colour of the batch; a thing for the log if not."""
        if progress.step > progress.total_steps / 4 and metrics["explained"] < 0.05:
            return f"explained {metrics['explained']:.2f}: the predicted colours are no better than their mean"
        return None

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 of what is seen, of the same with the predicted colours, and of the crops."""
        was_training = self.training
        self.eval()  # stochastic depth would draw random numbers, and change the training that follows
        x = self.backbone.preprocess(batch["image"][:8])
        mask = random_mask(random_noise(batch["seed"][:8], self.backbone.num_patches), self.config.mask_ratio)
        colours = self._enlarged(self._predict(x, mask))  # (n, C, H, W)
        self.train(was_training)
        shown = {"seen": self._covered(x, mask, self.cover), "predicted": self._covered(x, mask, colours), "crop": x}
        return {caption: self._to_rgb(images) for caption, images in shown.items()}

    def _to_rgb(self, x: Tensor) -> Tensor:
        images = (x * self.backbone.pixel_std + self.backbone.pixel_mean).clamp(0, 1).float()  # (n, C, H, W)
        return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
