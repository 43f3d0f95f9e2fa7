from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints import references
from pretrain.checkpoints.references import best_step, load_backbone, pull, resolve
from pretrain.checkpoints.store import CheckpointError
from pretrain.errors import RequestError, RunFailed
from pretrain.record.events import Evaluated, EvaluationFailed
from pretrain.record.journal import Journal
from pretrain.tracking import client
from pretrain.tracking.client import MlflowRun, connect
from tests.pretrain.conftest import write_manifest

RUN_ID = "tiny-20260101-000000-0001"
MakeCheckpoint = Callable[[Path, int], Path]


@pytest.fixture
def run_dir(storage: Path, mlflow_uri: str, make_checkpoint: MakeCheckpoint) -> Path:
    """A run with checkpoints of steps 0, 10 and 20; versions 1 and 2 are 10, the best, and 20, which has heads."""
    run_dir = storage / RUN_ID
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("name: tiny\nevaluation:\n  select: linear/photos/top1\n")
    make_checkpoint(run_dir, 0)
    run = MlflowRun.bind(connect(mlflow_uri), mlflow_uri, "pretrain", RUN_ID, 0, None)
    for step in (10, 20):
        checkpoint = make_checkpoint(run_dir, step)
        if step == 20:
            (checkpoint / "heads.safetensors").write_bytes(b"what a student learns from")
            write_manifest(checkpoint, step, RUN_ID)
        run.register(checkpoint, step, "tiny", {"run_id": RUN_ID})
    run.promote("tiny", "2")
    run.promote("tiny", "1")
    return run_dir


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)


def step_of(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "checkpoint.json").read_text())["step"])


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def uploaded(run_dir: Path, step: int) -> Path:
    """Where the artifact store of the test keeps the exported files of a step."""
    stores = (run_dir.parent / "mlflow-artifacts" / "models").glob("*/artifacts")
    return next(store for store in stores if step_of(store) == step)


@pytest.mark.parametrize(
    ("reference", "step"),
    [("tiny", 10), ("tiny@best", 10), ("models:/tiny@previous", 20), ("models:/tiny", 10), ("models:/tiny/2", 20)],
)
def test_pull__every_form_of_reference(run_dir: Path, tmp_path: Path, reference: str, step: int) -> None:
    dest = pull(reference, tmp_path / "a" / "b", storage=run_dir.parent)
    assert dest == tmp_path / "a" / "b"
    original = contents(run_dir / "checkpoints" / f"step-{step:08d}")
    del original["training_state/rank0.pt"]
    assert contents(dest) == original
    assert list(dest.parent.iterdir()) == [dest], "nothing is left beside it"


def test_pull__full_brings_the_training_state(run_dir: Path, tmp_path: Path) -> None:
    recorded = run_dir / "checkpoints" / "step-00000010"
    (recorded / "stray.bin").write_bytes(b"not part of the checkpoint")
    dest = pull("tiny", tmp_path / "full", storage=run_dir.parent, full=True)
    (recorded / "stray.bin").unlink()
    assert contents(dest) == contents(recorded)
    (recorded / "training_state" / "rank0.pt").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"training_state/rank0\.pt: contents differ .* refused"):
        pull("tiny", tmp_path / "again", storage=run_dir.parent, full=True)
    shutil.rmtree(recorded)
    with pytest.raises(RequestError, match=r"not there any more .* without --full"):
        pull("tiny", tmp_path / "again", storage=run_dir.parent, full=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["archive #2", "a%20b"])
def test_pull__a_moved_storage_is_the_one_that_was_named(run_dir: Path, tmp_path: Path, name: str) -> None:
    """MLflow holds absolute places of artifacts, and a version the absolute place of its whole checkpoint."""
    moved = run_dir.parent.rename(tmp_path / name)
    assert step_of(pull("tiny@best", tmp_path / "b", storage=moved)) == 10
    assert (pull("tiny@best", tmp_path / "full", storage=moved, full=True) / "training_state" / "rank0.pt").is_file()
    assert step_of(resolve("models:/tiny/2", moved)) == 20
    assert not run_dir.parent.exists()


