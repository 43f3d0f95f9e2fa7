"""The environment of a job, from the texts of `--env`. Values that may be secret are refused.

What is submitted with a job can be read by everybody who may list jobs, and is in the logs of the nodes. So a secret
goes by its name, and is in the environment of the nodes already, or by a file that is mounted there.

    NAME            has to be set where the job runs; it does not begin without it
    NAME=VALUE      is set, and readable by others
    NAME=@FILE      the driver gets what is in a file of the node, such as a mounted secret
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.secret_names import holds_secret, reads_like_secret
from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError, listed

__all__ = ["Environment", "read_environment"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = {"RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"}  # a job has those of its cluster


@dataclass(frozen=True)
class Environment:
    """Of a job.

    Attributes:
        values: Variables that are set.
        needed: Names that have to be set on the nodes.
        files: Variable -> file of the node that holds its value.
    """

    values: dict[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def read_environment(texts: Sequence[str]) -> Environment:
    """The environment that a request asks for.

    Raises:
        RequestError: One line per text that is wrong or would show a secret; no line shows a value.
    """
    values: dict[str, str] = {}
    files: dict[str, str] = {}
    needed: list[str] = []
    mistakes: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if problem := _problem(name, value if equals else None, {*values, *files, *needed}):
            mistakes.append(f"--env {name if equals else redact(text)}: {problem}")
        elif not equals:
            needed.append(name)
        elif value.startswith("@"):
            files[name] = value[1:]
        else:
            values[name] = value
    if mistakes:
        raise RequestError(*mistakes)
    return Environment(values, tuple(needed), files)


def _problem(name: str, value: str | None, known: set[str]) -> str:
    if not _NAME.fullmatch(name):
        return "expected NAME, NAME=VALUE or NAME=@FILE"
    if name in known:
        return "is given twice"
    if name in _OURS:
        return f"is set by Ray in every job ({listed(sorted(_OURS))} are); leave it out"
    if value is None:
        return ""
    if value.startswith("@"):
        return "" if value.startswith("@/") else "expected the absolute path of a file on the nodes after @"
    remedy = f"give --env {name} alone and set it on the nodes, or --env {name}=@FILE with a file that is mounted there"
    if holds_secret(name, value) or reads_like_secret(name, value):
        return f"looks like a secret, and the values of a job are readable by everybody who may list jobs; {remedy}"
    if redact(value, marked=True) != value:
        return f"holds a URL with user, password or query, readable by everybody who may list jobs; {remedy}"
    return ""
