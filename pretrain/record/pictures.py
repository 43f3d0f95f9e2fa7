"""Pictures of what a checkpoint makes of evaluation data, kept beside those that its objective made in training.

Not here: drawing them (`evaluation.pictures`), when (`pretrain.evaluations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipelines.files import write_atomically
from pretrain.errors import said_by_system
from pretrain.record.events import Visualizations, Warned
from pretrain.record.run_dir import RunDir

__all__ = ["CAPTION", "COLORED", "ROWS", "Drawn", "keep", "text_of"]

COLORED = ("tokens", "clouds", "slices")  # kinds of sheets whose second row shows components as colors
COLORS_ROW = 1
# Texts of a PNG for people: what its rows show, from above, and what else is to be known of it.
ROWS, CAPTION = "rows", "caption"


@dataclass(frozen=True)
class Drawn:
    """A picture that an evaluation task has drawn.

    Attributes:
        step: Of the checkpoint.
        data: Name of the evaluation data.
        shows: Its kind: a word, also for the name of its file.
        png: The file.
    """

    step: int
    data: str
    shows: str
    png: bytes


def keep(run: RunDir, drawn: Drawn) -> Visualizations | Warned:
    """Write a picture to the directory of its run and return what the run records of it.

    Colors of components are those of the checkpoint before, as far as the components are. A picture that cannot be
    written is a warning.
    """
    path = run.visualizations(drawn.step, drawn.data, drawn.shows)
    png = _with_colors_of_before(run, drawn) if drawn.shows in COLORED else drawn.png
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, png)
    except OSError as error:
        return Warned(step=drawn.step, about="pictures", text=f"a picture is not kept: {said_by_system(error)}")
    return Visualizations(step=drawn.step, path=run.relative(path), data=drawn.data, shows=drawn.shows)


def _with_colors_of_before(run: RunDir, drawn: Drawn) -> bytes:
    """The picture as it is where there is no other one, or where that is damaged."""
    others = run.visualizations_of(drawn.data, drawn.shows, but=drawn.step)
    if not others:
        return drawn.png
    from evaluation.pictures.sheets import with_colors_of  # numpy and Pillow take their time

    before = max((step for step in others if step < drawn.step), default=min(others))
    try:
        return with_colors_of(drawn.png, others[before].read_bytes(), row=COLORS_ROW)
    except (OSError, ValueError, SyntaxError):  # Pillow calls broken PNGs all of these
        return drawn.png


def text_of(png: Path, name: str) -> str:
    """What a picture says of itself, `ROWS` or `CAPTION`; empty where it does not, or is damaged."""
    from PIL import Image

    try:
        with Image.open(png) as image:
            return str(image.info.get(name, ""))
    except (OSError, ValueError, SyntaxError):
        return ""
