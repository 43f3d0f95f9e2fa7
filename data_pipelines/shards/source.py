"""From what a recipe says about its data to a sorted list of shard locations.

A source is a directory, a glob, a brace pattern, one tar, or a list of those; local, or on a remote store. A plain web
server cannot be listed, so a directory there needs the `dataset.json` that packing writes. Commands (`pipe:`) are code
and refused unless the recipe allows them.

What exists is taken literally, whatever it is called: only what is left of a path behind the folders that exist is a
pattern. Hidden files are no shards. Shards that `dataset.json` lists, that a directory or a glob should find, and that
are gone, are an error: a set of which a part was lost must not be taken for the whole. So is a directory in which
packing has not ended.

This module imports neither numpy, torch nor fsspec, so that a wrong recipe is rejected at once; `check_source` does
not touch the network. Not here: reading (`stores`), opening shards (`shards`).
"""

from __future__ import annotations

import glob
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from data_pipelines.errors import DataError, suggest
from data_pipelines.hidden import is_hidden
from data_pipelines.parsing import parse_json
from data_pipelines.shards.manifest import MANIFEST_NAME, UNFINISHED, Manifests, listed_shards
from data_pipelines.storage.credentials import whole_url
from data_pipelines.storage.locations import HTTP, OBJECT_STORES, PIPE, redact, scheme_of, sibling, split_location

if TYPE_CHECKING:
    from data_pipelines.storage.stores import Store

__all__ = ["check_source", "expand_source", "missing_shards", "require_all"]

Suffixes = tuple[str, ...]

SHARD_SUFFIX = ".tar"
COMPRESSED_SUFFIXES: Suffixes = (".tar.gz", ".tgz")
_SCHEMES = ("file", *HTTP, *OBJECT_STORES)
_MAX_SHARDS = 1_000_000
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NAMED = 3  # missing shards in a message
_NUMBERS = re.compile(r"\{(\d+\.\.\d+)\}")  # the only braces of a command that are ours; the others are its shell's


def check_source(
    source: str | Path | Sequence[str | Path],
    *,
    allow_pipe: bool = False,
    compressed: bool = False,
    allow_missing: bool = False,
) -> None:
    """Find what is wrong with a source as far as this machine can tell: local parts must exist, URLs must make sense.

    Raises:
        DataError: as `expand_source`, but remote stores are not asked.
    """
    _require_finished(source)
    if not allow_missing:
        require_all(source)
    _join(source, allow_pipe, None, compressed)


def _require_finished(source: str | Path | Sequence[str | Path]) -> None:
    """Refuse local directories and globs of which a packing that goes on, or was killed, has made a part.

    Raises:
        DataError: names the directory.
    """
    for folder in sorted({folder for folder, _ in _all_listings(source)}):
        if os.path.exists(os.path.join(folder, UNFINISHED)) and not os.path.exists(os.path.join(folder, MANIFEST_NAME)):
            raise DataError(
                f"{folder} holds a part of a data set: its packing has not ended; wait for it, or give the same "
                "command again, which goes on, or name the shards one by one"
            )


def require_all(source: str | Path | Sequence[str | Path]) -> None:
    """Refuse local directories and globs that lack shards.

    Raises:
        DataError: counts and names them.
    """
    missing = missing_shards(source)
    if missing:
        folder, names = os.path.dirname(missing[0]), [os.path.basename(location) for location in missing]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise DataError(
            f"{len(names)} of the {len(_listed_of(source))} shards that {folder}/{MANIFEST_NAME} lists are missing: "
            f"{', '.join(names[:_NAMED])}{more}; copy them again, or name the shards to do without them"
        )


def missing_shards(source: str | Path | Sequence[str | Path]) -> list[str]:
    """Locations of shards that a local `dataset.json` lists and that are gone, though the source stands for them.

    Those are all of a directory, and those that match of a glob; shards that are named one by one, or by braces, are
    no part of a whole.
    """
    return [location for location in _listed_of(source) if not os.path.exists(location)]


