"""What of its samples a backbone was trained on, as the recipe beside it says; evaluation reads the same.

Volumes have such settings, since an npz may hold several of one patient. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

from evaluation.extraction.recipe import Reads
from pretrain.config.values import parse_yaml
from pretrain.record.run_dir import RECIPE

__all__ = ["reads_of", "trained_on"]


def trained_on(checkpoint: Path) -> Reads:
    """What the recipe in the directory of a checkpoint says; nothing is known where there is none, or a damaged one."""
    try:
        settings = parse_yaml((checkpoint / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return Reads()
    objective = settings.get("objective") if isinstance(settings, Mapping) else None
    return reads_of(objective) if isinstance(objective, Mapping) else Reads()


def reads_of(objective: Mapping[str, Any]) -> Reads:
    """What the settings of an objective, by name, say; of those without such settings nothing is known."""
    return Reads(objective.get("volume_field"), objective.get("volume_array"))
