"""The leaderboard as one self-contained HTML page, in the style of the report.

Its tables can be sorted by any column; without the few lines of script that do it, they stand best first.

Not here: which scores there are and in which order (`pretrain.evaluations`), the same on a terminal (`pretrain.cli`).
"""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from evaluation.protocol import Metric, format_value
from pretrain.evaluations import Place, excerpt
from pretrain.reporting.page import TEMPLATES, environment

__all__ = ["leaderboard_page"]

SCRIPT = "sort.js"


@dataclass(frozen=True)
class Board:
    """One table: the scores of a task.

    Attributes:
        title: `PROTOCOL/DATA METRIC`.
        metric: Its headline.
        rows: Cells of (words, what they are sorted by; empty: nothing was recorded), and whether it is a floor.
        num_more: Scores that are not shown.
    """

    title: str
    metric: Metric
    rows: list[tuple[list[tuple[str, str]], bool]]
    num_more: int


def leaderboard_page(places: Sequence[Place], storage: str, most: int | None) -> bytes:
    """The page.

    Args:
        places: In the order of `pretrain.evaluations.leaderboard`.
        storage: What people call the place of the runs.
        most: Scores of a task that are shown beside those of what their runs began with; None: all.
    """
    boards = []
    for (protocol, data, metric), group in groupby(places, lambda place: (place.protocol, place.data, place.metric)):
        found = list(group)
        shown = found if most is None else excerpt(found, most)
        rows = [(_cells(place), place.step == 0 or place.is_floor) for place in shown]
        boards.append(Board(f"{protocol}/{data} {metric.name}", metric, rows, len(found) - len(shown)))
    script = (TEMPLATES / SCRIPT).read_text(encoding="utf-8")
    page = (
        environment()
        .get_template("leaderboard.html")
        .render(
            boards=boards,
            storage=storage,
            runs=len({place.run for place in places if place.step is not None}),
            script=script,
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
    )
    return page.encode()


def _cells(place: Place) -> list[tuple[str, str]]:
    """Score, interval, test samples, step and run: the columns of the terminal."""
    low = place.bounds[0] if place.bounds else math.nan
    step = "" if place.step is None else str(place.step)
    return [
        (format_value(place.score, place.metric.unit), _number(place.score)),
        (place.interval, _number(low)),
        (str(place.num_test or ""), str(place.num_test or "")),
        (f"{step} {place.start}".strip(), step),
        (place.shown_run, place.shown_run),
    ]


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""
