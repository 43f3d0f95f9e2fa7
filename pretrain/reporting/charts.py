"""The line charts of the report, as SVG data URIs: nothing to load, and an image runs no scripts.

Not here: which numbers are drawn (`pretrain.reporting.page`). Importing this module imports matplotlib (about a
second).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.protocol import FRACTION, format_value

__all__ = ["Curve", "line_chart", "score_chart"]

INK, MUTED, GRID, ACCENT, FLOOR = "#1f2933", "#616e7c", "#e4e7eb", "#2563eb", "#b45309"
MAX_POINTS = 1500
STYLE = {
    "svg.hashsalt": "pretrain",  # the same numbers give the same bytes
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps; `low` and `high` bound a confidence interval where one is known, else NaN."""

    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_chart(title: str, curve: Curve) -> str:
    """A metric of training over steps. Non-finite values leave a gap."""
    stride = math.ceil(len(curve.steps) / MAX_POINTS) or 1
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = _axes(title)
        axes.plot(curve.steps[::stride], curve.values[::stride], color=ACCENT, linewidth=1.4, solid_capstyle="round")
        if len(curve.steps) == 1:
            axes.plot(curve.steps, curve.values, "o", color=ACCENT, markersize=4)
        return _data_uri(figure)


def score_chart(title: str, curve: Curve, floor: float | None, unit: str) -> str:
    """A score of each checkpoint in its unit, beside the dashed line of the random backbone."""
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = _axes(title)
        if floor is not None:
            label = f"random backbone {format_value(floor, unit)}"
            axes.axhline(floor, color=FLOOR, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
        axes.plot(curve.steps, curve.values, "o-", color=ACCENT, linewidth=1.6, markersize=4.5, label="checkpoints")
        if curve.low:
            axes.fill_between(
                curve.steps, curve.low, curve.high, color=ACCENT, alpha=0.13, linewidth=0, label="95 % interval"
            )
        if unit == FRACTION:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        else:
            axes.set_ylabel(unit)
        axes.legend(loc="best", fontsize=8, labelcolor=MUTED)
        return _data_uri(figure)


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=8)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.02)
    return figure, axes


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
