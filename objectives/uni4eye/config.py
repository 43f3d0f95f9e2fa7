"""Settings of the masked autoencoder of images and volumes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import CROP_SCALE, FLIP, HFLIP, TURN, VOLUME_ARRAY, VOLUME_FIELD

__all__ = ["Uni4EyeConfig"]


@dataclass
class Uni4EyeConfig:
    """Uni4Eye (Cai et al. 2022, arXiv:2203.04614); defaults are the paper's, but for what is said beside them."""

    name: str = "uni4eye"
    mask_ratio: float = field(
        default=0.75, metadata={"range": (0.01, 0.99), "help": "share of the patches hidden from the encoder"}
    )
    norm_pix_loss: bool = field(
        default=False,
        metadata={"help": "predict pixels and voxels normalised by their own patch's mean and deviation; no gradients"},
    )
    # The authors' map is in 16-bit integers of some tens, beside images in [0, 1]; ours is in [0, 1] as well.
    gradient_weight: float = field(
        default=1.0, metadata={"range": (0.0, 1e6), "help": "weight of the gradient maps beside images and volumes"}
    )
    # The authors alternate between images and volumes by epochs; here each step has both.
    volume_weight: float = field(
        default=0.5, metadata={"range": (0.01, 0.99), "help": "share of the loss that volumes have; the rest, images"}
    )
    decoder_dim: int = field(
        default=512, metadata={"range": (8, 4096), "help": "width of both decoders, a multiple of 4"}
    )
    decoder_depth: int = field(default=8, metadata={"range": (1, 64), "help": "blocks of each decoder"})
    decoder_heads: int = field(default=16, metadata={"range": (1, 64), "help": "attention heads of both decoders"})
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata=CROP_SCALE)
    hflip: float = field(default=0.5, metadata=HFLIP)
    flip: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], metadata=FLIP)
    turn: float = field(default=0.0, metadata=TURN)
    # Named, since the npz of a volume would do for a picture of as many channels as it has slices.
    image_field: str = field(default="jpg", metadata={"help": "field of the samples with the image"})
    volume_field: str | None = field(default=None, metadata=VOLUME_FIELD)
    volume_array: str | None = field(default=None, metadata=VOLUME_ARRAY)
