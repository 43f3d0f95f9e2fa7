"""How messages end."""

from __future__ import annotations

from data_pipelines.errors import nearest, suggest


def test_suggest__names_what_is_alike_and_nothing_else() -> None:
    assert suggest("solarise_p", ["blur_p", "solarize_p"]) == "; did you mean 'solarize_p'?"
    assert suggest("x", {"blur_p", "solarize_p"}) == "" and suggest("x", []) == ""


def test_nearest__by_a_cutoff() -> None:
    assert nearest("path", ["file_path"], cutoff=0.4) == "file_path" and nearest("path", ["file_path"], 0.9) is None
