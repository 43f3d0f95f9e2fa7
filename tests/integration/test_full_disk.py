"""A run on a disk that is full: one line, and nothing is left of what did not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SMALL_DISK = """
import subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=True)
done = subprocess.run(sys.argv[2:])
print([path.name for path in (folder / "run/checkpoints").iterdir() if path.name.startswith(".step-")])
sys.exit(done.returncode)
"""


def test_run__on_a_disk_that_is_full_ends_in_one_line_and_leaves_no_part(recipe: Path, tmp_path: Path) -> None:
    """A disk of 3 MB takes the untrained backbone and the first checkpoint, not the second."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights that this user has not")
    disk = tmp_path / "disk"
    disk.mkdir()
    worker = [sys.executable, "-m", "pretrain.worker", str(recipe), "train.workers=1", "train.keep_last=9"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", SMALL_DISK, str(disk), *worker, "--run-dir", str(disk / "run")],
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {disk}/run") and "MB wanted" in line
    assert "no space left while writing the checkpoint of step" in line
    assert done.stdout.splitlines()[-1] == "[]" and "Traceback" not in done.stderr
