"""What a checkpoint is worth beside what its run began with, and what is said when it is pulled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluation.comparison import Difference, PerSample
from evaluation.results import ResultStore
from pretrain.comparisons import format_difference, over, words_on, worth_of
from pretrain.record.events import Evaluated
from pretrain.record.journal import Journal
from tests.pretrain.conftest import write_manifest


def scored(step: int, right: int, store: ResultStore, **metrics: float) -> Evaluated:
    """Of 100 samples the first `right` ones are right."""
    key = f"k{step}"
    store.keep(key, PerSample(np.arange(100) < right))
    metrics = {"top1": right / 100, **metrics}
    return Evaluated(step=step, protocol="knn", data="a", metrics=metrics, key=key, seconds=1.0, cached=False)


def test_over__what_was_kept_of_other_samples_says_nothing(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    first, last = scored(0, 40, store), scored(10, 50, store)
    found = over(first, last, tmp_path)
    assert found is not None and found.value == pytest.approx(0.1)
    store.keep(last.key, PerSample(np.arange(99) < 50))
    assert over(first, last, tmp_path) is None


def test_worth_of__is_of_the_step_asked_for_beside_step_0(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    scores = [scored(0, 40, store), scored(10, 41, store), scored(20, 70, store)]
    last, first = worth_of(scores, tmp_path)["knn/a"], worth_of(scores, tmp_path, step=10)["knn/a"]
    assert last.gain is not None and last.gain.value == pytest.approx(0.3) and last.shortcomings == []
    assert first.shortcomings == [
        f"knn/a: step 10 is not better, beyond noise, than what the run began with: {format_difference(first.gain, 'fraction')}"  # type: ignore[arg-type]  # noqa: E501
    ]
    assert worth_of(scores[:1], tmp_path) == {} == worth_of(scores, tmp_path, step=15)


def test_words_on__a_pulled_checkpoint_says_where_it_is_from_and_what_speaks_against_it(
    tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]
) -> None:
    runs = tmp_path / "runs"
    checkpoint = make_checkpoint(runs / "run-1", 20)
    write_manifest(checkpoint, 20, "run-1")
    store = ResultStore(runs)
    with Journal(runs / "run-1" / "evaluations.jsonl") as journal:
        for event in (scored(0, 40, store), scored(20, 30, store, top1_pixels=0.5)):
            journal.write(event)
    origin, shortcomings = words_on(checkpoint, runs)
    assert origin == "step 20 of run run-1"
    assert [line.partition(": ")[2].partition(":")[0] for line in shortcomings] == [
        "step 20 is worse than what the run began with",
        "step 20 does not beat raw pixels",
    ]
    assert words_on(checkpoint, tmp_path / "elsewhere") == (origin, [])
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "checkpoint.json").write_text(json.dumps({**manifest, "run_id": "../run-1"}))
    assert words_on(checkpoint, runs / "evaluations")[1] == []  # a name that leads out of the storage is not followed


@pytest.mark.parametrize(
    ("unit", "text"),
    [("fraction", "+2.5 points [+0.4, +4.6]"), ("dB", "+0.025 dB [+0.004, +0.046]"), ("", "+0.025 [+0.004, +0.046]")],
)
def test_format_difference__points_of_fractions_and_units_of_others(unit: str, text: str) -> None:
    assert format_difference(Difference(0.025, 0.004, 0.046), unit) == text
