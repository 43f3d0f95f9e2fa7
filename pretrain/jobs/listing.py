"""How jobs and local runs stand: one row each.

What a job has reached is in the files of its run where this machine sees them, else in what it has printed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.job_server import Job, JobServer, JobServerError, NoSuchJob
from pretrain.errors import EXIT_STOPPED, RequestError, last_words, listed, nearest
from pretrain.jobs.attempts import attempts_of
from pretrain.record.run_dir import RunDir, runs_in
from pretrain.record.standing import standing_of

__all__ = ["Row", "find_job", "is_stopping", "job_rows", "row_of_job", "row_of_run", "run_jobs", "run_rows"]

_STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "STOPPED": "stopped",
    "FAILED": "failed",
}
_STEP = re.compile(r"^(?:step (\d+)/(\d+)\b|stopped after step (\d+)|checkpoint at step (\d+):)", re.MULTILINE)
_SWEEP = re.compile(r"^sweep \S+ in .*: (\d+) runs, (\d+) to do, at most \d+ at a time", re.MULTILINE)
_POINT_DONE = re.compile(r"^\d+/\d+ (?!.*: (?:failed|stopped)).*: done$", re.MULTILINE)
# A driver, a sweep and a service, once they were asked to end; none goes on after that.
_STOPPING = re.compile(
    r"^(?:stopping after the next step|stopping all runs|stopping the service|ending at once)\b", re.M
)
_SCORE = re.compile(r"^evaluation of step (\d+): (\S+) (.+?)(?: \(known\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One job or run, for people.

    Attributes:
        id: Of the job, or of the run.
        state: waiting, running, stopping, finished, stopped or failed.
        progress: `step 20/100`, of a sweep `2/4 runs`; empty before the first.
        score: The last one; empty without any.
        when: It began, or a local run was last heard of; local time.
        note: Why it failed, and the like; one line.
    """

    id: str
    state: str
    progress: str
    score: str
    when: str
    note: str = ""


def run_rows(storage: Path) -> list[Row]:
    """The runs of a storage, the one that was heard of last at the end."""
    found = sorted((standing_of(run).changed, run.run_id) for run in runs_in(storage))
    return [row_of_run(RunDir(storage / run_id)) for _, run_id in found]


def row_of_run(run_dir: RunDir) -> Row:
    """How a run stands whose files are here."""
    now = standing_of(run_dir)
    return Row(run_dir.run_id, now.state, _progress(now.step, now.total_steps), now.score, _date(now.changed), now.note)


def run_jobs(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that run something of ours."""
    return [job for job in jobs if "run_id" in job.metadata]


def job_rows(server: JobServer, jobs: Iterable[Job]) -> list[Row]:
    """The rows of jobs; of each that has begun its log is read, unless the files of its run are here."""
    return [row_of_job(server, job) for job in jobs]


def is_stopping(server: JobServer, job: Job) -> bool:
    """Whether a job was asked to end, and is about to; Ray calls it running until it has."""
    return job.status == "RUNNING" and row_of_job(server, job).state == "stopping"


def row_of_job(server: JobServer, job: Job) -> Row:
    """How a job stands."""
    state = "stopped" if job.exit_code == EXIT_STOPPED else _STATES.get(job.status, job.status.lower())
    progress, score, note = "", "", ""
    run_dir = RunDir(Path(job.metadata.get("run_dir", "")))
    if job.metadata.get("run_id") == run_dir.run_id and run_dir.is_run:
        now = standing_of(run_dir)
        progress, score = _progress(now.step, now.total_steps), now.score
        state = "stopping" if state == "running" and now.state == "stopping" else state
    elif job.status != "PENDING":
        try:
            log = server.logs(job.id)
            progress, score = told_by_log(log)
            state = "stopping" if state == "running" and _STOPPING.search(log) else state
        except JobServerError as error:  # its node is gone, for example
            progress, note = "?", f"its log cannot be read: {error}"
    if state == "failed":
        code = "" if job.exit_code is None else f"exit code {job.exit_code}: "
        note = code + last_words(job.message)
    elif state == "waiting":
        note = last_words(job.message)
    return Row(job.id, state, progress, score, "" if job.started is None else _date(job.started), note)


def told_by_log(log: str) -> tuple[str, str]:
    """Progress and last score, from what a driver (`pretrain.reporting.terminal`) or a sweep has printed."""
    if begun := list(_SWEEP.finditer(log)):  # the last start counts
        runs, to_do = map(int, begun[-1].groups())
        return f"{runs - to_do + len(_POINT_DONE.findall(log, begun[-1].end()))}/{runs} runs", ""
    step, total = 0, None
    for match in _STEP.finditer(log):
        counted, of, stopped, published = match.groups()
        step, total = int(counted or stopped or published), of or total
    scores = _SCORE.findall(log)
    score = f"{scores[-1][1]} {scores[-1][2]} (step {scores[-1][0]})" if scores else ""
    return _progress(step, None if total is None else int(total)) if step or total else "", score


def find_job(server: JobServer, name: str) -> Job:
    """The job of that id, or the last one of the run of that name.

    Raises:
        RequestError: There is neither.
    """
    jobs = run_jobs(server.jobs())
    if attempts := attempts_of(name, jobs):
        return attempts[-1]
    try:
        return server.job(name)
    except NoSuchJob:
        known = [job.id for job in jobs]
        hint = nearest(name, known) or f"; there are: {listed(known[-8:])}"
        raise RequestError(f"job {name}: not in {server.address}{hint}") from None


def _progress(step: int, total: int | None) -> str:
    return f"step {step}" if total is None else f"step {step}/{total}"


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
