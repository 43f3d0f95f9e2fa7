"""The value of a field of any kind, for whoever looks at any data set: `verify`, `stats`, `show`.

Not here: of which kind a field is (`field_kinds`), how its bytes are decoded (`decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import Photo, chosen_decoder, decode_array, decode_arrays, decode_label, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import ARRAY_KINDS
from data_pipelines.parsing import parse_json

__all__ = ["decode_field", "label_mix_up"]

_NPY_MAGIC = b"\x93NUMPY"


def decode_field(kind: str, data: bytes) -> Any:
    """The value of a field.

    Returns:
        image (H, W, 3) uint8; mask and depth (H, W) uint8 or uint16 when they are PNG, else as the npy says; label int;
        json any JSON value; text str; array, points and volume: arrays by name, that of an npy under the empty one.

    Raises:
        DataError: the bytes are not what the kind says; names what they are.
    """
    return _DECODERS[kind](data)


def label_mix_up(label: int | None, described: Any, classes: Sequence[str] | None) -> str | None:
    """What is wrong when a sample is labelled by an index into other classes than those of its data set.

    Args:
        label: class index of the sample.
        described: its `json` field; packing writes the name of the class into it as `class_name`.
        classes: names in index order.
    """
    name = described.get("class_name") if isinstance(described, dict) else None
    if label is None or not classes or name not in classes or classes.index(name) == label:
        return None
    return (
        f"class {label}, but its class_name {name!r} is class {classes.index(name)} of dataset.json: packed with other "
        "classes; pack the splits together, or each with the same --classes"
    )


def _decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    return Photo(data, _fast_decoder()).pixels


@cache
def _fast_decoder() -> str:
    return chosen_decoder("auto")


def _decode_mask(data: bytes) -> npt.NDArray[Any]:
    values = _decode_depth(data)
    if values.dtype.kind not in "biu" or values.ndim < 2:
        raise DataError(f"mask is an array {values.dtype} {values.shape}; it must be whole numbers in two or more axes")
    return values


def _decode_depth(data: bytes) -> npt.NDArray[Any]:
    return decode_array(data) if data.startswith(_NPY_MAGIC) else decode_mask(data)


def _decode_json(data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}") from None


def _decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None


_DECODERS = {
    "image": _decode_image,
    "label": decode_label,
    "json": _decode_json,
    "text": _decode_text,
    "mask": _decode_mask,
    "depth": _decode_depth,
    **dict.fromkeys(ARRAY_KINDS, decode_arrays),
}
