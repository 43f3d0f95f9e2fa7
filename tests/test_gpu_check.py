"""The check of a GPU machine, rehearsed on a CPU, and what becomes of parts that fail or take too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from objectives import registry

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check.py"
sys.path.append(str(SCRIPT.parent))
import gpu_check  # noqa: E402
from gpu_parts import PARTS  # noqa: E402
from gpu_parts.agreement import OBJECTIVES, PARITY  # noqa: E402
from gpu_parts.questions import Check, Part, Row, difference, verdict  # noqa: E402


def _check(out: Path) -> Check:
    return Check("cpu", False, out, "unused")


def _answers(connection: Connection, check: Check) -> None:
    """In the place of `serve`: one good case, then whatever the part is called after."""
    while (name := connection.recv()) is not None:
        connection.send({"case": "first"})
        if name == "parity":
            connection.send({"case": "second", "error": "differs"})
        elif name == "loop":
            child = subprocess.Popen(["sleep", "600"])
            (check.out / "child").write_text(str(child.pid))
            time.sleep(600)
        elif name == "resume":
            os._exit(3)
        connection.send(None)


def _examined(out: Path, *names: str, minutes: float = 5) -> dict[str, Row]:
    return {report["part"]: report for report in gpu_check.examine(names, _check(out), minutes, _answers)}


def test_examine__a_part_that_fails_is_told_and_the_others_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, "loop", Part(lambda check, case: {}, ("first",), limit_s=2))
    began = time.monotonic()
    # What is quick is asked of a process that runs already: how long one takes to start is up to the machine.
    found = _examined(tmp_path, "parity", "speed", "loop", "resume", "photometric", "nccl")
    assert time.monotonic() - began < 120
    assert {name: report["status"] for name, report in found.items()} == {
        "parity": "failed", "speed": "rehearsed", "loop": "failed", "resume": "failed", "photometric": "rehearsed",
        "nccl": "skipped",
    }  # fmt: skip
    assert found["parity"]["why"] == "failed: second"
    assert found["loop"]["why"] == "not done after 2 s"
    assert found["resume"]["why"] == "its process ended with exit code 3"
    assert found["nccl"]["why"] == "needs a CUDA device"
    assert [row["case"] for row in found["loop"]["cases"]] == ["first"]  # what was answered in time is kept
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_examine__asks_nothing_of_a_machine_without_the_device_nor_when_time_is_over(tmp_path: Path) -> None:
    names = ("machine", "parity", "speed")
    assert {report["status"] for report in _examined(tmp_path, *names, minutes=0).values()} == {"skipped"}
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--out", out, "--quick", "--parts", *names]  # it waits for a busy machine
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_without_gpus())
    assert ended.returncode == 1
    first, *others = map(json.loads, ended.stdout.splitlines())
    assert first["status"] == "failed" and "torch sees no GPU" in first["cases"][0]["error"]
    assert [(report["status"], report["why"]) for report in others] == [("skipped", "the part machine failed")] * 2


def test_difference__is_relative_and_never_hides_what_is_not_a_number() -> None:
    assert difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert difference([1.0], [1.0, 2.0]) == difference([], []) == float("inf")
    for found in ([float("nan")], [float("inf")]):
        assert "error" in verdict({"difference": difference(found, [1.0])}, "difference", PARITY)
    assert "error" not in verdict({"difference": PARITY}, "difference", PARITY)


def test_objectives__all_are_compared() -> None:
    assert sorted(OBJECTIVES) == sorted(registry.built_in_names())


def _without_gpus() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _rehearsed(tmp_path: Path, *parts: str) -> dict[str, dict[str, Any]]:
    """The script's own answers, where neither Ray nor MLflow can be imported."""
    for name in ("ray", "mlflow"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not for the loop')\n")
    path = os.pathsep.join([str(tmp_path), str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, SCRIPT, "--out", tmp_path / "out", "--device", "cpu", "--quick", "--parts", *parts]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=560, env=_without_gpus() | {"PYTHONPATH": path}
    )
    assert ended.returncode == 0, ended.stdout + (tmp_path / "out" / "log").read_text()
    found = {report["part"]: report for report in map(json.loads, ended.stdout.splitlines())}
    assert found.keys() == set(parts)
    assert found == {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in parts}
    return found


@pytest.mark.long
@pytest.mark.integration
def test_gpu_check__is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    found = _rehearsed(tmp_path, "machine", "reference", "parity", "speed", "compiled", "nccl", "transfer", "profile")
    skipped = {"compiled", "nccl", "transfer"}
    assert {name for name, report in found.items() if report["status"] == "skipped"} == skipped
    assert {found[name]["status"] for name in found.keys() - skipped} == {"rehearsed"}
    assert {row["difference"] for row in found["parity"]["cases"]} == {0.0}
    assert all("says nothing of a GPU" in row["note"] for row in found["parity"]["cases"])
    assert all(row["images_per_s"] > 0 and 0 < row["mfu"] < 1 for row in found["speed"]["cases"])
    assert found["profile"]["cases"][0]["top"][0]["share"] > 0


@pytest.mark.long
@pytest.mark.integration
def test_gpu_check__runs_of_the_loop_are_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    found = _rehearsed(tmp_path, "loop", "resume", "zero", "photometric")
    assert {report["status"] for report in found.values()} == {"rehearsed"}
    (resumed,) = found["resume"]["cases"]
    assert resumed["difference"] == 0.0 and 20 <= resumed["killed_in_step"] < 60
