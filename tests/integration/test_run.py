"""The whole platform: two ZeRO workers on Ray, one is killed; evaluations and MLflow beside; the result is pulled."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pretrain.record.events import Evaluated, EvaluationFailed, Resumed, Start, Stopped, Visualizations
from pretrain.record.journal import read_events

GROCERY = Path(__file__).resolve().parents[2] / "pretrain" / "demo_data" / "grocery"

pytestmark = pytest.mark.integration

Losses = Callable[[Path], dict[int, float]]


def test_run__killed_worker_recovers_is_evaluated_and_pulled(
    whole: Path,
    losses: Losses,
    wait_for: Callable[..., None],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = tmp_path / "storage"
    log = tmp_path / "run.log"
    settings = [f"storage={storage}", "tracking.also=[tensorboard]", "train.hang_after_s=20"]
    with log.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "pretrain", "run", str(recipe), *settings], stdout=file, stderr=file
        )
    try:
        wait_for(lambda: bool(list(storage.glob("small-*/journal.jsonl"))), 240, log)
        (run_dir,) = storage.glob("small-*")
        wait_for(lambda: max(losses(run_dir), default=0) >= 1, 240, log)
        os.kill(_starts(run_dir)[-1].pids[1], signal.SIGSTOP)  # it hangs: nothing but a watchdog can notice
        wait_for(lambda: len(_starts(run_dir)) == 2 and max(losses(run_dir), default=0) >= 6, 240, log)
        assert _addresses_listened_on(run.pid) == {"127.0.0.1"}  # nothing of a private run can be reached from outside
        os.kill(_starts(run_dir)[-1].pids[1], signal.SIGKILL)
        assert run.wait(400) == 0, log.read_text()[-3000:]
    finally:
        run.kill()

    assert losses(run_dir) == losses(whole)  # the same recipe, undisturbed and without Ray
    resumed = [event for event in read_events(run_dir / "journal.jsonl")[0] if isinstance(event, Resumed)]
    steps = [event.step for event in resumed]  # it may train on until a signal arrives
    assert len(_starts(run_dir)) == 3 and steps == sorted(steps) and set(steps) <= {4, 8}
    assert "no sign of life for" in log.read_text() and not list((run_dir / "heartbeat").iterdir())
    # Its peer waits in a collective and tells where; a process that was stopped tells nothing.
    assert "in all_reduce" in (run_dir / "logs" / "worker-0.stacks").read_text()
    assert not psutil.pid_exists(_starts(run_dir)[0].pids[1])

    evaluations = read_events(run_dir / "evaluations.jsonl")[0]
    scores = [event for event in evaluations if isinstance(event, Evaluated)]
    assert {(event.step, event.protocol) for event in scores} == {(step, "knn") for step in (0, 4, 8, 12)}
    pictures = [event for event in evaluations if isinstance(event, Visualizations)]
    kinds = ("tokens", "knn_confusion", "knn_neighbors")
    assert {(event.step, event.shows) for event in pictures} == {(s, kind) for s in (0, 4, 8, 12) for kind in kinds}
    assert len(scores) + len(pictures) == len(evaluations)
    text = log.read_text()
    for line in ("loss", "knn/grocery top1", "samples/s", "report.html", "pretrain pull small@best", "mlflow ui"):
        assert line in text
    waits = ("starting Ray", "starting workers: 2", "building the model", "reading the first batch", "step 1/12")
    assert sorted(waits, key=text.index) == list(waits)  # signs of life before the first step
    assert (run_dir / "report.html").is_file() and list(run_dir.glob("tensorboard/events.*"))

    _check_pulled(storage, tmp_path / "pulled")


def _starts(run_dir: Path) -> list[Start]:
    return [event for event in read_events(run_dir / "journal.jsonl")[0] if isinstance(event, Start)]


_TELLS_OF_TASKS = """
import sys
from cluster.tasks import TaskQueue
from pretrain.cli.main import main
submit = TaskQueue.submit
def telling(queue, label, *arguments, device, **options):
    print("task", label[0].step, queue.gpus_per_task, device, flush=True)
    submit(queue, label, *arguments, device=device, **options)
