"""The job server of a Ray cluster over HTTP, by the standard library alone: asking for jobs must be quick.

The server is part of the dashboard of the head. First it is asked whether it wants a token, which needs none; whatever
goes wrong is one line that names the address, the cause and the remedy.

Redirects are not followed: the token would go with them. Not here: what a job runs and what is shipped with it
(`pretrain.jobs`), zipping it (`cluster.job_package`).
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit

from cluster.authentication import AuthenticationProblem, Token, find_token, missing, refused
from cluster.redirects import opener_without_redirects

__all__ = ["Job", "JobExists", "JobServer", "JobServerError", "NoSuchJob", "is_named_by_environment", "server_address"]

ANSWER_S = 20.0  # a busy head takes seconds
UPLOAD_S = 300.0
YOUNG_HEAD_S = 30.0  # until a head that has just begun to answer has an agent, which starts jobs
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # of Ray's own commands, in their order
LIVE = ("PENDING", "RUNNING")
_CHECK = "a job server is the dashboard of a head with ray[default], usually at port 8265"
_STRANGER = f"what answers there is no job server of Ray; {_CHECK}"


class JobServerError(Exception):
    """The job server refuses, or does not answer; one line."""


class NoSuchJob(JobServerError):
    """There is no job of that id."""


class JobExists(JobServerError):
    """The id of a job that was submitted is taken."""


@dataclass(frozen=True)
class Job:
    """A job as its server describes it.

    Attributes:
        id: Its submission id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: What the server says of the status; of a failed job the end of its log.
        exit_code: Of its process; None while it runs and of a stopped one.
        started, ended: Unix seconds.
        metadata: As submitted.
    """

    id: str
    status: str
    message: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Job:
        times = [record.get(name) for name in ("start_time", "end_time")]
        started, ended = (when / 1000 if isinstance(when, int | float) and when else None for when in times)
        return cls(
            id=str(record["submission_id"]),
            status=str(record["status"]),
            message=record.get("message") or "",
            exit_code=record.get("driver_exit_code"),
            started=started,
            ended=ended,
            metadata=record.get("metadata") or {},
        )


def is_named_by_environment() -> bool:
    """Whether a variable of Ray names a job server."""
    given = [os.environ.get(name, "") for name in ADDRESS_VARIABLES]
    return bool(given[0]) or given[1].startswith(("http://", "https://"))


def server_address(address: str | None) -> str:
    """The URL of a job server, from what a user gives, or the variables of Ray.

    Raises:
        JobServerError: There is none, or it is the address of something else.
    """
    source = "--address"
    for name in ADDRESS_VARIABLES:
        if not address and (found := os.environ.get(name, "")):
            if name == "RAY_ADDRESS" and not found.startswith(("http://", "https://")):
                continue  # of the cluster itself, not of its job server
            address, source = found, name
    example = "http://HEAD:8265 (the dashboard's port)"
    if not address:
        raise JobServerError(f"no job server is given; use --address {example} or set {ADDRESS_VARIABLES[0]}")
    if "://" not in address:
        address = f"http://{address}"
    if set("@?#") & set(address):
        problem = "an address with user, password or query is recorded in many places; leave them out"
        raise JobServerError(f"{source}: {problem}")
    try:
        url = urlsplit(address)
        url.netloc.encode("idna")  # what is no name of a host would be refused in words of a codec
        has_port = bool(url.hostname) and (url.port is not None or url.scheme == "https")
    except ValueError:
        url, has_port = urlsplit(""), False
    is_plain = address.isprintable() and " " not in address
    if url.scheme not in ("http", "https") or not has_port or not is_plain:
        raise JobServerError(f"{source} {address}: expected the job server of a cluster, such as {example}")
    return address.rstrip("/")


class JobServer:
    """A client of one job server. Every method may raise `JobServerError`.

    Args:
        address: Its URL, as `server_address` gives it.
        timeout_s: For each answer; what is sent may take `UPLOAD_S`.
    """

    def __init__(self, address: str, timeout_s: float = ANSWER_S) -> None:
        self.address, self._timeout_s = address, timeout_s
        host = urlsplit(address).hostname or ""
        loopback = host == "localhost" or host.startswith("127.") or host == "::1"
        # Whatever proxy the environment names is for other hosts.
        self._opener = opener_without_redirects(*([urllib.request.ProxyHandler({})] if loopback else []))

    @cached_property
    def token(self) -> Token | None:
        """What goes with each request; None where the server asks for no token."""
        try:
            told = self._send("GET", "/api/authentication_mode", None, None)
        except NoSuchJob:  # every job server has this page
            raise JobServerError(f"{self.address}: {_STRANGER}") from None
        answer = _parsed(told, self.address, dict)
        if answer.get("authentication_mode") != "token":
            return None
        try:
            found = find_token()
        except AuthenticationProblem as problem:
            raise JobServerError(str(problem)) from None
        if found is None:
            raise JobServerError(str(missing(self.address)))
        return found

    def versions(self) -> dict[str, str]:
        """Of `ray` and `python` in the cluster, as far as it tells."""
        found = {"ray": str(self._json("GET", "/api/version").get("ray_version") or "")}
        try:
            told = self._json("GET", "/api/v0/cluster_metadata").get("data")
        except NoSuchJob:  # no such page in this version
            told = None
        if isinstance(told, Mapping):
            found["python"] = str(told.get("pythonVersion") or "")
        return {name: version for name, version in found.items() if version}

    def jobs(self) -> list[Job]:
        """All that were submitted, the newest last. What drivers did without being submitted is left out."""
        records = self._ask("GET", "/api/jobs/")
        submitted = [record for record in _parsed(records, self.address, list) if record.get("submission_id")]
        return sorted(map(Job.from_json, submitted), key=lambda job: job.started or 0.0)

    def job(self, job_id: str) -> Job:
        """One of them.

        Raises:
            NoSuchJob: There is none of that id.
        """
        return Job.from_json(self._json("GET", _path(job_id)))

    def logs(self, job_id: str) -> str:
        """All that a job has written so far."""
        return str(self._json("GET", f"{_path(job_id)}/logs").get("logs") or "")

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to the processes of a job; SIGKILL follows when its grace is over."""
        self._json("POST", f"{_path(job_id)}/stop")

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        self._json("DELETE", _path(job_id))

    def submit(
        self, job_id: str, entrypoint: Sequence[str], *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Run a command in the cluster.

        It asks for no resources: a job that waits for some cannot be stopped, and fails after a quarter of an hour.

        Args:
            job_id: Letters, digits, `.`, `_`, `-`: others are left pending for ever by Ray.
            entrypoint: The command, word by word.
            runtime_env: As Ray has it; everybody who may list jobs can read it.
            metadata: Of the job, as readable.

        Raises:
            JobExists: The id is taken.
        """
        request = {
            # In the place of the shell, which would hear a signal first and end before its child.
            "entrypoint": f"exec {shlex.join(entrypoint)}",
            "submission_id": job_id,
            "runtime_env": dict(runtime_env),
            "metadata": dict(metadata),
        }
        until = time.monotonic() + YOUNG_HEAD_S
        while True:
            try:
                self._json("POST", "/api/jobs/", json.dumps(request).encode())
                return
            except JobServerError as error:
                if "already exists" in str(error):
                    raise JobExists(f"job {job_id}: the id is taken") from None
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(1.0)

    def has_package(self, name: str) -> bool:
        """Whether the cluster holds a package; if so it keeps it for the next minutes."""
        try:
            self._ask("GET", f"/api/packages/gcs/{name}")
        except NoSuchJob:
            return False
        return True

    def upload(self, name: str, content: bytes) -> None:
        """Send a package."""
        self._ask("PUT", f"/api/packages/gcs/{name}", content)

    def _json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        found: dict[str, Any] = _parsed(self._ask(method, path, body), self.address, dict)
        return found

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        return self._send(method, path, body, self.token)

    def _send(self, method: str, path: str, body: bytes | None, token: Token | None) -> bytes:
        timeout_s = self._timeout_s if body is None else UPLOAD_S
        headers = {"Content-Type": "application/json" if path.startswith("/api/jobs") else "application/octet-stream"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token.value}"
        request = urllib.request.Request(f"{self.address}{path}", body, headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise self._refusal(error, token) from None
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors, of a half-sent answer as well
            raise JobServerError(self._silence(error, timeout_s)) from None
        except Exception as error:  # http.client's, of an answer that is no HTTP
            if type(error).__module__ != "http.client":
                raise
            raise JobServerError(f"{self.address}: {_STRANGER}") from None

    def _refusal(self, error: urllib.error.HTTPError, token: Token | None) -> JobServerError:
        """What an answer with a status of 300 or more means."""
        if error.code in (401, 403):
            problem = missing(self.address) if token is None else refused(self.address, token)
            return JobServerError(f"{problem} (HTTP {error.code})")
        if 300 <= error.code < 400:
            place = error.headers.get("Location", "elsewhere")
            return JobServerError(f"{self.address}: is redirected to {place}, and a token does not follow; use that")
        try:
            said = error.read().decode("utf-8", "replace")
        except OSError:
            said = ""
        # The last line of a page for people, which a proxy sends, is markup.
        lines = [] if said.lstrip().startswith("<") else said.splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if error.code == 404:
            return NoSuchJob(f"{self.address}: {last or 'not found'}")
        return JobServerError(f"{self.address}: HTTP {error.code}: {last or error.reason}")

    def _silence(self, error: Exception, timeout_s: float) -> str:
        """Why there is no answer."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return f"{self.address}: no answer within {timeout_s:g} s; {_CHECK}"
        if isinstance(reason, ssl.SSLError) and not isinstance(reason, ssl.SSLCertVerificationError):
            problem = f"no https ({reason.reason or reason})"
            return f"{self.address}: {problem}; a dashboard without a proxy in front is at http://"
        if isinstance(reason, ssl.SSLError):
            return f"{self.address}: {reason.reason or reason}; SSL_CERT_FILE names the certificates that are trusted"
        if isinstance(reason, socket.gaierror):
            return f"{self.address}: no host of that name"
        if isinstance(reason, ConnectionRefusedError):
            return f"{self.address}: nothing listens there; {_CHECK}"
        said = getattr(reason, "strerror", None) or str(reason)
        return f"{self.address}: {said}; {_CHECK}"


def _parsed(answer: bytes, address: str, kind: type) -> Any:
    """The JSON of an answer."""
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise JobServerError(f"{address}: {_STRANGER}")
    return found


def _path(job_id: str) -> str:
    return f"/api/jobs/{quote(job_id, safe='')}"
