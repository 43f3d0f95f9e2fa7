"""Variables whose names say that they hold a secret. What a cluster is given can be read by many: not their values."""

from __future__ import annotations

import re

__all__ = ["holds_secret"]

_INSIDE = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|APIKEY")
_WORDS = {"AUTH", "KEY", "KEYS", "PASS", "PASSPHRASE", "PWD", "DSN"}
_PLACES = ("_FILE", "_PATH", "_DIR", "_URL", "_URI")
_CHOICES = ("_MODE",)  # RAY_AUTH_MODE=token


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable is there to hold a secret, by its name; one of a file or a place is not, if its value is one.

    What else the value looks like is not judged.
    """
    upper = name.upper()
    is_place = value.startswith(("/", "~/")) or "://" in value
    if upper.endswith(_CHOICES) or (is_place and upper.endswith(_PLACES)):
        return False
    return bool(_INSIDE.search(upper)) or bool(_WORDS & set(upper.split("_")))
