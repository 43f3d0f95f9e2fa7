"""The part of the report that says what data a run has seen: in training, and in the evaluations of its checkpoints.

Not here: looking at the data themselves (`pretrain data stats`, `pretrain data show`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pretrain.checkpoints.store import CheckpointError, published
from pretrain.record.events import Evaluated, Event, SourceOpened
from pretrain.record.run_dir import RunDir

__all__ = ["UNKNOWN", "data_name", "evaluated_on", "seen_words", "setting_of", "sources"]

UNKNOWN = "?"
DIGITS = 12  # of digests that are shown


def sources(
    run: RunDir,
    stages: Sequence[dict[str, Any]],
    events: Iterable[Event],
    training: Mapping[int, Mapping[str, float]],
) -> list[tuple[str, ...]]:
    """What was trained on: name, samples, how many were seen, what packing left out, digest; a row for each source."""
    opened = {(event.stage, event.name): event for event in events if isinstance(event, SourceOpened)}
    seen = max((values.get("samples_seen", 0.0) for values in training.values()), default=0.0)
    if not opened:  # of an older version: its checkpoints know how many samples there were in all
        order = _order_of(run)
        samples, digest = str(order.get("num_samples", UNKNOWN)), str(order.get("dataset", UNKNOWN))[:DIGITS]
        return [(data_name(stages[-1]), samples, f"{seen:.0f}", "not recorded", digest)]
    rows: list[tuple[str, ...]] = []
    for source in opened.values():
        name = f"{source.name}: {source.shards}" if source.name else source.shards
        counted = f"{source.samples or UNKNOWN} in {source.num_shards} shards"
        splits = ", ".join(f"{split} {number}" for split, number in source.splits.items())
        own = seen * source.share
        passes = f", {own / source.samples:.3g} passes" if source.samples else ""
        left_out = [
            f"{number} {what}"
            for number, what in ((source.duplicates, "duplicates"), (source.rejected, "damaged"))
            if number >= 0
        ]
        rows.append(
            (
                f"{name} ({source.stage})" if source.stage else name,
                f"{counted} (packed: {splits})" if splits else counted,
                "by stage not recorded" if len(stages) > 1 else f"{own:.0f}{passes}",
                ", ".join(left_out) or "not recorded",
                source.digest[:DIGITS],
            )
        )
    return rows


def _order_of(run: RunDir) -> Mapping[str, Any]:
    """What the newest checkpoint says of the order of its samples."""
    for checkpoint in reversed(published(run.path)):
        with suppress(CheckpointError, KeyError, TypeError):  # a damaged one is refused by whoever uses it
            return dict(checkpoint.manifest()["stream"]["order"])
    return {}


def seen_words(recipe: Mapping[str, Any], training: Mapping[int, Mapping[str, float]]) -> str:
    """What training left out of what it read."""
    counts = [values["corrupt_samples"] for values in training.values() if "corrupt_samples" in values]
    if counts:
        return f"Samples that training could not read and replaced by others: {max(counts):.0f}."
    if setting_of(recipe, "data.max_corrupt_fraction") == 0:
        return "Training replaces no sample: the first that cannot be read ends it (data.max_corrupt_fraction=0)."
    return ""


def evaluated_on(evaluations: Iterable[Event]) -> list[tuple[str, ...]]:
    """Of each data set: name, protocols, samples of train, test and both, digest; protocols differ."""
    groups: dict[tuple[str, str], list[Evaluated]] = {}
    for event in evaluations:
        if isinstance(event, Evaluated):
            groups.setdefault((event.data, event.data_digest), []).append(event)
    rows: list[tuple[str, ...]] = []
    for (data, digest), found in groups.items():
        fitted, reported, copies = (
            sorted({getattr(event, name) for event in found} - {nothing})
            for name, nothing in (("num_train", 0), ("num_test", 0), ("num_test_in_train", -1))
        )
        protocols = ", ".join(sorted({event.protocol for event in found}))
        counts = [" or ".join(map(str, numbers)) or "not recorded" for numbers in (fitted, reported, copies)]
        rows.append((data, protocols, *counts, digest[:DIGITS] or "not recorded"))
    return rows


def data_name(recipe: Mapping[str, Any]) -> str:
    source, mixture = setting_of(recipe, "data.train"), setting_of(recipe, "data.mixture")
    if source is not None or not isinstance(mixture, list):
        return str(source)
    return ", ".join(str(setting_of(part, "name")) for part in mixture)


def setting_of(recipe: Mapping[str, Any], key: str) -> Any:
    """A setting of a recipe that a run has written; `UNKNOWN` where the recipe is damaged."""
    node: Any = recipe
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return UNKNOWN
        node = node[name]
    return node
