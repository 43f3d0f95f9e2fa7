"""No two uses of a seed share a number, and the numbers that recorded runs depend on never change."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipelines.purposes import Purpose, ViewPurpose

PACKAGE = Path(__file__).parents[2] / "data_pipelines"


def test_purposes__are_those_of_every_run_so_far() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "BLOCKS": 1,
        "WINDOW": 2,
        "SAMPLE": 3,
        "SUBSTITUTE": 4,
        "PART": 5,
        "MIX": 6,
        "SHARDS": 7,
        "SIZES": 8,
        "SIDE": 9,
    }
    assert {purpose.name: purpose.value for purpose in ViewPurpose} == {"COLORS": 1}


def test_purposes__each_is_used_by_the_file_that_its_comment_names_and_by_no_other() -> None:
    comments = dict(
        re.findall(r"    ([A-Z]+) = \d+  # ([\w/]+)", (PACKAGE / "purposes.py").read_text(encoding="utf-8"))
    )
    for purpose in Purpose:
        users = [
            path.relative_to(PACKAGE).with_suffix("").as_posix()
            for path in sorted(PACKAGE.rglob("*.py"))
            if re.search(rf"\bPurpose\.{purpose.name}\b", path.read_text(encoding="utf-8"))
        ]
        assert users == [comments[purpose.name]]


def test_purposes__no_file_has_a_number_of_its_own() -> None:
    own = re.compile(r"[^\w]key\([^()\n]*\b_[A-Z]+\b")
    assert [path.name for path in PACKAGE.rglob("*.py") if own.search(path.read_text(encoding="utf-8"))] == []
