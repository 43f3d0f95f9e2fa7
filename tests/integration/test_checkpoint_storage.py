"""Checkpoints of two ranks in a store behind fsspec: published, verified, resumed from bit for bit, pruned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoints import copies, references
from pretrain.checkpoints import store as checkpoint

pytestmark = pytest.mark.integration

Launch = Callable[..., Any]
Losses = Callable[[Path], dict[int, float]]


def test_storage__two_ranks_publish_resume_and_prune_remotely(
    launch: Launch, losses: Losses, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "store"
    options = (f"checkpoints.storage=file://{store}", "train.keep_last=1")
    launch("remote", *options).kill_after_step(6)
    remote = launch("remote", *options)
    remote.wait()
    assert losses(remote.run_dir) == losses(whole)  # bit for bit, resumed from step 4

    found = checkpoint.published(remote.run_dir)
    assert [one.step for one in found] == [0, 4, 8, 12]
    assert [one.step for one in found if one.has_training_state] == [12]  # retention
    assert [path.name for path in (remote.run_dir / "checkpoints").iterdir()] == ["stored_at.txt"]
    assert found[-1].location == f"file://{store}/remote/step-00000012"

    path = copies.local(found[-1], training_state=True)
    manifest = checkpoint.verify(path)
    shards = [name for name in manifest["files"] if name.startswith("training_state/flat-")]
    assert len(shards) == 2 and (path / "training_state/rng-00001.safetensors").is_file()
    for one in found[1:]:
        weights = references.load_backbone(one.location).timm_state_dict()
        expected = references.load_backbone(checkpoint.checkpoint_path(whole, one.step)).timm_state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_storage__every_rank_digests_its_own_files(whole: Path) -> None:
    """What each of two ranks wrote is in the manifest of a local checkpoint as well."""
    manifest = json.loads((checkpoint.checkpoint_path(whole, 12) / "checkpoint.json").read_text())
    names = {name.removeprefix("training_state/") for name in manifest["files"]}
    assert {"rng-00000.safetensors", "rng-00001.safetensors", "objective-00000.safetensors"} <= names
    assert checkpoint.verify(checkpoint.checkpoint_path(whole, 12)) == manifest
