"""What the driver knows of checkpoints agrees with what is on disk, and costs the same however many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints import storage as storages
from pretrain.checkpoints import store
from pretrain.checkpoints.storage import CheckpointStorage, FsspecStorage, LocalStorage
from pretrain.config.load import load_plan
from pretrain.config.stages import Plan
from pretrain.known_checkpoints import KnownCheckpoints
from pretrain.record.events import CheckpointPublished, Evaluated, EvaluationFailed, Finished, Start

TASKS = "evaluation.tasks=[{protocol: knn, data: grocery}, {protocol: linear, data: grocery}]"
START = Start(step=0, total_steps=700, world_size=1, device="cpu")


@pytest.fixture(params=["local", "fsspec"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    if request.param == "fsspec":
        store.place(run, f"memory://{tmp_path.name}")
    return run


def plan(**settings: Any) -> Plan:
    chosen = {"train.keep_last": 2, "train.keep_best": 1, "train.checkpoint_every": 10, **settings}
    texts = [f"{key}={value}" for key, value in chosen.items()]
    return load_plan("demo", [TASKS, "evaluation.select=knn/grocery/top1", *texts])


def publish(run_dir: Path, step: int) -> CheckpointPublished:
    storage = store.storage_of(run_dir)
    staged = store.stage(run_dir, step, 0)
    (staged / "backbone.safetensors").write_bytes(b"weights")
    if step > 0:
        (staged / "training_state").mkdir()
        (staged / "training_state" / "state-0.pt").write_bytes(b"state")
    store.begin(storage, step)
    store.publish(storage, step, {}, [store.hand_over(storage, step, staged)])
    return CheckpointPublished(step=step, path=f"checkpoints/step-{step:08d}")


def score(step: int, protocol: str, top1: float) -> Evaluated:
    return Evaluated(
        step=step, protocol=protocol, data="grocery", metrics={"top1": top1}, key="k", seconds=1.0, cached=False
    )


def resumable(run_dir: Path) -> list[int]:
    return [found.step for found in store.published(run_dir) if found.has_training_state]


def evaluate(known: KnownCheckpoints, top1: float) -> list[int]:
    """Give each evaluation that is due a score; returns their steps."""
    taken = list(known.take_due())
    for step, protocol, _ in taken:
        known.see(score(step, protocol, top1))
        known.prune()
    return [step for step, _, _ in taken]


def test_look__finds_what_an_earlier_driver_left(run_dir: Path) -> None:
    for step in (0, 10, 20, 30, 40):
        publish(run_dir, step)
    store.remove_training_state(store.published(run_dir)[1])
    known = KnownCheckpoints(plan(), run_dir)
    for step, top1 in ((0, 0.1), (10, 0.9), (20, 0.5)):
        known.see(score(step, "knn", top1))
    known.look()
    labels = [(step, protocol) for step, protocol, _ in known.due]
    assert labels == [(0, "linear"), (10, "linear"), (20, "linear")] + [
        (step, protocol) for step in (30, 40) for protocol in ("knn", "linear")
    ]
    assert known.newest_step == 40
    known.prune()
    assert resumable(run_dir) == [30, 40]  # the best one lost its state before


def test_prune__keeps_the_newest_the_best_and_what_is_being_evaluated(run_dir: Path) -> None:
    known = KnownCheckpoints(plan(), run_dir)
    known.see(publish(run_dir, 0))
    known.see(publish(run_dir, 10))
    assert evaluate(known, 0.9) == [0, 0, 10, 10]
    for step in (20, 30, 40, 50):
        known.see(publish(run_dir, step))
    known.take_due()
    known.prune()
    assert resumable(run_dir) == [10, 20, 30, 40, 50]  # any of them may turn out to be better
    known.see(score(20, "knn", 0.5))
    known.prune()
    assert resumable(run_dir) == [10, 20, 30, 40, 50]  # its other evaluation goes on
    known.see(EvaluationFailed(step=20, protocol="linear", data="grocery", error="killed"))
    known.prune()
    assert resumable(run_dir) == [10, 30, 40, 50]
    known.see(score(30, "knn", 0.95))
    known.see(score(30, "linear", 0.1))
    known.prune()
    assert resumable(run_dir) == [30, 40, 50]
    assert [(event.step, event.protocol) for event in known.scores][-3:] == [(20, "knn"), (30, "knn"), (30, "linear")]


def test_see__what_is_left_out_of_a_suite_ends_and_is_not_due_to_the_next_driver(run_dir: Path) -> None:
    known = KnownCheckpoints(plan(**{"train.keep_last": 1, "train.keep_best": 0}), run_dir)
    for step in (10, 20):
        known.see(publish(run_dir, step))
    ends = [
        EvaluationFailed(step=step, protocol=protocol, data=data, error="too few", left_out=protocol == "linear")
        for step, protocol, data in known.take_due()
    ]
    for end in ends:
        known.see(end)
    known.prune()
    assert resumable(run_dir) == [20]
    following = KnownCheckpoints(plan(), run_dir)
    for end in ends:
        following.see(end)
    following.look()
    assert list(following.due) == [(10, "knn", "grocery"), (20, "knn", "grocery")]


def test_see__a_checkpoint_that_is_published_again_is_not_evaluated_again(run_dir: Path) -> None:
    known = KnownCheckpoints(plan(**{"train.keep_last": 1, "train.keep_best": 0}), run_dir)
    for step in (10, 20):
        known.see(publish(run_dir, step))
        evaluate(known, 0.5)
    assert resumable(run_dir) == [20]
    known.see(publish(run_dir, 10))  # the workers went back, as 20 was damaged
    assert not known.due and resumable(run_dir) == [10, 20]
    known.prune()
    assert resumable(run_dir) == [20]


@pytest.mark.parametrize("event", [START, Finished(step=700)], ids=["a new group", "the end"])
def test_see__finds_what_was_published_without_an_event(run_dir: Path, event: Start | Finished) -> None:
    known = KnownCheckpoints(plan(), run_dir)
    known.see(publish(run_dir, 10))
    publish(run_dir, 20)  # killed before it could tell
    evaluate(known, 0.5)
    known.see(event)
    assert evaluate(known, 0.5) == [20, 20] and known.newest_step == 20


def test_prune__the_newest_that_are_there_are_kept_when_newer_ones_were_deleted_by_hand(run_dir: Path) -> None:
    known = KnownCheckpoints(plan(**{"train.keep_last": 2, "train.keep_best": 0}), run_dir)
    for step in (10, 20):
        known.see(publish(run_dir, step))
        evaluate(known, 0.5)
    storage = store.storage_of(run_dir)
    storage.remove("step-00000020")
    known.see(publish(run_dir, 30))
    evaluate(known, 0.5)
    assert resumable(run_dir) == [10, 30]
    known.see(START)
    assert known.newest_step == 30
    known.see(publish(run_dir, 40))
    evaluate(known, 0.5)
    assert resumable(run_dir) == [30, 40]


def test_prune__ends_the_removals_of_a_driver_that_died(run_dir: Path) -> None:
    for step in (10, 20):
        publish(run_dir, step)
    first, second = store.published(run_dir)
    for found in (first, second):
        first.storage.mark(f"{found.name}/{store.REMOVED}", b"and no more")
    known = KnownCheckpoints(plan(), run_dir)
    known.look()
    known.see(publish(run_dir, 20))  # by workers that began before them
    known.prune()
    assert first.storage.list(f"{first.name}/training_state") == []
    assert resumable(run_dir) == [20]


def count_requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a storage, or the disk below one, is asked for anything, by what is asked."""
    counts: Counter[str] = Counter()

    def counted(kind: type[CheckpointStorage], name: str) -> Callable[..., Any]:
        plain = getattr(kind, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return plain(*arguments)

        return call

    for kind in (LocalStorage, FsspecStorage):
        for name in storages.CheckpointStorage.__abstractmethods__:
            monkeypatch.setattr(kind, name, counted(kind, name))
    return counts


def test_see__an_event_costs_the_same_requests_after_a_hundred_checkpoints_as_after_ten(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = KnownCheckpoints(plan(**{"train.steps": 2000}), run_dir)
    counts: dict[int, Counter[str]] = {}
    for number in range(1, 101):
        event = publish(run_dir, 10 * number)
        if number in (10, 100):
            counts[number] = count_requests(monkeypatch)
        known.see(event)
        assert evaluate(known, number / 1000) == [10 * number] * 2
        monkeypatch.undo()
    assert counts[10] == counts[100]
    assert counts[100]["published"] == counts[100]["survey"] == 0
    assert counts[100].total() <= 12
    assert resumable(run_dir) == [990, 1000]


def test_look__a_remote_store_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    store.place(run, f"memory://{tmp_path.name}")
    for step in (10, 20, 30):
        publish(run, step)
    from fsspec.implementations.memory import MemoryFileSystem

    calls: Counter[str] = Counter()
    for name in ("find", "ls", "isfile", "info", "cat_file"):
        plain = getattr(MemoryFileSystem, name)

        def call(*arguments: Any, name: str = name, plain: Any = plain, **options: Any) -> Any:
            calls[name] += 1
            return plain(*arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, name, call)
    KnownCheckpoints(plan(), run).look()
    assert calls["find"] == 1 and calls["isfile"] == 0
