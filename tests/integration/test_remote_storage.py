"""A run in an object store: its machine dies, another one goes on, a third one looks at it; the disks share nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.cli.main import main
from pretrain.record.events import Finished, Resumed
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1500)]

STORAGE = "s3://data/runs"
KEY = "a-key-that-is-nobodys-business"


def test_storage__a_run_outlives_its_machine(
    s3: Any,
    whole: Path,
    recipe: Path,
    losses: Callable[[Path], dict[int, float]],
    samples: Callable[[Path], Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)

    def machine(name: str) -> RunDir:
        monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / name))
        return RunDir(tmp_path / name / "runs/s3/data/runs/spot")

    first, log = machine("first"), tmp_path / "run.log"
    settings = [f"storage={STORAGE}", "data.record_samples=true", "--run-id", "spot"]
    with log.open("w") as file:
        run = psutil.Popen([sys.executable, "-m", "pretrain", "run", str(recipe), *settings], stdout=file, stderr=file)
    wait_for(lambda: max(losses(first.path), default=0) >= 6, 240, log)
    for process in (run, *run.children(recursive=True)):  # the machine is switched off
        process.kill()
    psutil.wait_procs([run])
    shutil.rmtree(tmp_path / "first")

    second = machine("second")
    holder = json.loads(s3.cat("data/runs/spot/driver.json"))
    s3.pipe("data/runs/spot/driver.json", json.dumps(holder | {"time": 0}).encode())  # an hour and more goes by
    resume = [sys.executable, "-m", "pretrain", "resume", "spot", "--storage", STORAGE]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(second.path) == losses(whole)  # bit for bit
    assert samples(second.path) == samples(whole)
    events = read_events(second.journal)[0]
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.step in (4, 8) and isinstance(events[-1], Finished)
    assert f"pretrain pull small@best ./small-backbone --storage {STORAGE}" in done.stdout
    assert [path.name for path in second.stored_at.parent.iterdir()] == [second.stored_at.name]

    third = machine("third")
    capsys.readouterr()
    for command, told in (
        (["leaderboard"], " spot"),
        (["report", "spot"], str(third.report)),
        (["evaluate", "runs:/spot", "--protocol", "knn"], "known"),
        (["pull", "small", str(tmp_path / "pulled")], "small is in "),
    ):
        assert main([*command, "--storage", STORAGE]) == 0, command
        assert told in capsys.readouterr().out, command
    assert "grocery" in third.report.read_text()
    step = json.loads((tmp_path / "pulled/checkpoint.json").read_text())["step"]
    backbone = s3.cat(f"data/runs/spot/step-{step:08d}/backbone.safetensors")
    assert (tmp_path / "pulled/backbone.safetensors").read_bytes() == backbone
    assert json.loads(s3.cat("data/runs/spot/driver.json"))["ended"]
    assert not [path for path in s3.find("data/runs") if KEY.encode() in s3.cat(path)]
