"""Credentials in the URLs of data: never stored, and asked for when a stored URL is used again.

What is kept of `https://user:password@host/a.tar?signature=x` is `https://***@host/a.tar?***` (`locations.redact`). Who
uses that later has the whole URL in the environment: in `PRETRAIN_URLS`, separated by spaces, or on a line of the file
that `PRETRAIN_URLS_FILE` names. One that ends in `/` serves for all that lies below.
"""

from __future__ import annotations

import os
import re

from data_pipelines.errors import DataError
from data_pipelines.storage.locations import redact

__all__ = ["whole_url"]

_URLS, _FILE = "PRETRAIN_URLS", "PRETRAIN_URLS_FILE"
_LEFT_OUT = re.compile(r"://\*\*\*@|\?\*\*\*(?=\s|$)")


def whole_url(location: str) -> str:
    """A location with what was left out of it when it was stored; any other one as it is.

    Raises:
        DataError: the environment does not say what was left out, or says several things.
    """
    if not _LEFT_OUT.search(location):
        return location
    found = set()
    for url in _known():
        stored = redact(url, marked=True)
        if location == stored:
            found.add(url)
        elif stored.endswith("/") and location.startswith(stored) and not _LEFT_OUT.search(location[len(stored) :]):
            found.add(url + location[len(stored) :])
    if len(found) == 1:
        return found.pop()
    problem = "stands for several URLs" if found else "credentials are not stored"
    raise DataError(f"{location}: {problem}; put the whole URL into {_URLS}, or on a line of the file {_FILE} names")


def _known() -> list[str]:
    listed = os.environ.get(_URLS, "").split()
    if name := os.environ.get(_FILE):
        try:
            with open(name, encoding="utf-8") as file:
                listed += file.read().split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{_FILE}={name}: cannot be read ({getattr(error, 'strerror', error)})") from None
    return listed
