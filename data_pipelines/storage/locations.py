"""What a location is: an absolute local path, a URL of a remote store, or `pipe:COMMAND`.

Plain text work, nothing is opened and nothing heavy is imported. Not here: sources that stand for several shards
(`source`), reading (`stores`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

__all__ = ["HTTP", "OBJECT_STORES", "PIPE", "is_local", "redact", "redacted", "scheme_of", "sibling", "split_location"]

HTTP = ("http", "https")
OBJECT_STORES = ("s3", "gs", "gcs")
PIPE = "pipe"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_LOGIN = r"[^/\s:@?#\[]*:(?!\d{1,5}(?:[/?#\s'\"]|$))"  # a user and a colon that does not begin a port
_HOST = r"(?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?"
_END = r"(?=['\"](?:[\s,;:)\]}>]|$)|\s|$)"  # of a URL in a text: a blank, or a quote that closes
_AUTHORITY = rf"(?:{_HOST}/|(?:localhost|[\w.-]*\.[\w.-]+|\[[\da-fA-F:.]+\]|[\w-]+(?=:\d))(?::\d+)?(?:[?#]|{_END}))"
_USER = re.compile(rf"(\w://)(?:{_LOGIN}(?:(?!://)\S)*@(?={_AUTHORITY})|[^/\s?#]*@|{_LOGIN}[^\s@]*@)")
_QUERY = re.compile(rf"(https?://[^\s?#'\"]*)[?#]\S*?{_END}", re.IGNORECASE)
_OBJECT_QUERY = re.compile(rf"(\w://[^\s?#'\"]*)[?#](?=\S*=)\S*?{_END}")  # a lone ? is a wildcard there


def is_local(location: str) -> bool:
    return location.startswith("/")


def scheme_of(location: str) -> str | None:
    """Lower-case scheme of a URL or `pipe:`; None for a path."""
    scheme = _SCHEME.match(location)
    return scheme.group(1).lower() if scheme else None


def redact(text: str, *, marked: bool = False) -> str:
    """Text as messages may show it: URLs without user, password and query, `pipe:` without arguments.

    A password may hold any character but a space, also those that should have been escaped (`@`, `/`, `?`, `#`). Where
    such a URL can be read in two ways, more is left out; but up to five digits and a `/` are taken for a port.

    Args:
        text: Text that starts with `pipe:` is taken for a location as a whole; a short digest tells two commands apart.
        marked: As it may be stored: `***` stands for each part that was left out (`credentials.whole_url` asks for it),
            and of a command nothing goes but what is a URL's.
    """
    if scheme_of(text) == PIPE and not marked:
        command = text.partition(":")[2].split()
        return f"pipe:{command[0] if command else ''} (command {hashlib.sha256(text.encode()).hexdigest()[:8]})"
    user, query = (r"\1***@", r"\1?***") if marked else (r"\1", r"\1")
    return _OBJECT_QUERY.sub(query, _QUERY.sub(query, _USER.sub(user, text)))


def redacted(value: Any) -> Any:
    """Lists and mappings as they may be stored: every text in them redacted, with marks."""
    if isinstance(value, str):
        return redact(value, marked=True) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: redacted(entry) for key, entry in value.items()}
    return type(value)(map(redacted, value)) if type(value) in (list, tuple) else value


def sibling(location: str, name: str) -> str | None:
    """The location of a file beside `location`, with the query (a signature, say) kept; a command has no siblings."""
    if is_local(location):
        return str(Path(location).with_name(name))
    if scheme_of(location) == PIPE:
        return None
    url = urlsplit(location)
    return urlunsplit(url._replace(path=f"{url.path.rpartition('/')[0]}/{name}"))


def split_location(location: str) -> tuple[str, str, str]:
    """Folder, file name and query string (with its `?`) of a location."""
    path, mark, query = (location, "", "") if is_local(location) else location.partition("?")
    folder, _, name = path.rpartition("/")
    return folder, name, mark + query
