"""`python -m pretrain` is the command `pretrain`."""

from __future__ import annotations

import sys

from pretrain.cli.main import main

sys.exit(main())
