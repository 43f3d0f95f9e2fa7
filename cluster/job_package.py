"""Files of this machine as one package, which Ray unpacks on each node as the working directory of a job.

Sizes are looked at before anything is zipped: Ray refuses more than 100 MiB, and only when all of it has been sent. The
name of a package is the digest of what is in it, so that one that a cluster holds is not sent again.

Not here: which files those are (`pretrain.jobs.shipping`), sending (`cluster.job_server`).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Package", "PackageTooLarge", "files_below", "packed"]

LARGEST = 90 * 2**20  # bytes before compression; Ray's limit is 100 MiB after it
SHOWN = 5  # of the largest files
_NOT_CODE = ("__pycache__", "*.pyc", "*.pyo", ".*", "*.egg-info")


class PackageTooLarge(ValueError):
    """There is more than a package may hold; one line that names the largest files."""


@dataclass(frozen=True)
class Package:
    """A zip, and what Ray calls it."""

    name: str
    content: bytes

    @property
    def uri(self) -> str:
        return f"gcs://{self.name}"


def files_below(folder: Path, name: str) -> dict[str, Path]:
    """The files of a folder of code by their places in a package, below `name`; without caches and hidden files."""
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if any(path.match(pattern) for pattern in _NOT_CODE):
            continue
        if path.is_dir() and not path.is_symlink():  # a link to a folder may lead back up
            yield from _walk(path)
        elif path.is_file():
            yield path


def packed(files: Mapping[str, Path | bytes]) -> Package:
    """All files in one package; equal files make equal packages.

    Args:
        files: By their places in it.

    Raises:
        PackageTooLarge: They are more than `LARGEST` bytes.
    """
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if (total := sum(sizes.values())) > LARGEST:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN]
        shown = ", ".join(f"{_place(files[name], name)} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        limit = f"{total / 2**20:.0f} MiB, and at most {LARGEST / 2**20:.0f} are shipped"
        raise PackageTooLarge(f"what the job runs with has {limit}; the largest files are {shown}: move them elsewhere")
    digest, zipped = hashlib.sha256(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            file = files[name]
            content = file if isinstance(file, bytes) else file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            archive.writestr(_entry(name), content)
    return Package(f"_ray_pkg_{digest.hexdigest()[:32]}.zip", zipped.getvalue())


def _place(file: Path | bytes, name: str) -> str:
    return name if isinstance(file, bytes) else str(file)


def _entry(name: str) -> zipfile.ZipInfo:
    """Of a file that everybody may read; the time is none, so that equal files make equal packages."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry
