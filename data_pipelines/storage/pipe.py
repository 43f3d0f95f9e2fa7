"""A shard that a command writes: `pipe:COMMAND`, run by a shell, only where the recipe allows commands."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import IO

from data_pipelines.errors import DataError
from data_pipelines.storage.locations import redact

__all__ = ["run_pipe"]

_PIECE_BYTES = 1 << 20


def run_pipe(location: str, write: Callable[[bytes], object], stall_s: float) -> None:
    """Run the command of `pipe:COMMAND` once and pass its standard output to `write`.

    Args:
        stall_s: a command that writes nothing for so long is ended.

    Raises:
        DataError: it wrote nothing for too long or nothing at all, or exited with a status other than 0.
    """
    bash = shutil.which("bash")  # of `a | b` a plain shell reports b only
    shell = [bash, "-o", "pipefail", "-c"] if bash else ["/bin/sh", "-c"]
    command = [*shell, location.partition(":")[2]]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert process.stdout is not None
        try:
            num_bytes = _drain(location, process.stdout, write, stall_s)
            status = process.wait(stall_s)
        except subprocess.TimeoutExpired:
            raise DataError(f"{redact(location)}: closed its output but did not end within {stall_s:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace").split("\n")
    if status != 0:
        last = next((line.strip() for line in reversed(said) if line.strip()), "it printed no error")
        raise DataError(f"{redact(location)}: exited with status {status} after {num_bytes} bytes: {redact(last)}")
    if num_bytes == 0:
        raise DataError(f"{redact(location)}: wrote nothing to its standard output")


def _drain(location: str, output: IO[bytes], write: Callable[[bytes], object], stall_s: float) -> int:
    num_bytes = 0
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while selector.select(stall_s):
            piece = os.read(output.fileno(), _PIECE_BYTES)
            if not piece:
                return num_bytes
            write(piece)
            num_bytes += len(piece)
    raise DataError(f"{redact(location)}: wrote nothing for {stall_s:g} s after {num_bytes} bytes; it was ended")
