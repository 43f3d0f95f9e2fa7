"""Results by key: computed once and published whole, also over processes that race."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation.comparison import PerSample
from evaluation.protocol import EvaluationError, Metric
from evaluation.results import EvaluationResult, ResultStore

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT = EvaluationResult(
    key="k1",
    protocol="knn",
    version=1,
    data="colours",
    data_digest="d",
    weights_digest="w",
    metrics={"top1": 0.25},
    details={"k": 20},
    seconds=1.5,
)

# computes a result slowly and logs that it did; arguments: storage root, log file
RACER = """
import sys, time
from pathlib import Path
from evaluation.results import EvaluationResult, ResultStore

root, log = Path(sys.argv[1]), Path(sys.argv[2])

def make():
    with open(log, "a") as file:
        file.write("computed\\n")
    time.sleep(1.0)
    return EvaluationResult("k1", "knn", 1, "colours", "d", "w", {"top1": 0.25}, {}, 1.0)

result = ResultStore(root).once("k1", make, data="colours")
print(result.metrics["top1"], result.cached)
"""


def _python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_result__json_round_trip() -> None:
    assert EvaluationResult.from_json(RESULT.to_json()) == RESULT


def test_result__says_what_its_numbers_mean_after_a_round_trip() -> None:
    meters = Metric("error", unit="m", better="lower", headline=True)
    result = dataclasses.replace(RESULT, metrics={"error": 0.5}, described=(meters,))
    assert EvaluationResult.from_json(result.to_json()).described == (meters,)


def test_result__of_an_older_version_is_read() -> None:
    fields = json.loads(RESULT.to_json())
    del fields["described"]
    assert EvaluationResult.from_json(json.dumps(fields)) == RESULT


def test_result__non_finite_metrics_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"non-finite metrics: \{'top1': nan\}"):
        dataclasses.replace(RESULT, metrics={"top1": float("nan"), "top5": 1.0})


def test_results__second_call_is_cached_and_takes_the_callers_name(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    assert store.once("k1", lambda: RESULT, data="colours") == RESULT
    again = store.once("k1", lambda: pytest.fail("computed twice"), data="colours-v2")
    assert again == dataclasses.replace(RESULT, cached=True, data="colours-v2")
    assert [path.name for path in (tmp_path / "evaluations").iterdir() if path.suffix == ".lease"] == []


def test_results__force_replaces(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.publish(RESULT)
    other = dataclasses.replace(RESULT, metrics={"top1": 0.5})
    assert store.once("k1", lambda: other, data="colours", force=True) == other
    found = store.find("k1")
    assert found is not None and found.metrics == {"top1": 0.5}


def _with(**changed: object) -> str:
    return json.dumps({**json.loads(RESULT.to_json()), **changed})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 99}',
        '{"format": 1, "key": "k1"}',
        _with(metrics=None),
        _with(metrics={"top1": "high"}),
        _with(details=[1]),
        _with(data_digest=3),
        _with(described=[{"name": "top5", "headline": True}]),
    ],
)
def test_results__a_damaged_file_counts_as_absent(tmp_path: Path, content: str) -> None:
    store = ResultStore(tmp_path)
    store.publish(RESULT)
    (tmp_path / "evaluations" / "k1.json").write_text(content)
    assert store.find("k1") is None
    assert not store.once("k1", lambda: RESULT, data="colours").cached


def test_results__what_is_kept_of_samples_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    """Wherever a byte of the file is another: compressed data, sums, and the words of the archive itself."""
    store, values = ResultStore(tmp_path), np.random.default_rng(0).random((9, 3, 2))
    store.keep("k1", PerSample(values, np.arange(9)))
    path = tmp_path / "evaluations" / "k1.npz"
    content, num_read = path.read_bytes(), 0
    for place in range(0, len(content), 4):
        path.write_bytes(content[:place] + bytes([content[place] ^ 9]) + content[place + 1 :])
        if (found := store.per_sample("k1")) is not None:
            assert np.array_equal(found.values, values)
            num_read += 1
    assert num_read < 0.3 * len(content) / 4
    path.write_bytes(content[: len(content) // 2])
    assert store.per_sample("k1") is None


def test_results__a_result_under_another_key_counts_as_absent(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.publish(RESULT)
    (tmp_path / "evaluations" / "k1.json").rename(tmp_path / "evaluations" / "k2.json")
    assert store.find("k2") is None


def test_results__two_processes_race_and_one_computes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    racers = [_python(RACER, tmp_path, log) for _ in range(2)]
    outputs = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    assert outputs == ["0.25 False", "0.25 True"]
    assert log.read_text() == "computed\n"


def test_results__a_failed_computation_leaves_the_way_free(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)

    def fail() -> EvaluationResult:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.once("k1", fail, data="colours")
    assert store.once("k1", lambda: RESULT, data="colours") == RESULT


@pytest.mark.parametrize("of_samples", [None, PerSample(np.array([True, False]), np.array([3, 4]))])
def test_results__arrays_for_pictures_lie_beside_what_the_headline_is_made_of(
    tmp_path: Path, of_samples: PerSample | None
) -> None:
    store, shown = ResultStore(tmp_path), {"values": np.arange(3), "labels": np.eye(2)}
    store.keep("k1", of_samples, shown)
    found, samples = store.shown("k1"), store.per_sample("k1")
    assert found.keys() == shown.keys() and all((found[name] == shown[name]).all() for name in shown)
    if of_samples is None:
        assert samples is None
    else:
        assert samples is not None and samples.groups is not None
        assert (samples.values == of_samples.values).all() and samples.groups.tolist() == [3, 4]


def test_results__of_an_older_version_have_no_arrays_for_pictures(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    assert store.shown("k1") == {}, "no file"
    (tmp_path / "evaluations").mkdir()
    np.savez_compressed(tmp_path / "evaluations" / "k1.npz", values=np.arange(3), groups=np.arange(3))
    assert store.shown("k1") == {} and store.per_sample("k1") is not None


@pytest.mark.parametrize("content", [b"", b"PK", b"no npz at all"])
def test_results__damaged_arrays_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "k1.npz").write_bytes(content)
    assert ResultStore(tmp_path).shown("k1") == {} and ResultStore(tmp_path).per_sample("k1") is None
