"""What can go wrong with one request to a remote store, and whether asking again can help.

Not here: waiting and asking again (`fetch`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from data_pipelines.storage.request import FetchOptions

__all__ = ["Failure", "RangesIgnored", "failure_of", "is_absent", "status_failure"]

_RETRIED_STATUS = frozenset({408, 425, 429})  # and 5xx
_ABSENT_STATUS = frozenset({401, 403, 404, 410})  # of an optional file; stores answer 403 where listing is forbidden
_LIBRARIES = frozenset({"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "urllib3"})


class RangesIgnored(Exception):
    """The server sends the whole file, whatever part is asked for."""


class Failure(Exception):
    """One request failed.

    Attributes:
        final: asking again is useless.
        status: of HTTP, where there is one.
        retry_after_s: how long the server wants us to wait.
    """

    def __init__(
        self, cause: str, *, final: bool = False, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(cause)
        self.final, self.status, self.retry_after_s = final, status, retry_after_s


def status_failure(status: int, reason: str, headers: Mapping[str, str]) -> Failure:
    """What an HTTP status other than success means."""
    final = 400 <= status < 500 and status not in _RETRIED_STATUS
    remedy = {401: "; check the credentials", 403: "; check the credentials", 404: "; check the name"}
    cause = f"HTTP {status} {reason}".strip() + remedy.get(status, "")
    return Failure(cause, final=final, status=status, retry_after_s=_retry_after_s(headers.get("Retry-After", "")))


def is_absent(error: Exception) -> bool:
    """Whether an optional file is not there, or not for us."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    return failure_of(error, None).status in _ABSENT_STATUS


def _retry_after_s(value: str) -> float | None:
    if value.strip().isdigit():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def failure_of(error: Exception, options: FetchOptions | None) -> Failure:
    """Translate an exception of fsspec, aiohttp, botocore or gcsfs to `Failure`.

    Anything else is a bug here and is re-raised.
    """
    if isinstance(error, Failure):
        return error
    name = type(error).__name__
    if isinstance(error, TimeoutError):
        limits = f" ({options.timeout_s:g} s without data, or {options.deadline_s:g} s in all)" if options else ""
        return Failure(f"timed out{limits}")
    text = " ".join(str(error).split()) or name
    if "Credential" in name:
        return Failure(f"{text}; set the credentials of the store in the environment", final=True)
    if isinstance(error, FileNotFoundError):
        return Failure("no such file; check the name", final=True, status=404)
    if isinstance(error, PermissionError):
        return Failure(f"{text}; check the credentials", final=True, status=403)
    status = _status_of(error)
    if status is not None and status >= 400:
        return status_failure(status, text, {})
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES:
        return Failure(text, final=isinstance(error, ValueError))
    raise error


def _status_of(error: BaseException) -> int | None:
    """HTTP status behind an exception of botocore (`response`) or gcsfs (`code`), which s3fs translates (`cause`)."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        if type(source).__module__.startswith("gcsfs") and str(code := getattr(source, "code", "")).isdigit():
            return int(code)
    return None
