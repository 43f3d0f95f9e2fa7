"""Settings of encoders of point clouds, as a recipe gives them below `backbone:`. Imports no torch.

Field metadata: "help" says what it does, "range" = (lowest, highest) allowed, both ends included. NOT here: what the
settings mean together (`backbones.points.transformer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PointTransformerConfig"]


@dataclass(frozen=True)
class PointTransformerConfig:
    """A transformer over groups of neighboring points; defaults are those of Point-MAE (arXiv:2203.06604)."""

    name: str = field(default="point_transformer", metadata={"help": "which encoder of point clouds"})
    num_points: int = field(
        default=1024, metadata={"range": (1, 1_048_576), "help": "points of a cloud that the encoder is given"}
    )
    num_groups: int = field(default=64, metadata={"range": (1, 65_536), "help": "groups, which are the tokens"})
    group_size: int = field(default=32, metadata={"range": (1, 4096), "help": "points of a group; groups overlap"})
    embed_dim: int = field(default=384, metadata={"range": (1, 16_384), "help": "width of a token"})
    depth: int = field(default=12, metadata={"range": (1, 256), "help": "blocks"})
    num_heads: int = field(default=6, metadata={"range": (1, 256), "help": "attention heads"})
    tokenizer_dim: int = field(
        default=128,
        metadata={"range": (1, 4096), "help": "width of the tokenizer's first layer; the others are twice and 4 times"},
    )
    drop_path: float = field(
        default=0.1, metadata={"range": (0.0, 0.99), "help": "stochastic depth of the last block; from 0 at the first"}
    )
    kind: str = field(default="points", metadata={"help": "what it encodes: points"})
