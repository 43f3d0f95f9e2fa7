"""Pictures of evaluations in the directory of a run: their names, and colors that go on from step to step."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from evaluation.pictures.sheets import encoded, on_tiles, sheet
from pretrain.record.events import Visualizations, Warned
from pretrain.record.pictures import Drawn, keep
from pretrain.record.run_dir import RunDir

COLORS = np.random.default_rng(0).random((2, 4, 4, 3))


def tokens(step: int, colors: npt.NDArray[np.float64], data: str = "photos") -> Drawn:
    rows = [on_tiles(shown, (8, 8)) for shown in (np.zeros_like(colors), colors)]
    return Drawn(step, data, "tokens", encoded(sheet(rows), (64, 64)))


def kept(run: RunDir, drawn: Drawn) -> npt.NDArray[np.uint8]:
    event = keep(run, drawn)
    assert isinstance(event, Visualizations) and (event.step, event.data) == (drawn.step, drawn.data)
    assert run.is_record(event.path), "a remote storage would not have it"
    return np.array(Image.open(io.BytesIO(run.inside(event.path).read_bytes())).convert("RGB"))


def test_keep__colors_are_those_of_the_checkpoint_before_of_the_same_data(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run-1")
    first = kept(run, tokens(20, COLORS))
    other = kept(run, tokens(20, 1 - COLORS, data="cars, and vans"))
    run.visualizations(40, "photos", "tokens").write_bytes(tokens(40, COLORS[..., ::-1]).png)
    turned = 1 - COLORS[..., [2, 0, 1]]
    assert (kept(run, tokens(60, turned))[66:, :64] == first[66:, :64, ::-1]).mean() > 0.95, "those of step 40"
    for step in (30, 10):  # evaluated late: after 20, and before all others
        assert (kept(run, tokens(step, turned)) == first).mean() > 0.95
    assert (other != first).mean() > 0.2
    assert sorted(path.name for path in (run.path / "visualizations").iterdir()) == [
        "step-00000010-photos-tokens.png",
        "step-00000020-cars--and-vans-tokens.png",
        "step-00000020-photos-tokens.png",
        "step-00000030-photos-tokens.png",
        "step-00000040-photos-tokens.png",
        "step-00000060-photos-tokens.png",
    ]


@pytest.mark.parametrize("damaged", [b"", b"\x89PNG", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_keep__a_damaged_picture_before_costs_nothing(tmp_path: Path, damaged: bytes) -> None:
    run = RunDir(tmp_path / "run-1")
    first = kept(run, tokens(20, COLORS))
    run.visualizations(20, "photos", "tokens").write_bytes(damaged)
    assert (kept(run, tokens(40, COLORS)) == first).all()


def test_keep__what_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run-1")
    run.path.mkdir()
    (run.path / "visualizations").write_text("no folder")
    warned = keep(run, tokens(20, COLORS))
    assert isinstance(warned, Warned) and warned.about == "pictures" and "visualizations" in warned.text
