"""Settings of the masked autoencoder of point clouds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PointMAEConfig"]


@dataclass
class PointMAEConfig:
    """Point-MAE (Pang et al. 2022, arXiv:2203.06604); defaults are the paper's pretraining on ShapeNet."""

    name: str = "point_mae"
    mask_ratio: float = field(
        default=0.6, metadata={"range": (0.01, 0.99), "help": "share of the groups hidden from the encoder"}
    )
    masking: str = field(
        default="random",
        metadata={"choices": ("random", "block"), "help": "hide groups at random, or those nearest to a random one"},
    )
    chamfer: str = field(
        default="l2",
        metadata={"choices": ("l2", "l1"), "help": "distances squared (l2, the paper's) or not (l1, less of outliers)"},
    )
    # As wide as the encoder.
    decoder_depth: int = field(default=4, metadata={"range": (1, 64), "help": "decoder blocks"})
    decoder_heads: int = field(default=6, metadata={"range": (1, 64), "help": "decoder attention heads"})
    decoder_drop_path: float = field(
        default=0.1, metadata={"range": (0.0, 0.99), "help": "stochastic depth of the last decoder block"}
    )
    # The authors' code: a factor per axis, then a shift per axis, of clouds in the unit sphere.
    scale: list[float] = field(
        default_factory=lambda: [2 / 3, 1.5],
        metadata={"range": (0.01, 100.0), "length": 2, "help": "least and greatest factor, drawn for each axis"},
    )
    translate: float = field(
        default=0.2, metadata={"range": (0.0, 100.0), "help": "a cloud moves by up to this along each axis"}
    )
    rotate: str = field(
        default="none",
        metadata={"choices": ("none", "x", "y", "z", "any"), "help": "turn clouds at random about an axis, or any way"},
    )
