"""Parts of checkpoints in a remote storage that nobody will publish: their processes were killed before the manifest.

Objects go to their final names, so that nothing in them tells whether whoever wrote them is still at it: a process that
was given up lives on now and then, and another machine may believe that the run is its own. What has not changed for a
while is removed. A publication that is cut off by it finds that files are missing, and publishes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoints import store

__all__ = ["QUIET_S", "Leftovers"]

QUIET_S = 600.0  # by the clock of this process: nothing new from a publication for so long, and it is over


class Leftovers:
    """What the storage of a run holds when a group of workers begins, and no manifest names. A look at the storage.

    Args:
        run_dir: Of the run.
        clock: Seconds, for tests.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._clock = store.storage_of(run_dir), clock
        self._seen = store.unpublished(self._storage)
        self._since = clock()

    def remove(self) -> None:
        """Remove what is as it was, once it has been so for `QUIET_S`. Call it while this run publishes nothing."""
        if not self._seen or self._clock() - self._since < QUIET_S:
            return
        now = store.unpublished(self._storage)
        for name in [name for name, files in self._seen.items() if now.get(name) == files]:
            self._storage.remove(name)
        self._seen = {}
