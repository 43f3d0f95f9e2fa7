"""Where a run may be: on this machine or a cluster, on how many GPUs, and driven by this process alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pretrain.config.schema import Recipe
from pretrain.errors import RequestError
from pretrain.machine import misfit, this_machine
from pretrain.record.lock import LOOKED_AT_S, hold, holder
from pretrain.record.run_dir import RunDir
from pretrain.screen import say

if TYPE_CHECKING:
    from cluster.connect import Cluster

__all__ = ["given_address", "gpus_per_worker", "only_driver", "require_room_for_workers"]


def require_room_for_workers(recipe: Recipe) -> None:
    """Warn of workers that are many on this machine, which a private Ray would start without a word.

    Raises:
        RequestError: There are so many that it cannot be meant, or not the GPUs that they need.
    """
    found = misfit(recipe, this_machine())
    if found is not None and found.is_refused:
        raise RequestError(found.text)
    if found is not None:
        say(f"warning: {found.text}", err=True)


def given_address(recipe: Recipe) -> str | None:
    """Of the cluster that a run is for; None: a private Ray."""
    return recipe.cluster.address or os.environ.get("RAY_ADDRESS")


def gpus_per_worker(cluster: Cluster, recipe: Recipe) -> tuple[float, str | None]:
    """As the recipe says, or as many as there are for each; and what is to be said of it.

    Raises:
        RequestError: There are some, but too few.
    """
    from cluster import connect

    if recipe.cluster.gpus_per_worker is not None:
        return recipe.cluster.gpus_per_worker, None
    try:
        fewest = recipe.train.min_workers or recipe.train.workers
        return connect.gpus_per_worker(cluster, recipe.train.device, fewest)
    except ValueError as error:
        raise RequestError(str(error)) from None


@contextmanager
def only_driver(run_dir: RunDir) -> Iterator[None]:
    """Hold the run's lock: two drivers would train into the same checkpoints."""
    until = time.monotonic() + LOOKED_AT_S
    while (lock := hold(run_dir.driver_lock)) is None and time.monotonic() < until:
        time.sleep(LOOKED_AT_S / 10)
    if lock is None:
        raise RequestError(f"run {run_dir.run_id} is already driven by process {holder(run_dir.driver_lock)}")
    with lock:
        yield