def test_bind__a_moved_database_goes_on_with_the_artifacts_beside_it(
    run_dir: Path, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    moved = run_dir.parent.rename(tmp_path / "moved")
    uri = f"sqlite:///{moved}/mlflow.db"
    run = MlflowRun.bind(connect(uri), uri, "pretrain", RUN_ID, 0, None)
    run.describe("name: tiny\n", {}, {})
    run.register(make_checkpoint(moved / RUN_ID, 30), 30, "tiny", {"run_id": RUN_ID})
    assert not run_dir.parent.exists(), "the old place is made again"
    version = connect(uri).get_model_version("tiny", "1")
    assert version.source.startswith((moved / "mlflow-artifacts").as_uri())
    assert step_of(pull("models:/tiny/3", tmp_path / "c", storage=moved)) == 30


def test_pull__a_storage_without_a_database_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"mlflow\.db: no such MLflow database"):
        pull("tiny", tmp_path / "x", storage=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_pull__default_destination_names_the_version(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pull("tiny@previous", storage=run_dir.parent) == tmp_path / "tiny-v2"
    assert step_of(tmp_path / "tiny-v2") == 20


def change_weights(files: Path) -> None:
    data = bytearray((files / "backbone.safetensors").read_bytes())
    data[-1] ^= 1
    (files / "backbone.safetensors").write_bytes(data)


def change_entry(files: Path) -> None:
    path = files / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["backbone.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


def change_both_consistently(files: Path) -> None:
    change_weights(files)
    path = files / "checkpoint.json"
    manifest = json.loads(path.read_text())
    import hashlib

    digest = hashlib.sha256((files / "backbone.safetensors").read_bytes()).hexdigest()
    manifest["files"]["backbone.safetensors"]["sha256"] = digest
    path.write_text(json.dumps(manifest))


def change_recipe(files: Path) -> None:
    (files / "recipe.yaml").write_text("name: other\n")


@pytest.mark.parametrize(
    ("tamper", "names"),
    [
        (change_weights, r"backbone\.safetensors: contents differ from the SHA-256"),
        (change_recipe, r"recipe\.yaml: contents differ from the SHA-256"),
        (change_entry, r"checkpoint\.json differs from the SHA-256 in the registry"),
        (change_both_consistently, r"checkpoint\.json differs from the SHA-256 in the registry"),
    ],
)
def test_pull__a_tampered_file_is_refused_and_leaves_nothing(
    run_dir: Path, tmp_path: Path, tamper: Callable[[Path], None], names: str
) -> None:
    tamper(uploaded(run_dir, 10))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"{names}.*refused"):
        pull("tiny@best", tmp_path / "out" / "dest", storage=run_dir.parent)
    assert list((tmp_path / "out").iterdir()) == []
    pull("tiny@previous", tmp_path / "out" / "dest", storage=run_dir.parent)  # the other version is untouched


def test_pull__a_missing_artifact_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    (uploaded(run_dir, 10) / "recipe.yaml").unlink()
    with pytest.raises(RunFailed, match="MLflow at sqlite"):
        pull("tiny", tmp_path / "dest", storage=run_dir.parent)
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b", "training_state\\..\\x", "a//b"])
def test_pull__paths_that_lead_out_of_a_checkpoint_are_refused(run_dir: Path, tmp_path: Path, name: str) -> None:
    manifest_path = run_dir / "checkpoints" / "step-00000010" / "checkpoint.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is no path inside a checkpoint; refused"):
        pull("tiny", tmp_path / "out" / "dest", storage=run_dir.parent, full=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "reference",
    ["../tiny", "models:/../tiny", "tiny/../x", "tiny@../x", "models:/tiny/0", "models:/tiny/-1", "", "a@b@c"],
)
def test_pull__malformed_names_are_refused_without_a_server(tmp_path: Path, reference: str) -> None:
    with pytest.raises(RequestError, match=r"names no registered model; expected NAME\[@ALIAS\]"):
        pull(reference, tmp_path / "dest", tracking_uri="http://127.0.0.1:1")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("tinny", r"no registered model 'tinny'; did you mean 'tiny'\? there are: tiny"),
        ("tiny@bst", r"has no alias 'bst'; did you mean 'best'\? there are: best, previous"),
        ("models:/tiny/7", r"has no version 7; there are: 1, 2"),
    ],
)
def test_pull__unknown_names_list_what_there_is(run_dir: Path, tmp_path: Path, reference: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        pull(reference, tmp_path / "dest", storage=run_dir.parent)


def test_pull__never_touches_a_destination_in_use(run_dir: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    assert step_of(pull("tiny", dest, storage=run_dir.parent)) == 10  # an empty directory is welcome
    before = contents(dest)
    with pytest.raises(RequestError, match="already exists"):
        pull("tiny@previous", dest, storage=run_dir.parent)
    assert contents(dest) == before


def test_pull__a_dead_server_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^MLflow at http://127\.0\.0\.1:9: [^\n]+$"):
        pull("tiny", tmp_path / "dest", tracking_uri="http://user:secret@127.0.0.1:9")


def test_pull__a_server_that_does_not_answer_is_told_of_before_mlflow_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(client, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, said in ((9, "Connection refused"), (silent.getsockname()[1], "timed out")):
            place = f"127.0.0.1:{port}"
            with pytest.raises(RunFailed) as failed:
                pull("tiny", tmp_path / "dest", tracking_uri=f"http://user:secret@{place}")
            remedy = "is it up, and MLFLOW_TRACKING_URI right? `pretrain doctor` asks it, too"
            assert failed.value.message == f"MLflow at http://{place}: does not answer ({said}); {remedy}"
    assert "mlflow" not in sys.modules and not (tmp_path / "dest").exists()


def test_require_answer__whoever_answers_is_there() -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=[server], daemon=True)
        thread.start()
        client.require_answer(f"http://127.0.0.1:{server.getsockname()[1]}/behind/a/proxy")
        thread.join(60)
    client.require_answer("sqlite:////no/such/file.db")


def test_pull__ctrl_c_while_a_server_is_silent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain", "pull", "tiny", str(tmp_path / "dest")],
            env=os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(Path(references.__file__).parents[2])},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(60)
        silent.accept()[0].recv(4096)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "error: interrupted") and list(tmp_path.iterdir()) == []


