"""Settings of the masked autoencoder. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import CROP_SCALE, HFLIP

__all__ = ["MAEConfig"]


@dataclass
class MAEConfig:
    """Masked autoencoder (He et al. 2021, arXiv:2111.06377); defaults are the paper's ViT-B/16 pretraining."""

    name: str = "mae"
    # Paper figure 5: 75 % is best for linear probing and near the best for fine-tuning.
    mask_ratio: float = field(
        default=0.75, metadata={"range": (0.01, 0.99), "help": "share of patches hidden from the encoder"}
    )
    # Paper table 1d: normalised pixels gain 0.5 points fine-tuned (ViT-L, 800 epochs).
    norm_pix_loss: bool = field(
        default=True, metadata={"help": "predict pixels normalised by their own patch's mean and deviation"}
    )
    masking: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "drop", "token"),
            "help": "hidden patches are left out (drop) or covered (token, SimMIM); auto: drop where the backbone can",
        },
    )
    mask_size: int | None = field(
        default=None,
        metadata={
            "range": (1, 1024),
            "help": "pixels per side of what masking=token covers at once; null: a token, less on small images",
        },
    )
    # Width x depth 512 x 8 belongs to encoders from ViT-B up; 192 x 4 makes a ViT-Tiny step several times cheaper.
    decoder_dim: int = field(
        default=512,
        metadata={"range": (4, 4096), "help": "decoder width, a multiple of 4; masking=token has no decoder"},
    )
    decoder_depth: int = field(default=8, metadata={"range": (1, 64), "help": "decoder blocks"})
    decoder_heads: int = field(default=16, metadata={"range": (1, 64), "help": "decoder attention heads"})
    # Paper appendix A.1: random resized crop and flip are the only augmentation.
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata=CROP_SCALE)
    hflip: float = field(default=0.5, metadata=HFLIP)
