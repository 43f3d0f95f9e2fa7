"""What a field of a sample holds, and its value, for whoever looks at any data set: `verify`, `stats`, `show`.

A `dataset.json` written by `pack` names the kinds; for shards of other origin the name of the field decides. Kinds that
need code to be read (pickles) are known by name and never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import Photo, chosen_decoder, decode_array, decode_arrays, decode_label, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import FIELD_KINDS, field_kind

__all__ = ["ARRAY_KINDS", "decode_field", "has_channels", "is_never_read", "kind_of_field"]

ARRAY_KINDS = ("array", "points", "volume")
_NPY_MAGIC = b"\x93NUMPY"
_NEVER_READ = frozenset({"pickle", "pkl", "pt", "pth", "pyd"})  # reading one of these runs code


def is_never_read(field: str) -> bool:
    """True for fields whose name says pickle, also below a compression (`pkl.gz`)."""
    return not _NEVER_READ.isdisjoint(field.lower().split("."))


def kind_of_field(field: str, declared: Any) -> str | None:
    """The kind of a field, one of `FIELD_KINDS`; None when it is unknown or never read.

    Args:
        field: everything behind the first dot of a member's name, such as `seg.png`.
        declared: `fields` of a `dataset.json`, whoever wrote it; what is no kind there is passed over.
    """
    if is_never_read(field):
        return None
    kind = declared.get(field) if isinstance(declared, Mapping) else None
    return kind if kind in FIELD_KINDS else field_kind(field)


def has_channels(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether an array looks like (C, H, W), an image of several bands, and not like a volume."""
    return kind == "array" and len(shape) == 3 and 2 * shape[0] <= min(shape[1:])


def decode_field(kind: str, data: bytes) -> Any:
    """The value of a field.

    Returns:
        image (H, W, 3) uint8; mask and depth (H, W) uint8 or uint16 when they are PNG, else as the npy says; label int;
        json any JSON value; text str; array, points and volume: arrays by name, that of an npy under the empty one.

    Raises:
        DataError: the bytes are not what the kind says; names what they are.
    """
    return _DECODERS[kind](data)


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
        return json.loads(data)
    except (ValueError, RecursionError) as error:
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