def test_resolve__directories_and_runs(run_dir: Path) -> None:
    storage, checkpoints = run_dir.parent, run_dir / "checkpoints"
    assert resolve(checkpoints / "step-00000010") == checkpoints / "step-00000010"
    assert resolve(f"runs:/{RUN_ID}", storage) == checkpoints / "step-00000020"
    assert resolve(f"runs:/{RUN_ID}/10", storage) == checkpoints / "step-00000010"
    assert resolve(f"runs:/{RUN_ID}/0", storage) == checkpoints / "step-00000000"
    with pytest.raises(RequestError, match="no checkpoint was scored"):
        resolve(f"runs:/{RUN_ID}/best", storage)
    with Journal(run_dir / "evaluations.jsonl") as evaluations:
        for step, top1 in ((0, 0.9), (10, 0.5), (20, 0.4), (30, 0.8)):  # a floor and a pruned one do not count
            task = {"protocol": "linear", "data": "photos", "key": "k"}
            evaluations.write(Evaluated(step=step, metrics={"top1": top1}, seconds=1.0, cached=False, **task))
        evaluations.write(EvaluationFailed(step=20, protocol="linear", data="photos", error="boom"))
    assert best_step(run_dir) == 10
    assert resolve(f"runs:/{RUN_ID}/best", storage) == checkpoints / "step-00000010"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (f"runs:/{RUN_ID}/30", "no checkpoint of step 30; there are: 0, 10, 20"),
        (f"runs:/{RUN_ID[:-1]}", f"did you mean '{RUN_ID}'"),
        ("runs:/../x", "expected runs:/RUN_ID"),
        ("runs:/x/first", "expected runs:/RUN_ID"),
        ("no/such/directory", "checkpoint no/such/directory: no such directory; there is no directory "),
        ("tiny", "checkpoint tiny: no such directory; expected a directory or URI, NAME@ALIAS"),
    ],
)
def test_resolve__mistakes(run_dir: Path, reference: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        resolve(reference, run_dir.parent)


def test_resolve__registered_ones_are_fetched_once(run_dir: Path, tmp_path: Path) -> None:
    found = resolve("models:/tiny@best", run_dir.parent)
    assert found.is_relative_to(tmp_path / "cache" / "checkpoints") and step_of(found) == 10
    shutil.rmtree(uploaded(run_dir, 10))
    assert resolve("tiny@best", run_dir.parent) == found
    other = resolve("models:/tiny/2", run_dir.parent)
    change_weights(other)  # damaged in the cache: fetched again
    assert resolve("models:/tiny/2", run_dir.parent) == other
    assert contents(other)["backbone.safetensors"] == contents(uploaded(run_dir, 20))["backbone.safetensors"]


def test_resolve__by_mlflow_run_id_here_and_elsewhere(run_dir: Path, mlflow_uri: str, tmp_path: Path) -> None:
    client = connect(mlflow_uri)
    mlflow_run_id = client.get_model_version("tiny", "1").run_id
    run_dir.rename(tmp_path / "moved away")
    elsewhere = resolve(f"runs:/{mlflow_run_id}", run_dir.parent)
    assert step_of(elsewhere) == 20 and elsewhere.is_relative_to(tmp_path / "cache")
    assert step_of(resolve(f"runs:/{mlflow_run_id}/10", run_dir.parent)) == 10
    with pytest.raises(RequestError, match="no registered checkpoint of step 30; there are: 10, 20"):
        resolve(f"runs:/{mlflow_run_id}/30", run_dir.parent)


def test_load_backbone__from_the_registry_without_unpickling(
    storage: Path, mlflow_uri: str, tmp_path: Path, no_pickle: None, make_checkpoint: MakeCheckpoint
) -> None:
    import torch

    from backbones.io import save_backbone
    from backbones.registry import create_backbone

    run_dir = storage / RUN_ID
    checkpoint = make_checkpoint(run_dir, 10)
    backbone = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, options={"depth": 1}).eval()
    save_backbone(checkpoint / "backbone.safetensors", backbone.timm_state_dict(), backbone.spec)
    rewrite_manifest(checkpoint)
    run = MlflowRun.bind(connect(mlflow_uri), mlflow_uri, "pretrain", RUN_ID, 0, None)
    run.register(checkpoint, 10, "tiny", {"run_id": RUN_ID})
    run.promote("tiny", "1")

    images = torch.rand(2, 3, 32, 32)
    loaded = load_backbone("models:/tiny@best", storage=storage)
    torch.testing.assert_close(loaded.forward_features(images), backbone.forward_features(images), rtol=0, atol=0)
    here = pull("tiny", tmp_path / "dest", storage=storage)
    torch.testing.assert_close(load_backbone(here).forward_features(images), backbone.forward_features(images))
    change_weights(here)
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors: contents differ from the SHA-256"):
        load_backbone(here)


def rewrite_manifest(checkpoint: Path) -> None:
    import hashlib

    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    weights = (checkpoint / "backbone.safetensors").read_bytes()
    manifest["files"]["backbone.safetensors"] = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    path.write_text(json.dumps(manifest))


def test_references__rejects_without_heavy_imports(tmp_path: Path) -> None:
    code = """
import sys
from pretrain.errors import RequestError
from pretrain.checkpoints.references import pull, resolve
for attempt in (lambda: pull("../x"), lambda: resolve("no/such"), lambda: resolve("runs:/none")):
    try:
        attempt()
    except RequestError:
        continue
    raise SystemExit("accepted")
assert not {"mlflow", "torch", "ray", "deepspeed", "timm", "matplotlib"} & sys.modules.keys()
"""
    root = Path(references.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, check=True)
