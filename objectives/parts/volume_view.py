"""The volume that masked autoencoders of voxels read, as their settings have it."""

from __future__ import annotations

from typing import Any, Protocol

from backbones.voxels.base import VoxelEncoder

__all__ = ["volume_view"]


class _Settings(Protocol):
    volume_field: str | None
    volume_array: str | None
    flip: list[float]
    turn: float


def volume_view(name: str, backbone: VoxelEncoder, config: _Settings) -> dict[str, Any]:
    """The view `name`: turned and mirrored, cut or padded to the size of `backbone`, with `NAME.size`.

    Args:
        name: of the view.
        backbone: says the size.
        config: where the volume is, and how often it is mirrored and turned.
    """
    return {
        "name": name,
        "kind": "volume",
        "size": backbone.size,
        "field": config.volume_field,
        "array": config.volume_array,
        "flip": tuple(config.flip),
        "turn": config.turn,
        "return_size": True,
    }
