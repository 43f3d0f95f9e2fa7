"""One process at a time makes a file; those that wait go on when it has ended, also by a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipelines.claims import claimed

HOLD = "import sys, time\nfrom pathlib import Path\nfrom data_pipelines.claims import claimed\n"
HOLD += "with claimed(Path(sys.argv[1]), wait=True) as mine:\n    print(mine, flush=True)\n    time.sleep(60)\n"


def test_claimed__is_refused_while_another_process_has_it_and_free_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "made"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with claimed(path, wait=False) as is_mine:
            assert not is_mine
        threading.Timer(0.2, other.send_signal, [signal.SIGKILL]).start()
        with claimed(path, wait=True) as is_mine:
            assert is_mine and other.wait() == -signal.SIGKILL
    assert list(path.parent.iterdir()) == []


def test_claimed__is_given_to_one_of_many_threads_at_a_time(tmp_path: Path) -> None:
    """Each removes the lock's file when it lets go, which the others may have opened before."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with claimed(tmp_path / "made", wait=True) as is_mine:
                assert is_mine
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0 and list(tmp_path.iterdir()) == []


def test_claimed__an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "made", wait=False):
        raise RuntimeError
    with claimed(tmp_path / "made", wait=False) as is_mine:
        assert is_mine
