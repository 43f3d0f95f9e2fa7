"""One computation per key: owners that live, die and expire."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation import lease
from evaluation.lease import compute_once


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
