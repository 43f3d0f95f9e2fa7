"""Volumes with hidden cubes, filled in by an encoder and the decoder that it was trained with.

Checkpoints of masked autoencoders of voxels have the decoder beside the backbone. It has one of two forms: "covered" of
encoders in stages, whose covered tokens a learned one stands for, and "left_out" of encoders that never see hidden
cubes.

NOT here: what is hidden, what a reconstruction is worth (`evaluation.protocols.masked_reconstruction`).

Legend: B batch, C channels, (X, Y, Z) voxels, p voxels along the edge of a cube, (a, b, c) cubes, K kept, M masked,
L = C * p^3 numbers per cube.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.decoder import MaskedDecoder
from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.features import Features
from backbones.precision import at_least_float32
from backbones.voxels.base import Cover, StagedVoxelEncoder, VoxelEncoder
from backbones.voxels.decoder import VoxelDecoder
from backbones.voxels.patches import from_patches, to_patches

__all__ = [
    "COVERED",
    "LEFT_OUT",
    "CoveredReconstruction",
    "LeftOutReconstruction",
    "Reconstruction",
    "reconstruction_of",
]

COVERED, LEFT_OUT = "covered", "left_out"
_PART = "decoder"  # of the spec of heads


class Reconstruction(nn.Module, ABC):
    """An encoder and its decoder.

    Attributes:
        encoder: gives values their natural units (`VoxelEncoder.scaled`).
        cube: p; what is hidden is a whole number of such cubes.
        is_radiance: volumes are grids of color and alpha.
    """

    is_radiance: ClassVar[bool]
    encoder: VoxelEncoder
    cube: int

    @abstractmethod
    def forward(self, values: Tensor, is_hidden: Tensor) -> Tensor:
        """Predicted values of the hidden cubes; elsewhere whatever the decoder says.

        Args:
            values: (B, C, X, Y, Z) in natural units, of the encoder's size; what is hidden is not looked at.
            is_hidden: (B, a, b, c) bool, as many in each volume.

        Returns:
            (B, C, X, Y, Z) in natural units, at least float32.
        """


class CoveredReconstruction(Reconstruction):
    """Color and alpha of grids, all of whose tokens the encoder sees, covered ones as a learned one (NeRF-MAE)."""

    is_radiance = True
    encoder: StagedVoxelEncoder

    def __init__(self, encoder: StagedVoxelEncoder) -> None:
        super().__init__()
        self.encoder, self.cube = encoder, encoder.patch_size
        self.mask_token = nn.Parameter(torch.zeros(encoder.stage_dims[0]))
        self.decoder = VoxelDecoder(encoder.stage_dims, encoder.patch_size, 4)

    def forward(self, values: Tensor, is_hidden: Tensor) -> Tensor:
        """See `Reconstruction`; colors are clipped to [0, 1], alpha is in it."""
        levels = self.encoder.stages(self.encoder.standardized(values), Cover(is_hidden, self.mask_token))
        predicted = at_least_float32(self.decoder(levels))
        return torch.cat([predicted[:, :3].clamp(0, 1), predicted[:, 3:].sigmoid()], dim=1)


class LeftOutReconstruction(Reconstruction):
    """Voxels of volumes, of which the encoder sees the visible cubes only (MAE)."""

    is_radiance = False

    def __init__(self, encoder: VoxelEncoder, *, dim: int, depth: int, num_heads: int) -> None:
        """`dim`, `depth` and `num_heads` of the decoder."""
        super().__init__()
        self.encoder, self.cube = encoder, encoder.token_size
        sizes = {"dim": dim, "depth": depth, "num_heads": num_heads}
        self.decoder = MaskedDecoder(encoder.embed_dim, encoder.grid, encoder.in_chans * self.cube**3, **sizes)

    def forward(self, values: Tensor, is_hidden: Tensor) -> Tensor:
        """See `Reconstruction`."""
        x = self.encoder.standardized(values)
        order = is_hidden.flatten(1).byte().argsort(dim=1, stable=True)  # (B, N), the visible ones first
        num_kept = order.shape[1] - int(is_hidden[0].sum())
        keep_idx, drop_idx = order[:, :num_kept], order[:, num_kept:]
        visible: Features = self.encoder.features(x, keep_idx)
        predicted = at_least_float32(self.decoder(visible, keep_idx, drop_idx))  # (B, M, L)
        patches = to_patches(x, self.cube).to(predicted.dtype)  # (B, N, L)
        filled = patches.scatter(1, drop_idx.unsqueeze(-1).expand_as(predicted), predicted)
        voxels = from_patches(filled, self.encoder.grid, self.cube)
        return voxels * self.encoder.voxel_std + self.encoder.voxel_mean


def reconstruction_of(encoder: Encoder, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reconstruction:
    """What heads of a checkpoint make of its encoder, in evaluation mode.

    Args:
        encoder: of the checkpoint.
        spec: of its heads: {"decoder": {"form": "covered"}}, or "left_out" with "dim", "depth" and "num_heads".
        tensors: the weights of the heads, as the module's of that form without its encoder.

    Raises:
        BackboneError: the heads are something else, or do not fit the encoder.
    """
    facts = dict(spec.get(_PART, {}))
    form = facts.pop("form", None)
    model: Reconstruction
    if form == COVERED and isinstance(encoder, StagedVoxelEncoder):
        model = CoveredReconstruction(encoder)
    elif form == LEFT_OUT and isinstance(encoder, VoxelEncoder) and facts.keys() == {"dim", "depth", "num_heads"}:
        model = LeftOutReconstruction(encoder, **facts)
    else:
        raise BackboneError(f"heads of backbone {encoder.spec['name']!r} are no decoder of hidden voxels")
    own = {name for name in model.state_dict() if not name.startswith("encoder.")}
    wrong = own ^ tensors.keys() or {name for name in own if model.state_dict()[name].shape != tensors[name].shape}
    if wrong:
        raise BackboneError(f"heads of backbone {encoder.spec['name']!r} do not fit it: {min(wrong)} differs")
    model.load_state_dict(dict(tensors), strict=False)
    return model.eval()
