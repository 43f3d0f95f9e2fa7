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

from pretrain.record.journal import Journal, read_journal, read_lines


def test_journal__records_come_back_in_order_with_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    before = time.time()
    with Journal(path) as journal:
        journal.write("start", world_size=2, total_steps=10, step=0)
        journal.write("metrics", step=1, values={"loss": 0.5})
        journal.write("checkpoint", step=1, path=Path("checkpoints/step-00000001"))
    records, offset = read_journal(path)
    assert [record["kind"] for record in records] == ["start", "metrics", "checkpoint"]
    assert records[1]["values"] == {"loss": 0.5}
    assert records[2]["path"] == "checkpoints/step-00000001"
    assert before <= records[0]["time"] <= records[2]["time"] <= time.time()
    assert offset == path.stat().st_size
    assert read_journal(path, offset) == ([], offset)


def test_journal__non_finite_floats_survive_in_strict_json(tmp_path: Path) -> None:
    def refuse(token: str) -> float:
        raise AssertionError(f"{token} is not JSON")

    path = tmp_path / "journal.jsonl"
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "numpy": np.float32("nan"), "tiny": 5e-324}
    with Journal(path) as journal:
        journal.write("metrics", step=1, values=values)
    json.loads(path.read_text(), parse_constant=refuse)
    ((record,), _) = read_journal(path)
    assert math.isnan(record["values"]["nan"]) and math.isnan(record["values"]["numpy"])
    assert record["values"]["up"] == math.inf and record["values"]["down"] == -math.inf
    assert record["values"]["tiny"] == 5e-324


def test_journal__a_value_json_cannot_hold_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal, pytest.raises(TypeError, match="object"):
        journal.write("metrics", step=1, values={"loss": object()})
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_read_journal__leaves_a_partial_last_line_for_later(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == ([], 0)
    path.write_bytes(b'{"kind": "start"}\n{"kind": "met')
    records, offset = read_journal(path)
    assert records == [{"kind": "start"}] and offset == 18
    with open(path, "ab") as file:
        file.write(b'rics"}\n')
    assert read_journal(path, offset) == ([{"kind": "metrics"}], path.stat().st_size)


def test_journal__a_torn_line_never_swallows_the_next_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"kind": "start"}\n{"kind": "met')
    with Journal(path) as journal:
        journal.write("resumed", step=5)
    lines = list(read_lines(path))
    assert [line.record is None for line in lines] == [False, True, False]
    assert lines[1].raw == b'{"kind": "met'
    with caplog.at_level(logging.WARNING):
        records, _ = read_journal(path)
    assert [record["kind"] for record in records] == ["start", "resumed"]
    assert "damaged line" in caplog.text


def test_read_lines__offsets_allow_to_continue_after_any_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for step in range(5):
            journal.write("metrics", step=step, values={})
    lines = list(read_lines(path))
    assert [line.end for line in list(read_lines(path, limit=2))] == [line.end for line in lines[:2]]
    for index, line in enumerate(lines):
        rest = [later.record["step"] for later in read_lines(path, line.end) if later.record]
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
            journal.write("metrics", step=step, values={})
        assert journal.lost == 3
    records, _ = read_journal(path)
    assert [record["step"] for record in records] == [3, 4]
    assert sum("cannot write" in record.message for record in caplog.records) == 1
    assert "3 records were lost" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_journal__real_enospc_does_not_raise() -> None:
    journal = Journal("/dev/full")
    journal.write("metrics", step=1, values={})
    assert journal.lost == 1
    journal.close()


def test_journal__what_was_written_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys; from pretrain.record.journal import Journal; j = Journal(sys.argv[1])\n"
        "for step in range(100): j.write('metrics', step=step, values={'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    records, _ = read_journal(path)
    assert [record["step"] for record in records] == list(range(100))


def test_journal__write_is_quick(tmp_path: Path) -> None:
    values = {name: 0.123456789 for name in ["loss", "lr", "grad_norm", "images_per_s", "samples_seen", "memory_mb"]}
    with Journal(tmp_path / "journal.jsonl") as journal:
        seconds = []
        for step in range(500):
            began = time.perf_counter()
            journal.write("metrics", step=step, values=values)
            seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[250] < 1e-3  # measured: 0.02 ms
