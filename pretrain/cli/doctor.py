"""`pretrain doctor`: is this machine, and what it is to work with, fit for a run."""

from __future__ import annotations

import click

from pretrain.cli.filled import Filled
from pretrain.screen import say

__all__ = ["doctor"]


@click.command(cls=Filled)
@click.option("--address", metavar="URL", help="Dashboard of a Ray cluster, http://HOST:8265.")
@click.option("--storage", metavar="URI", default="runs", show_default=True, help="Of runs, or a store of checkpoints.")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON: name, level, text, remedy.")
def doctor(address: str | None, storage: str, as_json: bool) -> int:
    """Check Python, packages, GPUs, shared memory, disk, storage, clock, Ray's token, a cluster and MLflow.

    Takes less than ten seconds and leaves nothing. Exit code 1 where a run would fail, else 0.
    """
    from pretrain.doctor.examine import as_json as written
    from pretrain.doctor.examine import examine

    findings = examine(address, storage)
    if as_json:
        for line in written(findings).splitlines():
            say(line)
    else:
        widest = max(len(finding.name) for finding in findings)
        for finding in findings:
            say(f"{finding.level:<4}  {finding.name:<{widest}}  {finding.text}")
            if finding.remedy:
                say(f"{'':<{6 + widest}}  -> {finding.remedy}")
    return 1 if any(finding.level == "fail" for finding in findings) else 0
