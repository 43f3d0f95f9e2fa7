"""Is one checkpoint better than another, by what their evaluations say sample by sample?

Not here: the statistics (`evaluation.comparison`), evaluating (`pretrain.evaluations`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from data_pipelines.parsing import parse_json
from evaluation.comparison import Difference, difference
from evaluation.protocol import FRACTION, EvaluationError, Metric, floors, format_value, less_is_better
from evaluation.results import EvaluationResult, ResultStore
from pretrain.errors import RequestError, RunFailed, listed
from pretrain.record.events import Evaluated
from pretrain.record.journal import read_events
from pretrain.record.remote_runs import brought
from pretrain.record.run_dir import MANIFEST, RunDir, is_run_id

__all__ = [
    "Compared",
    "Worth",
    "compare",
    "format_difference",
    "on_same_data",
    "over",
    "scores_of",
    "scores_of_teacher",
    "words_on",
    "worth_of",
]


@dataclass(frozen=True)
class Compared:
    """One task that both checkpoints were evaluated by.

    Attributes:
        protocol, data: Of the task; `data` as the evaluation of the second one was given it, with the beginning of the
            digest behind it where either checkpoint was evaluated on other data of that name.
        metric: Its headline.
        first, second: The scores.
        difference: Of the second to the first; None where a result keeps nothing of single samples.
        num_test: Test samples that the scores are of; 0: not recorded.
    """

    protocol: str
    data: str
    metric: Metric
    first: float
    second: float
    difference: Difference | None
    num_test: int

    @property
    def verdict(self) -> str:
        """In words, which of them is better; not known of results from before single samples were kept."""
        if self.difference is None:
            return "not known"
        if not self.difference.is_beyond_noise:
            return "within noise"
        return "better" if self.difference.is_better(self.metric) else "worse"


def compare(first: str, second: str, *, storage: str | os.PathLike[str] = "runs") -> list[Compared]:
    """Compare two checkpoints by all tasks that both were evaluated by, on the same test samples.

    Args:
        first, second: As for `pretrain.evaluations.evaluate`.
        storage: Root of runs and evaluations, a directory or URI.

    Returns:
        In the order of protocols and data.

    Raises:
        RequestError: An unknown checkpoint, or no evaluation that both of them have.
    """
    from backbones.io import weights_digest
    from pretrain.checkpoints.gradable import gradable

    root = brought(storage)
    store = ResultStore(root)
    digests = [weights_digest(gradable(reference, root)) for reference in (first, second)]
    of_both: tuple[list[EvaluationResult], list[EvaluationResult]] = ([], [])
    for result in store.all():
        for results, digest in zip(of_both, digests, strict=True):
            if result.weights_digest == digest and result.described:
                results.append(result)
    pairs = [(one, other) for one in of_both[0] for other in of_both[1] if _are_comparable(one, other)]
    digests_of: dict[str, set[str]] = {}
    for result in chain(*of_both):
        digests_of.setdefault(result.data, set()).add(result.data_digest)
    shared = {name for name, digests in digests_of.items() if len(digests) > 1}
    found = [_compared(store, one, other, other.data in shared) for one, other in pairs]
    if not found:
        missing = [name for name, results in zip((first, second), of_both, strict=True) if not results]
        what = f"no evaluation of {listed(missing)}" if missing else "no evaluation that both have, on the same samples"
        raise RequestError(f"{what} in {root}; `pretrain evaluate CHECKPOINT --data NAME=DIRECTORY` makes one")
    return sorted(found, key=lambda one: (one.protocol, one.data))


@dataclass(frozen=True)
class Worth:
    """What a trained checkpoint of a run is worth by one task.

    Attributes:
        event: Its score.
        gain: How much higher that is than the score of what the run began with; None where that is not known.
    """

    event: Evaluated
    gain: Difference | None

    @property
    def floors(self) -> dict[str, float]:
        """What is scored without a backbone, by what people call it, as far as that is known."""
        named = floors(self.event.headline, self.event.reported)
        return {called: self.event.metrics[name] for name, called in named.items()}

    @property
    def shortcomings(self) -> list[str]:
        """What speaks against it, a line each."""
        headline, at = self.event.headline, f"{self.event.task}: step {self.event.step}"
        found = []
        if self.gain is not None and not self.gain.is_better(headline):
            how = "worse than" if self.gain.is_beyond_noise else "not better, beyond noise, than"
            found.append(f"{at} is {how} what the run began with: {format_difference(self.gain, headline.unit)}")
        score = self.event.metrics[headline.name]
        for called, floor in self.floors.items():
            if less_is_better(score, headline) >= less_is_better(floor, headline):
                found.append(f"{at} does not beat {called}: {format_value(floor, headline.unit)}")
        return found


def worth_of(evaluations: Sequence[Evaluated], storage: Path, step: int | None = None) -> dict[str, Worth]:
    """By task, what a trained checkpoint of a run is worth.

    Args:
        evaluations: Of the run.
        storage: Where the run lives.
        step: Of the checkpoint; None: of each task the last one that has a score.
    """
    by_task: dict[str, dict[int, Evaluated]] = {}
    for event in evaluations:
        by_task.setdefault(event.task, {})[event.step] = event
    found = {}
    for task, events in by_task.items():
        asked = max(events) if step is None else step
        if asked > 0 and asked in events:
            gain = over(events[0], events[asked], storage) if 0 in events else None
            found[task] = Worth(events[asked], gain)
    return found


def words_on(checkpoint: Path, storage: Path) -> tuple[str, list[str]]:
    """Of a checkpoint directory: which run and step it is of, and what speaks against it, as far as the run is here."""
    manifest = parse_json((checkpoint / MANIFEST).read_text())
    run_id, step = str(manifest.get("run_id", "")), int(manifest["step"])
    run = RunDir(storage / run_id)
    events = read_events(run.evaluations)[0] if is_run_id(run_id) and run.evaluations.is_file() else []
    scores = [event for event in events if isinstance(event, Evaluated)]
    worths = worth_of(scores, storage, step).values()
    return f"step {step} of run {run_id}", [line for one in worths for line in one.shortcomings]


def scores_of_teacher(reference: str, storage: Path) -> list[Evaluated]:
    """The scores that the run of a checkpoint recorded of it; none where it is of no run in the storage.

    Args:
        reference: As `teacher_from` of a recipe has it.
        storage: Where runs live.
    """
    from pretrain.checkpoints.references import locate, resolve
    from pretrain.checkpoints.store import CheckpointError, read_manifest

    try:
        found = locate(reference, storage)
        manifest = read_manifest(resolve(reference, storage)) if found is None else found.manifest()
    except (CheckpointError, RequestError, RunFailed):  # a file of weights, timm's, or gone: then there are none
        return []
    run = RunDir(storage / str(manifest.get("run_id", "")))
    events = read_events(run.evaluations)[0] if is_run_id(run.run_id) and run.evaluations.is_file() else []
    return [event for event in events if isinstance(event, Evaluated) and event.step == manifest["step"]]


def on_same_data(event: Evaluated, others: Sequence[Evaluated]) -> Evaluated | None:
    """The last of other scores that is by the same protocol on the same data, whatever they are called there."""
    alike = [
        other
        for other in others
        if event.data_digest and (other.protocol, other.data_digest) == (event.protocol, event.data_digest)
    ]
    return alike[-1] if alike else None


def over(first: Evaluated, last: Evaluated, storage: Path) -> Difference | None:
    """How much higher the headline of `last` is than that of `first`, of the same task; None where it is not known."""
    return _between(ResultStore(storage), last.headline.name, first.key, last.key)


def format_difference(found: Difference, unit: str) -> str:
    """A difference for people: "+2.5 points [0.4, 4.6]" of fractions, "+0.12 dB [-0.1, 0.3]" of others."""
    value, low, high = (100 * number if unit == FRACTION else number for number in found)
    what = "points" if unit == FRACTION else unit
    form = "{:+.1f}" if unit == FRACTION else "{:+.3g}"
    return f"{form.format(value)} {what}".rstrip() + f" [{form.format(low)}, {form.format(high)}]"


def _are_comparable(one: EvaluationResult, other: EvaluationResult) -> bool:
    """Whether two results are of the same protocol on the same samples, seen and scored alike."""
    return all(
        _what_decides(one, name) == _what_decides(other, name)
        for name in ("protocol", "version", "data_digest", "image_size", "seed", "num_test", "num_scored")
    )


def _what_decides(result: EvaluationResult, name: str) -> object:
    return getattr(result, name) if hasattr(result, name) else result.details.get(name)


def _compared(store: ResultStore, one: EvaluationResult, other: EvaluationResult, name_is_shared: bool) -> Compared:
    metric = next(metric for metric in other.described if metric.headline)
    known = _between(store, metric.name, one.key, other.key)
    num_test = int(other.details.get("num_scored", other.details.get("num_test", 0)))
    data = f"{other.data}:{other.data_digest[:8]}" if name_is_shared else other.data
    return Compared(other.protocol, data, metric, one.metrics[metric.name], other.metrics[metric.name], known, num_test)


def _between(store: ResultStore, metric: str, first: str, second: str) -> Difference | None:
    """Of the results of two keys; None where one keeps nothing of single samples, or what they keep does not match."""
    before, after = store.per_sample(first), store.per_sample(second)
    if before is None or after is None:
        return None
    try:
        return difference(metric, before, after)
    except EvaluationError:  # of other samples, or of a protocol whose headline is none of the known sums
        return None


def scores_of(compared: Sequence[Compared]) -> list[list[str]]:
    """Rows of a table: task, both scores, difference with its interval, n, verdict."""
    return [
        [
            f"{one.protocol}/{one.data} {one.metric.name}",
            format_value(one.first, one.metric.unit),
            format_value(one.second, one.metric.unit),
            "" if one.difference is None else format_difference(one.difference, one.metric.unit),
            str(one.num_test or ""),
            one.verdict,
        ]
        for one in compared
    ]
