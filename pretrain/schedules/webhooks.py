"""Alerts for a server: written to disk first, signed, sent until the server has taken them or five tries have failed.

A message is a POST of JSON with the headers of https://www.standardwebhooks.com: `webhook-id` and `Idempotency-Key`, by
which a receiver knows a repeated one, `webhook-timestamp`, and `webhook-signature`, which is `v1,` and the base64 of
HMAC-SHA256(secret, "ID.TIMESTAMP.BODY"). The text is `text` of the body, as chat servers take it.

URL and secret stand in environment variables of the service, and only their names are written down: who knows the URL
can write to the server. No redirect is followed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.redirects import opener_without_redirects
from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from pretrain.errors import last_line
from pretrain.schedules.entries import parse_time, text_of_time

__all__ = ["Alert", "Outbox", "Sent", "signature"]

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
PAUSES_S = (10.0, 60.0, 600.0, 3600.0)  # after each failed try but the last
_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Alert:
    """A message that waits.

    Attributes:
        key: The same for the same occasion, whoever finds it and however often.
        entry: Of the schedule.
        body: What is sent.
        url_env, secret_env: Names of environment variables.
        tries: That have failed.
        next_try: UTC, as `text_of_time` writes it.
    """

    key: str
    entry: str
    body: Mapping[str, Any]
    url_env: str
    secret_env: str
    tries: int
    next_try: str


@dataclass(frozen=True)
class Sent:
    """What became of a message.

    Attributes:
        alert: As it was before.
        problem: Why the server has not taken it; None: it has.
        is_over: Whether nobody tries again.
    """

    alert: Alert
    problem: str | None
    is_over: bool


class Outbox:
    """The messages of one storage, a file each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, alert: Alert) -> None:
        """On disk when this returns. One of the same key takes the place of the one before."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(alert)

    def waiting(self) -> list[Alert]:
        """All messages, by key."""
        found = []
        for path in sorted(self.path.glob("*.json")):
            try:
                found.append(Alert(**parse_json(path.read_bytes())))
            except FileNotFoundError:
                continue
            except (ValueError, TypeError) as error:
                log.warning("%s: no message, passed over (%s)", path, error)
        return found

    def deliver(self, now: datetime, environment: Mapping[str, str] = os.environ) -> list[Sent]:
        """Try once to send each message whose time has come."""
        done = []
        for alert in self.waiting():
            if parse_time(alert.next_try) > now:
                continue
            problem = _post(alert, now, environment)
            tries = alert.tries + 1
            is_over = problem is None or tries > len(PAUSES_S)
            if is_over:
                self._file(alert).unlink(missing_ok=True)
            else:
                after = now + timedelta(seconds=PAUSES_S[tries - 1])
                self._write(replace(alert, tries=tries, next_try=text_of_time(after)))
            done.append(Sent(alert, problem, is_over))
        return done

    def _file(self, alert: Alert) -> Path:
        return self.path / f"{alert.key}.json"

    def _write(self, alert: Alert) -> None:
        write_atomically(self._file(alert), json.dumps(asdict(alert), indent=1).encode())


def signature(secret: str, key: str, timestamp: int, body: bytes) -> str:
    """What a receiver computes as well, to know that the message is from who has the secret."""
    signed = f"{key}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()


def _post(alert: Alert, now: datetime, environment: Mapping[str, str]) -> str | None:
    """Send a message; why it was not taken, without the URL."""
    url, secret = environment.get(alert.url_env, ""), environment.get(alert.secret_env, "")
    absent = [name for name, value in ((alert.url_env, url), (alert.secret_env, secret)) if not value]
    if absent:
        return f"the environment of the service has no {' and no '.join(absent)}"
    try:
        parts = urlsplit(url)
        is_safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL)
    except ValueError:
        is_safe = False
    if not is_safe or re.search(r"\s", url):
        return f"{alert.url_env} is no https URL (http only to this machine)"
    body, timestamp = json.dumps(alert.body, sort_keys=True).encode(), int(now.timestamp())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "pretrain",
        "Idempotency-Key": alert.key,
        "webhook-id": alert.key,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, alert.key, timestamp, body),
    }
    opener = opener_without_redirects()
    try:
        with opener.open(urllib.request.Request(url, body, headers, method="POST"), timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"the server of {alert.url_env} answers {error.code}"
    except urllib.error.URLError as error:
        return f"the server of {alert.url_env} is not reached: {_without(url, str(error.reason))}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"the server of {alert.url_env} is not reached: {_without(url, last_line(error))}"


def _without(url: str, text: str) -> str:
    """What a library says, which may quote the address."""
    for part in sorted({url, urlsplit(url).netloc, urlsplit(url).path} - {"", "/"}, key=len, reverse=True):
        text = text.replace(part, "***")
    return text
