"""Long work says how far it is, and short work nothing."""

from __future__ import annotations

import pytest

from evaluation import progress
from evaluation.progress import counted, telling


def test_counted__says_every_ten_seconds_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    with telling(said.append):
        for _ in counted(range(10), 10, "encoding 640 samples"):
            now[0] += 5.0
    assert said == [
        "encoding 640 samples: 20 % done, 40 s left",
        "encoding 640 samples: 40 % done, 30 s left",
        "encoding 640 samples: 60 % done, 20 s left",
        "encoding 640 samples: 80 % done, 10 s left",
    ]  # and not that all is done
    with telling(said.append):
        assert list(counted("abc", 3, "short")) == ["a", "b", "c"]
    assert len(said) == 4


def test_telling__ends_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    first: list[str] = []
    second: list[str] = []
    with telling(first.append):
        list(counted("ab", 2, "one"))
    with telling(second.append):
        list(counted("ab", 2, "two"))
    assert [line.partition(":")[0] for line in (*first, *second)] == ["one", "two"] and len(first) == 1
