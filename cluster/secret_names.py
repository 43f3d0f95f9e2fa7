"""Variables whose names, and texts whose looks, say that they are secret: many can read what a cluster is given."""

from __future__ import annotations

import re

__all__ = ["holds_issued_key", "holds_secret", "reads_like_secret"]

_INSIDE = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|APIKEY")
_WORDS = {"AUTH", "KEY", "KEYS", "PASS", "PASSPHRASE", "PWD", "DSN"}
_PLACES = ("_FILE", "_PATH", "_DIR", "_URL", "_URI")
_CHOICES = ("_MODE",)  # RAY_AUTH_MODE=token

_ISSUED = re.compile(  # what issuers of tokens begin them with, and keys in PEM
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\b(ghp|gho|ghs|github_pat|glpat|hf|sk|xox[abprs]|dapi|npm|pypi)[-_][A-Za-z0-9_-]{16,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY|\bAIza[\w-]{30,}"
)
_RANDOM = re.compile(r"(?=[^/]*[a-z])(?=[^/]*[A-Z0-9])(?=\S*\d)[A-Za-z0-9+=_/]{32,}")  # no text reads like this


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable is there to hold a secret, by its name; one of a file or a place is not, if its value is one.

    What else the value looks like is for `reads_like_secret` to judge.
    """
    upper = name.upper()
    is_place = value.startswith(("/", "~/")) or "://" in value
    if upper.endswith(_CHOICES) or (is_place and upper.endswith(_PLACES)):
        return False
    return bool(_INSIDE.search(upper)) or bool(_WORDS & set(upper.split("_")))


def holds_issued_key(text: str) -> bool:
    """Whether something in a text begins as the tokens and keys of well-known issuers do."""
    return bool(_ISSUED.search(text))


def reads_like_secret(name: str, text: str) -> bool:
    """Whether a text holds an issued key, or is as random as one; `name` says what it is for: places may be random."""
    is_place = name.upper().endswith(_PLACES) or "/" in text
    return holds_issued_key(text) or (not is_place and bool(_RANDOM.fullmatch(text)))
