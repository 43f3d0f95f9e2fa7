"""The command line: `main` is the console script, `data` the commands below `pretrain data`."""

from __future__ import annotations

from pretrain.cli.main import main

__all__ = ["main"]
