"""What one CUDA GPU makes of this product in a few minutes: does it compute what a CPU does, does it resume, how fast.

    python scripts/gpu_check.py --out DIR                    on a machine with a GPU: 8 minutes at most
    python scripts/gpu_check.py --out DIR --parts speed      some parts only
    python scripts/gpu_check.py --out DIR --device cpu --quick       a rehearsal: the same code on small models

Neither Ray nor MLflow is needed: runs start through torchrun. Parts come in the order of their worth, each under a time
limit. Each is one line of JSON on the terminal and a file DIR/PART.json; what it printed is in DIR/log. When one fails
the others run nevertheless, and the exit code is 1.

A part is `passed`, `failed` (an error, a difference above its tolerance, or its time was over), or `skipped`, with the
reason. Without a GPU nothing is `passed`: a part is `rehearsed`, which says that its code runs, or skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from gpu_parts import PARTS
from gpu_parts.questions import Check, Part, Row


def serve(connection: Connection, check: Check) -> None:
    """In a process of its own: answer the parts whose names come, case by case, each part's end with None."""
    with (check.out / "log").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    while (name := connection.recv()) is not None:
        for case in PARTS[name].cases:
            print(f"--- {name} {case}", flush=True)
            began = time.perf_counter()
            try:
                row = PARTS[name].measure(check, case)
            except Exception as error:
                traceback.print_exc()
                row = {"error": f"{type(error).__name__}: {error}"}
            connection.send({"case": case, "seconds": time.perf_counter() - began} | row)
            release_memory()
        connection.send(None)


def release_memory() -> None:
    """What a case leaves is not to be counted with the next one's."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


class Asked:
    """A process that answers parts one after the other, for none of which it is waited longer than its time."""

    def __init__(self, target: Callable[[Connection, Check], None], check: Check) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, check))
        self._process.start()
        theirs.close()

    def ask(self, name: str, limit_s: float) -> tuple[list[Row], str | None]:
        """What was answered, and why that is not all."""
        ends = time.monotonic() + limit_s
        rows: list[Row] = []
        try:
            self._connection.send(name)
            while self._connection.poll(max(0.0, ends - time.monotonic())):
                if (row := self._connection.recv()) is None:
                    return rows, None
                rows.append(row)
        except (EOFError, OSError):
            self._process.join()
            return rows, f"its process ended with exit code {self._process.exitcode}"
        return rows, f"not done after {limit_s:.0f} s"

    def end(self) -> None:
        """Kill it and all that it started."""
        with suppress(psutil.NoSuchProcess):  # it is gone, and its children have no parent to be found by
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.kill()
        self._process.join()


def examine(
    names: Sequence[str], check: Check, minutes: float, target: Callable[[Connection, Check], None] = serve
) -> Iterator[Row]:
    """Ask the parts in turn; yields the answer of each.

    A part that failed may have left the device in any state, so that the next is asked of a new process.
    """
    ends, processes, has_machine = time.monotonic() + 60 * minutes, {}, True
    try:
        for name in names:
            part, began = PARTS[name], time.monotonic()
            patience = 10 if check.quick else 1  # a CPU may have other work, too
            limit_s = min(patience * part.limit_s, ends - began)
            if why := why_not(part, check, limit_s, has_machine):
                yield {"part": name, "status": "skipped", "why": why, "cases": []}
                continue
            device = "cpu" if part.on_cpu else check.device
            if device not in processes:
                processes[device] = Asked(target, replace(check, device=device))
            rows, error = processes[device].ask(name, limit_s)
            failed = [row["case"] for row in rows if "error" in row]
            why = error or (f"failed: {', '.join(failed)}" if failed else None)
            status = "failed" if why else "passed" if check.device == "cuda" else "rehearsed"
            report = {"part": name, "status": status, "seconds": time.monotonic() - began, "cases": rows}
            yield report | ({"why": why} if why else {})
            if why:
                processes.pop(device).end()
                has_machine = has_machine and name != "machine"
    finally:
        for process in processes.values():
            process.end()


def why_not(part: Part, check: Check, limit_s: float, has_machine: bool) -> str | None:
    """Why a part is not asked."""
    if not has_machine:
        return "the part machine failed"
    if part.needs_cuda and check.device != "cuda":
        return "needs a CUDA device"
    if limit_s <= 0:
        return "no time is left; --parts asks for some only, --minutes gives more"
    return None


def plain(value: Any) -> Any:
    """In terms of strict JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, or an empty directory")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models and few steps: a rehearsal")
    parser.add_argument("--minutes", type=float, help="for all parts together; default: 8, or 60 with --quick")
    parser.add_argument("--data", default="package:demo_data/grocery/train-*.tar", help="shards of photos")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: is not empty; name another directory")
    out.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.device, arguments.quick, out, arguments.data)
    names = [name for name in PARTS if name in arguments.parts]
    statuses = []
    for report in examine(names, check, arguments.minutes or (60 if arguments.quick else 8)):
        (out / f"{report['part']}.json").write_text(json.dumps(plain(report), indent=1) + "\n")
        print(json.dumps(plain(report)), flush=True)
        statuses.append(report["status"])
    sys.exit(1 if "failed" in statuses else 0)


if __name__ == "__main__":
    main()
