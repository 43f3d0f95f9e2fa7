"""JSON of others: what is deep is refused before it is parsed, all else is as `json` reads it."""

from __future__ import annotations

import json
import sys

import pytest

from data_pipelines.parsing import MAX_DEPTH, parse_json


@pytest.mark.parametrize(
    "value",
    [None, [], {"a": [1, 2.5, "x", {"b": []}]}, "[" * 1000, ['"' + "{" * 500, "\\", '\\"['], [[]] * 1000, {"é": "𝄞["}],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_parse_json__is_that_of_json(value: object, encoding: str) -> None:
    """Brackets in texts are no levels."""
    text = json.dumps(value, ensure_ascii=False)
    assert parse_json(text) == parse_json(text.encode(encoding)) == value


def test_parse_json__depth_is_bounded_and_its_limit_fits() -> None:
    for one, other in (("[", "]"), ('{"a":', "}"), ('[["]", ', "]]")):
        levels = MAX_DEPTH // one.count("[") if "[" in one else MAX_DEPTH
        assert parse_json(one * levels + "1" + other * levels) is not None
        with pytest.raises(ValueError, match=f"^nested deeper than {MAX_DEPTH} levels$"):
            parse_json(one * (levels + 1) + "1" + other * (levels + 1))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-be"])
def test_parse_json__a_million_levels_end_nothing_where_recursion_is_not_limited(encoding: str) -> None:
    """Also where the bytes of other characters look like quotes in an encoding of two bytes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**9)
    try:
        for text in ("[" * 10**6, '["∢", ' * 10**6, '["' + "x" * 10**6 + '", ' + '{"a": ' * 10**6):
            with pytest.raises(ValueError, match="nested deeper"):
                parse_json(text.encode(encoding))
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"a": ' + b"9" * 5000 + b"}", b'"' * 9, "]" * 99])
def test_parse_json__what_is_none_is_a_value_error(content: bytes | str) -> None:
    with pytest.raises(ValueError):
        parse_json(content)
