"""The option `--storage` of all commands that work on runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError

__all__ = ["storage_option"]


def storage_option(default: str | None = "runs", help: str = "Directory of the runs.") -> Callable[[Any], Any]:
    """The option for a directory of runs; a URI is refused before anything is looked up or made."""
    return click.option(
        "--storage",
        metavar="DIR",
        default=default,
        show_default=default is not None,
        help=help,
        callback=_local,
    )


def _local(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and "://" in value:
        command = context.command_path.partition(" ")[2]
        remedy = f"pretrain {command} works on a directory, on the machine that has it"
        raise RequestError(f"--storage {redact(value)}: a remote store; {remedy}")
    return value
