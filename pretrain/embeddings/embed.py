"""`embed`: features of every sample of a data set by the backbone of a checkpoint, as Parquet or NumPy files.

They are those that evaluation takes, made by the same code (`evaluation.extraction`), and those that an evaluation has
stored are copied. A call that was killed goes on where it was; memory does not grow with the data.

Not here: what data may be (`sources`), files (`rows`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoints.references import resolve
from pretrain.errors import RequestError
from pretrain.record.destinations import require_local
from pretrain.record.interrupts import stopped_by_signals
from pretrain.record.remote_runs import brought

if TYPE_CHECKING:
    import torch

    from backbones.encoder import Encoder
    from evaluation.extraction.recipe import Extraction
    from pretrain.embeddings.rows import Rows
    from pretrain.embeddings.sources import Source

__all__ = ["FORMS", "TOKENS", "Embedded", "embed"]

FORMS = ("parquet", "npy")
# What is asked for -> columns; those that a backbone or its kind does not have are left out.
TOKENS = {"cls": ("cls",), "patch": ("patch_max", "patch_mean"), "both": ("cls", "patch_max", "patch_mean")}
SAVE_EVERY_S = 2.0  # what a kill may cost
COPIED = 8192  # rows at once
GOES_ON = "the same command goes on where it was"
_DEVICE = re.compile(r"auto|cpu|cuda(?::[0-9]{1,3})?")


@dataclass(frozen=True)
class Embedded:
    """What `embed` did.

    Attributes:
        dest: Where it is.
        num_samples: Rows that are there.
        num_kept: Of these, from an earlier call.
        num_known: Of these, features that an evaluation had stored.
    """

    dest: Path
    num_samples: int
    num_kept: int
    num_known: int


def embed(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    form: str = "parquet",
    tokens: str = "both",
    batch_size: int = 64,
    device: str = "auto",
    storage: str | os.PathLike[str] = "runs",
    on_start: Callable[[int, int], None] = lambda done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Write one row per sample: its key and float32 vectors of width D, after the final norm.

    Args:
        checkpoint: A directory or URI, `runs:/ID[/step]` or `models:/NAME@ALIAS`.
        data: A folder of photos; a folder, glob, range or URL of shards; or a name of evaluation data in the recipe of
            the checkpoint. Photos are seen as in evaluation: shorter side resized, centre cut out.
        dest: The folder to make. `parquet`: `embeddings.parquet` with columns `shard`, `key` and those of `tokens`.
            `npy`: `keys.npy` and an array for each. Both: `_embedding.json`, what was embedded by what.
        form: `parquet` or `npy`.
        tokens: `cls` (the class token), `patch` (column `patch_mean`: the mean of the patch tokens; of point clouds
            also `patch_max`, their maximum), or `both`, which leaves out `cls` for a backbone that has none.
        batch_size: Samples per forward pass; decides speed and memory.
        device: `auto` (CUDA if there is a device), `cpu`, `cuda` or `cuda:N`.
        storage: Where runs and evaluations live, a directory or URI.
        on_start: Called as `on_start(rows done, rows in all)` when all is checked, before the first row is made.
        progress: Called as `progress(rows done, rows in all)`.

    Raises:
        RequestError: An unknown checkpoint, data or setting, or `dest` holds something else.
        DataError: A sample cannot be read; names it.
        EvaluationError: The backbone cannot be given such data, or its features are not finite.
        RunStopped: Ctrl-C or SIGTERM; the same call goes on.
    """
    dest = require_local(dest, "an embedding")
    _check_request(dest, form, tokens, device)
    storage = brought(storage)
    directory = resolve(os.fspath(checkpoint), storage)

    from backbones.io import load_backbone, weights_digest
    from evaluation.extraction.recipe import extraction_of, feature_recipe
    from evaluation.registry import protocol
    from evaluation.runner import architecture_of
    from pretrain.checkpoints.reads import trained_on
    from pretrain.embeddings.rows import Rows
    from pretrain.embeddings.sources import open_source, part_rows

    on_device = _device(device)
    weights = weights_digest(directory)  # first, for it refuses files of other kinds
    architecture = architecture_of(directory)
    reads = trained_on(directory)
    extraction = extraction_of(architecture.get("kind", "image")).reading(reads)
    # The pooled features of all protocols are the same, and this one takes both sorts.
    recipe = feature_recipe(extraction, protocol("knn"), architecture, None, reads)
    source = open_source(os.fspath(data), directory, storage)
    source.samples.require_field(*extraction.inputs)
    request = {
        "weights": weights,
        "data": source.digest,
        "features": recipe,
        "form": form,
        "tokens": tokens,
    }
    total = source.samples.num_samples
    if _is_done(dest, request):
        return Embedded(dest, total, num_kept=total, num_known=0)
    backbone = load_backbone(directory).to(on_device).eval()
    columns = _columns(tokens, backbone, extraction)
    with Rows(dest, request, total, {name: backbone.embed_dim for name in columns}) as rows:
        kept = rows.num_done
        known = 0
        on_start(kept, total)
        with stopped_by_signals(lambda: f"stopped after {rows.num_done} of {total} samples; {GOES_ON}"):
            for first, end, stored in _spans(source, extraction, request, storage):
                begin = max(first, rows.num_done)
                if begin >= end:
                    continue
                if stored is not None:
                    known += end - begin
                    made = _copied(source, stored, (first, end), begin)
                else:
                    made = _computed(source, backbone, extraction, recipe, batch_size, on_device, begin, end)
                _append(rows, made, columns, lambda: progress(rows.num_done, total))
        description = {**request, "checkpoint": str(checkpoint), "place": source.place, "num_samples": total}
        description |= {
            "columns": list(columns),
            "width": backbone.embed_dim,
            "shards": [list(p) for p in source.parts],
        }
        rows.finish(form, description, part_rows(source.parts))
    return Embedded(dest, total, num_kept=kept, num_known=known)


