"""What reaches a terminal: all of it is written here, and nothing in it is obeyed by a terminal.

Names of files, fields and classes, texts in shards and answers of servers are written by others. A terminal takes some
characters for orders (clear the screen, change the title, write from right to left), so they are shown by their codes.
rich, which writes bars and tables, gives orders of its own; those of the text that it is given are escaped as well, and
square brackets in it are no markup.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["control_character", "escape_diagnostics", "escaping_console", "printable", "say"]

# Control characters but the tabulator; marks that change the direction of writing; ends of lines; halves of characters,
# which stand for the bytes of file names that are no text.
_ORDERS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # the tabulator, too


def printable(text: str) -> str:
    r"""One line that a terminal shows and does not obey: `\x1b` for the escape character, `\n` for an end of line."""
    return _ORDERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def control_character(text: str) -> str | None:
    r"""The first character of a text that is for no name and no path, by its code, such as `\n`; None: it has none."""
    found = _CONTROL.search(text)
    return None if found is None else found[0].encode("unicode_escape").decode()


def say(text: str, *, err: bool = False) -> None:
    """Write one line to standard output, or standard error."""
    import click

    click.echo(printable(text), err=err)


def escaping_console(file: IO[str] | None = None, **options: Any) -> Console:
    """A console of rich for text of others.

    Args:
        file: Where it writes; standard output by default.
        options: As for `rich.console.Console`.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Escaping(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Any:
            for text, style, control in super().render(renderable, options):
                shown = text if control else "\n".join(map(printable, text.split("\n")))
                yield Segment(shown, style, control)

        def on_broken_pipe(self) -> None:
            """Who read this has gone (`| head`, a closed terminal); what is being done goes on and is not shown."""
            self.quiet = True
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.file.fileno())

    return Escaping(file=file, markup=False, emoji=False, highlight=False, **options)


def escape_diagnostics() -> None:
    """From now on, what Python itself writes to standard error is escaped: warnings, log lines, tracebacks."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        _write(warnings.formatwarning(message, category, filename, lineno, line), file)

    def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _write("".join(traceback.format_exception(kind, error, trace)))

    warnings.showwarning = show
    sys.excepthook = show_exception
    for handler in (logging.lastResort, *logging.getLogger().handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setFormatter(_Escaping("%(message)s"))


class _Escaping(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _write(text: str, file: IO[str] | None = None) -> None:
    """Several lines, as they are."""
    stream = file or sys.stderr
    stream.write("\n".join(map(printable, text.split("\n"))))
