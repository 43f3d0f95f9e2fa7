"""A lock belongs to one process, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pretrain.record.lock import hold, holder

HOLD = "import sys, time; from pathlib import Path; from pretrain.record.lock import hold\n" + (
    "lock = hold(Path(sys.argv[1])); print(lock is not None, flush=True); time.sleep(60)"
)


def test_hold__one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with hold(path) as lock:  # type: ignore[union-attr]
        assert lock is not None and holder(path) == str(os.getpid())
        assert hold(path) is None
        assert holder(path) == str(os.getpid()), "who is refused does not overwrite the name of the holder"
    with hold(path) as again:  # type: ignore[union-attr]
        assert again is not None


def test_hold__ends_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == b"True\n"
        assert hold(path) is None and holder(path) == str(other.pid)
        other.send_signal(signal.SIGKILL)
        other.wait()
    lock = hold(path)
    assert lock is not None
    lock.close()