TaskQueue.submit = telling
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_run__last_checkpoint_is_evaluated_where_its_trainers_were(recipe: Path, tmp_path: Path) -> None:
    """A GPU that is declared and not there: Ray hands it out, and torch computes on the CPU all the same.

    Earlier checkpoints are evaluated on the CPU, unless training was over before the driver looked at them.
    """
    settings = [f"storage={tmp_path}/storage", "train.workers=1", "cluster.gpus_per_worker=1", "train.steps=4"]
    command = [sys.executable, "-c", _TELLS_OF_TASKS, "run", str(recipe), *settings, "train.checkpoint_every=2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    tasks = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("task ")]
    beside_trainers, after_them = ["0.0", "cpu"], ["1.0", "None"]
    places = {step: place for step, *place in tasks}
    assert sorted(places) == ["0", "2", "4"] and len(tasks) == 3
    assert places["4"] == after_them
    assert all(places[step] in (beside_trainers, after_them) for step in ("0", "2"))
    (scores,) = (tmp_path / "storage").glob("small-*/evaluations.jsonl")
    assert {event.step for event in read_events(scores)[0] if isinstance(event, Evaluated)} == {0, 2, 4}


def test_resume__after_it_was_stopped_and_after_the_driver_was_killed(
    losses: Losses, wait_for: Callable[..., None], recipe: Path, tmp_path: Path
) -> None:
    """SIGTERM to the process group, as schedulers do, loses nothing; SIGKILL costs the steps since a checkpoint."""
    storage, log = tmp_path / "storage", tmp_path / "run.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "pretrain", "run", str(recipe), f"storage={storage}"]
        command += ["train.steps=120", "train.checkpoint_every=40"]  # long enough not to end before the kill is noticed
        run = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: bool(list(storage.glob("small-*/journal.jsonl"))), 240, log)
        (run_dir,) = storage.glob("small-*")
        wait_for(lambda: max(losses(run_dir), default=0) >= 5, 240, log)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(120) == 75, log.read_text()[-3000:]
    finally:
        run.kill()
    (stopped,) = [event.step for event in read_events(run_dir / "journal.jsonl")[0] if isinstance(event, Stopped)]
    resume = f"pretrain resume {run_dir.name} --storage {storage}"
    last = log.read_text().strip().splitlines()[-1]
    assert last == f"stopped after step {stopped}, with a checkpoint; go on with: {resume}"
    assert max(losses(run_dir)) == stopped

    with log.open("w") as file:
        run = subprocess.Popen([sys.executable, "-m", *resume.split()], stdout=file, stderr=file)
    try:
        wait_for(lambda: max(losses(run_dir), default=0) >= 45, 240, log)
        descendants = psutil.Process(run.pid).children(recursive=True)
        descendants = [process for process in descendants if "Agent" not in process.name()]  # Ray's two linger a minute
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(descendants, timeout=60)
    assert not alive  # Ray and the workers go with the driver

    done = subprocess.run([sys.executable, "-m", *resume.split()], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"resumed at step (40|80): backbone tensors (\d+)/\2 equal", done.stdout), done.stdout
    assert sorted(losses(run_dir)) == list(range(1, 121))  # and steps trained twice had equal losses
    scores = [event for event in read_events(run_dir / "evaluations.jsonl")[0] if isinstance(event, Evaluated)]
    assert {event.step for event in scores} == {0, stopped, 40, 80, 120}


def _addresses_listened_on(pid: int) -> set[str]:
    """Of the sockets of a process and all its descendants."""
    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def _check_pulled(storage: Path, destination: Path) -> None:
    """What a user does next: pull the best backbone and load it into plain timm."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db"}
    command = [sys.executable, "-m", "pretrain", "pull", "small@best", str(destination)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=0
    )
    model.load_state_dict(load_file(destination / "backbone.safetensors"), strict=True)


@pytest.mark.long
def test_run__failed_evaluation_is_recorded_and_stops_nothing(recipe: Path, tmp_path: Path, losses: Losses) -> None:
    data = tmp_path / "unusable"
    data.mkdir()
    for split in ("train", "test"):
        shutil.copyfile(GROCERY / f"{split}-000000.tar", data / f"{split}-000000.tar")
        (data / f"{split}-000001.tar").write_bytes(b"not a tar archive" * 100)
    command = [sys.executable, "-m", "pretrain", "run", str(recipe), f"storage={tmp_path / 'storage'}", "train.steps=4"]
    command += ["train.workers=1", "train.checkpoint_every=4", f"evaluation.data.grocery={data}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (tmp_path / "storage").glob("small-*")
    events = read_events(run_dir / "evaluations.jsonl")[0]
    failed = [event for event in events if isinstance(event, EvaluationFailed)]
    assert failed == events and failed and all("train-000001.tar" in event.error for event in failed)
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]


@pytest.mark.long
def test_run__what_only_the_workers_can_tell_is_not_retried(recipe: Path, tmp_path: Path) -> None:
    """The second shard has no pictures: that ends the run at the first attempt, with one line."""
    data = tmp_path / "half"
    data.mkdir()
    shutil.copyfile(GROCERY / "train-000000.tar", data / "train-000000.tar")
    with tarfile.open(data / "train-000001.tar", "w") as tar:
        member = tarfile.TarInfo("z.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"z"))
    command = [sys.executable, "-m", "pretrain", "run", str(recipe), f"storage={tmp_path / 'storage'}"]
    command += ["train.workers=1", f"data.train={data}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "training failed: " in line]
    assert "no field" in line and "Error" not in line and "Traceback" not in done.stderr
    (worker_log,) = (tmp_path / "storage").glob("small-*/logs/worker-0.log")
    assert worker_log.read_text().count("Traceback") == 1
