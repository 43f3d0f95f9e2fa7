"""Checkpoint directories and MLflow databases for the tests of tracking, registry and report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.headless_browser import NAMES, find_browser, running_browser

RECIPE = "name: tiny\nobjective:\n  name: mae\nevaluation:\n  select: linear/photos/top1\n"


def write_manifest(checkpoint: Path, step: int, run_id: str) -> None:
    """`checkpoint.json` with the true digests of everything else in the directory."""
    files = {
        path.relative_to(checkpoint).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != "checkpoint.json"
    }
    manifest = {"format": 1, "run_id": run_id, "step": step, "samples_seen": 32 * step, "files": files}
    manifest["versions"] = {"pretrain": "0.1.0", "torch": "2.15.0"}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[[Path, int], Path]:
    """Publish a small checkpoint of `step` in a run directory; its weights depend on the step."""

    def make(run_dir: Path, step: int) -> Path:
        checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
        (checkpoint / "training_state").mkdir(parents=True)
        weights = np.random.default_rng(step).standard_normal((8, 8)).astype(np.float32)
        save_file({"patch_embed.proj.weight": weights}, checkpoint / "backbone.safetensors")
        (checkpoint / "training_state" / "rank0.pt").write_bytes(b"not read by anyone who only uses the backbone")
        (checkpoint / "recipe.yaml").write_text(RECIPE)
        write_manifest(checkpoint, step, run_dir.name)
        return checkpoint

    return make


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    directory = tmp_path / "runs"
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database. Its migrations take seconds, so the tests copy it."""
    from pretrain.tracking.client import connect

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_uri(storage: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow database of this test's own, at the default place of its storage."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PRETRAIN_CACHE", os.fspath(storage.parent / "cache"))
    shutil.copyfile(migrated_database, storage / "mlflow.db")
    return f"sqlite:///{storage / 'mlflow.db'}"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running Chromium, for `tests.headless_browser.look_at`."""
    program = find_browser()
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed, so no page is looked at")
    with running_browser(program, tmp_path_factory.mktemp("browser")) as address:
        yield address
