"""What becomes of evaluations and of MLflow costs training nothing, not even a bit of a loss."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.record.events import Evaluated, EvaluationFailed
from pretrain.record.journal import read_events

pytestmark = [pytest.mark.integration, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
FAULTY = """
import os
import resource
import signal

from evaluation.metrics import Outcome
from evaluation.protocol import Protocol


def end(train, test, **settings):
    os.kill(os.getpid(), signal.SIGKILL)


def fill(train, test, **settings):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file grows any more, as on a full disk
    return Outcome({"top1": 1.0}, {})


def known(name):
    return Protocol(name, "faulty", f"faulty_protocols:{name}", 1, "pooled", "cls", ("top1",))


END, FILL = known("end"), known("fill")
"""


def test_run__evaluations_that_are_killed_or_cannot_write_cost_training_nothing(
    recipe: Path, tmp_path: Path, whole: Path, losses: Callable[[Path], dict[int, float]]
) -> None:
    """T5; MLflow is away all the while. Of weights that are NaN tests/evaluation/test_runner.py tells."""
    site = tmp_path / "site"
    (site / "faulty_protocols-1.dist-info").mkdir(parents=True)
    (site / "faulty_protocols.py").write_text(FAULTY)
    (site / "faulty_protocols-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: faulty-protocols\nVersion: 1\n"
    )
    (site / "faulty_protocols-1.dist-info" / "entry_points.txt").write_text(
        "[pretrain.evaluations]\nend = faulty_protocols:END\nfill = faulty_protocols:FILL\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    names = ("end", "fill", "knn")
    tasks = ", ".join(f"{{protocol: {name}, data: for_{name}}}" for name in names)
    data = ", ".join(f"for_{name}: 'package:demo_data/grocery'" for name in names)
    settings = [f"storage={tmp_path / 'storage'}", f"evaluation.tasks=[{tasks}]", "evaluation.select=null"]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "run", str(recipe), *settings, f"evaluation.data={{{data}}}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "MLFLOW_TRACKING_URI": nobody},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run_dir,) = (tmp_path / "storage").glob("small-*")
    assert losses(run_dir) == losses(whole)  # the same recipe, without Ray and evaluations
    events = read_events(run_dir / "evaluations.jsonl")[0]
    failed = {(event.step, event.protocol) for event in events if isinstance(event, EvaluationFailed)}
    scored = {(event.step, event.protocol) for event in events if isinstance(event, Evaluated)}
    assert scored == {(step, "knn") for step in (0, 4, 8, 12)}
    assert failed == {(step, name) for step in (0, 4, 8, 12) for name in ("end", "fill")}
