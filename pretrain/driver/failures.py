"""What a restart of the workers cannot mend, and how the end of them is told in one line.

A restart mends the loss of a process or a machine, which the other ranks see as a `RuntimeError` of a collective, and
trouble on the way to files and hosts, an `OSError`. Not here: which rank is to blame (`cluster.workers.classify`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backbones.errors import BackboneError
from data_pipelines.errors import DataError, LoaderError
from objectives.errors import ObjectiveError
from pretrain.checkpoints.store import CheckpointError
from pretrain.errors import RequestError, last_line
from pretrain.record.disk import DiskFull

if TYPE_CHECKING:
    from cluster.workers import End

__all__ = ["FATAL", "restart_reason", "told"]

# Mistakes in code, of ours or a plug-in, which the next attempt makes again.
_BUGS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
)
FATAL = (RequestError, ValueError, ArithmeticError, DiskFull, CheckpointError, *_BUGS)
# Whose message is a whole sentence for people, which the name of a class would only stand before.
_SAYS_ALL = (BackboneError, CheckpointError, DataError, DiskFull, LoaderError, ObjectiveError, RequestError)


def told(error: BaseException) -> str:
    """One line about workers that have ended for good; `error` is the `cluster.workers.WorkersFailed`."""
    return _without_class(last_line(error), error.__cause__)


def restart_reason(end: End) -> str:
    """One line about workers that are started again."""
    return _without_class(end.reason, end.cause)


def _without_class(line: str, cause: BaseException | None) -> str:
    if not isinstance(cause, _SAYS_ALL):
        return line
    return line.removeprefix(f"{type(cause).__module__}.{type(cause).__qualname__}: ")
