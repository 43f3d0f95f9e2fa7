"""What the driver decides before anything starts, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cluster.connect
from cluster.connect import Cluster
from pretrain.config.load import load_recipe
from pretrain.driver.start import run
from pretrain.errors import RequestError


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_run__fewer_gpus_than_workers_are_refused_and_leave_nothing(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on CPUs instead, without a word, would take days to be noticed."""

    @contextmanager
    def connect(address: str | None, **options: Any) -> Iterator[Cluster]:
        yield Cluster("head:6379", private=False, num_gpus=1.0, has_evaluation_slots=False)

    monkeypatch.setattr(cluster.connect, "connect", connect)
    recipe = load_recipe("demo", [f"train.device={device}", "train.workers=2", "cluster.address=head:6379"])
    with pytest.raises(RequestError) as caught:
        run(replace(recipe, storage=str(tmp_path)))
    (line,) = caught.value.mistakes
    assert line.startswith("train.workers=2: the cluster at head:6379 has 1 GPU, not one for each worker; use")
    assert "train.workers=1" in line and "cluster.gpus_per_worker=1" in line and "train.device=cpu" in line
    assert list(tmp_path.iterdir()) == []
