"""What can happen to a run: one frozen dataclass per kind of record in the event log and among the evaluations.

Writers construct events, readers match on their types, so that a renamed field is an error of the type checker and not
a surprise for a user. On disk an event is one JSON object with `time`, `kind` and the fields of its class.

Reading is lenient where versions differ and strict where something is broken: an unknown kind is passed over, unknown
fields are dropped, but a missing or mistyped field makes the record damaged. Names that changed are read under the old
one as well (`OLD_KINDS`, `OLD_METRICS`), for runs that were begun before.

Not here: the file (`pretrain.record.journal`), where it lies (`pretrain.record.run_dir`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from evaluation.protocol import CI_SUFFIXES, Metric, format_interval
from evaluation.registry import describe

__all__ = [
    "CheckpointPublished",
    "DamagedEvent",
    "Evaluated",
    "EvaluationFailed",
    "Event",
    "Failed",
    "Finished",
    "Initialized",
    "Metrics",
    "Preparing",
    "Regrouping",
    "Rejected",
    "Resumed",
    "SourceOpened",
    "StageBegan",
    "Start",
    "Startup",
    "Stopped",
    "Taught",
    "Visualizations",
    "Warned",
    "from_json",
]

LAST_TIME = 1e11  # Unix seconds; later ones are damage that no calendar can show
OLD_KINDS = {"pictures": "visualizations"}
OLD_METRICS = {"images_per_s": "samples_per_s"}


class DamagedEvent(ValueError):
    """A record of a known kind that lacks a field or holds a value of another type."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all have in common.

    Attributes:
        kind: What the class is called on disk.
        time: Unix seconds; when it was made.
    """

    kind: ClassVar[str]
    time: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """The record: plain values, except that floats may be non-finite (`pretrain.record.journal` spells those)."""
        mine = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "time"}
        return {"time": self.time, "kind": self.kind, **mine}


@dataclass(frozen=True, kw_only=True)
class Preparing(Event):
    """Rank 0 has begun something that takes a while before there are steps; `what` says it in a few words."""

    kind: ClassVar[str] = "preparing"
    what: str


@dataclass(frozen=True, kw_only=True)
class Start(Event):
    """A group of workers begins to train, for the first time or again.

    Attributes:
        step: Optimizer steps done so far.
        total_steps: Of the whole run.
        device: Of rank 0.
        exact: Whether a resumed run sees the samples that an unbroken one would.
        pids: Process of each rank.
        decoder: Of JPEGs.
        epochs: Passes over the data that the steps of this stage are; 0 where nobody can say.
        size: Parameters of the model and what they take, one line; empty where nobody has looked.
    """

    kind: ClassVar[str] = "start"
    step: int
    total_steps: int
    world_size: int
    device: str
    exact: bool = True
    pids: tuple[int, ...] = ()
    decoder: str = ""
    epochs: float = 0.0
    size: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceOpened(Event):
    """Samples that a stage learns from: all of them, or one part of a mixture.

    Attributes:
        step: Steps of the run that are done.
        stage: Its name; empty in a run without stages.
        name: Of the part; empty where there is but one source.
        shards: As the recipe names them.
        num_shards: Tar files.
        samples: In them, as far as they are used; 0 where nobody has counted.
        digest: SHA-256 of names, order and content of the samples; of shards that nobody has indexed, of their names.
        share: Of the samples that training takes, how many are from here, in [0, 1].
        fields: Names that every sample has.
        splits: Samples of each split of the packed data that these are from, as their `dataset.json` says.
        duplicates, rejected: Equal and damaged samples that packing left out of these data; -1: not recorded.
    """

    kind: ClassVar[str] = "source"
    step: int
    stage: str
    name: str
    shards: str
    num_shards: int
    samples: int
    digest: str
    share: float
    fields: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = -1
    rejected: int = -1


@dataclass(frozen=True, kw_only=True)
class Startup(Event):
    """Where the time before the first step went, in seconds of wall clock; CPU seconds are those of rank 0."""

    kind: ClassVar[str] = "startup"
    total_s: float
    placed_s: float
    imported_s: float
    joined_s: float
    built_s: float
    first_batch_s: float
    first_step_s: float
    worker_cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """A checkpoint was restored.

    Attributes:
        step: Optimizer steps it was taken after.
        tensors, tensors_total: Tensors of the backbone that came back equal, and those that were saved.
        optimizer_step: What the restored optimizer counts.
        rng_states: Ranks that got their random state back; 0 after a change of the world size.
        saved_world_size: Ranks that wrote it.
        samples_seen: Samples of all ranks until then.
        epoch, position: Where the stream goes on.
        reference: The other run's checkpoint that it is (`resume_from`); empty: the run's own.
    """

    kind: ClassVar[str] = "resumed"
    step: int
    tensors: int
    tensors_total: int
    optimizer_step: int
    rng_states: int
    saved_world_size: int
    samples_seen: int
    epoch: int
    position: int
    reference: str = ""


@dataclass(frozen=True, kw_only=True)
class Initialized(Event):
    """The backbone begins with weights that were made elsewhere; the evaluation of step 0 is of these.

    Attributes:
        step: Optimizer steps done so far.
        reference: Where they are from (`init_from`).
        sha256: Of the file.
        loaded, total: Tensors of the backbone that were given, resampled ones included, and all that it has.
        resampled: Names of those brought to the backbone's shape.
        missing: Names that the file has not; they begin at random.
        unexpected: Names that the backbone has not; they are not used.
    """

    kind: ClassVar[str] = "initialized"
    step: int
    reference: str
    sha256: str
    loaded: int
    total: int
    resampled: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Taught(Event):
    """Frozen teachers of a stage have their weights.

    Attributes:
        step: Steps of the run that are done.
        stage: Its name; empty in a run without stages.
        teacher: Where they come from, for people: the reference, its step and architecture.
    """

    kind: ClassVar[str] = "teacher"
    step: int
    stage: str
    teacher: str


@dataclass(frozen=True, kw_only=True)
class StageBegan(Event):
    """A later stage of the run begins with the weights of the one before.

    Attributes:
        step: Steps of the run that are done.
        stage: Its name.
        loaded, total: Tensors that were taken over as they are, and all that the stage has.
        resampled: Those that were fitted to another shape.
        fresh: Those that stay as they were initialized.
        moments: Whether the optimizer goes on with the moments of the stage before.
    """

    kind: ClassVar[str] = "stage"
    step: int
    stage: str
    loaded: int
    total: int
    resampled: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    moments: bool = False


@dataclass(frozen=True, kw_only=True)
class Metrics(Event):
    """Numbers of a logged step, means over the ranks: `loss`, `lr`, `samples_per_s` and what the objective adds."""

    kind: ClassVar[str] = "metrics"
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CheckpointPublished(Event):
    """A checkpoint is complete; `path` is relative to the run directory."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Visualizations(Event):
    """A picture was written; `path` is relative to the run directory.

    Attributes:
        data, shows: Of a picture of what a checkpoint makes of evaluation data, the name of these and its kind; both
            are empty where it shows what the objective sees and makes in training.
    """

    kind: ClassVar[str] = "visualizations"
    step: int
    path: str
    data: str = ""
    shows: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something a person should know. `about` is a word for machines, `text` a sentence for people.

    Attributes:
        ranks: Whom it is about; empty when that is all of them, or nobody knows.
    """

    kind: ClassVar[str] = "warning"
    step: int
    about: str
    text: str
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The last step is done."""

    kind: ClassVar[str] = "finished"
    step: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The workers ended on request, with a checkpoint of `step`; the run can go on."""

    kind: ClassVar[str] = "stopped"
    step: int


@dataclass(frozen=True, kw_only=True)
class Regrouping(Event):
    """The workers ended with a checkpoint of `step`, to begin again with others; `why` is one line."""

    kind: ClassVar[str] = "regrouping"
    step: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """Training gave up; `error` is one line."""

    kind: ClassVar[str] = "failed"
    error: str


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """A checkpoint has scores.

    Attributes:
        step: Of the checkpoint.
        protocol, data: What was asked.
        metrics: Scores by name.
        described: What they mean: the fields of a `Metric` each; empty in records of older versions.
        key: Of the result in the store of evaluations.
        seconds: Wall time of the computation.
        cached: Whether the result was known before.
        num_test: Test samples that the headline is of; 0 in records of older versions.
        num_train: Samples that its protocol has fitted to; 0 where it fits nothing, and in records of older versions.
        num_test_in_train: Test samples with the same content as one of train; -1: nobody has counted.
        data_digest, weights_digest: What the data and the weights were, whatever they are called; empty in records of
            older versions.
    """

    kind: ClassVar[str] = "evaluation"
    step: int
    protocol: str
    data: str
    metrics: Mapping[str, float]
    key: str
    seconds: float
    cached: bool
    described: tuple[Mapping[str, Any], ...] = ()
    num_test: int = 0
    num_train: int = 0
    num_test_in_train: int = -1
    data_digest: str = ""
    weights_digest: str = ""

    @cached_property
    def reported(self) -> tuple[Metric, ...]:
        """What each of `metrics` means."""
        return describe(self.protocol, self.metrics, self.described)

    @property
    def headline(self) -> Metric:
        """The metric that stands for the protocol."""
        return next(metric for metric in self.reported if metric.headline)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of the 95 % interval of its headline; None where none was recorded."""
        low, high = (self.metrics.get(self.headline.name + suffix) for suffix in CI_SUFFIXES)
        return None if low is None or high is None else (low, high)

    @property
    def interval(self) -> str:
        """`bounds` for people; empty where none were recorded."""
        return "" if self.bounds is None else format_interval(*self.bounds, self.headline.unit)

    @property
    def task(self) -> str:
        """`PROTOCOL/DATA`."""
        return f"{self.protocol}/{self.data}"


