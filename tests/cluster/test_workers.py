"""A group of workers: told their places as by torchrun, started again after what a restart can mend, and only then."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.connect import Cluster, connect
from cluster.workers import End, Place, WorkerGroup, WorkersFailed, by_node, classify, environments, run_workers


def _raised(error: Exception) -> RayTaskError:
    return RayTaskError("run", f"Traceback ...\n{error}", error)


# What gloo says when another rank has died.
LOST = _raised(RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.4]:493. Check the logs of the worker"))
SAID = "has lost another one, or its machine (Connection closed by peer [127.0.0.4]:493)"
WRONG = _raised(ValueError("width 48 in\n5 heads"))


@pytest.mark.parametrize(
    ("errors", "kind", "rank", "reason"),
    [
        ({0: LOST, 1: LOST}, "failed", 0, f"worker 0 {SAID}"),
        ({1: _raised(RuntimeError("Connection"))}, "failed", 1, "RuntimeError: Connection"),
        ({0: LOST, 1: ActorDiedError()}, "failed", 1, "worker 1 died: The actor died unexpectedly before"),
        ({0: LOST, 2: WRONG, 1: ActorDiedError()}, "fatal", 2, "ValueError: width 48 in 5 heads"),
        ({0: _raised(UnicodeError("a subclass"))}, "fatal", 0, "UnicodeError: a subclass"),
        ({0: _raised(RuntimeError("x" * 5000))}, "failed", 0, "RuntimeError: xxx"),
    ],
)
def test_classify__names_the_cause_and_not_what_follows_from_it(
    errors: dict[int, Any], kind: str, rank: int, reason: str
) -> None:
    end = classify(errors, (ValueError,))
    assert (end.kind, end.rank) == (kind, rank)
    assert end.reason.startswith(reason) and "\n" not in end.reason and len(end.reason) <= 300


def test_classify__of_what_ray_says_of_a_death_the_end_counts() -> None:
    error = ActorDiedError()
    ids = "\n\tactor_id: 5e1f\n\tpid: 7\n\tnamespace: " + "0" * 400
    error.error_msg = f"The actor died.{ids}\nWorker exit type: SYSTEM_ERROR Worker exit detail: SIGKILL.\nOOM?"
    assert classify({1: error}, ()).reason == "worker 1 died: SIGKILL. OOM?"


def test_classify__of_a_machine_that_died_is_said_which_and_how() -> None:
    error = ActorDiedError()
    error.error_msg = "The actor died.\n\tactor_id: 5e1f\n\tip: 10.0.0.7\nThe actor died because its node has died."
    error.error_msg += " Node Id: 61\n\tthe actor's node was terminated unexpectedly: health check failed"
    said = "worker 1 died: its machine 10.0.0.7 was terminated unexpectedly: health check failed"
    assert classify({0: LOST, 1: error}, ()).reason == said


def test_classify__a_machine_that_was_taken_away_is_no_failure() -> None:
    error = ActorDiedError()
    error._preempted = True
    assert classify({0: LOST, 1: error}, ()).kind == "preempted"


def test_environments__are_those_of_torchrun() -> None:
    """Places as Ray gave them, two nodes mixed: ranks of a node follow one another and share its GPUs."""
    given = [
        Place("b", "10.0.0.2", ("3",), 4003),
        Place("a", "10.0.0.1", ("0",), 4000),
        Place("b", "10.0.0.2", ("1",), 4001),
    ]
    order = by_node(given)
    assert order == [0, 2, 1]
    found = environments([given[index] for index in order], loopback=False)
    assert [variables["RANK"] for variables in found] == ["0", "1", "2"]
    assert [(variables["LOCAL_RANK"], variables["LOCAL_WORLD_SIZE"]) for variables in found] == [
        ("0", "2"), ("1", "2"), ("0", "1")
    ]  # fmt: skip
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in found] == ["3,1", "3,1", "0"]
    assert {(v["MASTER_ADDR"], v["MASTER_PORT"], v["WORLD_SIZE"]) for v in found} == {("10.0.0.2", "4003", "3")}
    assert all("GLOO_SOCKET_IFNAME" not in variables for variables in found)


def test_environments__of_a_private_instance_stay_on_this_machine() -> None:
    (variables,) = environments([Place("a", "192.168.0.7", (), 4000)], loopback=True)
    assert variables["MASTER_ADDR"] == "127.0.0.1" and variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert "CUDA_VISIBLE_DEVICES" not in variables


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect(None, num_cpus=2, num_gpus=None, evaluation_slots=1) as found:
        yield found


def _group(**settings: Any) -> WorkerGroup:
    return WorkerGroup(sizes=(2,), cpus_per_worker=1, gpus_per_worker=0, **{"max_failures": 1, **settings})


def _work(settings: dict[str, Any]) -> None:
    """Note that this rank has begun, then do what the plan says of this attempt and rank."""
    rank, folder = os.environ["RANK"], Path(settings["folder"])
    attempt = len(list(folder.glob(f"{rank}-*")))
    facts = {name: os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    facts["main"] = str(threading.current_thread() is threading.main_thread())
    (folder / f"{rank}-{attempt}").write_text(json.dumps(facts))
    match settings["plan"][attempt].get(rank):
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wrong":
            raise ValueError("a wrong setting")
        case "fail":
            raise RuntimeError("this time")
        case "wait":
            signal.pause()  # what a rank does whose peer has gone: it is ended with it


def _run(cluster: Cluster, folder: Path, plan: list[dict[str, str]], group: WorkerGroup, **more: Any) -> list[End]:
    ends: list[End] = []
    settings = {"folder": str(folder), "plan": plan}
    run_workers(cluster, _work, settings, group, restarting=lambda end, pause_s: ends.append(end), **more)
    return ends


@pytest.mark.integration
def test_run_workers__a_killed_rank_takes_the_group_with_it_and_all_start_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    ends = _run(cluster, tmp_path, [{"0": "wait", "1": "die"}, {}], _group())
    assert [(end.kind, end.rank) for end in ends] == [("failed", 1)]
    assert ends[0].reason.startswith("worker 1 died: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "0-1", "1-0", "1-1"]
    first, second = (json.loads((tmp_path / f"{rank}-1").read_text()) for rank in (0, 1))
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"], first["main"]) == ("0", "1", "True")
    assert first | {"LOCAL_RANK": "1"} == second and first["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.integration
def test_run_workers__what_no_restart_can_mend_ends_the_first_attempt(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed) as caught:
        _run(cluster, tmp_path, [{"0": "wait", "1": "wrong"}], _group(max_failures=3, fatal=(ValueError,)))
    assert str(caught.value).splitlines()[-1] == "ValueError: a wrong setting"
    assert "in _work" in str(caught.value)  # the traceback
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "1-0"]


@pytest.mark.integration
def test_run_workers__failures_count_only_without_progress(cluster: Cluster, tmp_path: Path) -> None:
    steps = iter(range(1000))
    ends = _run(cluster, tmp_path, [{"0": "fail"}, {"0": "fail"}, {}], _group(), progress=lambda: next(steps))
    assert [end.reason for end in ends] == ["RuntimeError: this time"] * 2
    (tmp_path / "again").mkdir()
    with pytest.raises(WorkersFailed, match=r"RuntimeError: this time \(attempt 2\)$"):
        _run(cluster, tmp_path / "again", [{"0": "fail"}, {"0": "fail"}, {}], _group())
