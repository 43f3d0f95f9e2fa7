"""From what a recipe says about its data to a sorted list of shard locations.

A source is a directory, a glob, a brace pattern, one tar, or a list of those; local, or on a remote store. A plain web
server cannot be listed, so a directory there needs the `dataset.json` that packing writes. Commands (`pipe:`) are code
and refused unless the recipe allows them.

This module imports neither numpy, torch nor fsspec, so that a wrong recipe is rejected at once; `check_source` does
not touch the network. Not here: reading (`stores`), opening shards (`shards`).
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from data_pipelines.errors import DataError, suggest
from data_pipelines.shards.manifest import MANIFEST_NAME, Manifests
from data_pipelines.storage.locations import HTTP, OBJECT_STORES, PIPE, redact, scheme_of, sibling

if TYPE_CHECKING:
    from data_pipelines.storage.stores import Store

__all__ = ["check_source", "expand_source"]

Suffixes = tuple[str, ...]

SHARD_SUFFIX = ".tar"
COMPRESSED_SUFFIXES: Suffixes = (".tar.gz", ".tgz")
_SCHEMES = ("file", *HTTP, *OBJECT_STORES)
_MAX_SHARDS = 1_000_000
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBERS = re.compile(r"\{(\d+\.\.\d+)\}")  # the only braces of a command that are ours; the others are its shell's


def check_source(
    source: str | Path | Sequence[str | Path], *, allow_pipe: bool = False, compressed: bool = False
) -> None:
    """Find what is wrong with a source as far as this machine can tell: local parts must exist, URLs must make sense.

    Raises:
        DataError: as `expand_source`, but remote stores are not asked.
    """
    _join(source, allow_pipe, None, compressed)


def expand_source(
    source: str | Path | Sequence[str | Path],
    *,
    allow_pipe: bool = False,
    store: Store | None = None,
    manifests: Manifests | None = None,
    compressed: bool = False,
) -> tuple[str, ...]:
    """Find the shards of a source.

    Args:
        source: a directory (every `*.tar` in it; on a remote store it ends in `/`), a glob `dir/train-*.tar` (local,
            s3, gs), braces `train-{000000..000003}.tar` or `{train,val}-000000.tar`, one `.tar`, or a sequence of
            them; paths and URLs of the schemes file, http, https, s3, gs, gcs.
        allow_pipe: whether `pipe:COMMAND`, whose standard output is a shard, is allowed too.
        store: what remote directories are read with; without it, a store with default options.
        manifests: instead of `store`, by a caller who goes on to read manifests.
        compressed: whether `.tar.gz` and `.tgz` are shards as well; they can be streamed but not indexed.

    Returns:
        Absolute paths and URLs of shards, sorted, none twice. Local ones exist; URLs that were named, not listed, are
        not asked for here.

    Raises:
        DataError: nothing matches, a named shard is missing or named twice, or the scheme is not allowed.
    """
    from data_pipelines.storage.stores import Store

    with ExitStack() as owned:
        if manifests is None:
            manifests = Manifests(store or owned.enter_context(closing(Store())))
        locations = _join(source, allow_pipe, manifests, compressed)
    if not locations:
        raise DataError("the data source is empty; give a directory, a glob or a list of .tar shards")
    return tuple(locations)


def _join(
    source: str | Path | Sequence[str | Path], allow_pipe: bool, manifests: Manifests | None, compressed: bool
) -> list[str]:
    suffixes = (SHARD_SUFFIX, *(COMPRESSED_SUFFIXES if compressed else ()))
    parts = [source] if isinstance(source, str | Path) else list(source)
    if not parts:
        raise DataError("the data source is empty; give a directory, a glob or a list of .tar shards")
    locations = sorted(shard for part in parts for shard in _expand_one(str(part), allow_pipe, manifests, suffixes))
    for first, second in pairwise(locations):
        if first == second:
            raise DataError(f"shard {redact(first)} is named twice by the source; name each shard once")
    return locations


def _expand_one(pattern: str, allow_pipe: bool, manifests: Manifests | None, suffixes: Suffixes) -> list[str]:
    if not pattern.strip():
        raise DataError("an empty string is not a data source; give a directory, a glob or a .tar shard")
    scheme = scheme_of(pattern)
    if scheme is None:
        return _expand_local(Path(pattern).expanduser(), suffixes)
    if scheme == "file":
        return _expand_local(_file_url_path(pattern), suffixes)
    if scheme == PIPE:
        if not allow_pipe:
            raise DataError(
                f"data source {redact(pattern)} is a command and is not run; set data.allow_pipe=true to allow it"
            )
        _bound(pattern)
        return list(_expand_braces(pattern, _NUMBERS))
    if scheme not in _SCHEMES or not urlsplit(pattern).netloc:
        # The rest of the text may carry credentials, so the message repeats the scheme only.
        raise DataError(
            f"data source with scheme {scheme!r} is not supported; allowed are local paths and "
            f"{', '.join(f'{name}://' for name in _SCHEMES)}{suggest(scheme, _SCHEMES)}"
        )
    _bound(pattern)
    return [shard for url in _expand_braces(pattern) for shard in _expand_url(url, scheme, manifests, suffixes)]


# Remote.


def _expand_url(url: str, scheme: str, manifests: Manifests | None, suffixes: Suffixes) -> list[str]:
    """Shards of one URL without braces; of a directory or a glob, none if `manifests` and their store are not given."""
    listable = scheme in OBJECT_STORES
    if listable and "@" in urlsplit(url).netloc:
        raise DataError(f"{redact(url)}: credentials do not belong into a {scheme}:// URL; set them in the environment")
    path = url.partition("://")[2] if listable else urlsplit(url).path
    if "{" in path or "}" in path:
        raise DataError(f"cannot read the braces of {redact(url)}; write {{000..012}} or {{a,b}}")
    if glob.has_magic(path):
        if not listable:
            raise DataError(
                f"{redact(url)}: a web server cannot be listed; "
                f"name the shards, as in train-{{000000..000012}}{SHARD_SUFFIX}"
            )
        if not path.endswith(suffixes):
            raise DataError(
                f"{redact(url)} does not end in {' or '.join(suffixes)}; "
                f"a glob names shards, as in train-*{SHARD_SUFFIX}"
            )
        return _listed([url], manifests.store) if manifests else []
    if path.endswith("/"):
        return _expand_remote_folder(url, listable, manifests, suffixes) if manifests else []
    if not path.endswith(suffixes):
        raise DataError(
            f"{redact(url)} ends neither in {' or '.join(suffixes)}, as shards do, nor in '/', as directories do"
        )
    return [url]


def _expand_remote_folder(folder: str, listable: bool, manifests: Manifests, suffixes: Suffixes) -> list[str]:
    manifest = manifests.of(folder)
    if manifest is None and listable:
        return _listed([f"{folder}*{suffix}" for suffix in suffixes], manifests.store)
    if manifest is None:
        raise DataError(
            f"{redact(folder)} has no readable {MANIFEST_NAME} that lists its shards, and a web server cannot be "
            f"listed; name the shards, as in {redact(folder)}train-{{000000..000012}}{SHARD_SUFFIX}, or put one there"
        )
    for name in manifest.shards:
        if Path(name).name != name or not name.endswith(SHARD_SUFFIX):
            raise DataError(f"{redact(folder)}{MANIFEST_NAME} lists {name!r}, which is not the file name of a shard")
    return [_inside(folder, name) for name in manifest.shards]


def _inside(folder: str, name: str) -> str:
    location = sibling(folder, name)
    assert location is not None  # a folder is a URL, never a command
    return location


def _listed(patterns: Sequence[str], store: Store) -> list[str]:
    shards = [shard for pattern in patterns for shard in store.glob(pattern)]
    if not shards:
        raise DataError(f"no {SHARD_SUFFIX} shard matches {' or '.join(map(redact, patterns))}")
    return shards


# Local.


def _expand_local(local: Path, suffixes: Suffixes) -> list[str]:
    if local.is_dir():
        shards = sorted(path for path in local.glob("*") if path.name.endswith(suffixes))
        if not shards:
            raise DataError(f"no {' or '.join(suffixes)} shard in directory {local}")
    elif local.exists():
        shards = [_existing(local, suffixes)]
    elif not glob.has_magic(str(local)):
        shards = [_existing(Path(name), suffixes) for name in _expand_braces(str(local))]
    else:
        names = [name for braced in _expand_braces(str(local)) for name in glob.glob(braced)]
        shards = [Path(name) for name in names if name.endswith(suffixes)]
        if not shards:
            raise DataError(f"no {' or '.join(suffixes)} shard matches {local}{_nearest(local)}")
    return [str(shard.absolute()) for shard in shards]


def _file_url_path(pattern: str) -> Path:
    url = urlsplit(pattern)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise DataError(f"data source {redact(pattern)!r} is not a local file URL; write file:///absolute/path")
    return Path(unquote(url.path))


def _existing(path: Path, suffixes: Suffixes) -> Path:
    if not path.is_file():
        raise DataError(f"no such shard: {path.absolute()}{_nearest(path)}")
    if not path.name.endswith(suffixes):
        remedy = "unpack it, or set data.unindexed=stream" if path.name.endswith(COMPRESSED_SUFFIXES) else "rename it"
        raise DataError(f"{path.absolute()} is not a {' or '.join(suffixes)} shard (suffix {path.suffix!r}); {remedy}")
    return path


def _nearest(path: Path) -> str:
    """The hint at the end of a not-found message: what is there instead."""
    folder = path.parent
    if glob.has_magic(str(folder)):
        return ""
    if not folder.is_dir():
        return f"; there is no directory {folder.absolute()}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == SHARD_SUFFIX or entry.is_dir())
    others = f"; {folder.absolute()} has {len(names)} other shards or folders"
    return suggest(path.name, names, cutoff=0.5) or others


# Braces.


def _expand_braces(pattern: str, braces: re.Pattern[str] = _BRACE) -> Iterator[str]:
    """Expand `{000..012}` (zero padding kept) and `{a,b}`; lazily, so that a huge range costs nothing."""
    brace = braces.search(pattern)
    if brace is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(brace.group(1))
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first):
            raise DataError(
                f"brace range {brace.group()!r} of source {redact(pattern)!r} runs backwards; write the smaller first"
            )
        choices: Iterator[str] = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    elif "," in brace.group(1):
        choices = iter(brace.group(1).split(","))
    else:
        raise DataError(
            f"cannot read braces {brace.group()!r} of source {redact(pattern)!r}; write {{000..012}} or {{a,b}}"
        )
    for choice in choices:
        yield from _expand_braces(pattern[: brace.start()] + choice + pattern[brace.end() :], braces)


def _bound(pattern: str) -> None:
    """Refuse brace ranges of more than `_MAX_SHARDS` shards.

    Remote ranges are expanded without asking the server, so a typo would exhaust memory.
    """
    if math.prod(max(int(last) - int(first) + 1, 1) for first, last in _RANGE.findall(pattern)) > _MAX_SHARDS:
        raise DataError(f"source {redact(pattern)} names more than {_MAX_SHARDS} shards; write a smaller brace range")