def _check_request(dest: Path, form: str, tokens: str, device: str) -> None:
    for name, value, allowed in (("format", form, FORMS), ("tokens", tokens, tuple(TOKENS))):
        if value not in allowed:
            raise RequestError(f"{name} {value}: expected one of {', '.join(allowed)}")
    if _DEVICE.fullmatch(device) is None:
        raise RequestError(f"device {device}: expected auto, cpu, cuda or cuda:N")
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise RequestError(f"{dest}: already exists and is no folder; choose another destination")


def _device(name: str) -> torch.device:
    import torch

    from evaluation.runner import available_device

    if name == "auto":
        return available_device()
    count = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
        raise RequestError(f"device {name}: this process sees {count or 'no'} CUDA devices; use --device auto or cpu")
    return torch.device(name)


def _is_done(dest: Path, request: Mapping[str, Any]) -> bool:
    """Whether `dest` holds just this.

    Raises:
        RequestError: It holds something else.
    """
    from data_pipelines.parsing import parse_json
    from pretrain.embeddings.rows import DESCRIPTION, require_same

    if not dest.exists() or not os.listdir(dest):
        return False
    try:
        held = parse_json((dest / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        raise RequestError(f"{dest}: is not empty and holds no embedding; choose another destination") from None
    require_same(held, request, dest, f"as its {DESCRIPTION} says")
    return True


def _columns(tokens: str, backbone: Encoder, extraction: Extraction) -> tuple[str, ...]:
    if tokens == "cls" and not backbone.has_cls:
        raise RequestError(f"tokens cls: backbone {backbone.spec['name']!r} has no class token; use --tokens patch")
    is_there = {"cls": backbone.has_cls, "patch_max": "max" in extraction.pooling, "patch_mean": True}
    return tuple(column for column in TOKENS[tokens] if is_there[column])


Made = Iterator[tuple[list[str], Mapping[str, Any]]]


def _append(rows: Rows, made: Made, columns: tuple[str, ...], progress: Callable[[], None]) -> None:
    """Write rows as they come; those that were written count, however this ends."""
    saved = time.monotonic()
    try:
        for keys, vectors in made:
            rows.append(keys, {name: vectors[name] for name in columns})
            if time.monotonic() - saved >= SAVE_EVERY_S:
                rows.save()
                saved = time.monotonic()
            progress()
    finally:
        rows.save()


def _computed(
    source: Source,
    backbone: Any,
    extraction: Extraction,
    recipe: Mapping[str, Any],
    batch_size: int,
    device: torch.device,
    begin: int,
    end: int,
) -> Made:
    import torch

    from evaluation.extraction.forward import pooled_batches
    from evaluation.threads import Threads

    batches = pooled_batches(
        source.samples,
        backbone,
        extraction,
        recipe,
        lambda _, sample: str(sample["__key__"]),
        batch_size=batch_size,
        device=device,
        threads=Threads(torch.get_num_threads()),
        start=begin,
        stop=end,
    )
    for _, pooled, keys in batches:
        yield keys, {name: vectors.numpy() for name, vectors in pooled.items()}


@dataclass(frozen=True)
class _Stored:
    """Features that an evaluation has stored, of samples that follow one another."""

    arrays: Mapping[str, Any]
    split: str
    first: int  # row of the first of these samples

    def of(self, begin: int, end: int) -> dict[str, Any]:
        """Vectors by column of some of these samples, counted from the first."""
        names = [name for name in TOKENS["both"] if f"{self.split}.{name}" in self.arrays]
        return {name: self.arrays[f"{self.split}.{name}"][self.first + begin : self.first + end] for name in names}


def _copied(source: Source, stored: _Stored, span: tuple[int, int], begin: int) -> Made:
    """The rows from `begin` on of a span whose features are stored."""
    for first in range(begin, span[1], COPIED):
        last = min(first + COPIED, span[1])
        keys = [str(source.samples.read(row)["__key__"]) for row in range(first, last)]
        yield keys, stored.of(first - span[0], last - span[0])


def _spans(
    source: Source, extraction: Extraction, request: Mapping[str, Any], storage: Path
) -> list[tuple[int, int, _Stored | None]]:
    """(first row, row behind the last, where their features are stored if they are) of all samples, in order."""
    stored = _stored(source, extraction, request, storage)
    if source.dataset is None or not stored:
        return [(0, source.samples.num_samples, None)]
    ends = list(accumulate(source.dataset.counts))
    places = [stored.get(shard.location) for shard in source.dataset.shards]
    return list(zip([0, *ends], ends, places, strict=False))  # one end less than beginnings


def _stored(source: Source, extraction: Extraction, request: Mapping[str, Any], storage: Path) -> dict[str, _Stored]:
    """What evaluations have stored of the shards of a source, by their location."""
    from evaluation.data import EvaluationData
    from evaluation.extraction.recipe import feature_facts
    from evaluation.features import FeatureCache
    from evaluation.keys import digest_of
    from evaluation.registry import protocol

    if source.folder is None:
        return {}
    try:
        opened = EvaluationData("data", source.folder).open(protocol("knn"), extraction.inputs)
    except ValueError:  # no data of evaluations, which are in two splits and have labels
        return {}
    arrays = FeatureCache(storage).find(
        digest_of(feature_facts(request["weights"], request["features"], opened.digest))
    )
    if arrays is None:
        return {}
    return {
        shard.location: _Stored(arrays, split, end - count)
        for split, dataset in (("train", opened.train), ("test", opened.test))
        for shard, count, end in zip(dataset.shards, dataset.counts, accumulate(dataset.counts), strict=True)
    }
