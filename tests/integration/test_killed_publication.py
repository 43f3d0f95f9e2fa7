"""A machine dies while it publishes a checkpoint to an object store, killed from outside at a known request.

The store itself kills: a server of ours that sees each request of the workers before or after it is done. So the
processes are those of any run, with nothing of theirs replaced.
"""

from __future__ import annotations

import io
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints import copies
from pretrain.checkpoints import store as checkpoint
from pretrain.record.remote_runs import brought, lease_of
from pretrain.record.run_dir import RunDir, find_run
from pretrain.remote.lease import Lease

pytestmark = [pytest.mark.integration, pytest.mark.long]

STORAGE = "s3://data/runs"
NEW, OLD = "/data/runs/spot/step-00000008", "/data/runs/spot/step-00000004"
OPTIONS = (f"checkpoints.storage={STORAGE}", "train.keep_last=1", "data.record_samples=true")


@dataclass
class Trap:
    """What a store does at the first request that looks like `pattern`: METHOD PATH, and the body.

    Attributes:
        is_done: Whether the request is done before the machine dies; else it never is.
        kill: Ends the machine.
        sprung: Set once it has.
    """

    pattern: str
    is_done: bool
    kill: Callable[[], None]
    sprung: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def store(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Trap], None]]:
    """Sets traps in the server to which all requests of workers go; the bucket is that of `s3`."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    traps: list[Trap] = []

    def watched(environ: dict[str, Any], start_response: Any) -> Any:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {body[:4096].decode(errors='replace')}"
        if not (traps and re.match(traps[0].pattern, request, re.DOTALL)):
            return app(environ, start_response)
        trap = traps.pop()
        answer = app(environ, start_response) if trap.is_done else []
        trap.kill()
        trap.sprung.set()
        if not trap.is_done:
            start_response("500 Internal Server Error", [])
        return answer

    server = make_server("127.0.0.1", 0, watched, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield traps.append
    server.shutdown()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunDir]:
    """Goes to another machine, and tells where the working copy of the run is there."""

    def go_to(name: str) -> RunDir:
        monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / name))
        return RunDir(tmp_path / name / "runs/s3/data/runs/spot")

    return go_to


def take_over(run: RunDir) -> None:
    """As a driver does, without the wait for the one before."""
    run.path.mkdir(parents=True, exist_ok=True)
    lease = lease_of(run)
    assert lease is not None
    Lease(lease._folder, lease._name, lease._token, wait=lambda seconds: None).take(print)


@pytest.mark.parametrize(
    ("pattern", "is_done", "newest"),
    [
        pytest.param(f"PUT {NEW}/", False, 4, id="before the first upload"),
        pytest.param(f"PUT {NEW}/training_state/flat-00001", False, 4, id="between two shards"),
        pytest.param(f"PUT {NEW}/checkpoint.json", False, 4, id="before the manifest"),
        pytest.param(f"PUT {NEW}/checkpoint.json", True, 8, id="after the manifest"),
        pytest.param(f"PUT {OLD}/{checkpoint.REMOVED}", False, 8, id="before the deletion of the one before"),
        pytest.param(f"PUT {OLD}/{checkpoint.REMOVED}", True, 8, id="after its announcement"),
        pytest.param("POST /data .*step-00000004/training_state/", False, 8, id="during it"),
    ],
)
def test_publication__killed_in_any_phase_leaves_a_run_that_another_machine_goes_on_with(
    pattern: str,
    is_done: bool,
    newest: int,
    s3: Any,
    store: Callable[[Trap], None],
    machine: Callable[[str], RunDir],
    launch: Callable[..., Any],
    losses: Callable[[Path], dict[int, float]],
    samples: Callable[[Path], Any],
    whole: Path,
    recipe: Path,
    tmp_path: Path,
) -> None:
    first = machine("first")
    take_over(first)
    shutil.copy(recipe, first.recipe)
    loop = launch(str(first.path), *OPTIONS)

    def switch_off() -> None:
        for process in loop.processes:
            process.kill()
            process.join()
        if pattern.startswith("POST"):  # a store may have done a part of what one request asks for
            s3.rm_file(f"{OLD[1:]}/training_state/flat-00000.safetensors")

    trap = Trap(pattern, is_done, switch_off)
    store(trap)
    assert trap.sprung.wait(500), loop.log.read_text()[-3000:]
    shutil.rmtree(tmp_path / "first")

    second = machine("second")
    run = find_run("spot", brought(STORAGE, "spot"))
    take_over(run)
    assert run.path == second.path
    found = checkpoint.latest(run.path)
    assert found is not None and found.step == newest
    checkpoint.verify(copies.local(found, training_state=True))
    launch(str(run.path), *OPTIONS).wait(500)
    assert losses(run.path) == losses(whole)  # bit for bit
    assert samples(run.path) == samples(whole)
    published = checkpoint.published(run.path)
    assert [one.step for one in published] == [0, 4, 8, 12]
    assert [one.step for one in published if one.storage.list(f"{one.name}/training_state")] == [12]  # nothing is left
