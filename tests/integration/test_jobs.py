"""A real head with dashboard and token on the loopback interface: submit, follow, stop, go on.

One head for the module, 30 CPU-seconds; each job costs a driver and one worker, 15 together, most of it imports. The
run is one of small steps on the demo photos.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.checkpoints import store
from pretrain.cli.main import main
from pretrain.record.events import Finished, Metrics, Resumed, Stopped
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir, runs_in
from tests.integration.conftest import RECIPE, read_losses

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1500)]
pytest.importorskip("aiohttp_cors", reason="the dashboard of a head needs ray[default]")

TOKEN = "b7c1-of-the-tests-only"
STARTS = 4  # a raylet that does not come up within 30 s is given up by Ray, which a busy machine brings about
STEPS = 12
SETTINGS = ("train.workers=1", "train.micro_batch_size=32", "evaluation.enabled=false", f"train.steps={STEPS}")


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    sockets: Path
    process: subprocess.Popen[bytes]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The start is tried again, no test is."""
    folder = tmp_path_factory.mktemp("head")
    for attempt in range(STARTS):
        found = start_head(folder / str(attempt))
        if found is not None:
            break
    else:
        pytest.fail("no head came up")
    try:
        yield found
    finally:
        end_session(found.process, found.sockets)


def start_head(folder: Path) -> Head | None:
    folder.mkdir()
    gcs, dashboard, client, agent, metrics = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps 127.0.0.1 as it is
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # workers are at 15 else, and starve beside other tests
        "HOME": str(folder),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--num-cpus", "2", "--num-gpus", "0"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--include-dashboard", "true"]
    command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
    command += ["--metrics-export-port", str(metrics), "--object-store-memory", "200000000"]
    sockets = Path(f"/tmp/ray-jobs-{os.getpid()}-{gcs}")  # below pytest's folders their paths would be too long
    command += ["--temp-dir", str(sockets)]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url, until = f"http://127.0.0.1:{dashboard}", time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if answers(f"{url}/api/version") and runs_jobs(url):
            return Head(url, f"127.0.0.1:{gcs}", sockets, process)
        time.sleep(0.5)
    end_session(process, sockets)
    return None


def answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def runs_jobs(url: str) -> bool:
    """Whether the node has its agent, which comes seconds after the dashboard, or not at all on a busy machine."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/jobs/", b'{"entrypoint": "true"}', headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end_session(process: subprocess.Popen[bytes], sockets: Path) -> None:
    """All that `ray start` has started, and no other Ray of this machine."""
    import psutil

    family = [process.pid]
    with suppress(psutil.NoSuchProcess):  # a head that has given up
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for other in psutil.process_iter(["cmdline"]):  # whom it has left behind
        if any(str(sockets) in word for word in other.info["cmdline"] or ()):
            family.append(other.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture(autouse=True)
def client(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A laptop that has the token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.2)


def test_connect__a_wrong_token_is_said_and_not_that_nobody_answers(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process of its own: Ray keeps what it has read."""
    code = "from cluster.connect import connect\nimport sys\ntry:\n  with connect(sys.argv[1], num_cpus=1, num_gpus=0,"
    code += " evaluation_slots=1): print('in')\nexcept ConnectionError as error: print(type(error).__name__, error)"
    said = []
    for token in ("wrong-one", ""):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        done = subprocess.run([sys.executable, "-c", code, head.gcs], capture_output=True, text=True, timeout=300)
        said.append(done.stdout.strip())
    place = f"AuthenticationProblem {head.gcs} "
    assert said[0].startswith(f"{place}refuses the token of RAY_AUTH_TOKEN")
    assert said[1].startswith(f"{place}asks for a token, and there is none: set RAY_AUTH_TOKEN")


