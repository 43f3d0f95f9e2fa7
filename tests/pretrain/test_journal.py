from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.record.events import CheckpointPublished, DamagedEvent, Finished, Metrics, Start
from pretrain.record.journal import Journal, read_events, read_lines

LINE = b'{"time": 0, "kind": "finished", "step": 1}\n'


def test_journal__events_come_back_in_order_with_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    before = time.time()
    with Journal(path) as journal:
        written = [
            Start(world_size=2, total_steps=10, step=0, device="cpu", pids=(7, 8)),
            Metrics(step=1, values={"loss": 0.5}),
            CheckpointPublished(step=1, path="checkpoints/step-00000001"),
        ]
        for event in written:
            journal.write(event)
    events, offset = read_events(path)
    assert events == written
    assert before <= events[0].time <= events[2].time <= time.time()
    assert offset == path.stat().st_size
    assert read_events(path, offset) == ([], offset)


def test_journal__non_finite_floats_survive_in_strict_json(tmp_path: Path) -> None:
    def refuse(token: str) -> float:
        raise AssertionError(f"{token} is not JSON")

    path = tmp_path / "journal.jsonl"
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "numpy": np.float32("nan"), "tiny": 5e-324}
    with Journal(path) as journal:
        journal.write(Metrics(step=1, values=values))
    json.loads(path.read_text(), parse_constant=refuse)
    ((event,), _) = read_events(path)
    assert isinstance(event, Metrics)
    assert math.isnan(event.values["nan"]) and math.isnan(event.values["numpy"])
    assert event.values["up"] == math.inf and event.values["down"] == -math.inf
    assert event.values["tiny"] == 5e-324


def test_journal__a_value_json_cannot_hold_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal, pytest.raises(TypeError, match="object"):
        journal.write(Metrics(step=1, values={"loss": object()}))  # type: ignore[dict-item]
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_read_events__leaves_a_partial_last_line_for_later(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_events(path) == ([], 0)
    path.write_bytes(LINE + LINE[:20])
    events, offset = read_events(path)
    assert events == [Finished(time=0, step=1)] and offset == len(LINE)
    with open(path, "ab") as file:
        file.write(LINE[20:])
    assert read_events(path, offset) == ([Finished(time=0, step=1)], path.stat().st_size)


def test_journal__a_torn_line_never_swallows_the_next_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(LINE + b'{"kind": "met')
    with Journal(path) as journal:
        journal.write(Finished(step=5))
    lines = list(read_lines(path))
    assert [line.raw for line in lines[:2]] == [LINE.rstrip(), b'{"kind": "met'] and len(lines) == 3
    with pytest.raises(DamagedEvent, match="not a JSON object"):
        lines[1].event()
    with caplog.at_level(logging.WARNING):
        events, _ = read_events(path)
    assert [event.step for event in events if isinstance(event, Finished)] == [1, 5] and len(events) == 2
    assert f"damaged line that ends at byte {len(LINE) + 14} (not a JSON object)" in caplog.text


@pytest.mark.parametrize(
    "damaged",
    [b"[]", b'"text"', b"nul", b'{"$float": []}', b"[" * 100_000, b'{"time": 0, "kind": "finished"}', b"\xff\xfe"],
    ids=lambda line: line[:20].decode(errors="replace"),
)
def test_read_events__a_damaged_line_costs_only_itself(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(LINE + damaged + b"\n" + LINE)
    with caplog.at_level(logging.WARNING):
        events, offset = read_events(path)
    assert events == [Finished(time=0, step=1)] * 2 and offset == path.stat().st_size
    assert caplog.text.count("damaged line") == 1


def test_read_lines__offsets_allow_to_continue_after_any_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for step in range(5):
            journal.write(Finished(step=step))
    lines = list(read_lines(path))
    assert [line.end for line in list(read_lines(path, limit=2))] == [line.end for line in lines[:2]]
    for index, line in enumerate(lines):
        rest = [event.step for event in read_events(path, line.end)[0] if isinstance(event, Finished)]
        assert rest == list(range(index + 1, 5))


def test_journal__full_disk_costs_records_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_write = os.write
    room = [10, 0, 0]  # bytes the disk takes per call: a short write, then nothing, then all is well again

    def write(fd: int, data: bytes) -> int:
        if not room:
            return real_write(fd, data)
        if free := room.pop(0):
            return real_write(fd, data[:free])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "journal.jsonl"
    with caplog.at_level(logging.WARNING), Journal(path) as journal:
        monkeypatch.setattr(os, "write", write)
        for step in range(5):
            journal.write(Finished(step=step))
        assert journal.lost == 3
    events, _ = read_events(path)
    assert [event.step for event in events if isinstance(event, Finished)] == [3, 4] and len(events) == 2
    assert sum("cannot write" in record.message for record in caplog.records) == 1
    assert "3 events were lost" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_journal__real_enospc_does_not_raise() -> None:
    journal = Journal("/dev/full")
    journal.write(Finished(step=1))
    assert journal.lost == 1
    journal.close()


def test_journal__what_was_written_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys\n"
        "from pretrain.record.events import Metrics; from pretrain.record.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for step in range(100): journal.write(Metrics(step=step, values={'loss': 1.0}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    events, _ = read_events(path)
    assert [event.step for event in events if isinstance(event, Metrics)] == list(range(100))


def test_journal__write_is_quick(tmp_path: Path) -> None:
    values = {name: 0.123456789 for name in ["loss", "lr", "grad_norm", "samples_per_s", "samples_seen", "memory_mb"]}
    with Journal(tmp_path / "journal.jsonl") as journal:
        seconds = []
        for step in range(500):
            began = time.perf_counter()
            journal.write(Metrics(step=step, values=values))
            seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[250] < 1e-3  # measured: 0.02 ms
