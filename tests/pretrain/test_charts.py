"""What the report's charts draw, read back from their SVG."""

from __future__ import annotations

import base64
import math
import random
import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pretrain.reporting.charts import ACCENT, FLOOR, HEIGHT, MOST_TICKS, WIDTH, Curve, line_chart, score_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(uri: str) -> ElementTree.Element:
    return ElementTree.fromstring(base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,"), validate=True))


def curves(image: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Places of each line that is drawn through values."""
    paths = [p.get("d", "") for p in image.findall(f"{SVG}path") if p.get("stroke") == ACCENT and not p.get("fill")]
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)] for path in paths]


def words(image: ElementTree.Element, anchor: str) -> list[tuple[str, float, float]]:
    found = [t for t in image.findall(f"{SVG}text") if t.get("text-anchor") == anchor]
    return [(t.text or "", float(t.get("x", "nan")), float(t.get("y", "nan"))) for t in found]


def test_line_chart__places_values_by_its_labels() -> None:
    image = drawn(line_chart("Loss", Curve([0, 10, 40], [1.0, 2.0, 4.0])))
    (places,) = curves(image)
    (label_0, _, y_0), (label_1, _, y_1) = words(image, "end")[:2]  # a value's label stands 4 pixels below its line
    scale = (y_1 - y_0) / (float(label_1) - float(label_0))
    for value, (_, y) in zip([1.0, 2.0, 4.0], places, strict=True):
        assert y == pytest.approx(y_0 - 4 + scale * (value - float(label_0)), abs=0.2)
    steps = {text: x for text, x, _ in words(image, "middle") if text.isdigit()}
    assert places[0][0] == pytest.approx(steps["0"], abs=0.2) and places[2][0] == pytest.approx(steps["40"], abs=0.2)
    assert places[1][0] - places[0][0] == pytest.approx((places[2][0] - places[0][0]) / 4, abs=0.2)


def test_line_chart__of_the_largest_and_smallest_numbers() -> None:
    for values in ([-1.7e308, 1.7e308], [0.0, 5e-324], [1e-320, 2e-320], [1e299, -1e299], [math.inf], []):
        assert drawn(line_chart("Loss", Curve(range(len(values)), values))).tag == f"{SVG}svg"


def test_line_chart__gaps_and_lonely_values() -> None:
    image = drawn(line_chart("Loss", Curve(range(7), [1, math.nan, 1, 2, math.inf, -math.inf, 3])))
    assert [len(places) for places in curves(image)] == [1, 2, 1]
    assert len(image.findall(f"{SVG}circle")) == 2, "a value without neighbors is a point"


@pytest.mark.parametrize("seed", range(40))
def test_charts__stay_on_the_page_and_are_labelled(seed: int) -> None:
    draw = random.Random(seed)
    scale, shift = 10.0 ** draw.randint(-9, 9), draw.choice([0.0, 1.0, -1e6])
    count = draw.choice([1, 2, 3, 50, 5000])
    first = draw.choice([0, 10**6])
    steps = range(first, first + count * draw.choice([1, 7, 100]), 1)[:count]
    values = [shift + scale * draw.random() for _ in steps]
    score = Curve(steps, values, [value - scale for value in values], [value + scale for value in values])
    for uri in (
        line_chart("<b>&", Curve(steps, values)),
        score_chart("<b>&", score, {"random": shift}, draw.choice(["m", ""])),
    ):
        image = drawn(uri)
        assert next(image.iter(f"{SVG}text")).text == "<b>&"
        for places in curves(image):
            assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
        labels = [text for text, _, _ in words(image, "end")]
        assert 1 <= len(labels) <= MOST_TICKS + 1
        if abs(shift) < scale * 1e4:  # else all that is seen happens in digits that no label has
            assert len(set(labels)) == len(labels)
        numbers = sorted(int(text) for text, _, _ in words(image, "middle") if text.isdigit())
        gaps = {after - before for before, after in pairwise(numbers)}
        assert len(numbers) >= 1 and len(gaps) <= 1, "steps are whole and evenly spaced"


def test_score_chart__percent_floor_and_interval() -> None:
    curve = Curve([100, 200, 300], [0.4, 0.5, 0.6], [0.35, math.nan, 0.55], [0.45, math.nan, 0.65])
    image = drawn(score_chart("linear/photos top1", curve, {"random backbone": 0.3}, "fraction"))
    assert all(text.endswith("%") for text, _, _ in words(image, "end"))
    assert "random backbone 30.0%" in [text for text, _, _ in words(image, "start")]
    floors = [p for p in image.findall(f"{SVG}path") if p.get("stroke") == FLOOR]
    assert len(floors) == 1
    bands = [p for p in image.findall(f"{SVG}path") if p.get("d", "").endswith("Z")]
    assert len(bands) == 2, "a bound that is not known leaves a gap"
    assert not [
        p for p in drawn(score_chart("t", Curve([1], [0.4]), {"random": math.nan}, "m")) if p.get("stroke") == FLOOR
    ]


def test_score_chart__each_floor_has_its_line_and_words_that_are_inside() -> None:
    floors = {"random backbone": 0.3, "raw pixels": 0.2, "best constant": 0.1}
    image = drawn(score_chart("t", Curve([100, 200], [0.4, 0.5], [0.3, 0.4], [0.5, 0.6]), floors, "fraction"))
    lines = [p for p in image.findall(f"{SVG}path") if p.get("stroke") == FLOOR]
    assert len({line.get("stroke-dasharray") for line in lines}) == len({line.get("d") for line in lines}) == 3
    legend = words(image, "start")[1:]  # without the title
    assert [text for text, _, _ in legend][-3:] == ["random backbone 30.0%", "raw pixels 20.0%", "best constant 10.0%"]
    assert all(x + 5 * len(text) < WIDTH for text, x, _ in legend) and len({y for _, _, y in legend}) == 2


def test_charts__import_no_plotting_library() -> None:
    code = "import sys, pretrain.reporting.charts, pretrain.reporting.page; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
