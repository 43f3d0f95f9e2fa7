from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import pytest

from pretrain.cli.main import main
from pretrain.record.events import Evaluated
from pretrain.record.journal import Journal
from tests.headless_browser import look_at

ERROR = ({"name": "error", "unit": "m", "better": "lower", "headline": True},)
LONG = "a_run_with_a_name_that_is_longer_than_a_phone_is_wide-20260101-000000-0001"


@pytest.fixture
def runs(storage: Path) -> Path:
    """Scores of two runs, one with markup in its data's name; an error, where less is better; and raw pixels."""
    scored: Sequence[tuple[str, int, float]] = (("b", 0, 0.25), ("b", 90, 0.75), (LONG, 100, 0.5), (LONG, 1100, 0.125))
    for run, step, score in scored:
        (storage / run).mkdir(exist_ok=True)
        (storage / run / "recipe.yaml").write_text("init_from: null\n")
        bounds = {"top1_ci_low": score - 0.1, "top1_ci_high": score + 0.1} if step != 100 else {}
        common = {"step": step, "seconds": 1.0, "cached": False, "num_test": 2000 - step}
        with Journal(storage / run / "evaluations.jsonl") as journal:
            top1 = {"top1": score, **bounds}
            journal.write(Evaluated(protocol="knn", data="<b>", metrics=top1, key=f"k{run}{step}", **common))
            error = {"metrics": {"error": score}, "described": ERROR, "key": f"d{run}{step}"}
            journal.write(Evaluated(protocol="depth", data="rooms", **error, **common))
    (storage / "evaluations").mkdir()
    pixels = '{"protocol": "knn", "data": "<b>", "metrics": {"top1": 0.3}, "key": "x", "weights_digest": "pixels"}'
    (storage / "evaluations" / "x.json").write_text(pixels)
    return storage


def rows_of(page: str, title: str) -> list[list[str]]:
    section = unescape(page).partition(f"<h2>{title}")[2].partition("</table>")[0]
    rows = [re.findall(r"<td [^>]*>(.*?)</td>", row) for row in section.split("<tr")]
    return [row for row in rows if row]


def test_leaderboard_page__has_the_columns_of_the_terminal_and_marks_floors(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "board.html"
    assert main(["leaderboard", "--storage", str(runs), "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    page = file.read_text(encoding="utf-8")
    assert rows_of(page, "knn/<b> top1") == [
        ["75.0%", "65.0-85.0%", "1910", "90", "b"],
        ["50.0%", "", "1900", "100", LONG],
        ["30.0%", "", "", "", "raw pixels"],
        ["25.0%", "15.0-35.0%", "2000", "0 random", "b"],
        ["12.5%", "2.5-22.5%", "900", "1100", LONG],
    ]
    assert [row[0] for row in rows_of(page, "depth/rooms error")] == ["0.125 m", "0.25 m", "0.5 m", "0.75 m"]
    assert page.count('<tr class="floor">') == 3, "step 0 twice, and raw pixels"
    assert "2 runs in" in page and "<b>" not in page and "http" not in page.replace("http-equiv", "")
    assert main(["leaderboard", "--storage", str(runs), "--html", str(file), "--protocol", "depth"]) == 0
    assert "knn/" not in file.read_text(encoding="utf-8")


def test_leaderboard_page__says_what_it_leaves_out(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[main.__module__], "BEST", 1)
    file = tmp_path / "board.html"
    for options, shown, says_more in (([], 2, True), (["--all"], 5, False)):
        assert main(["leaderboard", "--storage", str(runs), "--html", str(file), *options]) == 0
        page = file.read_text(encoding="utf-8")
        assert len(rows_of(page, "knn/<b> top1")) == shown
        assert ("and 3 more" in page) == says_more


def test_leaderboard_page__refuses_places_that_take_no_page(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for options, said in (
        (["--html", str(tmp_path)], "is there and no file"),
        (["--html", str(tmp_path / "file" / "board.html")], "is no folder"),
        (["--html", "s3://bucket/board.html"], "is written to a local disk"),
        (["--html", ""], "--html is empty"),
        (["--html", str(tmp_path / "board.html"), "--csv"], "beside --csv"),
    ):
        assert main(["leaderboard", "--storage", str(runs), *options]) == 2
        assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_leaderboard_page__in_a_browser_is_sorted_by_a_click(runs: Path, tmp_path: Path, browser: str) -> None:
    file = tmp_path / "board.html"
    assert main(["leaderboard", "--storage", str(runs), "--html", str(file)]) == 0

    def click(column: int) -> str:
        table = "document.querySelectorAll('table')[1]"
        cells = f"[...{table}.tBodies[0].rows].map(row => row.cells[{column}].textContent)"
        return f"{table}.querySelectorAll('th button')[{column}].click(); {cells}"

    for width in (1200, 390):
        for is_dark in (False, True):
            clicks = [click(column) for column in (0, 0, 1, 2, 3, 4, 4)]
            seen = look_at(browser, file, width=width, is_dark=is_dark, expressions=clicks)
            assert (seen.complaints, seen.cut_off, seen.faint) == ([], [], [])
            assert seen.brightness < 60 if is_dark else seen.brightness > 200
            assert seen.answers == [
                ["12.5%", "25.0%", "30.0%", "50.0%", "75.0%"],
                ["75.0%", "50.0%", "30.0%", "25.0%", "12.5%"],
                ["65.0-85.0%", "15.0-35.0%", "2.5-22.5%", "", ""],
                ["2000", "1910", "1900", "900", ""],
                ["1100", "100", "90", "0 random", ""],
                [LONG, LONG, "b", "b", "raw pixels"],
                ["raw pixels", "b", "b", LONG, LONG],
            ]
