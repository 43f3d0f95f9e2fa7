"""Publication is atomic, verification names what differs, pruning keeps what it must."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoints import store as checkpoint


def _stage(run_dir: Path, step: int, *, training_state: bool = True) -> Path:
    staged = checkpoint.staging_path(run_dir, step)
    (staged / checkpoint.TRAINING_STATE if training_state else staged).mkdir(parents=True)
    (staged / "backbone.safetensors").write_bytes(b"weights of step %d" % step)
    if training_state:
        (staged / checkpoint.TRAINING_STATE / "state.pt").write_bytes(os.urandom(100))
    return staged


def _publish(run_dir: Path, *steps: int) -> None:
    for step in steps:
        _stage(run_dir, step)
        checkpoint.publish(run_dir, step, {"run_id": "r"})


def test_publish__lists_every_file_with_its_digest(tmp_path: Path) -> None:
    _stage(tmp_path, 100)
    final = checkpoint.publish(tmp_path, 100, {"run_id": "r", "samples_seen": 6400})
    manifest = checkpoint.verify(final)
    assert final == checkpoint.checkpoint_path(tmp_path, 100)
    assert set(manifest["files"]) == {"backbone.safetensors", "training_state/state.pt"}
    assert manifest["step"] == 100 and manifest["samples_seen"] == 6400 and manifest["training_state"] is True
    assert not checkpoint.staging_path(tmp_path, 100).exists()


def test_publish__killed_at_any_moment_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """A process that dies in the n-th fsync or in the rename leaves the checkpoint before as the newest one."""
    _publish(tmp_path, 1)
    script = """
import os, sys
from pathlib import Path
from pretrain.checkpoints import store as checkpoint
run_dir, moment = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def die(*arguments):
    global calls
    calls += 1
    if calls == moment:
        os._exit(9)
checkpoint._flush = die
Path.rename = (lambda rename: lambda self, target: die() or rename(self, target))(Path.rename)
checkpoint.publish(run_dir, 2, {"run_id": "r"})
"""
    died = 0
    for moment in range(1, 12):
        _stage(tmp_path, 2)
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(moment)], check=False)
        if checkpoint.checkpoint_path(tmp_path, 2).exists():
            checkpoint.verify(checkpoint.checkpoint_path(tmp_path, 2))  # published: then complete
            break
        assert done.returncode == 9
        died += 1
        newest = checkpoint.latest(tmp_path)
        assert newest is not None and newest.step == 1
        checkpoint.verify(newest.path)
        shutil.rmtree(checkpoint.staging_path(tmp_path, 2))
    assert died >= 5  # files, manifest, directories and the rename each were a moment to die in


def test_latest__skips_a_backbone_without_training_state(tmp_path: Path) -> None:
    _stage(tmp_path, 0, training_state=False)
    checkpoint.publish(tmp_path, 0, {"run_id": "r"})
    assert checkpoint.latest(tmp_path) is None
    assert [found.step for found in checkpoint.published(tmp_path)] == [0]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify__names_the_damaged_file(tmp_path: Path, damage: str) -> None:
    _publish(tmp_path, 3)
    state = checkpoint.checkpoint_path(tmp_path, 3) / "training_state" / "state.pt"
    data = state.read_bytes()
    if damage == "remove":
        state.unlink()
    else:
        state.write_bytes(data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt: (missing|contents differ)"):
        checkpoint.verify(state.parent.parent)


def test_read_manifest__refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint\.json"):
        checkpoint.read_manifest(tmp_path)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(checkpoint.CheckpointError, match="format 99, expected 1"):
        checkpoint.read_manifest(tmp_path)


def test_prune__keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    _publish(tmp_path, 1, 2, 3, 4, 5)
    assert checkpoint.prune(tmp_path, keep_last=2, pinned={1}) == [2, 3]
    assert [found.step for found in checkpoint.published(tmp_path)] == [1, 4, 5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[0].startswith("step-")
