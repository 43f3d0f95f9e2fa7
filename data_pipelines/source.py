"""From what a recipe says about its data to a sorted list of shard files.

A source is a directory, a glob, a brace pattern, one tar, a `file://` URL, or a list of those. Everything else is
refused before it can reach a shell or a network library: `pipe:` strings are code, and remote stores are not
supported yet. This module imports neither numpy nor torch, so that a wrong recipe is rejected at once. Shards are
opened in `shards`.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_pipelines.errors import DataError

__all__ = ["expand_source"]

SHARD_SUFFIX = ".tar"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_source(source: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Find the shards of a source.

    Args:
        source: a directory (every `*.tar` in it), a glob `dir/train-*.tar`, braces `train-{000000..000003}.tar` or
            `{train,val}-000000.tar`, one `.tar` file, a `file://` URL of one of these, or a sequence of them.

    Returns:
        Absolute paths of existing `.tar` files, sorted, none twice.

    Raises:
        DataError: nothing matches, a named shard is missing, a shard is named twice, or the scheme is not `file`.
    """
    parts = [source] if isinstance(source, str | Path) else list(source)
    paths = sorted(path for part in parts for path in _expand_one(str(part)))
    if not paths:
        raise DataError("the data source is empty; give a directory, a glob or a list of .tar shards")
    for first, second in pairwise(paths):
        if first == second:
            raise DataError(f"shard {first} is named twice by the source {source!r}; name each shard once")
    return tuple(map(str, paths))


def _expand_one(pattern: str) -> list[Path]:
    local = _local_path(pattern)
    if local.is_dir():
        shards = sorted(local.glob(f"*{SHARD_SUFFIX}"))
        if not shards:
            raise DataError(f"no {SHARD_SUFFIX} shard in directory {local}")
    elif local.exists() or not glob.has_magic(str(local)):
        shards = [_existing(Path(name)) for name in _expand_braces(str(local))]
    else:
        names = [name for braced in _expand_braces(str(local)) for name in glob.glob(braced)]
        shards = [Path(name) for name in names if name.endswith(SHARD_SUFFIX)]
        if not shards:
            raise DataError(f"no {SHARD_SUFFIX} shard matches {local}{_nearest(local)}")
    return [shard.absolute() for shard in shards]


def _local_path(pattern: str) -> Path:
    """Strip `file://` and refuse every other scheme; `pattern` may still hold wildcards and braces."""
    if not pattern.strip():
        raise DataError("an empty string is not a data source; give a directory, a glob or a .tar shard")
    scheme = _SCHEME.match(pattern)
    if scheme is None:
        return Path(pattern).expanduser()
    if scheme.group().lower() != "file:":
        # A URL may carry credentials in its path or query, so the message repeats the scheme only.
        raise DataError(
            f"data source with scheme {scheme.group()!r} is not supported; only local paths and file:// are "
            "(commands are never run, remote stores are not read yet: copy the shards to a local directory)"
        )
    url = urlsplit(pattern)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise DataError(f"data source {pattern!r} is not a local file URL; write file:///absolute/path")
    return Path(unquote(url.path))


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expand `{000..012}` (zero padding kept) and `{a,b}`; lazily, so that a huge range costs nothing."""
    brace = _BRACE.search(pattern)
    if brace is None or Path(pattern).exists():
        yield pattern
        return
    numbers = _RANGE.fullmatch(brace.group(1))
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first):
            raise DataError(
                f"brace range {brace.group()!r} of source {pattern!r} runs backwards; write the smaller first"
            )
        choices: Iterator[str] = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    elif "," in brace.group(1):
        choices = iter(brace.group(1).split(","))
    else:
        raise DataError(f"cannot read braces {brace.group()!r} of source {pattern!r}; write {{000..012}} or {{a,b}}")
    for choice in choices:
        yield from _expand_braces(pattern[: brace.start()] + choice + pattern[brace.end() :])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"no such shard: {path.absolute()}{_nearest(path)}")
    if path.suffix != SHARD_SUFFIX:
        raise DataError(
            f"{path.absolute()} is not a plain {SHARD_SUFFIX} shard (suffix {path.suffix!r}); unpack or rename it"
        )
    return path


def _nearest(path: Path) -> str:
    """The hint at the end of a not-found message: what is there instead."""
    folder = path.parent
    if glob.has_magic(str(folder)):
        return ""
    if not folder.is_dir():
        return f"; there is no directory {folder.absolute()}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == SHARD_SUFFIX or entry.is_dir())
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; nearest there: {near[0]}" if near else f"; {folder.absolute()} has {len(names)} other shards or folders"