@dataclass(frozen=True, kw_only=True)
class EvaluationFailed(Event):
    """A checkpoint could not be evaluated. On disk an evaluation with `error` for `metrics`.

    Attributes:
        step: Of the checkpoint.
        protocol, data: What was asked.
        error: Why, in one line.
        left_out: Nothing has failed: a suite was asked for, and this protocol of it is nothing for the checkpoint or
            its data, now and later.
    """

    kind: ClassVar[str] = "evaluation"
    step: int
    protocol: str
    data: str
    error: str
    left_out: bool = False

    @property
    def task(self) -> str:
        """`PROTOCOL/DATA`."""
        return f"{self.protocol}/{self.data}"


@dataclass(frozen=True, kw_only=True)
class Rejected(Event):
    """A line of the event log that MLflow does not get, and why."""

    kind: ClassVar[str] = "rejected"
    reason: str
    line: str


_KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        Preparing,
        Start,
        SourceOpened,
        Startup,
        Resumed,
        Initialized,
        StageBegan,
        Taught,
        Metrics,
        CheckpointPublished,
        Visualizations,
        Warned,
        Finished,
        Stopped,
        Regrouping,
        Failed,
        Evaluated,
        Rejected,
    )
}


@dataclass(frozen=True)
class _Part:
    """One field of a class of events, as it is read."""

    name: str
    hint: Any
    fits: Callable[[Any], bool]
    is_tuple: bool
    is_needed: bool


