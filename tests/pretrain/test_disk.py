"""A disk that takes nothing more is named, with the directory, what was to be written and how much."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from pretrain.record.disk import DiskFull, naming_disk, require_room


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "the quota is used up"), (errno.EROFS, "is read-only")],
)
def test_naming_disk__what_the_system_says(number: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as caught, naming_disk(tmp_path, "the checkpoint of step 4", 3_200_000):
        raise OSError(number, os.strerror(number))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}: ") and reason in line and "\n" not in line
    assert "while writing the checkpoint of step 4 (about 3.2 MB wanted, " in line and line.endswith("resume the run")


def test_naming_disk__other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), naming_disk(tmp_path, "a file"):
        raise PermissionError(errno.EACCES, "denied")
    with pytest.raises(RuntimeError, match="broken"), naming_disk(tmp_path, "a file"):
        raise RuntimeError("broken")


def test_naming_disk__what_libraries_say_of_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """torch and safetensors have messages of their own; a limit on the size of files makes them fail for real."""
    import torch
    from safetensors.torch import save_file

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFull, match=r"while writing a file"), naming_disk(tmp_path, "a file", 1 << 62):
            torch.save(torch.zeros(10**5), tmp_path / "a.pt")
        with pytest.raises(DiskFull, match=r"while writing a file"), naming_disk(tmp_path, "a file", 1 << 62):
            save_file({"a": torch.zeros(10**5)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_require_room__refuses_before_anything_is_written(tmp_path: Path) -> None:
    require_room(tmp_path, "a file", 1)
    with pytest.raises(DiskFull, match=r"no space left while writing a file \(about 1000000.0 GB wanted, "):
        require_room(tmp_path, "a file", 10**15)
