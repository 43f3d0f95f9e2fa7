"""A small convolutional encoder of series of numbers: one token per stretch of time.

Legend: B batch, C channels, T points in time, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from backbones import Encoder, Features

__all__ = ["SeriesConfig", "SeriesEncoder"]


@dataclass
class SeriesConfig:
    """What a recipe may set below `backbone:`, once it says `kind: series`."""

    kind: str = "series"
    name: str = "conv"
    in_chans: int = field(default=1, metadata={"range": (1, 1024), "help": "channels of the series"})
    patch_size: int = field(default=8, metadata={"range": (1, 4096), "help": "points in time of a token"})
    dim: int = field(default=32, metadata={"range": (1, 4096), "help": "width"})
    depth: int = field(default=2, metadata={"range": (1, 64), "help": "blocks"})


class SeriesEncoder(Encoder):
    """Tokens of stretches of `patch_size` points, mixed by convolutions."""

    kind = "series"
    Config = SeriesConfig

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__(config)  # from which checkpoints know how to build it again
        self.embed_dim, self.patch_size, self.in_chans = config.dim, config.patch_size, config.in_chans
        self.stem = nn.Conv1d(config.in_chans, config.dim, config.patch_size, stride=config.patch_size)
        self.blocks = nn.ModuleList([_Block(config.dim) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim)

    def tokens(self, batch: Tensor) -> Features:
        """Features of series (B, C, T), of any length that is a multiple of the patch size."""
        x = self.stem(batch.to(self.dtype))  # (B, D, N)
        for block in self.blocks:
            x = block(x)
        tokens = self.norm(x.mT)  # (B, N, D)
        return Features(tokens, cls=None, registers=None, grid=(tokens.shape[1],))

    def layer_ids(self) -> dict[str, int]:
        """How deep each parameter lies, for `optimizer.layer_decay`."""
        depth = {"stem": 0, "norm": len(self.blocks)}
        return {
            name: depth[name.split(".")[0]] if name.split(".")[0] in depth else 1 + int(name.split(".")[1])
            for name, _ in self.named_parameters()
        }


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.mix = nn.Sequential(nn.Conv1d(dim, 2 * dim, 3, padding="same"), nn.GELU(), nn.Conv1d(2 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))  # (B, D, N)
