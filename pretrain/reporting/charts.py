"""The line charts of the report, as SVG data URIs: nothing to load, and an image runs no scripts.

Lines, points, bands and ticks are all that a report draws, so they are written here: importing a plotting library would
take as long as everything else between the last step and the prompt.

Not here: which numbers are drawn (`pretrain.reporting.page`).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle

from evaluation.protocol import FRACTION, format_value

__all__ = ["Curve", "line_chart", "score_chart"]

INK, MUTED, GRID, ACCENT, FLOOR = "#1f2933", "#616e7c", "#e4e7eb", "#2563eb", "#b45309"
MAX_POINTS = 1500
WIDTH, HEIGHT, RIGHT, BOTTOM = 520, 290, 20, 44  # of the page and of its margins, pixels
LETTER = 8.2  # pixels that a letter of the small text takes at most, on average, where it is enlarged
LINE = 18  # pixels from one line of a legend to the next
NARROW = "<style>@media (max-width: 420px) { text { font-size: 15px } }</style>"  # shown at less, 12 cannot be read
DASHES = "5 4", "2 3", "9 4"  # of the first floor, the second, the third
MARGINS = 0.02, 0.05  # free beside the first and last step, and beyond the extreme values, of their range
MOST_TICKS = 6
LARGEST = 1e300  # the range of larger ones would overflow
ROUND = (1, 2, 2.5, 5, 10)  # what people like to count by


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
    thinned = Curve(curve.steps[::stride], curve.values[::stride])
    axes = _Axes.around(thinned.steps, thinned.values, unit="", top=36)
    return _data_uri(title, [*axes.grid(), *axes.line(thinned)])


def score_chart(title: str, curve: Curve, floors: Mapping[str, float], unit: str) -> str:
    """A score of each checkpoint in its unit, beside dashed lines of what takes no training: name -> score."""
    known = {name: floor for name, floor in floors.items() if math.isfinite(floor)}
    top = 58 + LINE * max(0, len(known) - 1)
    axes = _Axes.around(curve.steps, [*curve.values, *curve.low, *curve.high, *known.values()], unit=unit, top=top)
    shapes = [*axes.grid()]
    legend = [(f'<path d="M0 0h18"/><circle cx="9" r="3.2" fill="{ACCENT}"/>', ACCENT, "checkpoints")]
    if curve.low:
        shapes += axes.band(curve)
        legend.append((f'<path d="M0 -5h18v10h-18z" fill="{ACCENT}" opacity=".16"/>', "none", "95 % interval"))
    for (name, floor), dashes in zip(known.items(), cycle(DASHES)):
        shapes.append(axes.floor(floor, dashes))
        sign = f'<path d="M0 0h18" stroke-dasharray="{dashes}"/>'
        legend.append((sign, FLOOR, f"{name} {format_value(floor, unit)}"))
    return _data_uri(title, [*shapes, *axes.line(curve, points=True), *_legend(legend)])


@dataclass(frozen=True)
class _Axes:
    """From steps and values to pixels.

    Attributes:
        steps, values: The lowest and the highest that are drawn; never the same.
        left, top: Margins, pixels.
        labels: Of the values that have a line.
        unit: Of the values.
    """

    steps: tuple[float, float]
    values: tuple[float, float]
    left: float
    top: float
    labels: dict[float, str]
    unit: str

    @classmethod
    def around(cls, steps: Iterable[int], values: Iterable[float], *, unit: str, top: float) -> _Axes:
        """Axes that hold all of these; values that are not finite are passed over."""
        shown = _range(values, MARGINS[1])
        labels = _labels(_ticks(*shown), unit)
        width = 18 + LETTER * max(map(len, labels.values()), default=0) + 18 * _is_written(unit)
        return cls(_range(steps, MARGINS[0]), shown, width, top, labels, unit)

    def x(self, step: float) -> float:
        low, high = self.steps
        return round(self.left + (step - low) / (high - low) * (WIDTH - RIGHT - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.values
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - self.top), 1)

    def grid(self) -> Iterator[str]:
        """Lines behind the curves, with their labels and what the axes are of."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value, label in self.labels.items():
            y = self.y(value)
            yield f'<path d="M{self.left} {y}H{right}" stroke="{GRID}"/>'
            yield _text(label, self.left - 7, y + 4, "end")
        for step in _ticks(*self.steps, whole=True):
            x = self.x(step)
            yield f'<path d="M{x} {bottom}V{self.top}" stroke="{GRID}"/>'
            label = f"{step:.0f}"
            yield _text(label, min(x, WIDTH - LETTER * len(label) / 2), bottom + 17, "middle")
        yield _text("step", (self.left + right) / 2, HEIGHT - 8, "middle")
        if _is_written(self.unit):
            x, y = 16, (self.top + bottom) / 2
            yield f'<g transform="rotate(-90 {x} {y})">{_text(self.unit, x, y, "middle")}</g>'

    def line(self, curve: Curve, *, points: bool = False) -> Iterator[str]:
        """Through the finite values; with a point at each of them if asked, and where one has no neighbors."""
        for stretch in _stretches(curve.values):
            places = [(self.x(curve.steps[index]), self.y(curve.values[index])) for index in stretch]
            yield f'<path d="{_through(places)}" stroke="{ACCENT}" stroke-width="2"/>'
            for x, y in places if points or len(places) == 1 else ():
                yield f'<circle cx="{x}" cy="{y}" r="3.2" fill="{ACCENT}"/>'

    def band(self, curve: Curve) -> Iterator[str]:
        """Between the bounds, where both are known; as wide as a bar where that is one checkpoint."""
        known = [low + high for low, high in zip(curve.low, curve.high, strict=True)]
        for stretch in _stretches(known):
            lower = [(self.x(curve.steps[index]), self.y(curve.low[index])) for index in stretch]
            upper = [(self.x(curve.steps[index]), self.y(curve.high[index])) for index in stretch]
            path = _through([*lower, *reversed(upper)])
            yield f'<path d="{path}Z" fill="{ACCENT}" stroke="{ACCENT}" stroke-width="3" opacity=".13"/>'

    def floor(self, value: float, dashes: str) -> str:
        y, how = self.y(value), f'stroke-width="1.6" stroke-dasharray="{dashes}"'
        return f'<path d="M{self.left} {y}H{WIDTH - RIGHT}" stroke="{FLOOR}" {how}/>'


