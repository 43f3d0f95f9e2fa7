"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.screen import escaping_console, say

__all__ = ["print_table"]

LONG_TABLE = 200  # rows; rich takes a millisecond for each


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, folded where there is no room for them; of a table that is longer than a screen as wide as they are."""
    if len(rows) > LONG_TABLE:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")  # nothing is lost: a name that is cut cannot be typed
    for row in rows:
        table.add_row(*row)
    escaping_console().print(table)
