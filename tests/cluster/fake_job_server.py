"""A fake job server: what Ray's answers to the calls of `cluster.job_server`, from memory, on a loopback port.

It runs nothing. Tests that need a job to run have a real head (`tests/integration/test_jobs.py`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeJobServer(ThreadingHTTPServer):
    """Jobs, logs and packages in memory.

    Attributes:
        token: What it asks for; None asks for nothing.
        jobs: Their records by submission id, as Ray tells them.
        logs: By submission id.
        packages: By name.
        seen: Method, path and the header `Authorization` of each request.
        canned: Path -> (status, headers, body) in the place of what would be answered; None never answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token: str | None = None
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.packages: dict[str, bytes] = {}
        self.versions = {"ray": "2.60.0", "python": "3.11.7"}
        self.seen: list[tuple[str, str, str | None]] = []
        self.canned: dict[str, tuple[int, dict[str, str], bytes] | None] = {}
        self.over = threading.Event()  # the test is
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, job_id: str, status: str = "RUNNING", log: str = "", **record: Any) -> None:
        """A job that is there."""
        begun = {"submission_id": job_id, "status": status, "start_time": 1_000_000 + 1000 * len(self.jobs)}
        self.jobs[job_id] = {**begun, "message": "", "driver_exit_code": None, "metadata": {}, **record}
        self.logs[job_id] = log


class _Handler(BaseHTTPRequestHandler):
    server: FakeJobServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path in self.server.canned:
            canned = self.server.canned[self.path]
            if canned is None:
                self.server.over.wait(30)
                return
            self._send(*canned)
            return
        if self.path == "/api/authentication_mode":
            self._say({"authentication_mode": "token" if self.server.token else "disabled"})
        elif self.server.token and self.headers.get("Authorization") is None:
            self._send(401, {}, b"Unauthorized: Missing authentication token")
        elif self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._send(403, {}, b"Forbidden: Invalid authentication token")
        else:
            self._serve(body)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def _serve(self, body: bytes) -> None:
        server, (_, _, room, *rest) = self.server, self.path.split("/")
        if room == "version":
            self._say({"version": "4", "ray_version": server.versions["ray"]})
        elif room == "v0":
            self._say({"result": True, "data": {"pythonVersion": server.versions["python"]}})
        elif room == "packages":
            name = rest[-1]
            if self.command == "PUT":
                server.packages[name] = body
                self._send(200, {}, b"")
            else:
                self._send(200 if name in server.packages else 404, {}, b"")
        elif self.command == "POST" and rest == [""]:
            request = json.loads(body)
            if request["submission_id"] in server.jobs:
                trace = f"Traceback ...\nValueError: Job with submission_id {request['submission_id']} already exists."
                self._send(500, {}, trace.encode())
                return
            server.add(request["submission_id"], "PENDING", **{**request, "start_time": time.time() * 1000})
            self._say({"submission_id": request["submission_id"]})
        elif rest == [""]:
            self._say([*server.jobs.values(), {"submission_id": None, "status": "RUNNING", "type": "DRIVER"}])
        elif rest[0] not in server.jobs:
            self._send(404, {}, f"Job {rest[0]} does not exist".encode())
        elif rest[1:] == ["logs"]:
            self._say({"logs": server.logs[rest[0]]})
        elif rest[1:] == ["stop"]:
            if server.jobs[rest[0]]["status"] in ("PENDING", "RUNNING"):
                server.jobs[rest[0]]["status"] = "STOPPED"
            self._say({"stopped": True})
        elif self.command == "DELETE":
            del server.jobs[rest[0]]
            self._say({"deleted": True})
        else:
            self._say(server.jobs[rest[0]])

    def _say(self, answer: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def fake_job_server() -> Iterator[FakeJobServer]:
    """One that answers until the end of the block."""
    server = FakeJobServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
