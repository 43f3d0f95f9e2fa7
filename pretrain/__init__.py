"""Distributed self-supervised pretraining for vision: train, evaluate every checkpoint, record, pull.

    import pretrain

    result = pretrain.run("mae_cifar10", overrides=["data.root=shards", "train.steps=200"])
    model = pretrain.load_backbone("models:/mae_cifar10@best")
    scores = pretrain.evaluate(result.checkpoint, protocols=["linear", "knn"])

Importing this package is cheap: a name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pretrain.version import __version__

if TYPE_CHECKING:
    from pretrain.checkpoints.references import load_backbone
    from pretrain.driver import RunResult, resume, run
    from pretrain.evaluations import evaluate

__all__ = ["RunResult", "__version__", "evaluate", "load_backbone", "resume", "run"]

_HOMES = {
    "RunResult": "pretrain.driver",
    "evaluate": "pretrain.evaluations",
    "load_backbone": "pretrain.checkpoints.references",
    "resume": "pretrain.driver",
    "run": "pretrain.driver",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
