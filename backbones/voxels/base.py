"""What every encoder of volumes and voxel grids is to objectives and evaluation.

A batch is what a `volume` view holds: (B, C, X, Y, Z), bytes or floats. Two classes read it: `backbones.voxels.vit`, a
plain ViT whose patches can be left out, and `backbones.voxels.swin`, which has stages of several resolutions.

Padding: where the sizes of volumes are told, what lies beyond them is 0 in natural units (`scaled`), whatever a window
or a density makes of the zeros that are stored there. A volume that is not a whole number of output tokens long gets
zeros at the high end of its axes, in the units of the normalized input. Volumes of other sizes than `size` are allowed;
positions are a function of the place.

NOT here: lookup by name (`backbones.registry`), files (`backbones.io`).

Legend: B batch, C channels, N tokens, K kept tokens, D width, n blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from backbones.encoder import Encoder, Normalization
from backbones.errors import BackboneError
from backbones.features import Features
from backbones.voxels.config import DENSITIES, VoxelConfig
from backbones.voxels.padding import inside

__all__ = ["Cover", "StagedVoxelEncoder", "VoxelEncoder", "alpha_of_density"]


class VoxelEncoder(Encoder):
    """An encoder of voxels, with normalization of its input.

    Attributes:
        size: voxels along each axis that it is trained on.
        in_chans: C.
        token_size: voxels along the edge of an output token.
        grid: output tokens along each axis at `size`.
        can_drop_patches: `features(x, keep_idx)` runs on some tokens only.
    """

    kind = "voxels"
    can_drop_patches: ClassVar[bool] = False
    voxel_mean: Tensor
    voxel_std: Tensor

    def __init__(self, config: VoxelConfig, *, token_size: int) -> None:
        """Takes what all encoders of voxels have in common from the settings.

        Raises:
            BackboneError: `size` is not three whole numbers of output tokens, there is not one mean and one positive
                deviation per channel, a window is no [low, high], or a density is to be converted where there is none.
        """
        super().__init__(config)
        name = self.spec["name"]
        self.token_size, self.in_chans = token_size, config.in_chans
        self.size = _three(config.size, name)
        if any(side < 1 or side % token_size for side in self.size):
            below = [max(1, side // token_size) * token_size for side in self.size]
            above = [max(1, -(-side // token_size)) * token_size for side in self.size]
            raise BackboneError(
                f"backbone {name!r}: size {list(self.size)} has a side that is no multiple of {token_size} voxels, the "
                f"edge of an output token; use {below} or {above}"
            )
        self.grid = self.grid_at(self.size)
        self._density, self._density_step = config.density, config.density_step
        if config.density not in DENSITIES or (config.density != "alpha" and config.in_chans != 4):
            raise BackboneError(
                f"backbone {name!r}: density {config.density!r} with in_chans {config.in_chans}; it is one of "
                f"{', '.join(DENSITIES)}, and only the fourth of 4 channels is converted"
            )
        self._window = tuple(config.voxel_window)
        if self._window and not (len(self._window) == 2 and self._window[0] < self._window[1]):
            raise BackboneError(
                f"backbone {name!r}: voxel_window {list(self._window)} must be [low, high] with low < high, or [] for "
                "none"
            )
        for key, values, default in (("voxel_mean", config.voxel_mean, 0.0), ("voxel_std", config.voxel_std, 1.0)):
            values = list(values) or [default] * config.in_chans
            if len(values) != config.in_chans or (key == "voxel_std" and min(values) <= 0):
                raise BackboneError(
                    f"backbone {name!r}: {key} {values} must hold {config.in_chans} "
                    f"{'positive ' if key == 'voxel_std' else ''}numbers, one for each of in_chans={config.in_chans}"
                )
            # Buffers, not parameters: bf16 engines cast parameters, and 8 bits of mantissa would quantize the voxels.
            table = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)  # (C, 1, 1, 1)
            self.register_buffer(key, table, persistent=False)

    @abstractmethod
    def features(self, x: Tensor, keep_idx: Tensor | None = None) -> Features:
        """Encodes volumes, or only some tokens of them.

        Args:
            x: (B, C, X, Y, Z) normalized voxels of any size.
            keep_idx: (B, K) int64 row-major token indices: only these run, in this order. Needs `can_drop_patches`.

        Returns:
            Tokens (B, N, D), row-major over `grid_at` of the size, in the type of the weights.

        Raises:
            BackboneError: the encoder cannot leave tokens out.
        """

    def tokens(self, batch: Tensor | Mapping[str, Tensor]) -> Features:
        """Features of volumes (B, C, X, Y, Z), bytes or floats, as a `volume` view holds them.

        Args:
            batch: the volumes; or "volume", and "size" (B, 3) int64, voxels along each axis that are no padding at its
                high end. With it `Features.is_valid` says which tokens have data.

        Raises:
            BackboneError: another shape or number of channels.
        """
        if isinstance(batch, Tensor):
            return self.features(self.normalized(batch))
        features = self.features(self.normalized(batch["volume"], batch["size"]))
        begun = -(-batch["size"] // self.token_size)  # (B, 3) tokens
        return replace(features, is_valid=inside(begun, self.grid_of(batch["volume"].shape[1:])).flatten(1))

    def grid_at(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Output tokens along each axis of volumes of this size in voxels, begun ones among them."""
        x, y, z = (-(-side // self.token_size) for side in size)
        return x, y, z

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis of a volume (C, X, Y, Z); see `Encoder`."""
        return self.grid_at(shape[1:])

    @property
    def unit_channels(self) -> int:
        """Channels of a radiance grid, from the first, with values in [0, 1]: colors, and alpha where it is stored."""
        return 4 if self._density == "alpha" else 3

    @property
    def num_patches(self) -> int:
        """N at `size`."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def scaled(self, volumes: Tensor, size: Tensor | None = None) -> Tensor:
        """Voxels in natural units: values of the window to 0 .. 1, without one bytes from 0 .. 255 to 0 .. 1, and the
        density of a radiance grid as alpha.

        Args:
            volumes: (B, C, X, Y, Z), integers or floats.
            size: (B, 3) int64, voxels along each axis that are no padding at its high end; padding is 0 then.

        Returns:
            The same shape in float32, or float64 when `volumes` is float64.

        Raises:
            BackboneError: another shape or number of channels.
        """
        if volumes.ndim != 5 or volumes.shape[1] != self.in_chans:
            raise BackboneError(
                f"backbone {self.spec['name']!r} takes volumes (B, {self.in_chans}, X, Y, Z), not "
                f"{tuple(volumes.shape)}; set backbone.in_chans to the channels of the data"
            )
        values = volumes.to(torch.promote_types(volumes.dtype, torch.float32))
        if self._window:
            low, high = self._window
            values = ((values - low) / (high - low)).clamp(0, 1)
        elif volumes.dtype == torch.uint8:
            values = values / 255
        if self._density != "alpha":
            alpha = alpha_of_density(values[:, 3:], self._density, self._density_step)
            values = torch.cat([values[:, :3], alpha], dim=1)
        return values if size is None else values * inside(size, values.shape[2:]).unsqueeze(1)

    def standardized(self, values: Tensor) -> Tensor:
        """(values - mean) / deviation of what `scaled` gave."""
        return (values - self.voxel_mean.to(values.dtype)) / self.voxel_std.to(values.dtype)

    def normalized(self, volumes: Tensor, size: Tensor | None = None) -> Tensor:
        """Input of `features` from a batch: `standardized` of `scaled`."""
        return self.standardized(self.scaled(volumes, size))

    def normalization(self, kind: str) -> Normalization | None:
        """Of volumes; see `Encoder`."""
        settings = ("voxel_window", "voxel_mean", "voxel_std")
        return Normalization(self.normalized, settings) if kind == "volume" else None


class Cover(NamedTuple):
    """Tokens of the first stage that a learned one stands for."""

    is_masked: Tensor  # (B, X, Y, Z) bool
    token: Tensor  # (D,)


class StagedVoxelEncoder(VoxelEncoder):
    """An encoder in stages, of which each halves the resolution of the one before.

    Attributes:
        patch_size: voxels along the edge of a token of the first stage.
        stage_dims: D of each stage; the last is `embed_dim`.
        num_blocks: n, of all stages.
    """

    patch_size: int
    stage_dims: tuple[int, ...]
    num_blocks: int

    @abstractmethod
    def stages(self, x: Tensor, cover: Cover | None = None, branch_noise: Tensor | None = None) -> list[Tensor]:
        """Tokens of each stage, (B, X, Y, Z, D): of `patch_size` voxels in the first, of twice as many in each next.

        Args:
            x: (B, C, X, Y, Z) normalized voxels; sides are padded to multiples of `token_size`.
            cover: tokens that a learned one stands for.
            branch_noise: (B, n, 2) uniform in [0, 1), for stochastic depth: which samples skip the two branches of
                which block. Without it none does.
        """


def alpha_of_density(density: Tensor, kind: str, step: float = 0.01) -> Tensor:
    """Opacity in [0, 1] of voxels that hold a density of any kind but "alpha".

    Args:
        density: of kind "log_density", as instant-NGP stores it, the logarithm; of kind "relu_density" the density
            itself, where values below 0 mean 0.
        kind: one of these.
        step: length of a ray in a voxel. NeRF-MAE's code has 0.01 in the units of any scene.
    """
    wide = density.to(torch.promote_types(density.dtype, torch.float32))
    linear = wide.exp() if kind == "log_density" else wide.clamp_min(0)
    return -torch.expm1(-linear * step)


def _three(size: Sequence[int], name: str) -> tuple[int, int, int]:
    if len(size) != 3:
        raise BackboneError(f"backbone {name!r}: size {list(size)} must be three numbers of voxels")
    return int(size[0]), int(size[1]), int(size[2])
