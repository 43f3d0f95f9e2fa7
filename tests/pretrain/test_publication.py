"""Checkpoints beside training: it goes on, what is published is what was, and one that fails costs no other one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.mae.config import MAEConfig
from pretrain.checkpoints import copies, leftovers, store
from pretrain.checkpoints.storage import FsspecStorage, LocalStorage
from pretrain.config.schema import CheckpointsConfig, DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.config.stages import Stage
from pretrain.record.disk import DiskFull
from pretrain.record.events import CheckpointPublished, Event, Warned
from pretrain.record.remote_runs import lease_of
from pretrain.record.run_dir import RunDir
from pretrain.remote.folder import RemoteFolder
from pretrain.remote.lease import Lease
from pretrain.remote.places import working_copy
from pretrain.training import publication
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from pretrain.training.publication import Publisher
from tests.engine_weights import exported_now

pytestmark = pytest.mark.integration

RANKS, MICRO = 2, 2
RECIPE = Recipe(
    name="publication",
    objective=MAEConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2),
    backbone=ImageConfig("vit_tiny_patch16_224", 16, 4, options={"depth": 1, "embed_dim": 24, "num_heads": 2}),
    data=DataConfig(train="unused"),
    optimizer=OptimizerConfig(lr=2e-3),
    train=TrainConfig(
        steps=99,
        global_batch_size=MICRO * RANKS,
        micro_batch_size=MICRO,
        accumulation=1,
        workers=RANKS,
        zero_stage=1,
        checkpoint_every=4,
    ),
)
STREAM: Any = SimpleNamespace(state_at=lambda _: SimpleNamespace(epoch=0, position=4), order_signature={})


class Trainer:
    """An engine that makes steps, and the publisher of its checkpoints in a run of its own."""

    def __init__(self, run_dir: Path, engine: Engine, recipe: Recipe = RECIPE) -> None:
        self.run_dir, self.engine, self.events = run_dir, engine, list[Event]()
        store.place(run_dir, recipe.checkpoints.storage)
        dist.barrier()
        self.publisher = Publisher(RunDir(run_dir), Stage("", recipe), engine, STREAM, None, self.events.append)

    def step(self) -> None:
        self.engine.set_schedule(2e-3, 0.05)
        batch = {"image": torch.randint(0, 256, (MICRO, 3, 16, 16), dtype=torch.uint8), "seed": torch.arange(MICRO)}
        assert self.engine.step([batch], Progress(1, 99, is_logged=False)).applied
        self.publisher.tell()

    def told(self) -> list[str]:
        """What rank 0 was told since the last look, in short."""
        found = [
            f"{event.step} published" if isinstance(event, CheckpointPublished) else f"{event.step} {event.text}"
            for event in self.events
            if isinstance(event, CheckpointPublished | Warned)
        ]
        self.events.clear()
        return found

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """Of a published checkpoint, which is verified; on rank 0, since one process of a machine makes its copies."""
        if dist.get_rank() > 0:
            return {}
        found = store.find_published(self.run_dir, step)
        assert found is not None
        path = copies.local(found, training_state=True)
        store.verify(path)
        return load_file(path / "backbone.safetensors")

    def remains(self) -> list[str]:
        """Of publications that failed. A collective."""
        dist.barrier()  # all ranks have cleaned up
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob(".*"))


@contextmanager
def failing(kind: type, method: str, error: Callable[[], Exception | None], *, rank: int) -> Iterator[None]:
    """Where `error` gives one, a method of a storage raises it on a rank; else it does nothing at all."""
    real = getattr(kind, method)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if (raised := error()) is not None:
            raise raised

    if dist.get_rank() == rank:
        setattr(kind, method, call)
    try:
        yield
    finally:
        setattr(kind, method, real)


@contextmanager
def patched(kind: type, method: str, call: Callable[..., Any]) -> Iterator[None]:
    real = getattr(kind, method)
    setattr(kind, method, call)
    try:
        yield
    finally:
        setattr(kind, method, real)


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _goes_on(trainer: Trainer) -> dict[str, Any]:
    """Steps are made before any file is written; what is written at last are the weights of when it was due."""
    hold, real = threading.Event(), store.stage

    def late(*arguments: Any) -> Path:
        assert hold.wait(60)
        return real(*arguments)

    store.stage = late
    trainer.step()
    expected = exported_now(trainer.engine)
    trainer.publisher.take(4)
    trainer.step()
    trainer.step()
    early, before = trainer.told(), store.find_published(trainer.run_dir, 4)
    hold.set()
    store.stage = real
    moved = exported_now(trainer.engine)
    trainer.publisher.take(8)  # waits for the one before
    saved = trainer.weights(4)
    due = trainer.told()
    trainer.publisher.take(12, is_last=True)
    return {
        "early": early,
        "before": before is None,
        "equal": all(torch.equal(saved[name], expected[name]) for name in saved),
        "moved": any(not torch.equal(saved[name], moved[name]) for name in saved),
        "due": due,
        "end": trainer.told(),
        "steps": [found.step for found in store.published(trainer.run_dir)],
        "remains": trainer.remains(),
    }


def _survives(
    trainer: Trainer, kind: type, method: str, error: Callable[[], Exception | None], rank: int
) -> dict[str, Any]:
    """Two publications fail on one rank, the third works; then the last one fails."""
    trainer.publisher.take(4)
    trainer.step()
    trainer.publisher.take(8)
    trainer.publisher._settle(is_needed=False)
    first = trainer.told()
    with failing(kind, method, error, rank=rank):
        for step in (12, 16):
            trainer.publisher.take(step)
            trainer.step()
        trainer.publisher._settle(is_needed=False)
    second, remains = trainer.told(), trainer.remains()
    trainer.publisher.take(20)
    trainer.publisher._settle(is_needed=False)
    third = trainer.told()
    with failing(kind, method, error, rank=rank), pytest.raises((DiskFull, store.CheckpointError)) as refused:
        trainer.publisher.take(24, is_last=True)
    trainer.weights(8)
    trainer.weights(20)
    steps = [found.step for found in store.published(trainer.run_dir)]
    return {
        "told": [first, second, third, trainer.told()],
        "refused": [type(refused.value).__name__, str(refused.value)],
        "steps": steps,
        "remains": [remains, trainer.remains()],
    }


def _of_a_remote_run(engine: Engine, endpoint: str) -> dict[str, Any]:
    """A run in an object store: what is told and published while it is driven, and after another machine has it."""
    os.environ.update(
        {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "NO_PROXY": "127.0.0.1"}
    )
    uri = "s3://publication/runs"
    run, there = RunDir(working_copy(uri) / "run"), RemoteFolder(f"{uri}/run")
    if dist.get_rank() == 0:
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("publication")
        filesystem.pipe_file("publication/runs/run/step-00000003/training_state/part", b"of workers that were killed")
        run.path.mkdir(parents=True)
        run.journal.write_text("step 4\n")
        lease = lease_of(run)
        assert lease is not None
        lease.take(print)
    dist.barrier()
    trainer = Trainer(run.path, engine, replace(RECIPE, checkpoints=CheckpointsConfig(storage=uri)))
    seen: list[bytes | None] = []
    real = FsspecStorage.publish

    def publish(self: FsspecStorage, *arguments: Any) -> None:
        seen.append(there.read(run.journal.name))
        real(self, *arguments)

    with patched(FsspecStorage, "publish", publish), patched(leftovers, "QUIET_S", 0.0):
        trainer.publisher.take(4, is_last=True)
    found: dict[str, Any] = {"told": [trainer.told()], "seen": [str(content) for content in seen]}
    found["left"] = list(store.unpublished(store.storage_of(run.path)))
    with failing(RemoteFolder, "put", lambda: ConnectionError("the store is away"), rank=0):
        if dist.get_rank() == 0:
            run.journal.write_text("step 4\nstep 8\n")
        trainer.publisher.take(8)
        trainer.publisher._settle(is_needed=False)
    found["told"].append(trainer.told())
    trainer.publisher.take(10, is_last=True)
    found["told"].append(trainer.told())
    if dist.get_rank() == 0:
        other = Lease(there, run.driver_lease.name, run.path / "other", wait=lambda seconds: None)
        other.take(print)
    dist.barrier()
    trainer.publisher.take(12)
    trainer.publisher._settle(is_needed=False)
    found["told"].append(trainer.told())
    found["steps"] = [one.step for one in store.published(run.path)]
    found["journal"] = str(there.read(run.journal.name))
    return found


def _everything(directory: Path, endpoint: str | None) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = Engine(build_objective(RECIPE), RECIPE, torch.device("cpu"))
    torch.manual_seed(dist.get_rank())
    os.environ["PRETRAIN_CACHE"] = str(directory / "cache")
    remote = replace(RECIPE, checkpoints=CheckpointsConfig(storage=f"file://{directory}/store"))
    found: dict[str, Any] = {"goes_on": _goes_on(Trainer(directory / "goes_on", engine))}
    for name, kind, method, error, rank in (
        ("full", LocalStorage, "write", _no_space, 1),
        ("broken", LocalStorage, "publish", lambda: OSError(errno.EIO, "Input/output error"), 0),
        ("late", LocalStorage, "begin", _no_space, 0),
    ):
        found[name] = _survives(Trainer(directory / name, engine), kind, method, error, rank)
    for name, method, error, rank in (
        ("away", "write", lambda: ConnectionError("the store is away"), 1),
        ("dropped", "write", lambda: None, 1),
        ("lost", "mark", lambda: None, 0),
    ):
        trainer = Trainer(directory / name, engine, remote)
        found[name] = _survives(trainer, FsspecStorage, method, error, rank)

    trainer = Trainer(directory / "short", engine)
    free, publication.free_memory = publication.free_memory, lambda: 10**9 if dist.get_rank() == 0 else 10**5
    trainer.publisher.take(4)
    trainer.publisher.take(8)
    publication.free_memory = free
    found["short"] = [trainer.told(), [one.step for one in store.published(trainer.run_dir)]]

    trainer = Trainer(directory / "waits", engine, replace(RECIPE, checkpoints=CheckpointsConfig(asynchronous=False)))
    trainer.publisher.take(4)
    found["waits"] = trainer.told()
    with failing(LocalStorage, "write", _no_space, rank=1), pytest.raises(DiskFull) as refused:
        trainer.publisher.take(8)
    found["waits"] += [str(refused.value), *trainer.told()]

    # Another group of workers, which was given up, goes on with what it had begun.
    for name, recipe in (("zombie", RECIPE), ("remote_zombie", remote)):
        zombie = Trainer(directory / name, engine, recipe)
        ours = Trainer(directory / name, engine, recipe)
        zombie.step()
        ours.publisher.take(4, is_last=True)
        manifest = store.published_by_event(directory / name, 4).manifest()
        zombie.step()
        zombie.publisher.take(4)
        zombie.publisher._settle(is_needed=False)
        ours.weights(4)
        same = store.published_by_event(directory / name, 4).manifest() == manifest
        found[name] = [same, zombie.told(), zombie.remains()]

    # An error ends the stage while a checkpoint is on its way.
    trainer = Trainer(directory / "error", engine)
    with pytest.raises(FloatingPointError), trainer.publisher:
        trainer.publisher.take(4)
        raise FloatingPointError
    found["error"] = trainer.told()
    if endpoint is not None:
        found["remote_run"] = _of_a_remote_run(engine, endpoint)
    return found


@pytest.fixture(scope="module")
def found(
    run_on_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    has_store = find_spec("moto") is not None and find_spec("s3fs") is not None
    endpoint = request.getfixturevalue("s3_endpoint") if has_store else None
    return run_on_ranks(RANKS, _everything, tmp_path_factory.mktemp("publication"), endpoint)


def test_take__training_goes_on_and_what_is_published_is_what_was(found: dict[str, Any]) -> None:
    result = found["goes_on"]
    assert result["early"] == [] and result["before"]
    assert result["equal"] and result["moved"]
    assert result["due"] == ["4 published"] and result["end"] == ["8 published", "12 published"]
    assert result["steps"] == [4, 8, 12] and result["remains"] == []


@pytest.mark.parametrize(
    ("name", "said", "kind"),
    [
        ("full", "no space left while writing the checkpoint of step {}", "DiskFull"),
        ("broken", "OSError: [Errno 5] Input/output error", "CheckpointError"),
        ("late", "no space left while writing the checkpoint of step {}", "DiskFull"),
        ("away", "ConnectionError: the store is away", "CheckpointError"),
        ("dropped", "flat-00001.safetensors: was written, and the store does not have its", "CheckpointError"),
        ("lost", "checkpoint.json: was written, and the store does not have it", "CheckpointError"),
    ],
)
def test_take__a_failure_beside_training_is_a_warning_and_of_the_last_one_an_error(
    name: str, said: str, kind: str, found: dict[str, Any]
) -> None:
    result = found[name]
    first, second, third, last = result["told"]
    assert first == ["4 published", "8 published"] and third == ["20 published"] and last == []
    (warning,) = second  # of two failures
    assert warning.startswith("12 the checkpoint of step 12 was not published: ") and said.format(12) in warning
    assert warning.endswith("training goes on and tries the next one")
    assert result["refused"][0] == kind and said.format(24) in result["refused"][1]
    assert result["steps"] == [4, 8, 20]
    assert result["remains"] == [[], []]


def test_take__without_memory_for_a_copy_training_waits_and_says_so_once(found: dict[str, Any]) -> None:
    told, steps = found["short"]
    assert told[0].startswith("4 no memory for a copy of the training state (") and told[0].endswith("is written")
    assert told[1:] == ["4 published", "8 published"] and steps == [4, 8]


def test_take__is_waited_for_where_the_recipe_says_so(found: dict[str, Any]) -> None:
    first, refused = found["waits"]
    assert first == "4 published" and "no space left while writing the checkpoint of step 8" in refused


@pytest.mark.parametrize("name", ["zombie", "remote_zombie"])
def test_take__workers_that_were_given_up_replace_nothing(name: str, found: dict[str, Any]) -> None:
    is_same, told, remains = found[name]
    assert is_same and remains == []
    assert len(told) == 1 and "step-00000004: published meanwhile by other workers of this run; left alone" in told[0]


def test_take__a_remote_run_has_the_record_of_a_checkpoint_first_and_one_machine_that_publishes(
    found: dict[str, Any],
) -> None:
    if "remote_run" not in found:
        pytest.skip("moto[server] or s3fs is not installed")
    result = found["remote_run"]
    first, away, back, other = result["told"]
    assert first == ["4 published"] and result["seen"] == [str(b"step 4\n")]
    assert len(away) == 1 and "8 was not published: ConnectionError: the store is away" in away[0]
    assert back == ["10 published"] and result["journal"] == str(b"step 4\nstep 8\n")
    assert len(other) == 1 and "12 was not published: another machine drives the run now; left alone" in other[0]
    assert result["steps"] == [4, 10] and result["left"] == []


def test_publisher__an_error_in_training_lets_the_one_under_way_end(found: dict[str, Any]) -> None:
    assert found["error"] == ["4 published"]
