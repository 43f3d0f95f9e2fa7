"""Checkpoints: directories that appear complete or not at all, and are verified before anything of them is used.

A checkpoint is written aside as `.step-XXXXXXXX.partial`, flushed to disk with `checkpoint.json` (digests of every
file) last, and renamed. Whatever is named `step-XXXXXXXX` is therefore complete; a crash leaves at most a `.partial`,
which the next publication of that step overwrites.

    step-00000100/  backbone.safetensors  recipe.yaml  checkpoint.json  training_state/ (DeepSpeed's shards, RNG states)

Only `training_state` holds pickles (DeepSpeed's format): it is read after its digests matched, and only to resume.

What is not here: when to publish (`pretrain.worker`), registering and pulling (`pretrain.checkpoints.references`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pretrain.record.run_dir import MANIFEST
from pretrain.version import __version__

__all__ = [
    "CheckpointError",
    "checkpoint_path",
    "latest",
    "prune",
    "publish",
    "published",
    "read_manifest",
    "staging_path",
    "verify",
]

FORMAT = 1
TRAINING_STATE = "training_state"
REMEDY = "delete this checkpoint to resume from the one before"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete or does not fit."""


@dataclass(frozen=True)
class Published:
    """A complete checkpoint on disk."""

    step: int
    path: Path


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is published."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def staging_path(run_dir: Path, step: int) -> Path:
    """Where it is written first; never a name that a reader would take for a checkpoint."""
    return run_dir / "checkpoints" / f".step-{step:08d}.partial"


def published(run_dir: Path) -> list[Published]:
    """All complete checkpoints of a run, by step."""
    names = sorted((run_dir / "checkpoints").glob("step-*"))
    return [Published(int(match[1]), path) for path in names if (match := _NAME.fullmatch(path.name))]


def latest(run_dir: Path) -> Published | None:
    """The newest checkpoint that training can resume from."""
    for found in reversed(published(run_dir)):
        if (found.path / TRAINING_STATE).is_dir():
            return found
    return None


def publish(run_dir: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Complete the staged checkpoint of `step` with its manifest and give it its name. Call on one rank.

    Args:
        run_dir: Directory of the run.
        step: Optimiser steps done.
        manifest: What `checkpoint.json` says beside format, time, files and versions.

    Returns:
        The published directory.
    """
    staged, final = staging_path(run_dir, step), checkpoint_path(run_dir, step)
    files = {}
    for path in sorted(p for p in staged.rglob("*") if p.is_file()):
        files[path.relative_to(staged).as_posix()] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        _flush(path)
    complete = {
        "format": FORMAT,
        **manifest,
        "step": step,
        "created": time.time(),
        "files": files,
        "versions": {"pretrain": __version__, **{name: version(name) for name in ("torch", "deepspeed", "timm")}},
        TRAINING_STATE: (staged / TRAINING_STATE).is_dir(),
    }
    (staged / MANIFEST).write_text(json.dumps(complete, indent=1, sort_keys=True) + "\n")
    for name in files:  # safetensors writes files that only their owner can read; the umask decides
        (staged / name).chmod((staged / MANIFEST).stat().st_mode)
    _flush(staged / MANIFEST)
    for directory in [*(p for p in staged.rglob("*") if p.is_dir()), staged]:
        _flush(directory)
    if (
        final.exists()
    ):  # the same step again after a restart from an earlier checkpoint: bit-equal weights, newer file times
        remove(final)
    staged.rename(final)
    _flush(final.parent)
    return final


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The contents of `checkpoint.json`.

    Raises:
        CheckpointError: It is missing, not JSON, or of a format this version does not know.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {MANIFEST} in it; not a published checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format') if isinstance(manifest, dict) else '?'}, expected {FORMAT}"
        )
    return manifest


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check the size and SHA-256 of every file of a checkpoint; returns its manifest.

    Raises:
        CheckpointError: Names the file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, {MANIFEST} lists it; {REMEDY}")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: contents differ from the SHA-256 in {MANIFEST}; {REMEDY}")
    return manifest


def prune(run_dir: Path, *, keep_last: int, pinned: Iterable[int] = ()) -> list[int]:
    """Delete all but the newest `keep_last` checkpoints and the pinned steps; returns the steps that went."""
    kept = {found.step for found in published(run_dir)[-keep_last:]} | set(pinned)
    gone = [found for found in published(run_dir) if found.step not in kept]
    for found in gone:
        remove(found.path)
    return [found.step for found in gone]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that no reader ever sees half of it under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
