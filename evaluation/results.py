"""Evaluation results by key, one JSON file each in `evaluations/` of a root: computed once and published whole.

Beside it is `KEY.npz`: what the headline is made of sample by sample, for comparisons, and arrays that pictures are
drawn of.

Not here: frozen features (`evaluation.features`), who computes (`evaluation.lease`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError
from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from evaluation.comparison import PerSample
from evaluation.lease import compute_once
from evaluation.protocol import BrokenError, Metric

__all__ = ["EvaluationResult", "ResultStore"]

FORMAT = 1
SHOWN = "shown."  # before the names of arrays of a KEY.npz that are for pictures
_KINDS = {  # of the values of a record; those of `metrics` are asked whether they are finite
    "key": str,
    "protocol": str,
    "version": int,
    "data": str,
    "data_digest": str,
    "weights_digest": str,
    "metrics": dict,
    "details": dict,
    "seconds": int | float,
}


@dataclass(frozen=True)
class EvaluationResult:
    """One score card: (weights, protocol, data) -> metrics.

    Attributes:
        key: SHA-256 of weights digest, feature recipe, data digest and protocol; see `runner`.
        data: the name the data was given by the caller, not part of the key.
        metrics: the protocol's numbers by name.
        described: unit and direction of each of them; empty in results of older versions.
        seconds: wall time of the computation; a cached result keeps that of the original.
        cached: True when this call computed nothing.

    Raises:
        BrokenError: a metric is not finite.
    """

    key: str
    protocol: str
    version: int
    data: str
    data_digest: str
    weights_digest: str
    metrics: dict[str, float]
    details: dict[str, Any]
    seconds: float
    cached: bool = False
    described: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        bad = {name: value for name, value in self.metrics.items() if not math.isfinite(value)}
        if bad:
            raise BrokenError(f"protocol {self.protocol!r} on {self.data!r} gave non-finite metrics: {bad}")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        """Inverse of `to_json`; `ValueError` when `text` is something else."""
        fields = parse_json(text)
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise ValueError(f"not an evaluation result of format {FORMAT}")
        if wrong := [name for name, kind in _KINDS.items() if not isinstance(fields.get(name), kind)]:
            raise ValueError(f"not an evaluation result: {', '.join(wrong)} missing or of another type")
        try:
            described = tuple(Metric(**metric) for metric in fields.pop("described", ()))
            result = cls(**fields, described=described)
        except TypeError as error:
            raise ValueError(f"not an evaluation result: {error}") from error
        if described and not any(metric.headline and metric.name in result.metrics for metric in described):
            raise ValueError("not an evaluation result: no headline among its metrics")
        return result


class ResultStore:
    """The results under one root."""

    def __init__(self, root: Path):
        self._root = root / "evaluations"

    def find(self, key: str) -> EvaluationResult | None:
        """The stored result, marked cached; a file that is not a result of this key counts as absent."""
        try:
            result = EvaluationResult.from_json((self._root / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return dataclasses.replace(result, cached=True) if result.key == key else None

    def per_sample(self, key: str) -> PerSample | None:
        """What the headline of a result is made of; None where nothing was kept, or where it is damaged."""
        try:
            arrays = decode_arrays((self._root / f"{key}.npz").read_bytes())
            return PerSample(arrays["values"], arrays.get("groups"))
        except (OSError, DataError, KeyError):
            return None

    def shown(self, key: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays that pictures of a result are drawn of; none where none were kept, or where they are damaged."""
        try:
            arrays = decode_arrays((self._root / f"{key}.npz").read_bytes())
        except (OSError, DataError):
            return {}
        return {name.removeprefix(SHOWN): array for name, array in arrays.items() if name.startswith(SHOWN)}

    def keep(
        self,
        key: str,
        of_samples: PerSample | None,
        shown: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        """Store what goes with a result, before the result itself is published.

        Args:
            of_samples: What its headline is made of; None: its protocol does not say.
            shown: What pictures of it are drawn of, by name.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        arrays = {f"{SHOWN}{name}": array for name, array in shown.items()}
        if of_samples is not None:
            arrays["values"] = of_samples.values
            if of_samples.groups is not None:
                arrays["groups"] = of_samples.groups
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_atomically(self._root / f"{key}.npz", content.getvalue())

    def all(self) -> Iterator[EvaluationResult]:
        """Every result that there is, in the order of their keys; files that are none are passed over."""
        for path in sorted(self._root.glob("*.json")):
            if (result := self.find(path.stem)) is not None:
                yield result

    def publish(self, result: EvaluationResult) -> EvaluationResult:
        self._root.mkdir(parents=True, exist_ok=True)
        write_atomically(self._root / f"{result.key}.json", result.to_json().encode())
        return result

    def once(
        self, key: str, make: Callable[[], EvaluationResult], *, data: str, force: bool = False
    ) -> EvaluationResult:
        """The stored result, else that of `make`, computed by one process only; `force` computes in any case.

        Args:
            data: the name under which the caller knows the data; the result carries it.
        """
        if force:
            return self.publish(make())
        lease = self._root / f"{key}.lease"
        result, _ = compute_once(lease, lambda: self.find(key), lambda: self.publish(make()))
        return dataclasses.replace(result, data=data)
