"""Settings of encoders of voxels, as a recipe gives them below `backbone:`. Imports no torch.

Field metadata: "help" says what it does, "range" = (lowest, highest) allowed, both ends included, "choices" lists what
is allowed, "length" is the number of items of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backbones.images.config import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["DENSITIES", "UnifiedVitConfig", "VoxelConfig", "VoxelSwinConfig", "VoxelVitConfig"]

DENSITIES = ("alpha", "log_density", "relu_density")


@dataclass(frozen=True)
class VoxelConfig:
    """What encoders of voxels have in common."""

    kind: str = field(default="voxels", metadata={"help": "what it encodes"})
    size: list[int] = field(
        default_factory=lambda: [96, 96, 96],
        metadata={"range": (1, 4096), "length": 3, "help": "voxels along each axis that it is trained on"},
    )
    in_chans: int = field(
        default=1, metadata={"range": (1, 1024), "help": "channels of the input; 4 of a radiance grid: RGB and alpha"}
    )
    # Values of scanners have units of their own: of a CT of the abdomen [-160, 240] Hounsfield units, say.
    voxel_window: list[float] = field(
        default_factory=list,
        metadata={"help": "[low, high]: stored values that become 0 and 1, clipped, before all else; []: as stored"},
    )
    voxel_mean: list[float] = field(
        default_factory=list, metadata={"help": "mean per channel of the input, bytes as in [0, 1]; []: 0"}
    )
    voxel_std: list[float] = field(
        default_factory=list,
        metadata={"range": (1e-6, None), "help": "deviation per channel of the input, bytes as in [0, 1]; []: 1"},
    )
    # Instant-NGP stores log densities, and NeRF-MAE's code takes 0.01 for the length of a step in any scene.
    density: str = field(
        default="alpha",
        metadata={
            "choices": DENSITIES,
            "help": "what the fourth of four channels holds; a density d becomes 1 - exp(-exp(d) * density_step) "
            "(log_density) or 1 - exp(-max(d, 0) * density_step)",
        },
    )
    density_step: float = field(
        default=0.01, metadata={"range": (1e-9, 1e9), "help": "length of a ray in a voxel, in the units of densities"}
    )


@dataclass(frozen=True)
class VoxelVitConfig(VoxelConfig):
    """A plain ViT of cubes of voxels; by default of the size of a ViT-S."""

    name: str = field(default="voxel_vit", metadata={"help": "which encoder of voxels"})
    patch_size: int = field(default=16, metadata={"range": (1, 1024), "help": "voxels along the edge of a patch"})
    embed_dim: int = field(default=384, metadata={"range": (2, 16384), "help": "width, an even number"})
    depth: int = field(default=12, metadata={"range": (1, 256), "help": "blocks"})
    num_heads: int = field(default=6, metadata={"range": (1, 256), "help": "attention heads, a divisor of the width"})
    mlp_ratio: float = field(default=4.0, metadata={"range": (0.1, 64.0), "help": "width of the MLPs / width"})


@dataclass(frozen=True)
class UnifiedVitConfig(VoxelVitConfig):
    """A plain ViT of volumes and images, each with a patch embedding of its own (Uni4Eye, 2022, arXiv:2203.04614)."""

    name: str = field(default="unified_vit", metadata={"help": "which encoder of voxels"})
    image_size: int = field(
        default=224, metadata={"range": (1, 8192), "help": "side of images in pixels, a multiple of image_patch_size"}
    )
    image_patch_size: int = field(
        default=16, metadata={"range": (1, 1024), "help": "side of a patch of an image in pixels"}
    )
    image_chans: int = field(default=3, metadata={"range": (1, 1024), "help": "channels of images"})
    pixel_mean: list[float] = field(
        default_factory=lambda: list(IMAGENET_MEAN),
        metadata={"help": "mean per channel of images in [0, 1]; default: ImageNet"},
    )
    pixel_std: list[float] = field(
        default_factory=lambda: list(IMAGENET_STD),
        metadata={"range": (1e-6, None), "help": "deviation per channel of images in [0, 1]; default: ImageNet"},
    )


@dataclass(frozen=True)
class VoxelSwinConfig(VoxelConfig):
    """NeRF-MAE's 3D Swin transformer (Irshad et al. 2024, arXiv:2404.01300); defaults are its Swin-S at 160^3."""

    name: str = field(default="voxel_swin", metadata={"help": "which encoder of voxels"})
    size: list[int] = field(
        default_factory=lambda: [160, 160, 160],
        metadata={
            "range": (1, 4096),
            "length": 3,
            "help": "voxels along each axis that it is trained on, multiples of patch_size * 2^(stages - 1)",
        },
    )
    in_chans: int = field(default=4, metadata={"range": (1, 1024), "help": "channels; 4: RGB and alpha"})
    patch_size: int = field(default=4, metadata={"range": (1, 64), "help": "voxels along the edge of a first token"})
    embed_dim: int = field(
        default=96, metadata={"range": (2, 4096), "help": "width of the first stage, an even number; doubled by each"}
    )
    depths: list[int] = field(
        default_factory=lambda: [2, 2, 18, 2], metadata={"range": (1, 256), "help": "blocks of each stage"}
    )
    num_heads: list[int] = field(
        default_factory=lambda: [3, 6, 12, 24], metadata={"range": (1, 256), "help": "attention heads of each stage"}
    )
    window: int = field(default=4, metadata={"range": (2, 32), "help": "tokens along the edge of a window, even"})
    mlp_ratio: float = field(default=4.0, metadata={"range": (0.1, 64.0), "help": "width of the MLPs / width"})
    drop_path: float = field(
        default=0.1,
        metadata={"range": (0.0, 0.9), "help": "share of the samples that skip the last block's branches in training"},
    )
