"""`python -m pretrain.schedules STORAGE NAME DUE` does the work of an entry that a service has claimed.

The service passes on the lock of the entry, which this process holds until it ends. Work that is stopped is not ended:
the next service finds it interrupted and begins it again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pretrain.errors import EXIT_STOPPED, RequestError, RunStopped
from pretrain.record.interrupts import stopped_by_signals
from pretrain.schedules.entries import Schedules, parse_time
from pretrain.schedules.service import utc_now
from pretrain.schedules.work import done
from pretrain.screen import escape_diagnostics, say
from pretrain.tracking.mlflow_internals import leave_out_pandas

escape_diagnostics()
leave_out_pandas()
if len(sys.argv) != 4:
    sys.exit("usage: python -m pretrain.schedules STORAGE NAME DUE")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `pretrain evaluate`, before torch is imported
schedules = Schedules(Path(sys.argv[1]))
try:
    with stopped_by_signals(lambda: "stopped; the next service does it again"):
        outcome = done(schedules, schedules.entry(sys.argv[2]), parse_time(sys.argv[3]), say, utc_now)
except RunStopped as error:
    say(str(error))
    sys.exit(EXIT_STOPPED)
except RequestError as error:  # removed before it began
    say(str(error))
    sys.exit(2)
sys.exit(1 if outcome.failures or outcome.regressions else 0)
