"""One item to the fields of one sample: read, decoded once to see that it is whole, resized and re-encoded on request.

By default images keep their bytes. Those that are resized or re-encoded are turned as their EXIF orientation says and
hold pixels only. Masks and depth maps never pass through RGB and are never interpolated. Clouds and volumes of all file
formats become one npy each.

Not here: what there is to pack (`inputs`), how samples become a shard (`shard_writer`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipelines.decode import Photo
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import field_kind
from data_pipelines.fields import decode_field
from data_pipelines.packing.inputs import Item, Piece, suffix_of
from data_pipelines.packing.point_files import read_points
from data_pipelines.packing.volume_files import read_labels, read_volume
from data_pipelines.pixel_sums import PixelSums

__all__ = ["Conversion", "Encoding", "Sample", "convert", "parse_encoding"]

DEFAULT_IGNORE_INDEX = 255
_PNG_MAGIC = b"\x89PNG"
_EXTENSIONS = {"JPEG": "jpg", "WEBP": "webp", "PNG": "png"}
_DEFAULT_QUALITY = {"JPEG": 95, "WEBP": 90}


@dataclass(frozen=True)
class Encoding:
    """How images are written."""

    format: str  # of Pillow: JPEG, WEBP or PNG
    quality: int | None = None  # 1..100; None for PNG

    @property
    def extension(self) -> str:
        return _EXTENSIONS[self.format]

    def __str__(self) -> str:
        return self.format.lower() + ("" if self.quality is None else f":{self.quality}")


@dataclass(frozen=True)
class Conversion:
    """What is done to every item."""

    family: str  # of `inputs.FAMILIES`
    root: str  # what the paths of pieces are relative to
    size: int | None = None  # shorter side in pixels; smaller images stay as they are
    encoding: Encoding | None = None  # None: as found; resized images keep their format
    classes: tuple[str, ...] | None = None  # in index order
    ignore_index: int | None = None  # value of masks that is no class
    channels: str | None = None  # of `volume_files.CHANNELS`, for volumes


@dataclass
class Sample:
    """The fields of one sample and what is counted over them."""

    fields: dict[str, bytes] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what goes into the `json` field
    label: int | None = None
    is_transparent: bool = False  # whether a picture of it is, in part
    sums: PixelSums = field(default_factory=PixelSums)


def parse_encoding(text: str | int) -> Encoding:
    """`jpeg:90`, `webp`, `webp:80`, `png`, or a number for the quality of JPEG.

    Raises:
        DataError: an unknown format, or a quality outside 1..100.
    """
    name, _, quality = f"jpeg:{text}".partition(":") if str(text).isdecimal() else str(text).lower().partition(":")
    format_name = name.upper().replace("JPG", "JPEG")
    allowed = format_name in _EXTENSIONS and (not quality or format_name != "PNG")
    if not allowed or (quality and not (quality.isdecimal() and 1 <= int(quality) <= 100)):
        raise DataError(f"cannot re-encode as {text!r}; write jpeg:QUALITY or webp:QUALITY (1..100), or png")
    return Encoding(format_name, int(quality) if quality else _DEFAULT_QUALITY.get(format_name))


def convert(item: Item, conversion: Conversion) -> Sample:
    """Read an item and make its fields.

    Raises:
        DataError: a file cannot be read or does not hold what it should; the message does not name the item.
    """
    if item.problem is not None:
        raise DataError(item.problem)
    sample = Sample(label=item.label)
    if conversion.family == "points":
        (piece,) = item.pieces
        found = read_points(_read(conversion.root, piece), suffix_of(piece.path))
        sample.fields[piece.field] = _npy(found.points)
        if found.origin is not None:
            sample.facts["origin"] = list(found.origin)
    elif conversion.family == "volumes":
        _add_volume(sample, item, conversion)
    else:
        _add_fields(sample, item, conversion)
    if sample.label is not None:
        _check_label(sample.label, conversion.classes)
        sample.fields["cls"] = str(sample.label).encode()
        if item.label is not None and conversion.classes:  # by which a mix-up with other classes is noticed
            sample.facts["class_name"] = conversion.classes[sample.label]
    described = {"source": item.name, **sample.facts}
    sample.fields["json"] = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
    return sample


def _read(root: str, piece: Piece) -> bytes:
    try:
        with open(os.path.join(root, piece.path), "rb") as file:
            file.seek(piece.begin)
            data = file.read(piece.size)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from None
    if not data or len(data) != piece.size:
        raise DataError(f"{len(data)} bytes, {piece.size} when it was listed" if piece.size else "the file is empty")
    return data


def _add_fields(sample: Sample, item: Item, conversion: Conversion) -> None:
    """Images and masks, and everything else that existing tars hold."""
    shapes = dict[str, tuple[int, int]]()  # (H, W) as shown, before resizing
    for piece in item.pieces:
        kind, data = field_kind(piece.field), _read(conversion.root, piece)
        if kind == "image":
            shapes[piece.field] = _add_image(sample, piece.field, data, conversion)
        elif kind in ("mask", "depth"):
            values = decode_field(kind, data)
            shapes[piece.field] = values.shape
            if kind == "mask":
                _check_mask(values, conversion)
            sample.fields[piece.field] = _resized_map(values, data, conversion.size)
        elif kind == "json":
            sample.facts = decode_field("json", data)
            if not isinstance(sample.facts, dict):
                raise DataError(f"field json holds a {type(sample.facts).__name__}; it must be an object")
        else:
            value = decode_field(str(kind), data)
            sample.fields[piece.field] = data
            if kind == "label":
                sample.label = value
    if conversion.family == "images" and len(set(shapes.values())) > 1:
        named = ", ".join(f"{name} {height}x{width}" for name, (height, width) in shapes.items())
        is_turned = len({tuple(sorted(shape)) for shape in shapes.values()}) == 1
        hint = "; photos count as their EXIF orientation shows them: make the mask of the photo as shown"
        raise DataError(f"mask and image differ in size: {named}{hint if is_turned else ''}")


def _add_image(sample: Sample, name: str, data: bytes, conversion: Conversion) -> tuple[int, int]:
    """Add a picture, as found where nothing about it changes; its height and width as it is shown."""
    photo = Photo(data)
    target = _target(photo.width, photo.height, conversion.size)
    photo.reduce_to_limit(min(target))
    image = _resized(photo.image, target)
    sample.sums.add_image(image)
    sample.is_transparent |= photo.is_transparent
    if conversion.encoding is not None:
        name = f"{name[: name.rfind('.') + 1]}{conversion.encoding.extension}"  # left.jpg -> left.webp
        data = _encode(image, conversion.encoding)
    elif target != (photo.width, photo.height):
        data = _encode(image, _encoding_of(data))
    sample.fields[name] = data
    return photo.height, photo.width


def _add_volume(sample: Sample, item: Item, conversion: Conversion) -> None:
    volume, *masks = item.pieces
    found = read_volume(_read(conversion.root, volume), suffix_of(volume.path), conversion.channels)
    labels = found.labels
    for mask in masks:
        labels = read_labels(_read(conversion.root, mask), suffix_of(mask.path), found)
    sample.fields[volume.field] = _npy(found.values)
    if labels is not None:
        _check_mask(labels, conversion)
        sample.fields["seg.npy"] = _npy(labels)
    if found.spacing is not None:
        sample.facts["spacing"] = list(found.spacing)


def _check_label(label: int, classes: tuple[str, ...] | None) -> None:
    if label < 0 or (classes is not None and label >= len(classes)):
        raise DataError(f"class {label} is outside 0..{len(classes or ()) - 1}")


def _check_mask(values: npt.NDArray[Any], conversion: Conversion) -> None:
    if conversion.classes is None:
        return
    num_classes = len(conversion.classes)
    ignored = DEFAULT_IGNORE_INDEX if conversion.ignore_index is None else conversion.ignore_index
    wrong = values[((values < 0) | (values >= num_classes)) & (values != ignored)]
    if wrong.size:
        raise DataError(f"mask has the value {wrong[0]}; there are {num_classes} classes and ignore_index {ignored}")


def _target(width: int, height: int, size: int | None) -> tuple[int, int]:
    """(width, height) with a shorter side of `size`; images that are small enough stay."""
    shorter = min(width, height)
    if size is None or shorter <= size:
        return width, height
    return max(size, round(width * size / shorter)), max(size, round(height * size / shorter))


def _resized(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)  # Pillow antialiases


def _resized_map(values: npt.NDArray[Any], data: bytes, size: int | None) -> bytes:
    """Nearest pixel by centres; the bytes as found when the size does not change, and those of volumes."""
    if values.ndim != 2:
        return data
    height, width = values.shape
    new_width, new_height = _target(width, height, size)
    if (new_width, new_height) == (width, height):
        return data
    rows = (2 * np.arange(new_height) + 1) * height // (2 * new_height)
    columns = (2 * np.arange(new_width) + 1) * width // (2 * new_width)
    resized = values[rows[:, None], columns]
    if not data.startswith(_PNG_MAGIC):
        return _npy(resized)
    picture = BytesIO()
    Image.fromarray(resized).save(picture, "PNG")
    return picture.getvalue()


def _encoding_of(data: bytes) -> Encoding:
    name = "JPEG" if data.startswith(b"\xff\xd8") else "PNG" if data.startswith(_PNG_MAGIC) else "WEBP"
    return Encoding(name, _DEFAULT_QUALITY.get(name))


def _encode(image: Image.Image, encoding: Encoding) -> bytes:
    picture = BytesIO()
    options: Mapping[str, Any] = {} if encoding.quality is None else {"quality": encoding.quality}
    try:
        image.save(picture, encoding.format, **options)
    except (OSError, ValueError) as error:  # more pixels than the format can hold
        size = f"{image.width} x {image.height}"
        raise DataError(f"{size} pixels cannot be written as {encoding.format}: {error}; give a --size") from None
    return picture.getvalue()


def _npy(array: npt.NDArray[Any]) -> bytes:
    content = BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()