_PARTS: dict[type[Event], list[_Part]] = {}


def from_json(record: Mapping[str, Any]) -> Event | None:
    """The event that a record tells; None when its kind is not known here.

    Raises:
        DamagedEvent: A field is missing or has a value of another type; names the kind and the field.
    """
    kind = record.get("kind")
    if not isinstance(kind, str):
        raise DamagedEvent("an event without 'kind'")
    event = _KINDS.get(OLD_KINDS.get(kind, kind))
    if event is Evaluated and "error" in record:
        event = EvaluationFailed
    if event is None:
        return None
    if event is Metrics and isinstance(values := record.get("values"), Mapping):
        record = {**record, "values": {OLD_METRICS.get(name, name): value for name, value in values.items()}}
    if isinstance(when := record.get("time"), float | int) and not 0 <= when < LAST_TIME:
        raise DamagedEvent(f"{kind}: 'time' is {when}, expected Unix seconds")
    given: dict[str, Any] = {}
    for part in _parts(event):
        if part.name in record:
            value = record[part.name]
            if not part.fits(value):
                expected = getattr(part.hint, "__name__", part.hint)
                raise DamagedEvent(f"{kind}: {part.name!r} is {value!r:.80}, expected {expected}")
            given[part.name] = tuple(value) if part.is_tuple else value
        elif part.is_needed:
            raise DamagedEvent(f"{kind}: no {part.name!r}")
    made = event(**given)
    if isinstance(made, Evaluated):
        try:
            _ = made.headline
        except (ValueError, TypeError, LookupError, StopIteration) as error:
            raise DamagedEvent(f"{kind}: its metrics say nothing ({error})") from None
    return made


def _parts(event: type[Event]) -> list[_Part]:
    """The fields of a class of events; looked up once per class, as a long run has a million events."""
    if event not in _PARTS:
        hints = get_type_hints(event)
        _PARTS[event] = [_part_of(part, hints[part.name]) for part in fields(event)]
    return _PARTS[event]


def _part_of(part: Field[Any], hint: Any) -> _Part:
    is_needed = part.name == "time" or (part.default is MISSING and part.default_factory is MISSING)
    return _Part(part.name, hint, _fitting(hint), get_origin(hint) is tuple, is_needed)


def _fitting(hint: Any) -> Callable[[Any], bool]:
    """The test whether a value of JSON has the type of a field."""
    if get_origin(hint) is tuple:
        is_item = _fitting(get_args(hint)[0])
        return lambda value: isinstance(value, list | tuple) and all(map(is_item, value))
    if get_origin(hint) is Mapping:
        is_value = _fitting(get_args(hint)[1])
        return lambda value: isinstance(value, Mapping) and all(map(is_value, value.values()))
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return lambda value: isinstance(value, hint)
