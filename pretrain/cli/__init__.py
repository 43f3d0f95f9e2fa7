"""The command line: `console` is the console script, `data` the commands below `pretrain data`."""

from __future__ import annotations

from pretrain.cli.main import console, main

__all__ = ["console", "main"]
