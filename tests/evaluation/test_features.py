"""The feature cache: written once, hashed once, also when writers die or files are damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import files
from evaluation.features import ArrayWriter, FeatureCache

REPOSITORY = Path(__file__).resolve().parents[2]
# starts to write features, says so, and never ends; argument: storage root
STUCK_WRITER = """
import sys, time
from pathlib import Path
from evaluation.features import FeatureCache

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
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were hashed, in order."""
    names: list[str] = []
    original = files.sha256

    def counted(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(files, "sha256", counted)
    return names


def test_features__every_byte_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    def write(writer: ArrayWriter) -> None:
        writer.create("train.cls", (4, 3), np.float32)[:] = 1.0
        writer.create("train.labels", (4,), np.int64)[:] = 2

    cache = FeatureCache(tmp_path)
    for _ in range(4):
        arrays, _ = cache.once("f1", {}, write)
        assert int(arrays["train.labels"].sum()) == 8
    assert sorted(hashed) == ["train.cls.npy", "train.labels.npy"]


def test_features__a_copy_is_hashed_once_more_and_a_restored_time_does_not_hide_a_change_of_size(
    tmp_path: Path, hashed: list[str]
) -> None:
    cache = FeatureCache(tmp_path)
    cache.once("f1", {}, _writer(2.0))
    array = tmp_path / "features/f1/train.cls.npy"
    before = array.stat()
    os.utime(array, (1, 1))  # what copying without times does
    hashed.clear()
    assert cache.find("f1") is not None and cache.find("f1") is not None
    assert hashed == ["train.cls.npy"]
    array.write_bytes(array.read_bytes()[:-8])
    os.utime(array, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.find("f1") is None


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
