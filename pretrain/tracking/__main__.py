"""`python -m pretrain.tracking RUN_DIR` sends what a run has written and MLflow has not received yet."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pretrain.checkpoints.copies import exported
from pretrain.errors import RequestError
from pretrain.screen import escape_diagnostics, say
from pretrain.tracking.mlflow_internals import leave_out_pandas
from pretrain.tracking.sync import sync

logging.basicConfig(level=logging.INFO, format="%(message)s")
escape_diagnostics()
leave_out_pandas()
if len(sys.argv) != 2:
    sys.exit("usage: python -m pretrain.tracking RUN_DIR")
try:
    sys.exit(0 if sync(Path(sys.argv[1]), exported) else 1)
except RequestError as mistake:
    for line in mistake.mistakes:
        say(line, err=True)
    sys.exit(2)
