"""Pictures of results: what was planted is where it belongs, and they are drawn of what is stored."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.inspection.thumbnails import class_colors
from evaluation.data import IGNORED, EvaluationData
from evaluation.extraction.recipe import Reads
from evaluation.pictures.draw import draw
from evaluation.pictures.outcomes import (
    INK,
    NAMED_CELL_PX,
    NOBODY,
    OutcomePictures,
    confusion_counts,
    confusion_picture,
    framed,
    overlay_rows,
)
from evaluation.pictures.sheets import MOST_BYTES, Pixels
from evaluation.registry import protocol
from evaluation.runner import evaluate
from evaluation.threads import Threads

RED, GREEN, BLACK = [230, 30, 30], [40, 160, 60], [0, 0, 0]
SETTINGS: dict[str, Any] = {"image_size": None, "reads": Reads(), "device": "cpu", "threads": Threads(1)}


def pixels(png: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def test_confusion_counts__are_those_of_planted_predictions() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 3], np.int32), np.array([0, 0, 1, 3, 3], np.int32)
    assert confusion_counts(predicted, labels, 2).tolist() == [[2, 1, 0, 0], [0, 0, 0, 1], [0] * 4, [0, 0, 0, 1]]
    assert confusion_counts(predicted, labels, 6).shape == (6, 6)


def test_confusion_picture__names_beside_cells_that_are_as_dark_as_their_share() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 5]])
    picture = confusion_picture(counts, ["ant", "a bee", "the\nlongest of all of the names"])
    cells = picture[-3 * NAMED_CELL_PX :, -3 * NAMED_CELL_PX :][1::NAMED_CELL_PX, 1::NAMED_CELL_PX]  # corners
    assert cells[0, 1].tolist() == [round((255 + ink) / 2) for ink in INK], "a quarter, whose root is a half"
    assert cells[2, 2].tolist() == list(INK) and (cells[1] == NOBODY).all() and (cells[2, :2] == 255).all()
    inside = picture[-3 * NAMED_CELL_PX : -2 * NAMED_CELL_PX, -3 * NAMED_CELL_PX : -2 * NAMED_CELL_PX]
    assert inside.min(axis=-1).max() > 200 and (inside[0, 0] < 130).all(), "percents"
    beside = picture[-3 * NAMED_CELL_PX :, : -3 * NAMED_CELL_PX]
    widths = [(line < 128).any(axis=(0, 2)).sum() for line in np.split(beside, 3)]
    assert 0 < widths[0] < widths[1] < widths[2], "each name in the line of its class"
    above = picture[: -3 * NAMED_CELL_PX, -3 * NAMED_CELL_PX :]
    heights = [np.flatnonzero((line < 128).any(axis=(1, 2))) for line in np.split(above, 3, axis=1)]
    assert heights[0].size < heights[1].size < heights[2].size
    assert len(above) - heights[0].max() < 12, "it begins at the matrix"


@pytest.mark.parametrize(("num_classes", "width"), [(21, 22 * 21), (240, 480), (1000, 2 * 200)])
def test_confusion_picture__of_many_classes_has_cells_only(num_classes: int, width: int) -> None:
    picture = confusion_picture(np.eye(num_classes, dtype=np.int64) * 7, None)
    assert picture.shape == (width, width, 3)
    side = width // min(num_classes, 200 if num_classes == 1000 else num_classes)
    assert (picture[side // 2 :: side, side // 2 :: side].diagonal() == np.array(INK)[:, None]).all()
    assert (picture == 255).all(-1).mean() > 0.9


def test_framed__is_green_where_right() -> None:
    tiles = framed(np.full((2, 20, 16, 3), 7, np.uint8), np.array([True, False]))
    assert tiles[:, 0, 0].tolist() == [GREEN, RED] == tiles[:, -1, -1].tolist()
    assert (tiles[:, 3:-3, 3:-3] == 7).all() and (tiles[:, :3] != 7).any(-1).all()


def test_overlay_rows__errors_are_where_they_were_planted() -> None:
    images = np.full((1, 8, 8, 3), 100, np.uint8)
    truth = np.array([[[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, IGNORED]]])
    guess = truth.copy()
    guess[0, 0, 1], guess[0, 2, 0], guess[0, 3, 3] = 0, 5, 2
    same, of_truth, of_guess, errors = overlay_rows(images, truth, guess)
    is_wrong = np.zeros((4, 4), bool)
    is_wrong[[0, 2], [1, 0]] = True
    assert ((errors[0] == RED).all(-1) == is_wrong.repeat(2, 0).repeat(2, 1)).all()
    assert (errors[0, 6:, 6:] == BLACK).all() and (errors[0, 7, 0] == 40).all()
    tints = (0.4 * 100 + 0.6 * class_colors()).round()
    assert (of_truth[0, 1, 2] == tints[1]).all() and (of_guess[0, 1, 2] == tints[0]).all()
    assert (of_guess[0, 5, 1] == tints[5]).all() and (of_truth[0, 5, 1] == tints[0]).all()
    assert (of_truth[0, 6:, 6:] == 100).all() and (same == images).all()


def test_draw__of_a_stored_result_without_computing_anything(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path
) -> None:
    weights, store = checkpoint(), tmp_path / "store"
    found = []
    for _ in range(2):  # then what is stored
        result = evaluate(weights, "knn", colours, store=store, device="cpu")
        found.append(dict(draw(weights, colours, [result], store=store, **SETTINGS)))
    assert result.cached and found[0] == found[1]
    assert list(found[0]) == ["tokens", "knn_confusion", "knn_neighbors"]
    neighbors = pixels(found[0]["knn_neighbors"]).reshape(6, 66, 6, 66, 3)[:, :64, :, :64]
    frames, channel = neighbors[:, 0, :, 0], neighbors[:, 32:, :, 32:].mean(axis=(1, 3)).argmax(-1)
    assert (frames[:, 1:] == np.where((channel[:, 1:] == channel[:, :1])[..., None], GREEN, RED)).all()

    path = store / "evaluations" / f"{result.key}.npz"  # as an older version has kept it
    with np.load(path) as arrays:
        values = arrays["values"]
    np.savez_compressed(path, values=values)
    assert list(dict(draw(weights, colours, [result], store=store, **SETTINGS))) == ["tokens"]


def test_drawings__maps_lie_over_their_images_and_name_their_classes(halves: EvaluationData) -> None:
    planted = np.zeros((4, 24, 20), np.int32)
    planted[:, 12:, 10:] = 1
    shown = {"asked": np.array([0, 2, 3, 6]), "truth": planted, "guess": planted * 0}
    pictures = OutcomePictures(protocol("segmentation"), shown, halves, ("png",), (16, 16))
    maps = pixels(pictures.drawings()["segmentation_maps"]())
    assert maps.shape == (4 * 66 + 14, 4 * 66, 3), "a line with the two classes"
    assert (maps[4 * 66 + 5, 3] == class_colors()[0]).all()
    tiles = maps[: 4 * 66].reshape(4, 66, 4, 66, 3)[:, :64, :, :64]
    assert ((tiles[3] == RED).all(-1).swapaxes(0, 1) == (np.indices((64, 64)) >= 32).all(0)).all()
    opened = halves.open(protocol("segmentation"))
    whole = [decode_image(opened.test.read(number)["png"]) for number in (0, 2, 3, 6)]
    assert (tiles[0].swapaxes(0, 1)[:, ::4, ::4] == whole).all()


@pytest.mark.parametrize("name", ["knn", "segmentation"])
def test_drawings__noise_is_no_larger_than_allowed(
    name: str, tmp_path: Path, png: Callable[..., bytes], write_shards: Callable[..., None]
) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        samples = [{"png": png(rng.integers(0, 256, (96, 96, 3), np.uint8)), "cls": b"0"} for _ in range(36)]
        mask = {"seg.png": png(np.zeros((8, 8), np.uint8))}
        write_shards(tmp_path / "noise", split, [{**sample, **mask} for sample in samples])
    (tmp_path / "noise" / "dataset.json").write_text('{"classes": ["noise", "more"]}')
    shown = {
        "asked": np.arange(6) if name == "knn" else np.arange(4),
        "neighbors": np.arange(6, 36).reshape(6, 5),
        "truth": rng.integers(0, 2, (4, 96, 96)),
        "guess": rng.integers(0, 2, (4, 96, 96)),
    }
    needless = {"knn": {"truth", "guess"}, "segmentation": {"neighbors"}}[name]
    kept = {array: shown[array] for array in shown.keys() - needless}
    pictures = OutcomePictures(protocol(name), kept, EvaluationData("noise", tmp_path / "noise"), ("png",), (96, 96))
    ((kind, drawing),) = pictures.drawings().items()
    assert kind in ("knn_neighbors", "segmentation_maps") and len(drawing()) <= MOST_BYTES
