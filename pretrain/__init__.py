"""Distributed self-supervised pretraining for vision: train, evaluate every checkpoint, record, pull.

    import pretrain

    result = pretrain.run("mae_cifar10", overrides=["data.root=shards", "train.steps=200"])
    model = pretrain.load_backbone("models:/mae_cifar10@best")
    scores = pretrain.evaluate(result.checkpoint, protocols=["linear", "knn"])

Importing this package is cheap: a name below is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.version import __version__

if TYPE_CHECKING:
    from pretrain.checkpoints.references import load_backbone
    from pretrain.driver.drive import RunResult
    from pretrain.driver.start import resume, run
    from pretrain.embeddings.embed import embed
    from pretrain.evaluations import evaluate
    from pretrain.exports.export import export

__all__ = ["RunResult", "__version__", "embed", "evaluate", "export", "load_backbone", "resume", "run"]

_HOMES = {
    "RunResult": "pretrain.driver.drive",
    "embed": "pretrain.embeddings.embed",
    "evaluate": "pretrain.evaluations",
    "export": "pretrain.exports.export",
    "load_backbone": "pretrain.checkpoints.references",
    "resume": "pretrain.driver.start",
    "run": "pretrain.driver.start",
}


def _refuse_shadows() -> None:
    """Name the file of a user that Python takes for one of our packages, since it comes first on the path.

    Raises:
        ImportError: There is one.
        SystemExit: The same under `python -m`, where one line is enough.
    """
    root = Path(__file__).parents[1]
    for package in ("backbones", "cluster", "data_pipelines", "evaluation", "objectives"):
        loaded = sys.modules.get(package)
        spec = find_spec(package) if loaded is None else loaded.__spec__
        found = spec.origin if spec is not None else getattr(loaded, "__file__", None)
        if found is None or Path(found).parent == root / package or not (root / package).is_dir():
            continue
        line = (
            f"{found} is taken for the package {package!r} of pretrain, since its directory comes first on "
            "the path; rename it, or start Python in another directory"
        )
        if sys.argv[:1] == ["-m"]:
            from pretrain.screen import say

            say(f"error: {line}", err=True)
            sys.exit(2)
        raise ImportError(line)


_refuse_shadows()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
