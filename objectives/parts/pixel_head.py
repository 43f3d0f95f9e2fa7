"""From patch tokens to pixels: the head of GMML and SiT.

S. Atito et al., 2022, arXiv:2205.14986. NOT here: its error (`objectives.parts.masked_l1`).

Legend: n images, C channels, S side in pixels, N patches, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from backbones.images.base import ImageEncoder
from objectives.parts.initialization import initialize_linear

__all__ = ["ReconstructionHead"]


class ReconstructionHead(nn.Module):
    """Three layers per patch token, then a transposed convolution that paints each token's patch."""

    def __init__(self, backbone: ImageEncoder) -> None:
        super().__init__()
        dim, patch = backbone.embed_dim, backbone.patch_size
        layers = [(nn.Linear(dim, dim), nn.GELU()) for _ in range(3)]  # the last one has its GELU, too
        self.mlp = nn.Sequential(*[module for pair in layers for module in pair])
        self.paint = nn.ConvTranspose2d(dim, backbone.in_chans, kernel_size=patch, stride=patch)
        initialize_linear(self)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised pixels: (n, N, D) tokens of a grid of patches -> (n, C, S, S)."""
        return self.paint(self.mlp(patches).mT.unflatten(2, grid))
