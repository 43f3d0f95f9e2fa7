"""The token that Ray asks its clients for: where it is looked for, and what to say when it is missing or wrong.

A cluster with token authentication (`RAY_AUTH_MODE=token`) has one token for everybody. It is looked for in the order
of Ray: the variable RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, and `~/.ray/auth_token`. A token is never
part of a message; its source is.

Not here: the token that a private instance draws for itself (`cluster.connect`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HOME_FILE", "AuthenticationProblem", "Token", "find_token", "missing", "refused"]

VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
HOME_FILE = "~/.ray/auth_token"
REMEDY = f"set {VARIABLE}, or {PATH_VARIABLE} to a file of mode 0600 that holds it, or write {HOME_FILE} (mode 0600)"
_OF_A_HEADER = re.compile(r"[!-~]+")  # what can be sent: printable ASCII without spaces


class AuthenticationProblem(ConnectionError):
    """A cluster asks for a token, and this process has none, or another one; one line with the remedy."""


@dataclass(frozen=True)
class Token:
    """A token, and where it was found.

    Attributes:
        source: Variable or file, for messages.
        exposed: What to do about a file that other users can read, for a warning; empty when they cannot.
    """

    value: str
    source: str
    exposed: str = ""

    def __repr__(self) -> str:
        return f"Token(source={self.source!r})"  # a traceback must not show it


def find_token() -> Token | None:
    """The token that Ray would use in this process; None when there is none.

    Raises:
        AuthenticationProblem: The file of RAY_AUTH_TOKEN_PATH cannot be read or is empty, or no token has such letters.
    """
    if value := os.environ.get(VARIABLE, "").strip():
        return _checked(Token(value, VARIABLE))
    if named := os.environ.get(PATH_VARIABLE):
        try:
            return _from_file(Path(named).expanduser(), f"{PATH_VARIABLE}={named}")
        except OSError as error:
            problem = error.strerror or str(error)
            raise AuthenticationProblem(f"{PATH_VARIABLE}={named}: {problem}; {REMEDY}") from None
    try:
        return _from_file(Path(HOME_FILE).expanduser(), HOME_FILE)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:  # of a user without a home directory
        raise AuthenticationProblem(f"{HOME_FILE}: {getattr(error, 'strerror', '') or error}; {REMEDY}") from None


def _from_file(path: Path, source: str) -> Token:
    value = path.read_text(encoding="utf-8", errors="replace").strip()
    mode = path.stat().st_mode & 0o777
    if not value:
        raise AuthenticationProblem(f"{source}: the file is empty; {REMEDY}")
    exposed = f"{source} has mode {mode:04o}: other users can read the token; chmod 600 {path}" if mode & 0o077 else ""
    return _checked(Token(value, f"{source} (mode {mode:04o})", exposed))


def _checked(token: Token) -> Token:
    if not _OF_A_HEADER.fullmatch(token.value):
        raise AuthenticationProblem(f"{token.source}: holds spaces or letters that no token has; {REMEDY}")
    return token


def missing(place: str) -> AuthenticationProblem:
    """That there is no token for `place`, an address."""
    return AuthenticationProblem(f"{place} asks for a token, and there is none: {REMEDY}")


def refused(place: str, token: Token) -> AuthenticationProblem:
    """That `place` does not take the token."""
    return AuthenticationProblem(f"{place} refuses the token of {token.source}; with that of this cluster: {REMEDY}")
