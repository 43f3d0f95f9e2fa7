"""`pretrain doctor`: each check against what it is to find, and what it says of it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.cli.main import main
from pretrain.doctor import examine, services, storage, this_machine
from pretrain.doctor.finding import Finding

TOKEN = "0123456789abcdef0123456789abcdef"
NAMES = ["python", "packages", "gpus", "deepspeed", "cores", "shared memory", "open files", "disk", "storage", "clock"]
NAMES += ["ray token", "ray cluster", "mlflow"]


class Server(ThreadingHTTPServer):
    """Answers as a dashboard of Ray and as MLflow do, to who has the token."""

    version = metadata.version("ray")
    mode = "token"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, code, answer = self.path.partition("?")[0], 200, {}
        if path == "/api/authentication_mode":
            answer = {"authentication_mode": self.server.mode}
        elif self.server.mode == "token" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            code = 403 if "Authorization" in self.headers else 401
        elif path == "/api/version":
            answer = {"version": "4", "ray_version": self.server.version}
        elif path != "/api/2.0/mlflow/experiments/search":
            code = 404
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in os.environ:
        if name.startswith(("RAY_AUTH", "MLFLOW_TRACKING")):
            monkeypatch.delenv(name)


def test_doctor__command_makes_all_checks_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    code = main(["doctor", "--storage", str(tmp_path / "runs"), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in findings] == NAMES
    assert code == (1 if any(finding["level"] == "fail" for finding in findings) else 0)
    by_name = {finding["name"]: finding for finding in findings}
    assert by_name["storage"]["level"] == by_name["ray token"]["level"] == by_name["python"]["level"] == "ok"
    assert all(finding["remedy"] for finding in findings if finding["level"] != "ok")
    assert list((tmp_path / "runs").iterdir()) == [] and not (tmp_path / "mlflow.db").exists()


def test_doctor__text_has_a_line_for_each_and_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("python", "ok", "3.11"), Finding("disk", "warn", "1.5 GiB free", "free some")]
    monkeypatch.setattr(examine, "examine", lambda address, place: found)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok    python  3.11",
        "warn  disk    1.5 GiB free",
        "              -> free some",
    ]
    found.append(Finding("clock", "fail", "late", "set it"))
    assert main(["doctor"]) == 1


def test_examine__what_hangs_or_breaks_is_a_finding_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "LIMIT_S", 2.0)
    for name in ("gpus", "deepspeed_ops", "packages"):
        monkeypatch.setattr(this_machine, name, lambda: Finding("x", "ok", ""))
    asked = threading.Event()

    def hanging() -> Finding:
        asked.wait(60)
        return Finding("mlflow", "ok", "too late")

    monkeypatch.setattr(services, "mlflow", hanging)

    def broken() -> Finding:
        raise OSError("lost https://me:secret@host/x")

    monkeypatch.setattr(this_machine, "cores", broken)
    began = time.monotonic()
    found = {finding.name: finding for finding in examine.examine(None, str(tmp_path))}
    assert time.monotonic() - began < 30
    asked.set()
    assert found["mlflow"] == Finding("mlflow", "fail", "no answer within 2 s", found["mlflow"].remedy)
    assert found["cores"].level == "fail" and found["cores"].text == "OSError: lost https://host/x"
    assert found["storage"].level == "ok"


@pytest.mark.parametrize("address", ["ray-head:6379", "ray://ray-head:10001", f"http://me:{TOKEN}@host:8265"])
def test_doctor__address_is_that_of_a_dashboard(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", address]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected the dashboard of a cluster, http://HOST:8265" in line and TOKEN not in line


def test_ray_cluster__token_version_and_mode(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = services.ray_cluster(server.url)
    assert finding.level == "fail" and "asks for a token, and there is none: set RAY_AUTH_TOKEN" in finding.text
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    finding = services.ray_cluster(server.url)
    assert (
        finding.level == "fail"
        and "refuses the token of RAY_AUTH_TOKEN" in finding.text
        and "wrong" not in finding.text
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    finding = services.ray_cluster(server.url)
    assert finding.level == "warn" and finding.remedy == "export RAY_AUTH_MODE=token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert services.ray_cluster(server.url).level == "ok"
    server.version = "2.40.0"
    finding = services.ray_cluster(server.url)
    assert finding.level == "fail" and "Ray 2.40.0" in finding.text and Server.version in finding.remedy
    server.version, server.mode = Server.version, "disabled"
    assert services.ray_cluster(server.url).level == "warn"
    server.shutdown()
    server.server_close()
    finding = services.ray_cluster(server.url)
    assert finding.level == "fail" and "nothing listens there" in finding.text


def test_mlflow__credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.mlflow().level == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    finding = services.mlflow()
    assert finding.level == "fail" and "refuses our credentials (HTTP 401)" in finding.text
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", TOKEN)
    finding = services.mlflow()
    assert "HTTP 403" in finding.text and TOKEN not in str(finding)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    finding = services.mlflow()
    assert finding.level == "ok" and finding.text.endswith("answers to our credentials") and TOKEN not in str(finding)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.url}/elsewhere")
    assert services.mlflow().text.endswith("HTTP 404")


@pytest.mark.parametrize(
    ("environment", "mode", "level", "said"),
    [
        ({}, None, "ok", "no token file"),
        ({}, 0o600, "ok", "has mode 0600"),
        ({}, 0o644, "fail", "has mode 0644: others can read it"),
        ({"RAY_AUTH_MODE": "token"}, None, "fail", "there is no"),
        ({"RAY_AUTH_MODE": "disabled"}, 0o600, "fail", "RAY_AUTH_MODE=disabled"),
        ({"RAY_AUTH_MODE": "tokn"}, 0o600, "fail", "RAY_AUTH_MODE=tokn"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, 0o644, "ok", "token in the environment"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, 0o600, "fail", "there is no /no/such/file"),
    ],
)
def test_ray_token__who_can_read_it(
    environment: dict[str, str],
    mode: int | None,
    level: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if mode is not None:
        file = tmp_path / ".ray" / "auth_token"
        file.parent.mkdir()
        file.write_text(TOKEN)
        file.chmod(mode)
    finding = services.ray_token()
    assert finding.level == level and said in finding.text and TOKEN not in str(finding)


@pytest.mark.parametrize("uri", ["LOCAL", "memory://doctor"])
def test_store__is_written_read_and_left_as_it_was(uri: str, tmp_path: Path) -> None:
    place = uri.replace("LOCAL", str(tmp_path / "not" / "yet"))
    finding = storage.store(place)
    assert finding.level == "ok" and "a second writer is refused" in finding.text, finding
    assert storage.clock(place).level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_store__of_which_a_second_writer_is_not_refused_or_reads_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage._LocalProbe, "refuses_second", lambda probe: False)
    assert storage.store(str(tmp_path)).level == "warn"
    monkeypatch.setattr(storage._LocalProbe, "read", lambda probe: b"")
    assert storage.store(str(tmp_path)).text.endswith("reads back something else")
    assert list(tmp_path.iterdir()) == []
    assert storage.store("nosuch://bucket").level == "fail"


@pytest.mark.parametrize(("skew_s", "level"), [(0.5, "ok"), (-30.0, "warn"), (3600.0, "fail")])
def test_clock__against_that_of_the_store(
    skew_s: float, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage._LocalProbe, "modified", lambda probe: probe.written_at + skew_s)
    assert storage.clock(str(tmp_path)).level == level


@pytest.mark.parametrize(
    ("answer", "there", "level", "said"),
    [
        ({"available": False, "count": 0, "cuda": None}, 0, "ok", "train.device=auto means cpu here"),
        ({"available": False, "count": 0, "cuda": None}, 4, "fail", "is built for CPUs, sees none"),
        ({"available": False, "count": 0, "cuda": "13.0"}, 4, "fail", "is built for CUDA 13.0, sees none"),
        ({"available": True, "count": 4, "cuda": "13.0", "nccl": "2.27.5", "names": ["H"] * 4}, 4, "ok", "4 x H"),
        ({"available": True, "count": 2, "cuda": "13.0", "nccl": "2.27.5", "names": ["H"] * 2}, 4, "fail", "has 4"),
        ("no such module", 4, "fail", "torch gives no answer: no such module"),
        ("not within 4 s", 0, "warn", "torch gives no answer"),
        ("not within 4 s", 4, "warn", "torch gives no answer"),
    ],
)
def test_gpus__never_fall_back_to_cpus_in_silence(
    answer: Any, there: int, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_machine, "_asked", lambda code: answer)
    monkeypatch.setattr(this_machine, "this_machine", lambda: SimpleNamespace(gpus=there))
    finding = this_machine.gpus()
    assert finding.level == level and said in finding.text


def test_asked__a_process_that_hangs_fails_or_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_machine._asked("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    assert this_machine._asked("raise SystemExit('gone')") == "gone"
    monkeypatch.setattr(this_machine, "ANSWER_S", 0.2)
    assert this_machine._asked("import time; time.sleep(60)") == "not within 4 s"


@pytest.mark.parametrize(("size", "level"), [(64 << 20, "fail"), (512 << 20, "warn"), (8 << 30, "ok")])
def test_shared_memory__as_containers_have_it(size: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=size, free=size))
    assert this_machine.shared_memory().level == level


@pytest.mark.parametrize(("free", "level"), [(2 << 20, "fail"), (2 << 30, "warn"), (1 << 40, "ok")])
def test_disk__free_where_runs_will_be(free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    finding = storage.disk(str(tmp_path / "runs"))
    assert finding.level == level and str(tmp_path) in finding.text


def test_open_files__bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.resource, "getrlimit", lambda what: (1024, 1 << 20))
    assert this_machine.open_files().remedy == "ulimit -n 65536 before Ray is started"
    monkeypatch.setattr(this_machine.resource, "getrlimit", lambda what: (1 << 20, 1 << 20))
    assert this_machine.open_files().level == "ok"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({}, None),
    ],
)
def test_cores__of_a_container(
    files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_machine, "_CGROUP", tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert this_machine._cgroup_cpus() == quota
    monkeypatch.setattr(this_machine, "this_machine", lambda: SimpleNamespace(cpus=4, gpus=0))
    assert this_machine.cores().level == ("ok" if quota is None else "warn")


def test_packages__a_version_outside_the_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.metadata, "requires", lambda name: ["ray<3,>=2.60", "torch>=2.13"])
    versions = {"ray": "2.40.0", "torch": "2.15.0"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(this_machine.metadata, "version", version)
    finding = this_machine.packages()
    assert finding.level == "fail"
    assert "ray 2.40.0 is not <3,>=2.60" in finding.text and "deepspeed is not installed" in finding.text
