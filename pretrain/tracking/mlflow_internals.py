"""What MLflow imports before anybody asks for it, and how a command does without: pandas.

MLflow uses it for tables, which a run does not log; with what is imported only where it is installed it is a third of
MLflow's import. `mlflow-skinny` is the same code where it is not installed, so MLflow can do without. The MLflow of a
notebook that trains stays whole: it may be asked for a table next.

`tests/integration/test_imports.py` looks at what the processes of a run hold at their end.

Not here: the calls to MLflow (`pretrain.tracking.client`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["importing_without_pandas", "leave_out_pandas"]

_unwanted: set[str] = set()


def leave_out_pandas() -> None:
    """For a process that runs a command and nothing else: from now on `importing_without_pandas` does what it says."""
    _unwanted.add("pandas")


@contextmanager
def importing_without_pandas() -> Iterator[None]:
    """In this context MLflow is imported as where pandas is not installed, if `leave_out_pandas` was called.

    What is imported already stays.
    """
    hidden = _unwanted - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python's sign for "cannot be imported"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
