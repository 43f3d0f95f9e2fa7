"""What a frozen backbone is worth: protocols that turn (checkpoint, data) into scores, each computed once.

Importing this package loads no torch; names resolve on first use. Protocol facts (names, metrics, parameters) are found
with `evaluation.registry`, which stays light enough for the command line.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "EvaluationData": "evaluation.data",
    "EvaluationError": "evaluation.protocol",
    "EvaluationResult": "evaluation.results",
    "evaluate": "evaluation.runner",
}

__all__ = ["EvaluationData", "EvaluationError", "EvaluationResult", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
