"""A plain folder of photos as data, of `pretrain run RECIPE data.root=PHOTOS/` and `evaluate RUN --data NAME=PHOTOS/`.

The photos are packed into shards once, in the storage of the runs, and read from there; a later command on the same
files uses the same shards. What is changed, added or removed makes new shards beside the old ones, which the runs that
began with them go on with.

    STORAGE/shards/NAME-PLACE-STATE/       PLACE: hash of the folder's path, STATE: of its files, their sizes and times

Folders of classes give labels, and a tenth of the photos is held out to evaluate on unless the folder has splits.
Without labels, tasks that need them are left out of the run.

Not here: what folders mean and how shards are written (`data_pipelines.packing`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_pipelines.errors import TooManyDamagedError
from data_pipelines.shards.manifest import MANIFEST_NAME
from evaluation import registry as evaluations
from pretrain.config.checks.places import place_problem
from pretrain.config.load import data_root, load_plan
from pretrain.config.pairing import photos_problem
from pretrain.config.paths import absolute
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan
from pretrain.errors import RequestError
from pretrain.record.interrupts import stopped_by_signals
from pretrain.record.lock import hold
from pretrain.remote.places import uri_of
from pretrain.screen import say

if TYPE_CHECKING:
    from data_pipelines.packing.inputs import Listing

__all__ = [
    "SHARDS",
    "drawn_splits",
    "foreseen_plan",
    "holds_photos",
    "listed",
    "load",
    "packed",
    "packed_plan",
    "photo_folder",
    "unfit_for_evaluation",
]

SHARDS = "shards"  # in the storage of the runs
HELD_OUT = {"train": 0.9, "test": 0.1}
MAX_BAD = 0.05  # share of damaged photos that are left out, with a warning that names the first
SHARD_MB = 64  # a shard is the work of one process
POLL_S = 0.5
STOPPED = "stopped while the photos are packed; the same command goes on where it was"


def load(recipe: str, overrides: Sequence[str] = ()) -> Plan:
    """`load_plan`, which takes a plain folder of photos as `data.root`, too; it is packed first.

    Raises:
        RequestError: as `load_plan`, or too many of the photos are damaged.
        DataError: the photos cannot be packed.
        RunStopped: SIGTERM or Ctrl-C while they are packed; the same call goes on.
    """
    folder = photo_folder(recipe, overrides)
    if folder is None:
        return load_plan(recipe, overrides)
    return packed_plan(recipe, overrides, folder, load_plan(recipe, overrides, check_files=False))


def photo_folder(recipe: str, overrides: Sequence[str] = ()) -> Path | None:
    """The folder that `data.root` of a request names, if it holds photos and no shards.

    Raises:
        RequestError: there is no such recipe.
    """
    root = data_root(recipe, overrides)
    if root is None or not holds_photos(Path(absolute(root))):
        return None
    return Path(absolute(root))


def holds_photos(folder: Path) -> bool:
    """Whether there are photos in or below a folder that is none of shards."""
    if not os.path.isdir(folder):
        return False
    from data_pipelines.packing.inputs import FAMILIES, holds

    if any(name.lower().endswith(FAMILIES["tars"]) or name == MANIFEST_NAME for name in os.listdir(folder)):
        return False
    return holds(folder, "images")


def packed_plan(recipe: str, overrides: Sequence[str], folder: Path, draft: Plan) -> Plan:
    """The plan of a request on shards of the photos in `folder`, which are packed if they are not yet.

    Args:
        recipe, overrides: of the request.
        folder: as `photo_folder` gives it.
        draft: its plan as far as it can be checked without the data.

    Raises:
        RequestError, DataError, RunStopped: as `load`.
    """
    _require_images(folder, draft.recipe)
    storage = Path(draft.recipe.storage)
    listing = listed(folder, storage)
    dest = packed(folder, storage, listing)
    if uri_of(storage):
        say("note: these shards stay on this machine; another one can go on with the run if it has them, too")
    return load_plan(recipe, (*overrides, *_pointing_at(dest, folder, listing, draft.recipe)))


def packed(folder: Path, storage: Path, listing: Listing) -> Path:
    """Where the shards of the photos in `folder` are, which are packed if they are not yet.

    Args:
        folder: of photos.
        storage: of the runs.
        listing: what is to be packed, by `listed`.

    Raises:
        DataError, RunStopped: as `load`.
    """
    dest = place_of(folder, storage, listing)
    if (dest / MANIFEST_NAME).exists():
        say(f"data: the shards of {folder} in {dest}, as nothing has changed since they were packed")
    else:
        with _alone(dest), stopped_by_signals(lambda: STOPPED):
            _pack(folder, dest, listing)
    return dest


def unfit_for_evaluation(listing: Listing, protocols: Sequence[str] = ()) -> str | None:
    """Why photos cannot be evaluated on by these protocols, or, without any, by none; None if they can."""
    others = [name for name in protocols if evaluations.protocol(name).label != "cls"]
    if others:
        return f"photos have no labels for {', '.join(others)}; pack them with their masks by `pretrain data pack`"
    if listing.classes is None:
        return "no folders of classes, which give the labels to evaluate with"
    if not {"test", "val"} & drawn_splits(listing).keys():
        return "too few photos to hold some out to test on"
    return None


def foreseen_plan(recipe: str, overrides: Sequence[str], folder: Path, draft: Plan) -> tuple[Plan, Listing, Path]:
    """What `packed_plan` would give, as far as it can be known before anything is packed; nothing is written.

    Returns:
        the plan, what is to be packed, and where.
    """
    _require_images(folder, draft.recipe)
    storage = Path(draft.recipe.storage)
    listing = listed(folder, storage)
    dest = place_of(folder, storage, listing)
    pointing = (*overrides, *_pointing_at(dest, folder, listing, draft.recipe))
    return load_plan(recipe, pointing, check_files=False), listing, dest


def listed(folder: Path, storage: Path) -> Listing:
    """What is to be packed.

    Raises:
        RequestError: the runs would lie among the photos, or nothing can be written where they are to be.
        DataError: the folders cannot be understood.
    """
    from data_pipelines.packing.inputs import list_folder

    if storage.resolve().is_relative_to(folder.resolve()):
        problem = f"lies among the photos of {folder}, and what runs write would be packed with them"
        raise RequestError(f"storage={storage}: {problem}; name another place as the storage")
    if place := place_problem(storage.absolute()):
        raise RequestError(f"storage={storage}: {place}")
    return list_folder(folder, kind="images")


def place_of(folder: Path, storage: Path, listing: Listing) -> Path:
    """Where the shards of a folder as it is now belong."""
    from data_pipelines.packing.pack import CREATED_BY

    name = re.sub(r"[^A-Za-z0-9._-]", "_", listing.name) or "photos"
    where = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    state = hashlib.sha256(f"{CREATED_BY} {shares_of(listing)} {listing.state()}".encode()).hexdigest()
    return storage / SHARDS / f"{name}-{where[:6]}-{state[:10]}"


def shares_of(listing: Listing) -> dict[str, float] | None:
    """How photos with labels but without splits are divided; None: as the folder says, else all are trained on."""
    from data_pipelines.packing.plan import split_of

    if listing.classes is None or len({item.split for item in listing.items}) > 1:
        return None
    drawn = {split_of(item._replace(split=None), list(HELD_OUT.items())) for item in listing.items}
    return HELD_OUT if drawn == HELD_OUT.keys() else None


def drawn_splits(listing: Listing) -> Counter[str]:
    """How many photos each split gets."""
    from data_pipelines.packing.plan import split_of

    shares = shares_of(listing)
    if shares is None:
        return Counter(item.split or "train" for item in listing.items)
    return Counter(split_of(item._replace(split=None), list(shares.items())) for item in listing.items)


def _pack(folder: Path, dest: Path, listing: Listing) -> None:
    if (dest / MANIFEST_NAME).exists():  # by another process, for which this one has waited
        return
    from data_pipelines.packing.pack import pack
    from pretrain.reporting.progress import progress_of

    size = sum(item.pieces[0].size for item in listing.items)
    earlier = [path for path in dest.parent.glob(f"{dest.name[:-10]}*") if (path / MANIFEST_NAME).exists()]
    why = f"{folder} has changed since it was packed" if earlier else "once, later runs use the shards"
    if (dest / ".packing" / "request.json").exists():
        why = "going on where packing was stopped"
    say(f"data: packing {len(listing.items)} photos ({size / 1e6:.0f} MB) of {folder} into {dest} ({why})")
    began = time.monotonic()
    with progress_of("packing") as progress:
        try:
            manifest = pack(
                folder,
                dest,
                kind="images",
                splits=shares_of(listing),
                shard_mb=SHARD_MB,
                max_bad=MAX_BAD,
                progress=progress,
            )
        except TooManyDamagedError as error:
            if dest.exists():  # of no use to a later run: files that were repaired or removed make other shards
                shutil.rmtree(dest)
            remedy = f"repair or remove them (up to {MAX_BAD:.0%} are left out)"
            raise RequestError(f"data.root={folder}: {error.found}; {remedy}") from None
    counts = ", ".join(f"{name} {split.samples}" for name, split in manifest.splits.items())
    classes = f"{len(manifest.classes)} classes" if manifest.classes else "no classes"
    say(f"data: packed {counts}; {classes}; {time.monotonic() - began:.1f} s")


def _require_images(folder: Path, draft: Recipe) -> None:
    """Raises RequestError for photos that the backbone cannot read, before they are packed."""
    if problem := photos_problem(draft.backbone.kind):
        raise RequestError(f"data.root={folder}: {problem}")


def _pointing_at(dest: Path, folder: Path, listing: Listing, draft: Recipe) -> Iterator[str]:
    """The settings that put the shards in the place of the folder, without evaluations that these do not allow."""
    yield f"data.root={dest}"
    evaluation = draft.evaluation
    mine = {name for name, path in evaluation.data.items() if Path(path) == folder}
    is_held_out = bool({"test", "val"} & drawn_splits(listing).keys())
    why = "no folders of classes" if listing.classes is None else "no photos that are held out (split test or val)"
    labels = (None, "cls") if listing.classes else (None,)
    dropped = [
        task
        for task in evaluation.tasks
        if task.data in mine and not (is_held_out and evaluations.protocol(task.protocol).label in labels)
    ]
    if not evaluation.enabled or (not dropped and is_held_out):
        return
    names = [f"{task.protocol}/{task.data}" for task in dropped]
    if named := [name for name, task in zip(names, dropped, strict=True) if task.suite is None]:
        say(f"evaluation: without {', '.join(named)}, which need labels: {folder} has {why}")
    data = {name: str(dest) if name in mine else path for name, path in evaluation.data.items()}
    kept = {name: path for name, path in data.items() if is_held_out or name not in mine}
    yield f"evaluation.data={json.dumps(kept)}"
    yield f"evaluation.tasks={json.dumps([asdict(task) for task in evaluation.tasks if task not in dropped])}"
    if evaluation.select is not None and evaluation.select.rpartition("/")[0] in names:
        yield "evaluation.select=null"


@contextmanager
def _alone(dest: Path) -> Iterator[None]:
    """One process at a time packs; others wait for it. The lock goes at the end, as do new folders without content."""
    absent = [folder for folder in dest.parents if not folder.exists()]
    path = dest.parent / f".{dest.name}.lock"
    if (lock := _hold_named(path)) is None:
        say(f"data: another process is packing into {dest}; waiting for it")
    while lock is None:
        time.sleep(POLL_S)
        lock = _hold_named(path)
    with lock:
        try:
            yield
        finally:
            path.unlink()
            with suppress(OSError):  # not empty
                for folder in absent:
                    folder.rmdir()


def _hold_named(path: Path) -> IO[str] | None:
    """`hold` a lock that goes with its holder: one whose file is gone, as its holder has ended, is taken anew."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # of a folder that has just gone with the lock
            lock = hold(path)
            if lock is None or os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()
