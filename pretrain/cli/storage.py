"""The option `--storage` of all commands that work on runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError
from pretrain.remote.places import is_uri, storage_problem
from pretrain.screen import control_character

__all__ = ["storage_option"]


def storage_option(
    default: str | None = "runs", help: str = "Directory or URI of the runs.", *, may_be_remote: bool = False
) -> Callable[[Any], Any]:
    """The option for where runs are; a URI that is no use is refused before anything is looked up or made."""
    return click.option(
        "--storage",
        metavar="URI" if may_be_remote else "DIR",
        default=default,
        show_default=default is not None,
        help=help,
        callback=_checked if may_be_remote else _local,
    )


def _checked(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    _require_plain(value)
    if value is not None and is_uri(value) and (problem := storage_problem(value)):
        raise RequestError(f"--storage {redact(value)}: {problem}")
    return value


def _local(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    _require_plain(value)
    if value is not None and is_uri(value):
        command = context.command_path.partition(" ")[2]
        remedy = f"pretrain {command} works on a directory, on the machine that has it"
        raise RequestError(f"--storage {redact(value)}: a remote store; {remedy}")
    return value


def _require_plain(value: str | None) -> None:
    if value is not None and (character := control_character(value)):
        raise RequestError(f"--storage {redact(value)}: {character} is in it, a control character; leave it out")
