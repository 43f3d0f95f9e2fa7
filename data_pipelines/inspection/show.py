"""Samples for the eye: a few lines of text each, or a contact sheet of small pictures.

Not here: how a field becomes a picture (`thumbnails`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.field_kinds import is_radiance_grid, kind_of_field
from data_pipelines.fields import decode_field
from data_pipelines.inspection.thumbnails import PICTURED, thumbnail
from data_pipelines.shards.dataset import Dataset

__all__ = ["contact_sheet", "describe"]

_GAP, _CAPTION = 6, 16  # pixels
_SHEET_WIDTH = 1600
_BACKGROUND, _INK, _ALARM = (32, 32, 32), (225, 225, 225), (255, 110, 90)
_MAX_TEXT = 400  # characters of a json or text field


def describe(dataset: Dataset, sample_id: int, field: str | None = None) -> list[str]:
    """What one sample holds: where it lies, then one line per field with kind, size and what there is to say.

    Raises:
        DataError: there is no such sample or field, or the sample does not read.
    """
    sample = dataset.read(sample_id)
    names = _chosen(dataset, sample, field)
    width = max(map(len, names), default=0)
    lines = [f"{sample_id}: {dataset.where(sample_id)}"]
    for name in names:
        kind = kind_of_field(name, dataset.description.get("fields"))
        lines.append(f"  {name:<{width}}  {len(sample[name]):>9} bytes  {_say(dataset, kind, sample[name])}".rstrip())
    return lines


def contact_sheet(dataset: Dataset, ids: Sequence[int], size: int = 128, field: str | None = None) -> Image.Image:
    """Pictures of samples with captions (id, key, class), in rows.

    Args:
        dataset: where they come from.
        ids: which samples, in the order of the sheet.
        size: pixels of the longer side of a picture.
        field: draw this one only, else every field that has a picture.

    Raises:
        DataError: there is no such sample or field, or no field has a picture. Damaged samples say so on the sheet.
    """
    cells = [_cell(dataset, sample_id, size, field) for sample_id in ids]
    if not any(pictures for pictures, _ in cells):
        raise DataError(f"{f'field {field}' if field else 'no field'} of these samples can be drawn as a picture")
    width = max(sum(picture.width + _GAP for picture in pictures) for pictures, _ in cells) or size + _GAP
    height = max((picture.height for pictures, _ in cells for picture in pictures), default=size) + _CAPTION + _GAP
    rows = -(-len(cells) // max(1, _SHEET_WIDTH // width))
    columns = -(-len(cells) // rows)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _BACKGROUND)
    for number, (pictures, caption) in enumerate(cells):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        _write(sheet, (left, top + height - _GAP - _CAPTION), caption, width - _GAP, _INK if pictures else _ALARM)
        for picture in pictures:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
    return sheet


def _cell(dataset: Dataset, sample_id: int, size: int, field: str | None) -> tuple[list[Image.Image], str]:
    """The pictures of a sample and its caption, which says so when the sample or a field of it is damaged."""
    declared, ignore_index = dataset.description.get("fields"), dataset.description.get("ignore_index")
    try:
        sample = dataset.read(sample_id)
    except CorruptSampleError as error:
        return [], f"{sample_id}: {error}"
    pictures, caption = [], f"{sample_id}  {sample['__key__']}"
    for name in _chosen(dataset, sample, field):
        kind = kind_of_field(name, declared)
        is_grid = is_radiance_grid(name)
        try:
            picture = thumbnail(kind, sample[name], size, ignore_index, is_grid=is_grid) if kind in PICTURED else None
        except DataError as error:
            caption += f"  {name}: {error}"
        else:
            pictures += [] if picture is None else [picture]
    labels = [name for name in sample if kind_of_field(name, declared) == "label"]
    return pictures, "  ".join([caption, *(_say(dataset, "label", sample[name]) for name in labels)])


def _chosen(dataset: Dataset, sample: Mapping[str, Any], field: str | None) -> list[str]:
    if field is None:
        return sorted(name for name in sample if name != "__key__")
    if field not in sample:
        dataset.require_field(field)  # explains what there is
        raise DataError(f"sample {sample['__key__']!r} has no field {field}")
    return [field]


def _say(dataset: Dataset, kind: str | None, data: bytes) -> str:
    """A field in a few words."""
    if kind is None:
        return "not read"
    try:
        value = decode_field(kind, data)
    except DataError as error:
        return f"{kind}: {error}"
    if kind == "label":
        classes = dataset.description.get("classes")
        return f"{classes[value]} ({value})" if isinstance(classes, list) and 0 <= value < len(classes) else str(value)
    if kind in ("json", "text"):
        text = json.dumps(value, ensure_ascii=False) if kind == "json" else " ".join(value.split())
        return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
    if kind == "image":
        return f"image {value.shape[1]} x {value.shape[0]}"
    arrays = value if isinstance(value, dict) else {"": value}
    return f"{kind} " + ", ".join(f"{name} {array.dtype} {array.shape}".strip() for name, array in arrays.items())


def _write(sheet: Image.Image, at: tuple[int, int], text: str, width: int, ink: tuple[int, int, int]) -> None:
    """One line, cut to `width` pixels."""
    font = ImageFont.load_default(size=11)
    while text and font.getlength(text) > width:
        text = text[:-1]
    ImageDraw.Draw(sheet).text(at, text, fill=ink, font=font)