def test_job__is_stopped_with_a_checkpoint_and_goes_on_to_the_losses_of_an_undisturbed_run(
    head: Head, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE)
    run = RunDir(folder / "runs/stopped")
    command = ["submit", str(recipe), *SETTINGS, f"storage={run.path.parent}", "--env", "LC_ALL=C"]
    rarely = ("train.checkpoint_every=1000", "evaluation.baseline=false")

    first = [*command, *rarely, "--run-id", "stopped", "--retries", "1"]
    assert main(first) == 0 and main(first) == 0  # the same request twice is one job
    assert capfd.readouterr().out == "stopped\nstopped\n"
    wait_until(lambda: newest_step(run) >= 2, 600, "no steps")
    assert main(["status", "stopped"]) == 0
    assert "state       running\n" in capfd.readouterr().out
    assert main(["stop", "stopped"]) == 0
    assert main(["logs", "-f", "stopped"]) == 0
    said = capfd.readouterr()
    assert f"run stopped in {run.path}" in said.out and "stopped after step" in said.out
    assert "job stopped: stopped" in said.err

    events = read_events(run.journal)[0]
    assert isinstance(events[-1], Stopped) and 2 <= events[-1].step < STEPS
    newest = store.latest(run.path)
    assert newest is not None and newest.step == events[-1].step

    assert main(first) == 0  # the run has ended: it goes on
    assert main([*command, "--run-id", "whole"]) == 0
    assert main(["logs", "-f", "stopped"]) == 0 and main(["logs", "-f", "whole"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("stopped.2\nwhole\n")
    assert "job stopped.2: finished" in said.err and "job whole: finished" in said.err, said.out
    events = read_events(run.journal)[0]
    assert [event.step for event in events if isinstance(event, Resumed)] == [newest.step]
    assert isinstance(events[-1], Finished)
    losses = read_losses(run.path)
    assert len(losses) == STEPS and losses == read_losses(folder / "runs/whole")

    assert main(["jobs"]) == 0
    listed = capfd.readouterr().out
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [
        ["stopped", "stopped"],
        ["stopped.2", "finished"],
        ["whole", "finished"],
    ]
    assert listed.count(f"step {STEPS}/{STEPS}") >= 2

    answered = [asked(head, "/api/jobs/"), *(asked(head, f"/api/jobs/{job}/logs") for job in ("stopped", "whole"))]
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written)
    holders = [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert holders == [] and not any(TOKEN in answer for answer in answered)
    assert "stop-now" not in json.dumps(answered)


def newest_step(run: RunDir) -> int:
    return max((event.step for event in read_events(run.journal)[0] if isinstance(event, Metrics)), default=0)


def asked(head: Head, path: str) -> str:
    request = urllib.request.Request(f"{head.url}{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_stop__now_ends_a_run_with_a_plugin_that_the_nodes_have_not(
    head: Head, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE)
    run = RunDir(folder / "runs/long")
    settings = [*SETTINGS[:3], "objective.name=colour", "train.steps=100000", f"storage={run.path.parent}"]
    command = ["submit", str(recipe), *settings, "--run-id", "long", "--retries", "3"]
    environment = os.environ | {"PYTHONPATH": f"{installed_plugin(folder)}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "long\n", done.stderr
    wait_until(lambda: newest_step(run) >= 1, 600, "no steps")
    began = time.monotonic()
    assert main(["stop", "long", "--now"]) == 0
    wait_until(lambda: json.loads(asked(head, "/api/jobs/long"))["status"] != "RUNNING", 60, "did not end")
    print(f"stop --now took {time.monotonic() - began:.1f} s")
    assert not any(isinstance(event, Stopped) for event in read_events(run.journal)[0])
    assert main(["jobs"]) == 0
    listed = capfd.readouterr().out
    assert "stop-now." not in listed and listed.splitlines()[-1].split()[:2] == ["long", "stopped"]


def test_sweep__is_a_job_that_is_stopped_with_a_checkpoint_and_goes_on(
    head: Head, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    recipe, storage = folder / "small.yaml", folder / "runs"
    recipe.write_text(RECIPE)
    rarely = ("train.checkpoint_every=1000", "evaluation.baseline=false", "train.seed=1,2")
    command = ["submit", str(recipe), "--sweep", *SETTINGS, *rarely, f"storage={storage}"]
    assert main(command) == 0
    sweep = capfd.readouterr().out.strip()

    def began() -> RunDir | None:
        return next(iter(runs_in(storage)), None) if storage.is_dir() else None

    wait_until(lambda: (run := began()) is not None and newest_step(run) >= 2, 900, "no steps")
    assert main(["stop", sweep]) == 0 and main(["logs", "-f", sweep]) == 0
    said = capfd.readouterr()
    assert f"sweep {sweep} in {storage}/sweeps/{sweep}: 2 runs, 2 to do" in said.out
    assert f"job {sweep}: stopped" in said.err
    (run,) = runs_in(storage)
    end = read_events(run.journal)[0][-1]
    newest = store.latest(run.path)
    assert isinstance(end, Stopped) and newest is not None and newest.step == end.step  # not at once

    assert main(command) == 0 and main(["logs", "-f", sweep]) == 0
    said = capfd.readouterr()
    assert said.out.startswith(f"{sweep}.2\n") and f"job {sweep}.2: finished" in said.err, said.out
    runs = runs_in(storage)
    assert len(runs) == 2 and all(newest_step(each) == STEPS for each in runs)
    assert [type(event) for event in read_events(run.journal)[0]].count(Resumed) == 1
    assert (storage / "sweeps" / sweep / "table.csv").read_text().count("done") == 2
    assert main(["status", sweep]) == 0
    assert "2/2 runs" in capfd.readouterr().out


def test_serve__is_a_job_until_it_is_stopped(
    head: Head, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path_factory.mktemp("shared") / "runs"
    storage.mkdir()
    place = ["--storage", str(storage)]
    data = f"mine={Path(__file__).parents[2]}/pretrain/demo_data/grocery"
    assert (
        main(["schedule", "add", "each", "--on-checkpoint", str(storage), "--tasks", "knn", "--data", data, *place])
        == 0
    )
    capfd.readouterr()
    assert main(["schedule", "serve", "--as-job", *place]) == 0
    job = capfd.readouterr().out.strip()
    wait_until(lambda: f"serving {storage}/schedules" in asked(head, f"/api/jobs/{job}/logs"), 300, "does not serve")
    assert main(["stop", job]) == 0 and main(["logs", "-f", job]) == 0
    assert f"job {job}: stopped" in capfd.readouterr().err


def installed_plugin(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the example plug-in is as if installed."""
    example = Path(__file__).parents[2] / "docs/example_plugin"
    shutil.copytree(example / "pretrain_colour", folder / "site/pretrain_colour")
    note = folder / "site/pretrain_colour-1.0.dist-info"
    note.mkdir()
    (note / "METADATA").write_text("Metadata-Version: 2.1\nName: pretrain-colour\nVersion: 1.0\n")
    groups = tomllib.loads((example / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (note / "entry_points.txt").write_text("\n".join(lines))
    return folder / "site"
