"""Result store and feature cache: computed once, published whole, also over processes that race or die."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import lease
from evaluation.lease import compute_once
from evaluation.registry import EvaluationError
from evaluation.store import ArrayWriter, EvaluationResult, FeatureCache, ResultStore

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
from evaluation.store import EvaluationResult, ResultStore

root, log = Path(sys.argv[1]), Path(sys.argv[2])

def make():
    with open(log, "a") as file:
        file.write("computed\\n")
    time.sleep(1.0)
    return EvaluationResult("k1", "knn", 1, "colours", "d", "w", {"top1": 0.25}, {}, 1.0)

result = ResultStore(root).once("k1", make, data="colours")
print(result.metrics["top1"], result.cached)
"""

# starts to write features, says so, and never ends; argument: storage root
STUCK_WRITER = """
import sys, time
from pathlib import Path
from evaluation.store import FeatureCache

def write(writer):
    writer.create("train.cls", (1000, 8), "float32")[:] = 1
    print("writing", flush=True)
    time.sleep(600)

FeatureCache(Path(sys.argv[1])).once("f1", {}, write)
"""


def _python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


def _writer(value: float, log: list[str] | None = None) -> Callable[[ArrayWriter], None]:
    def write(writer: ArrayWriter) -> None:
        if log is not None:
            log.append("written")
        writer.create("train.cls", (4, 3), np.float32)[:] = value

    return write


def test_result__json_round_trip() -> None:
    assert EvaluationResult.from_json(RESULT.to_json()) == RESULT


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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "key": "k1"}'])
def test_results__a_damaged_file_counts_as_absent(tmp_path: Path, content: str) -> None:
    store = ResultStore(tmp_path)
    store.publish(RESULT)
    (tmp_path / "evaluations" / "k1.json").write_text(content)
    assert store.find("k1") is None
    assert not store.once("k1", lambda: RESULT, data="colours").cached


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


def test_features__second_call_reads_what_the_first_wrote(tmp_path: Path) -> None:
    log: list[str] = []
    cache = FeatureCache(tmp_path)
    arrays, were_made = cache.once("f1", {"size": [16, 16]}, _writer(2.0, log))
    assert were_made and arrays["train.cls"].shape == (4, 3)
    arrays, were_made = cache.once("f1", {"size": [16, 16]}, _writer(3.0, log))
    assert not were_made and log == ["written"]
    assert float(arrays["train.cls"].sum()) == 24.0


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no mark", "mark"])
def test_features__a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path)
    cache.once("f1", {}, _writer(2.0))
    array, mark = tmp_path / "features/f1/train.cls.npy", tmp_path / "features/f1/meta.json"
    content = array.read_bytes()
    if damage == "flip":
        array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        array.write_bytes(content[:-8])
    elif damage == "missing":
        array.unlink()
    elif damage == "no mark":
        mark.unlink()
    else:
        mark.write_text(mark.read_text()[:20])
    assert cache.find("f1") is None
    arrays, were_made = cache.once("f1", {}, _writer(2.0))
    assert were_made and float(arrays["train.cls"].sum()) == 24.0


def test_features__a_killed_writer_leaves_nothing_complete(tmp_path: Path) -> None:
    writer = _python(STUCK_WRITER, tmp_path)
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    cache = FeatureCache(tmp_path)
    assert (tmp_path / "features/f1.lease").exists()
    assert cache.find("f1") is None
    arrays, were_made = cache.once("f1", {}, _writer(2.0))  # takes the dead owner's lease without waiting for expiry
    assert were_made and arrays["train.cls"].shape == (4, 3)
    left = sorted(path.name for path in (tmp_path / "features").iterdir() if not path.name.startswith("."))
    assert left == ["f1"]


def test_features__a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: ArrayWriter) -> None:
        writer.create("train.cls", (4, 3), np.float32)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        FeatureCache(tmp_path).once("f1", {}, fail)
    assert [path.name for path in (tmp_path / "features").iterdir() if not path.name.startswith(".")] == []


def test_features__least_recently_used_go_first(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, limit_bytes=1000)  # an entry takes some 300 bytes
    for age, key in ((300, "old"), (200, "used"), (100, "new")):
        cache.once(key, {}, _writer(1.0))
        moment = time.time() - age
        os.utime(tmp_path / f"features/{key}/meta.json", (moment, moment))
    assert cache.find("used") is not None  # a look renews
    kept, _ = cache.once("last", {}, _writer(1.0))
    present = {key for key in ("old", "used", "new", "last") if cache.find(key) is not None}
    assert "last" in present and "used" in present and "old" not in present
    assert kept["train.cls"].shape == (4, 3)


def test_lease__threads_of_one_process_compute_once(tmp_path: Path) -> None:
    values: list[str] = []
    results: list[tuple[str, bool]] = []

    def make() -> str:
        time.sleep(0.2)
        values.append("value")
        return "value"

    def run() -> None:
        results.append(compute_once(tmp_path / "a.lease", lambda: values[0] if values else None, make))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [("value", False)] * 3 + [("value", True)]


@pytest.mark.parametrize("owner", ["other host", "empty", "reused pid"])
def test_lease__an_expired_or_reused_owner_is_replaced(tmp_path: Path, owner: str) -> None:
    path = tmp_path / "a.lease"
    own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "started": "1", "token": "t"}
    content = {"other host": json.dumps({**own, "host": "elsewhere"}), "empty": "", "reused pid": json.dumps(own)}
    path.write_text(content[owner])
    if owner != "reused pid":  # these only die by age
        assert not lease._is_dead(path)
        os.utime(path, (time.time() - 2 * lease.EXPIRY_S,) * 2)
    made = compute_once(path, lambda: None, lambda: "mine")
    assert made == ("mine", True)
    assert not path.exists()


def test_lease__a_heartbeat_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    path = tmp_path / "a.lease"

    def make() -> str:
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 30
        return "value"

    assert compute_once(path, lambda: None, make) == ("value", True)
