"""What can be embedded: shards, data that the checkpoint's recipe names, and plain folders of photos.

Not here: running the backbone (`embed`), what shards are (`data_pipelines.shards`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.decode import IMAGE_FIELDS
from data_pipelines.errors import DataError
from data_pipelines.packing.inputs import FAMILIES, family_of, walk
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.shards.manifest import MANIFEST_NAME
from data_pipelines.shards.source import check_source
from data_pipelines.storage.locations import redact
from evaluation.extraction.forward import Samples
from pretrain.config.load import in_storage, load_recipe
from pretrain.errors import RequestError, listed, nearest_file
from pretrain.record.run_dir import RECIPE

__all__ = ["PhotoFolder", "Source", "open_source", "part_rows"]

_PATTERN = "*?[{"


@dataclass(frozen=True)
class Source:
    """Opened data.

    Attributes:
        place: where it lies, without credentials.
        digest: identity of names, order and content; of plain files, of their sizes and times of change.
        parts: (name, number of samples) of what follows one another, such as shards.
        folder: of shards on this machine that lie in one.
    """

    samples: Samples
    place: str
    digest: str
    parts: tuple[tuple[str, int], ...]
    folder: Path | None = None

    @property
    def dataset(self) -> Dataset | None:
        """The samples, where these are shards."""
        return self.samples if isinstance(self.samples, Dataset) else None


class PhotoFolder:
    """Photos below a folder in the order of their paths, which are their keys. Hidden files are none."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        DataError: there are no photos, or what is there is neither a file nor a folder.
        """
        self.folder = folder
        photos = [entry for entry in walk(folder) if family_of(entry.path) == "images"]
        if not photos:
            raise DataError(f"{folder}: no shards (.tar) and no photos ({' '.join(FAMILIES['images'])}) in it")
        self._names = [entry.path for entry in photos]
        self.num_samples = len(photos)
        sha = hashlib.sha256(b"photos\n")
        for entry in photos:
            sha.update(f"{entry.path}\0{entry.size}\0{entry.modified_ns}\n".encode("utf-8", "surrogateescape"))
        self.digest = sha.hexdigest()

    def read(self, sample_id: int) -> dict[str, Any]:
        """The bytes of a photo, whatever its format, as field `jpg`."""
        name = self._names[sample_id]
        return {"__key__": name, IMAGE_FIELDS[0]: (self.folder / name).read_bytes()}

    def where(self, sample_id: int) -> str:
        return str(self.folder / self._names[sample_id])

    def require_field(self, *candidates: str) -> str:
        """Raises:
        DataError: no photo is asked for.
        """
        if IMAGE_FIELDS[0] not in candidates:
            raise DataError(f"{self.folder} holds photos, but the backbone is given {' or '.join(candidates)}")
        return IMAGE_FIELDS[0]


def open_source(data: str, checkpoint: Path, storage: Path) -> Source:
    """Open what `data` means.

    Args:
        data: A folder of photos; a folder, glob, range or URL of shards; or a name of evaluation data in the recipe of
            the checkpoint.
        checkpoint: Its directory.
        storage: Where runs live; data that a run has packed are found again there.

    Raises:
        RequestError: There is no such thing.
        DataError: It is damaged or empty.
    """
    is_here = Path(data).exists()
    if not is_here and "://" not in data and not any(letter in data for letter in _PATTERN):
        data = _named(data, checkpoint, storage)
    folder = Path(data)
    if folder.is_dir() and not any(_is_of_shards(path.name) for path in folder.iterdir()):
        photos = PhotoFolder(folder.absolute())
        return Source(photos, str(photos.folder), photos.digest, ((photos.folder.name, photos.num_samples),))
    check_source(data)
    dataset = open_dataset(data)
    parts = tuple((shard.name, count) for shard, count in zip(dataset.shards, dataset.counts, strict=True))
    return Source(dataset, redact(data), dataset.digest, parts, folder.absolute() if folder.is_dir() else None)


def _is_of_shards(name: str) -> bool:
    return name == MANIFEST_NAME or name.lower().endswith(FAMILIES["tars"])


def _named(name: str, checkpoint: Path, storage: Path) -> str:
    """Where evaluation data of the recipe of a checkpoint lie.

    Raises:
        RequestError: It has none of that name.
    """
    missing = f"DATA {name}: no such file or directory{nearest_file(Path(name))}"
    if not (checkpoint / RECIPE).is_file():
        raise RequestError(missing)
    try:
        recipe = load_recipe(checkpoint / RECIPE, check_files=False)
    except RequestError as error:
        raise RequestError(f"{missing}; the recipe of the checkpoint cannot be asked: {error.mistakes[0]}") from None
    named = recipe.evaluation.data
    if name not in named:
        raise RequestError(f"{missing}; the recipe of the checkpoint names {listed(named)}")
    return in_storage(str(named[name]), recipe.storage, str(storage))


def part_rows(parts: tuple[tuple[str, int], ...]) -> Iterator[tuple[str, int, int]]:
    """(name, first row, row behind the last) of each part."""
    begin = 0
    for name, count in parts:
        yield name, begin, begin + count
        begin += count