def _listed_of(source: str | Path | Sequence[str | Path]) -> list[str]:
    """All that should be there."""
    listings = _all_listings(source)
    return sorted(
        {
            os.path.join(folder, name)
            for folder, pattern in listings
            for name in _names_listed(folder)
            if fnmatchcase(name, pattern)
        }
    )


def expand_source(
    source: str | Path | Sequence[str | Path],
    *,
    allow_pipe: bool = False,
    store: Store | None = None,
    manifests: Manifests | None = None,
    compressed: bool = False,
    allow_missing: bool = False,
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
        allow_missing: whether shards may be gone that `dataset.json` lists; `missing_shards` names them.

    Returns:
        Absolute paths and URLs of shards, sorted, none twice. Local ones exist; URLs that were named, not listed, are
        not asked for here.

    Raises:
        DataError: nothing matches, a named or listed shard is missing, one is named twice, the scheme is not allowed,
            or packing has not ended.
    """
    _require_finished(source)
    if not allow_missing:
        require_all(source)
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
    pattern = whole_url(pattern)
    path = _local_path(pattern)
    if path is not None:
        return _expand_local(path, suffixes)
    scheme = str(scheme_of(pattern))
    if scheme == PIPE:
        if not allow_pipe:
            raise DataError(
                f"data source {redact(pattern)} is a command and is not run; set data.allow_pipe=true to allow it"
            )
        _bound(pattern)
        return list(_expand_braces(pattern, _NUMBERS))
    if scheme not in _SCHEMES or not _split(pattern).netloc:
        # The rest of the text may carry credentials, so the message repeats the scheme only.
        raise DataError(
            f"data source with scheme {scheme!r} is not supported; allowed are local paths and "
            f"{', '.join(f'{name}://' for name in _SCHEMES)}{suggest(scheme, _SCHEMES)}"
        )
    _bound(pattern)
    return [shard for url in _expand_braces(pattern) for shard in _expand_url(url, scheme, manifests, suffixes)]


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:  # a bracket without an IPv6 address, say
        raise DataError(f"data source {redact(url)} is no URL: {error}") from None


# Remote.


def _expand_url(url: str, scheme: str, manifests: Manifests | None, suffixes: Suffixes) -> list[str]:
    """Shards of one URL without braces; of a directory or a glob, none if `manifests` and their store are not given."""
    listable = scheme in OBJECT_STORES
    if listable and "@" in _split(url).netloc:
        raise DataError(f"{redact(url)}: credentials do not belong into a {scheme}:// URL; set them in the environment")
    path = url.partition("://")[2] if listable else _split(url).path
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
        return _listed([url], manifests) if manifests else []
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
        return _listed([f"{folder}*{suffix}" for suffix in suffixes], manifests)
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


def _listed(patterns: Sequence[str], manifests: Manifests) -> list[str]:
    found = [shard for pattern in patterns for shard in manifests.store.glob(pattern)]
    shards = [shard for shard in found if not is_hidden(split_location(shard)[1])]
    _say_hidden(found, shards)
    if not shards:
        raise DataError(f"no {SHARD_SUFFIX} shard matches {' or '.join(map(redact, patterns))}")
    return shards


# Local.


def _local_path(text: str) -> str | None:
    """The absolute path that a source means; None for URLs and commands."""
    scheme = scheme_of(text)
    if scheme == "file":
        return _file_url_path(text)
    if scheme is None or ("://" not in text and os.path.lexists(text.partition("/")[0])):  # a folder `photos: 2024`
        return str(Path(text if os.path.lexists(text) else os.path.expanduser(text)).absolute())
    return None


def _file_url_path(url: str) -> str:
    rest = url.partition(":")[2]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        rest = slash + path if host in ("", "localhost") else ""
    if not rest.startswith("/"):
        raise DataError(f"data source {redact(url)!r} is not a local file URL; write file:///absolute/path")
    # Many write a path as it is, with #, ? and %; whichever reading of it leads farther down is meant.
    readings = (unquote(rest), rest)
    return rest if os.path.lexists(rest) else min(readings, key=lambda path: _split_existing(path)[1].count("/"))


def _expand_local(path: str, suffixes: Suffixes) -> list[str]:
    if os.path.isdir(path):
        found = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(suffixes)]
        shards = [shard for shard in found if not is_hidden(os.path.basename(shard))]
        _say_hidden(found, shards)
        if not shards:
            raise DataError(f"no {' or '.join(suffixes)} shard in directory {path}")
    elif os.path.exists(path):
        shards = [_existing(path, suffixes)]
    else:
        shards = []
        for folder, pattern in _patterns(path):
            if glob.has_magic(pattern):
                shards += [os.path.join(folder, name) for name in glob.glob(pattern, root_dir=folder)]
            else:
                shards.append(_existing(os.path.join(folder, pattern), suffixes))
        shards = [shard for shard in shards if shard.endswith(suffixes)]
        if not shards:
            raise DataError(f"no {' or '.join(suffixes)} shard matches {path}{_nearest(path)}")
    return shards


def _patterns(path: str) -> Iterator[tuple[str, str]]:
    """What a path that does not exist may mean: folders that do, each with the pattern of what is in them."""
    folder, rest = _split_existing(path)
    _bound(rest)
    for name in _expand_braces(rest):
        yield _split_existing(os.path.join(folder, name))


def _split_existing(path: str) -> tuple[str, str]:
    """The folder that exists farthest down a path, and the rest, at least one name."""
    folder = next(str(parent) for parent in Path(path).parents if os.path.isdir(parent))
    return folder, str(Path(path).relative_to(folder))


def _all_listings(source: str | Path | Sequence[str | Path]) -> set[tuple[str, str]]:
    """`_listings` of all local parts."""
    paths = map(_local_path, map(str, [source] if isinstance(source, str | Path) else source))
    return {listing for path in paths if path is not None for listing in _listings(path)}


def _listings(path: str) -> Iterator[tuple[str, str]]:
    """The folders that a path has listed, each with the pattern of the shards in it."""
    if os.path.isdir(path):
        yield path, "*"
    elif not os.path.exists(path):
        for folder, pattern in _patterns(path):
            above, _, name = pattern.rpartition("/")
            if glob.has_magic(name):
                for place in glob.glob(above, root_dir=folder) if above else [""]:
                    yield os.path.join(folder, place).rstrip("/"), name


def _names_listed(folder: str) -> list[str]:
    """File names of shards in the `dataset.json` of a folder; whoever opens the shards says what is wrong with it."""
    try:
        content = parse_json(Path(folder, MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return []
    return [name for name in listed_shards(content) if name == os.path.basename(name) and name.endswith(SHARD_SUFFIX)]


def _say_hidden(found: Sequence[str], shards: Sequence[str]) -> None:
    if len(found) > len(shards):
        folder, name, _ = split_location(next(location for location in found if location not in shards))
        warnings.warn(f"left out hidden files of {redact(folder)}, such as {name}", stacklevel=2)


def _existing(path: str, suffixes: Suffixes) -> str:
    if not os.path.isfile(path):
        raise DataError(f"no such shard: {path}{_nearest(path)}")
    if not path.endswith(suffixes):
        remedy = "unpack it, or set data.unindexed=stream" if path.endswith(COMPRESSED_SUFFIXES) else "rename it"
        suffix = os.path.splitext(path)[1]
        raise DataError(f"{path} is not a {' or '.join(suffixes)} shard (suffix {suffix!r}); {remedy}")
    return path


def _nearest(path: str) -> str:
    """The hint at the end of a not-found message: what is there instead."""
    folder, rest = _split_existing(path)
    above, _, name = rest.rpartition("/")
    if above:
        return "" if glob.has_magic(above) else f"; there is no directory {os.path.join(folder, above)}"
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if not is_hidden(entry.name) and (entry.name.endswith(SHARD_SUFFIX) or os.path.isdir(entry))
        )
    return suggest(name, names, cutoff=0.5) or f"; {folder} has {len(names)} other shards or folders"


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
