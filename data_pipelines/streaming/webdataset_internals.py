"""The parts of `webdataset` in use that its documentation does not promise, in one place for the next upgrade.

Only what walks a tar and groups its members is taken. Nothing is opened by it, so `GOPEN_*` has no effect; none of its
pipelines runs, so neither have `RANK` and `WDS_*`. Three variables are numbers that it reads while it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

from data_pipelines.errors import DataError

__all__ = ["grouped_members", "split_name"]

_READ_AT_IMPORT = ("WDS_CACHE_SIZE", "WDS_SECURE", "WDS_VERBOSE_CACHE")


def grouped_members(file: BinaryIO, url: str, is_wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Samples of a tar that is read from front to back: bytes by field, with `"__key__"` and `"__url__"`.

    Args:
        file: only `read` is called.
        url: what samples say that they come from.
        is_wanted: told each member's name; the others are passed over.

    Raises:
        ValueError, OSError, tarfile.TarError: of a tar that is damaged or has a member twice.
        DataError: a variable of the environment keeps webdataset from being imported.
    """
    iterators = _tariterators()
    members = iterators.tar_file_expander([{"url": url, "stream": file}], select_files=is_wanted)
    yield from cast(Iterable[dict[str, Any]], iterators.group_by_keys(members))


def split_name(name: str) -> tuple[str | None, str | None]:
    """A member's name as key and field; None twice when it has no field."""
    return cast(tuple[str | None, str | None], _tariterators().base_plus_ext(name))


def _tariterators() -> Any:
    try:
        from webdataset import tariterators  # here, since it imports torch
    except ValueError as error:
        said = ", ".join(f"{name}={os.environ[name]}" for name in _READ_AT_IMPORT if name in os.environ)
        raise DataError(f"webdataset cannot be imported with {said or 'this environment'}: {error}; unset it") from None
    return tariterators
