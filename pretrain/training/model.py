"""The model of a recipe: its objective around its backbone, with initial weights from torch's global generator."""

from __future__ import annotations

from backbones.registry import from_config
from objectives import registry
from objectives.base import Objective
from pretrain.config.schema import Recipe

__all__ = ["build_objective"]


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's objective around its backbone.

    Raises:
        BackboneError: The backbone cannot be built like this.
        ObjectiveError: The objective is not known, or needs what this backbone has not.
    """
    backbone = from_config(recipe.backbone)
    return registry.load(recipe.objective.name)(backbone, recipe.objective)
