"""All checks at the same time, each in a thread; one that has not answered after `LIMIT_S` is given up."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from data_pipelines.storage.locations import redact
from pretrain.doctor import services, storage, this_machine
from pretrain.doctor.finding import LIMIT_S, Finding, Level
from pretrain.errors import RequestError, last_line

__all__ = ["as_json", "examine"]


@dataclass(frozen=True)
class _Check:
    function: Callable[[], Finding]
    late: Level  # what it means that there is no answer


def examine(address: str | None, place: str) -> list[Finding]:
    """All findings, in the order of the checks.

    Args:
        address: Of the dashboard of a Ray cluster, `http://HOST:8265`; None: no cluster is asked.
        place: Directory of the runs, or URI of a store for checkpoints.

    Raises:
        RequestError: The address is none of a dashboard.
    """
    if address is not None and not re.fullmatch(r"https?://[^\s/?#@]+/?", address):
        raise RequestError(f"--address {redact(address)}: expected the dashboard of a cluster, http://HOST:8265")
    checks = {
        "python": _Check(this_machine.python, "fail"),
        "packages": _Check(this_machine.packages, "fail"),
        "gpus": _Check(this_machine.gpus, "warn"),
        "deepspeed": _Check(this_machine.deepspeed_ops, "warn"),
        "cores": _Check(this_machine.cores, "warn"),
        "shared memory": _Check(this_machine.shared_memory, "warn"),
        "open files": _Check(this_machine.open_files, "warn"),
        "disk": _Check(lambda: storage.disk(place), "fail"),
        "storage": _Check(lambda: storage.store(place), "fail"),
        "clock": _Check(lambda: storage.clock(place), "warn"),
        "ray token": _Check(services.ray_token, "warn"),
        "ray cluster": _Check(lambda: services.ray_cluster(address), "fail"),
        "mlflow": _Check(services.mlflow, "fail"),
    }
    found: dict[str, Finding] = {}

    def carry_out(name: str, check: _Check) -> None:
        try:
            finding = check.function()
        except Exception as error:  # a check must not end the others; what went wrong is its finding
            said = f"{type(error).__name__}: {last_line(error)}"
            finding = Finding(name, "fail", said, "the check itself failed: look at what it says")
        found[name] = Finding(name, finding.level, redact(finding.text), redact(finding.remedy))

    threads = [threading.Thread(target=carry_out, args=item, daemon=True) for item in checks.items()]
    deadline = time.monotonic() + LIMIT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {LIMIT_S:.0f} s"
    remedy = "ask again; if it stays so, look whether the machine is overloaded or what is asked hangs"
    done = dict(found)  # of the others nothing is heard any more
    return [done.get(name) or Finding(name, check.late, late, remedy) for name, check in checks.items()]


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)
