"""Digests, and files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["digest_of", "flush", "sha256", "write_atomically"]


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `facts`; what keys are made of."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flush(path: Path) -> None:
    """Brings the bytes of a file to the disk, those written through a memory map as well."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Digest of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes aside, to the disk, and renames: whoever reads `path` sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
