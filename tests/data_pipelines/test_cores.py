"""How many cores a process may use, on systems that bind processes to cores and on others."""

from __future__ import annotations

import os

import pytest

from data_pipelines.cores import usable_cores


@pytest.mark.parametrize(("bound", "whole", "wanted"), [({0, 5}, 64, 2), (None, 12, 12), (None, None, 1)])
def test_usable_cores__those_it_is_bound_to_else_all(
    bound: set[int] | None, whole: int | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no `os.sched_getaffinity`, and a system may not know how many cores there are."""
    if bound is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: bound, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: whole)
    assert usable_cores() == wanted
