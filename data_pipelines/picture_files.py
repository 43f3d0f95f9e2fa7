"""What picture files hold besides pixels, read from their containers without decoding anything.

Of JPEG, PNG and WebP only: which of them it is, how the picture is to be turned to be shown (EXIF), and what of a PNG
no reader here needs. Files may be damaged or hostile: what cannot be read is taken for absent, the decoder finds the
rest.

Not here: pixels (`decode`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["grey_bits", "is_progressive", "orientation", "picture_format", "turned", "without_texts"]

Values = TypeVar("Values", bound=npt.NDArray[Any])

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # the tag
_SHORT = 3  # a type of EXIF values: two bytes
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # packed ones among them may unpack to any size
_EXIF_SEGMENT, _SCAN, _END = 0xE1, 0xDA, 0xD9  # JPEG markers
_WITHOUT_SIZE = (0x01, *range(0xD0, 0xD9))
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_TRANSPOSED = range(5, 9)
_MIRRORED_ACROSS, _MIRRORED_DOWN = (2, 3, 6, 7), (3, 4, 7, 8)  # after they are transposed


def picture_format(data: bytes) -> str | None:
    """`JPEG`, `PNG` or `WEBP` by the first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(_PNG_MAGIC):
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def orientation(data: bytes) -> int:
    """How a picture is to be turned to be shown: 1 (as stored) to 8, as EXIF counts."""
    parts = {"JPEG": _jpeg_exif, "PNG": _png_exif, "WEBP": _webp_exif}.get(picture_format(data) or "")
    exif = next(parts(data), None) if parts else None
    return 1 if exif is None else _orientation_of(exif.removeprefix(_EXIF))


def turned(values: Values, orientation: int) -> Values:
    """A picture (H, W, ...) as it is shown, contiguous; a copy unless the orientation is 1."""
    if orientation == 1:
        return values
    if orientation in _TRANSPOSED:
        values = values.swapaxes(0, 1)
    across = -1 if orientation in _MIRRORED_ACROSS else 1
    down = -1 if orientation in _MIRRORED_DOWN else 1
    return np.array(values[::down, ::across], order="C")  # type: ignore[return-value]


def grey_bits(png: bytes) -> int | None:
    """Bits of the grey values of a PNG: 1, 2, 4, 8 or 16; None if it is not grey without alpha."""
    header = next((png[begin:end] for name, begin, end in _png_chunks(png) if name == b"IHDR"), b"")
    return header[8] if header[9:10] == b"\0" else None


def is_progressive(jpeg: bytes) -> bool:
    """Whether a JPEG is decoded as a whole, at any scale: its coefficients take 6 bytes per pixel at once."""
    return any(marker in _PROGRESSIVE for marker, _, _ in _jpeg_segments(jpeg))


def without_texts(png: bytes) -> bytes:
    """A PNG without texts and color profile: readers unpack these, whatever their size, and no one here uses them."""
    chunks = list(_png_chunks(png))
    if not any(name in _TEXTS for name, _, _ in chunks):
        return png
    end = chunks[-1][2] + 4  # behind the checksum
    kept = [png[begin - 8 : end + 4] for name, begin, end in chunks if name not in _TEXTS]
    return b"".join([png[: len(_PNG_MAGIC)], *kept, png[end:]])


def _orientation_of(tiff: bytes) -> int:
    """The tag of the first directory of a TIFF header."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (begin,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, begin)
        for entry in range(begin + 2, begin + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # cut; viewers show such a picture as it is stored
        return 1
    return 1


def _jpeg_exif(data: bytes) -> Iterator[bytes]:
    for marker, begin, end in _jpeg_segments(data):
        if marker == _EXIF_SEGMENT and data.startswith(_EXIF, begin):
            yield data[begin:end]


def _png_exif(data: bytes) -> Iterator[bytes]:
    return (data[begin:end] for name, begin, end in _png_chunks(data) if name == b"eXIf")


def _webp_exif(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            yield data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, begin, end) of what lies before the pixels."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (_SCAN, _END):
            return
        if marker == 0xFF:  # filling
            at += 1
        elif marker in _WITHOUT_SIZE:
            at += 2
        else:
            end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
            yield marker, at + 4, end
            at = end


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, begin, end) of the content of each whole chunk; a checksum of four bytes follows."""
    at = len(_PNG_MAGIC)
    while at + 12 <= len(data):
        begin = at + 8
        end = begin + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            return
        yield data[at + 4 : begin], begin, end
        at = end + 4
