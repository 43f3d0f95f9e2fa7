"""Commands that refuse an empty argument or option, which a variable of a shell gives that was never set.

Taken as it is, an empty path would be the current directory.
"""

from __future__ import annotations

import click

from pretrain.errors import RequestError

__all__ = ["Commands", "Filled"]


class Filled(click.Command):
    """A command none of whose arguments and options may be given as nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises:
        RequestError: one of them is.
        """
        rest = super().parse_args(ctx, args)
        empty = [_said(param) for param in self.params if _is_empty(ctx.params.get(param.name or ""))]
        if empty:
            raise RequestError(
                *(f"{name} is empty; give a value (is a variable of the shell unset?)" for name in empty)
            )
        return rest


class Commands(click.Group):
    """A group of them."""

    command_class = Filled


def _is_empty(value: object) -> bool:
    return value == "" or (isinstance(value, tuple) and "" in value)


def _said(param: click.Parameter) -> str:
    return max(param.opts, key=len) if isinstance(param, click.Option) else param.human_readable_name
