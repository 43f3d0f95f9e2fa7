"""Distributed self-supervised pretraining for vision: train, grade every checkpoint, record, pull.

    import pretrain

    result = pretrain.run("mae_cifar10", overrides=["data.root=shards", "train.steps=200"])
    model = pretrain.load_backbone("models:/mae_cifar10@best")
    scores = pretrain.evaluate(result.checkpoint, protocols=["linear", "knn"])

Importing this package is cheap: a name below is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.grade import evaluate
    from pretrain.registry import load_backbone
    from pretrain.run import RunResult, resume, run

__all__ = ["RunResult", "__version__", "evaluate", "load_backbone", "resume", "run"]

__version__ = "0.1.0"

_HOMES = {
    "RunResult": "pretrain.run",
    "evaluate": "pretrain.grade",
    "load_backbone": "pretrain.registry",
    "resume": "pretrain.run",
    "run": "pretrain.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps `pretrain.run` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
