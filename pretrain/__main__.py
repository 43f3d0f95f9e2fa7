"""`python -m pretrain` is the command `pretrain`."""

from __future__ import annotations

from pretrain.cli import console

console()
