"""Functions as Ray tasks that take what the trainers leave over.

On a private instance a task asks for a slot (a custom resource) and no CPU, and keeps its own priority low; on a given
cluster it asks for one CPU (or a slot where the nodes declare them) and waits until that is free. Where GPUs are left
over it asks for a share of one, and Ray shows it that GPU and no other. Either way it is a process of its own: it can
fail, hang or be killed without touching training.

Not here: what a task computes, where results are recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray

from cluster.connect import EVALUATION_SLOT, Cluster

__all__ = ["TaskQueue", "gpu_share"]


def gpu_share(cluster: Cluster, *, trainer_gpus: float, tasks: int) -> float:
    """What each of `tasks` tasks at a time can have of the GPUs that the trainers do not ask for.

    Returns:
        At most 1; 0 when the trainers take them all, so that a task never waits for a GPU that does not come free.
    """
    spare = cluster.num_gpus - trainer_gpus
    if spare >= tasks:
        return 1.0
    return max(0.0, spare) / tasks


class TaskQueue:
    """Submit functions, collect results as they come. One task per label; a label is accepted once.

    Attributes:
        gpus_per_task: What each task that is handed to Ray from now on asks for.
        held: While it is set, no further task is handed to Ray.
    """

    def __init__(
        self, cluster: Cluster, *, at_once: int | None = None, gpus_per_task: float = 0.0, max_retries: int = 2
    ) -> None:
        """
        Args:
            cluster: A live connection.
            at_once: How many tasks Ray has at a time; None: all. What Ray has, it starts wherever a CPU is free, and so
                may take those of workers that are about to begin.
            gpus_per_task: Share of a GPU that each task asks for. With 0 Ray hides no GPU from a task, so the function
                has to be told to leave them to the trainers.
            max_retries: How often Ray runs a task again whose process or node died. Exceptions are not retried.
        """
        if cluster.has_evaluation_slots:
            self._options: dict[str, Any] = {"num_cpus": 0, "resources": {EVALUATION_SLOT: 1}}
        else:
            self._options = {"num_cpus": 1}
        self._options |= {"max_retries": max_retries}
        self.gpus_per_task = gpus_per_task
        self.held = False
        self._at_once = at_once
        self._waiting: deque[tuple[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = deque()
        self._labels: dict[ray.ObjectRef, Any] = {}
        self._seen: set[Any] = set()

    def submit(self, label: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Queue `function(*arguments, **options)`; `label` (hashable) comes back with its result."""
        if label in self._seen:
            return
        self._seen.add(label)
        self._waiting.append((label, function, arguments, options))
        self._hand_over()

    @property
    def pending(self) -> set[Any]:
        """Labels that are queued or running."""
        return {*self._labels.values(), *(label for label, *_ in self._waiting)}

    def finished(self, *, timeout_s: float = 0.0) -> Iterator[tuple[Any, Any, Exception | None]]:
        """Yield (label, result, error) of every task that has ended; waits up to `timeout_s` for the first one."""
        self._hand_over()
        if not self._labels:
            return
        waiting = list(self._labels)
        done, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for reference in done:
            label = self._labels.pop(reference)
            try:
                yield label, ray.get(reference), None
            except ray.exceptions.RayError as error:
                yield label, None, error
        self._hand_over()

    def _hand_over(self) -> None:
        """Give Ray as many as it may have."""
        while self._waiting and not self.held and (self._at_once is None or len(self._labels) < self._at_once):
            label, function, arguments, options = self._waiting.popleft()
            task = ray.remote(function).options(**self._options, num_gpus=self.gpus_per_task)
            self._labels[task.remote(*arguments, **options)] = label
