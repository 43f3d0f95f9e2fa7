"""GMML: replace groups of connected pixels by noise or by another image's, and predict what was there.

S. Atito et al., "GMML is All you Need", 2022, arXiv:2205.14986. Written from the formulas; the values of the authors'
code are in tests/golden/gmml.json. NOT here: how images are corrupted (`objectives.parts.block_corruption`), the head
(`objectives.parts.pixel_head`) and its error (`objectives.parts.masked_l1`), the small local crops that the authors'
code offers and leaves off.

Legend: B batch, V views, n = V * B images, C channels, S side in pixels, P prefix tokens, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones.features import Features
from backbones.images.base import ImageEncoder
from objectives.base import ImageObjective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.gmml.config import GMMLConfig
from objectives.parts.block_corruption import block_corruption
from objectives.parts.masked_l1 import masked_l1, reconstruction_metrics
from objectives.parts.photometric import photometric, require_colors
from objectives.parts.pixel_head import ReconstructionHead
from objectives.parts.reconstruction_health import reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, evaluating, reconstructions

__all__ = ["GMML"]

_PHOTOMETRIC = {"jitter_p": 0.3, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.01, "blur_p": 0.1}


class GMML(ImageObjective):
    """Mean absolute error of the replaced pixels, from all tokens of the corrupted image.

    The head reads the mean of several blocks' token streams. Views are more samples of one image and nothing relates
    them. Each micro-batch and step averages over the masked pixels that it has.

    Attributes:
        blocks: after which blocks, counted from 1, the head reads.
    """

    Config: ClassVar[type] = GMMLConfig

    def __init__(self, backbone: ImageEncoder, config: GMMLConfig) -> None:
        """Re-initialises the class token as the authors do.

        Raises:
            ObjectiveError: blocks do not fit the image, the encoder's inner blocks cannot be read, or photometric
                augmentation is on and the input is not RGB.
        """
        super().__init__(backbone, config.name)
        require_colors(config, backbone)
        self.config = config
        self.corruption = block_corruption(config, backbone)
        self.blocks = _blocks_at(config.read_depths, backbone)
        backbone.reset_tokens(0.02)  # as the authors; timm draws class tokens with a deviation of 1e-6
        self.head = ReconstructionHead(backbone)

    def views(self) -> list[dict[str, Any]]:
        """`num_views` crops, "image"."""
        return [
            {
                "name": "image",
                "size": self.backbone.image_size,
                "count": self.config.num_views,
                "scale": tuple(self.config.crop_scale),
                "hflip": self.config.hflip,
                **photometric(self.config, _PHOTOMETRIC),
            }
        ]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "image" (V, B, C, S, S) uint8 or float in [0, 1]; "seed" (B,) int64. The corruption that follows from
                the seed can be given, see `BlockCorruption.of_batch`.
            progress: not used.
        """
        images = batch["image"]
        target = self.backbone.normalized(images.flatten(0, 1))  # (n, C, S, S)
        corruption = self.corruption.of_batch(batch, target)
        features = self._encode(corruption.apply(target))
        prediction = self.head(features.patches, features.grid)  # (n, C, S, S)
        counted = corruption.is_masked if self.config.masked_only else torch.ones_like(corruption.is_masked)
        loss = masked_l1(prediction, target, counted)
        metrics = {"loss": loss.detach()}
        if progress.is_logged:
            metrics |= reconstruction_metrics(prediction, target, corruption, features)
        return Output(loss, metrics)

    def _encode(self, x: Tensor) -> Features:
        """Features of normalised images (n, C, S, S): the final norm of the mean of the token streams at `blocks`."""
        if not self.blocks:
            return self.backbone.features(x)
        streams = self.backbone.features(x, layers=self.blocks).levels
        features = self.backbone.read_out(torch.stack(streams).mean(0), self.backbone.grid)  # of (n, P + N, D)
        return replace(features, cls=None, registers=None)  # the head and the metrics read the patches

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Grey reconstructions, or features that are all alike."""
        return reconstruction_finding(metrics, progress)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of "clean", "corrupted" and "reconstruction" (masked pixels predicted, others kept)."""
        batch = {name: batch[name] for name in ("image", "seed")}
        images = batch["image"]
        batch["seed"] = batch["seed"][:MAX_PICTURES]
        target = self.backbone.normalized(images[0])[:MAX_PICTURES]
        corruption = self.corruption.of_batch(batch, target)
        with evaluating(self):
            features = self._encode(corruption.apply(target))
            prediction = self.head(features.patches, features.grid)
        return reconstructions(self.backbone, target, corruption, prediction)


def _blocks_at(depths: list[float], backbone: ImageEncoder) -> list[int]:
    """Blocks, counted from 1, at shares of the encoder's depth; none when only the last one is read.

    Raises:
        ObjectiveError: the encoder's inner blocks cannot be read.
    """
    if set(depths) == {1.0}:
        return []
    if not backbone.has_plain_blocks:
        raise ObjectiveError(
            f"objective.read_depths {list(depths)} averages the tokens of several blocks, and the blocks of backbone "
            f"{backbone.spec['name']!r} do not all have the same tokens; set objective.read_depths=[1.0]"
        )
    return sorted({max(1, round(depth * backbone.num_layers)) for depth in depths})
