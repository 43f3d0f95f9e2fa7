"""The jobs of a run: one at a time, `RUN_ID`, `RUN_ID.2`, ..., each of which goes on where the one before was."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.job_server import Job

__all__ = ["attempt_of", "attempts_of", "job_id_of"]


def attempts_of(run_id: str, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a run, the first attempt first."""
    return sorted((job for job in jobs if job.metadata.get("run_id") == run_id), key=attempt_of)


def attempt_of(job: Job) -> int:
    """Which one of its run a job is, from 1 on."""
    number = job.metadata.get("attempt", "")
    return int(number) if number.isdecimal() else 1


def job_id_of(run_id: str, attempt: int) -> str:
    """What the job of an attempt is called."""
    return run_id if attempt == 1 else f"{run_id}.{attempt}"
