"""Global batch = micro-batch x accumulation x workers: fills in what is open, names the nearest numbers that fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pretrain.config.mistakes import Mistakes
from pretrain.config.schema import TrainConfig

__all__ = ["with_batch_arithmetic"]


def with_batch_arithmetic(train: TrainConfig, mistakes: Mistakes) -> TrainConfig:
    """Fill in micro_batch_size, accumulation and pictures_every, so that global = micro x accumulation x workers."""
    keys = ("train.global_batch_size", "train.micro_batch_size", "train.accumulation", "train.workers")
    micro, accumulation = train.micro_batch_size, train.accumulation
    if micro is None and accumulation is None:
        accumulation = 1
    given = micro if micro is not None else accumulation
    assert given is not None
    if mistakes.sound(*keys):
        quotient, rest = divmod(train.global_batch_size, given * train.workers)
        both = micro is not None and accumulation is not None
        wanted = accumulation if both else quotient
        if rest or quotient != wanted or not quotient:
            mistakes.add(*_batch_mistake(train, mistakes.latest(*keys)))
        elif micro is None:
            micro = quotient
        else:
            accumulation = quotient
        _check_fewest(replace(train, micro_batch_size=micro), mistakes)
    pictures_every = train.checkpoint_every if train.pictures_every is None else train.pictures_every
    return replace(train, micro_batch_size=micro, accumulation=accumulation, pictures_every=pictures_every)


def _check_fewest(train: TrainConfig, mistakes: Mistakes) -> None:
    """Whether the run can go on with fewer workers at all, where it is asked to."""
    key, fewest, micro = "train.min_workers", train.min_workers, train.micro_batch_size
    if fewest is None or micro is None or not mistakes.sound(key) or fewest == train.workers:
        return
    if fewest > train.workers:
        problem = f"the most workers are {train.workers}; nearest: train.workers=[{train.workers},{fewest}]"
        mistakes.add(key, fewest, problem)
        return
    parts = train.global_batch_size // micro  # micro-batches of a step, of which each worker gets equally many
    if not any(parts % workers == 0 for workers in range(fewest, train.workers)):
        lower = max((workers for workers in range(1, fewest) if parts % workers == 0), default=train.workers)
        unit = f"the {parts} micro-batches of a step cannot be divided among {fewest} to {train.workers - 1} workers"
        mistakes.add(key, fewest, f"{unit}; nearest: train.workers=[{lower},{train.workers}]")


def _batch_mistake(train: TrainConfig, key: str) -> tuple[str, Any, str]:
    """The arithmetic that does not work out, and the nearest numbers that do."""
    total, workers = train.global_batch_size, train.workers
    micro, accumulation = train.micro_batch_size, train.accumulation
    unit = (micro or 1) * (accumulation or 1) * workers
    below = total - total % unit
    totals = [unit] if micro and accumulation else [size for size in (below, below + unit) if size]
    remedies = [f"train.global_batch_size={' or '.join(map(str, totals))}"]
    per_worker = total // workers if total % workers == 0 else None
    if per_worker and micro:
        near = _nearest_divisors(per_worker, micro)
        pairs = [f"{size} (accumulation {per_worker // size})" for size in near]
        remedies.append(f"train.micro_batch_size={' or '.join(pairs)}")
    elif per_worker and accumulation:
        remedies.append(f"train.accumulation={' or '.join(map(str, _nearest_divisors(per_worker, accumulation)))}")
    else:
        remedies.append(f"train.workers={' or '.join(map(str, _nearest_divisors(total, workers)))}")
    arithmetic = f"micro {micro or '?'} x accumulation {accumulation or '?'} x workers {workers}"
    verdict = f"is {unit}, not" if micro and accumulation else "can not be"
    problem = f"{arithmetic} {verdict} the global batch {total}; nearest: {', '.join(remedies)}"
    return key, getattr(train, key.removeprefix("train.")), problem


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next to `wanted`, ascending."""
    below = next(size for size in range(min(wanted, number), 0, -1) if number % size == 0)
    above = next((size for size in range(wanted + 1, number + 1) if number % size == 0), below)
    return sorted({below, above})
