"""Settings of GMML. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import CorruptionConfig

__all__ = ["GMMLConfig"]


@dataclass
class GMMLConfig(CorruptionConfig):
    """Group masked model learning (Atito et al. 2022, arXiv:2205.14986); defaults are the authors' code."""

    name: str = "gmml"
    # The authors read blocks 6, 8, 10 and 12 of 12.
    read_depths: list[float] = field(
        default_factory=lambda: [0.5, 0.67, 0.83, 1.0],
        metadata={"range": (0.01, 1.0), "help": "blocks whose mean is decoded, as shares of the encoder's depth"},
    )
    # Only "more samples per step": nothing relates the views of an image.
    num_views: int = field(default=2, metadata={"range": (1, 16), "help": "crops per image"})
