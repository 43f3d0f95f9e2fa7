"""Trackers beside MLflow get the events of a run; a missing one is refused, a failing one stops nothing."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pretrain.config.checks import places
from pretrain.config.load import load_plan, load_recipe
from pretrain.errors import RequestError
from pretrain.record.events import Evaluated, Event, Finished, Metrics, Visualizations, Warned
from pretrain.tracking.also import Mirrors

BOUNDS = {"top1": 0.5, "top1_ci_low": 0.4}


def events(run_dir: Path) -> list[Event]:
    Image.new("RGB", (8, 4)).save(run_dir / "grid.png")
    return [
        Metrics(step=1, values={"loss": 2.0, "lr": 0.1}, time=100.0),
        Metrics(step=2, values={"loss": 1.0}, time=101.0),
        Metrics(step=2, values={"loss": 9.0}, time=102.0),  # trained again after a restart
        Visualizations(step=2, path="grid.png"),
        Warned(step=2, about="collapse", text="collapsed: flat"),
        Evaluated(step=1, protocol="knn", data="a", metrics=BOUNDS, key="", seconds=1.0, cached=False, time=103.0),
        Finished(step=2),
    ]


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every number in TensorBoard's files, read without TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event as Record

    def records(data: bytes) -> Iterator[bytes]:
        while data:  # length, its checksum, content, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            yield data[12 : 12 + length]
            data = data[16 + length :]

    found = []
    for path in sorted(folder.glob("events.*")):
        for content in records(path.read_bytes()):
            record = Record.FromString(content)
            found += [(v.tag, record.step, v.simple_value) for v in record.summary.value if v.HasField("simple_value")]
    return found


def test_mirrors__tensorboard_gets_numbers_once_and_anew_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for _ in range(2):  # the second driver writes the files anew
        mirrors = Mirrors(["tensorboard"], tmp_path, "tests", {})
        mirrors.show(events(tmp_path))
        mirrors.close()
    found = [(tag, step, round(value, 3)) for tag, step, value in scalars(tmp_path / "tensorboard")]
    assert sorted(found) == [
        ("eval/knn/a/top1", 1, 0.5),
        ("eval/knn/a/top1_ci_low", 1, 0.4),
        ("train/loss", 1, 2.0),
        ("train/loss", 2, 1.0),
        ("train/lr", 1, 0.1),
    ]


def test_mirrors__wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is no development dependency: it brings a service of its own, 20 MB")
    monkeypatch.setenv("WANDB_MODE", "offline")
    mirrors = Mirrors(["wandb"], tmp_path, "tests", {"train": {"steps": 2}})
    mirrors.show(events(tmp_path))
    mirrors.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_mirrors__one_that_fails_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        mirrors = Mirrors(["tensorboard"], tmp_path, "tests", {})
        mirrors.show(events(tmp_path))
        mirrors.close()
    assert [record.message for record in caplog.records if "gets nothing more" in record.message]


def test_load__a_tracker_that_is_missing_or_unknown_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe("demo", ["tracking.also=[]"]).tracking.also == []
    with pytest.raises(RequestError) as refused:
        load_plan("demo", ["tracking.also=[tensorbord]"])
    assert refused.value.mistakes[0].endswith("known are tensorboard, wandb; did you mean 'tensorboard'?")
    monkeypatch.setattr(places, "_TRACKERS", {"wandb": ("no_such_package",)})
    with pytest.raises(RequestError) as refused:
        load_plan("demo", ["tracking.also=[wandb]"])
    assert refused.value.mistakes == (
        "command line: tracking.also=['wandb']: wandb is not installed: pip install no_such_package, or leave it out",
    )
    assert load_recipe("demo", ["tracking.also=[wandb]"], check_files=False).tracking.also == ["wandb"]
    with pytest.raises(RequestError, match="expected a list of texts"):
        load_plan("demo", ["tracking.also=3"])