def _range(numbers: Iterable[float], margin: float) -> tuple[float, float]:
    """The lowest and the highest number, of finite ones that are not huge, with room beside them."""
    finite = [number for number in numbers if abs(number) < LARGEST] or [0.0]
    low, high = min(finite), max(finite)
    room = (high - low) * margin or abs(high) * margin or 0.5  # around a single one, too
    return low - room, high + room


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """At most `MOST_TICKS` round numbers, evenly spaced, from `low` to `high`."""
    least = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(least))
    spacing = next(factor * power for factor in ROUND if factor * power >= least)
    if whole:
        spacing = max(1.0, spacing if spacing % 1 == 0 else math.ceil(spacing))
    return [number * spacing for number in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]


def _labels(values: Sequence[float], unit: str) -> dict[float, str]:
    """As many digits as tell neighbors apart."""
    percent = unit == FRACTION
    scaled = [value * 100 for value in values] if percent else values
    for digits in range(7):
        texts = [f"{value:.{digits}f}" for value in scaled]
        if all(math.isclose(float(text), value, rel_tol=1e-6) for text, value in zip(texts, scaled, strict=True)):
            break
    else:
        texts = [f"{value:.3g}" for value in scaled]
    return {value: text + "%" * percent for value, text in zip(values, texts, strict=True)}


def _is_written(unit: str) -> bool:
    return unit not in ("", FRACTION)  # a fraction has its percent sign at each label


def _stretches(values: Sequence[float]) -> Iterator[list[int]]:
    """Indices of finite values that follow one another."""
    stretch: list[int] = []
    for index, value in enumerate(values):
        if math.isfinite(value):
            stretch.append(index)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _through(places: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in places)


def _legend(entries: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Lines below the title: sign, color of its strokes, words."""
    x, y = 16.0, 40
    for sign, color, words in entries:
        width = 24 + LETTER * len(words)
        if x > 16 and x + width > WIDTH:
            x, y = 16.0, y + LINE
        yield f'<g transform="translate({x} {y})" stroke="{color}" stroke-width="1.6">{sign}</g>'
        yield _text(words, x + 24, y + 4, "start")
        x += width + 14


def _text(words: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{MUTED}">{escape(words)}</text>'


def _data_uri(title: str, shapes: Iterable[str]) -> str:
    head = f'<text x="16" y="22" fill="{INK}" font-size="14.5" font-weight="bold">{escape(title)}</text>'
    style = 'font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="12" fill="none"'
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style} stroke-linejoin="round">'
    image = "".join([begin, NARROW, head, *shapes, "</svg>"])
    return f"data:image/svg+xml;base64,{base64.b64encode(image.encode()).decode()}"
