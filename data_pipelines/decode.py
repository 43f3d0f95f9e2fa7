"""Bytes of a field to arrays, trusting neither the name of the field nor the size the file claims.

The codec is chosen by content from an allow-list and the number of pixels is bounded before anything is decoded.
Masks never pass through RGB: class ids and 16-bit values come out as stored. EXIF orientation is not applied (as in
torchvision's ImageFolder). Nothing here unpickles.

PIL decodes everything and decides what is damaged. `simplejpeg` (optional, 1.3 to 1.9 times as fast) decodes JPEGs
where it is installed; what it refuses is handed to PIL, so both accept the same files. Both use libjpeg-turbo and gave
the same pixels in every photo compared. Neither can decode a part of a JPEG, so whole pictures are decoded.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from io import BytesIO
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from data_pipelines.errors import DataError
from data_pipelines.specs import require_choice

__all__ = [
    "DECODERS",
    "IMAGE_FIELDS",
    "MAX_PIXELS",
    "Photo",
    "chosen_decoder",
    "decode_array",
    "decode_arrays",
    "decode_image",
    "decode_label",
    "decode_mask",
    "open_image",
]

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
DECODERS = ("auto", "pil", "simplejpeg")
MAX_PIXELS = 1 << 26  # 8192 x 8192; a photo of 67 million pixels takes 268 MB in PIL
MAX_ARRAY_BYTES = 4 << 30  # what one array may unpack to
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_MASK_FORMATS = ("PNG",)  # lossless only
_JPEG_MAGIC = b"\xff\xd8"
_INTEGER = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")

_ARRAY_ERRORS = (  # what damaged zip directories, compressed data and npy headers (parsed as Python) make readers raise
    *(zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, OSError, EOFError, MemoryError),
    *(ValueError, TypeError, OverflowError, SyntaxError, TokenError),
)

Array = npt.NDArray[Any]


def chosen_decoder(name: str) -> str:
    """The decoder of JPEGs that a setting means: `auto` is simplejpeg where it is installed, else PIL.

    Raises:
        DataError: no decoder of that name, or it is not installed.
    """
    require_choice("data", "decoder", name, DECODERS)
    if name == "pil" or find_spec("simplejpeg") is not None:
        return "pil" if name == "pil" else "simplejpeg"
    if name == "simplejpeg":
        raise DataError("data: decoder='simplejpeg' is not installed; pip install 'pretrain[fast]', or use auto or pil")
    return "pil"


class Photo:
    """An encoded photo: its size is read at once, its pixels are decoded when they are first asked for.

    Alpha is dropped, grey and palette images are spread to three channels.

    Args:
        data: a JPEG, PNG or WebP.
        decoder: of JPEGs, `pil` or `simplejpeg`.

    Attributes:
        width, height: as the header says.

    Raises:
        DataError: another format, broken, too large, or of more than 8 bits (which RGB would clip); at once or when
            the pixels are asked for.
    """

    def __init__(self, data: bytes, decoder: str = "pil") -> None:
        self._data, self._factor = data, 1
        self._file: Image.Image | None = None  # what PIL will decode
        size = _jpeg_size(data) if decoder == "simplejpeg" and data[:2] == _JPEG_MAGIC else None
        if size is None:
            self._file = _open(data, _IMAGE_FORMATS)
            size = self._file.size
        self.width, self.height = size

    def reduce(self, factor: int) -> None:
        """Decode to about 1 / factor of the size (2, 4 or 8), where the format can: JPEGs, by a smaller inverse DCT.

        Worth it for factors of two only: others cost more than they save.
        """
        if self._data[:2] == _JPEG_MAGIC:
            self._factor = factor

    @cached_property
    def image(self) -> Image.Image:
        """RGB."""
        return Image.fromarray(self._decoded) if isinstance(self._decoded, np.ndarray) else self._decoded

    @cached_property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, writeable."""
        return self._decoded if isinstance(self._decoded, np.ndarray) else np.array(self._decoded)

    @cached_property
    def _decoded(self) -> Image.Image | npt.NDArray[np.uint8]:
        factor = self._factor
        if self._file is None:
            pixels = _decode_jpeg(self._data, -(-self.height // factor), -(-self.width // factor))
            if pixels is not None:
                return pixels
        image = _open(self._data, _IMAGE_FORMATS) if self._file is None else self._file
        if factor > 1:  # the largest power of two by which both sides shrink to no less than what is asked for
            image.draft(None, (max(1, self.width // factor), max(1, self.height // factor)))
        return _rgb(_loaded(image, self._data))


def open_image(data: bytes) -> Image.Image:
    """Decode a photo to a PIL image in RGB, see `Photo`."""
    return Photo(data).image


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a photo to (H, W, 3) uint8 in RGB, see `Photo`."""
    return Photo(data).pixels


def decode_mask(data: bytes) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Decode a label or depth map without touching its values (palette images give their indices).

    Returns:
        (H, W) uint8 or uint16.

    Raises:
        DataError: not a PNG, broken, too large, or with several channels.
    """
    image = _loaded(_open(data, _MASK_FORMATS), data)
    values = np.array(image)
    if values.ndim != 2:
        raise DataError(
            f"mask has {values.shape[-1]} channels (mode {image.mode}); it must be a single-channel 8 or 16 bit PNG"
        )
    if image.mode.startswith("I"):
        return values.astype(np.uint16, copy=False)
    return values.astype(np.uint8, copy=False)


def decode_label(data: bytes) -> int:
    """Decode a class index written as ASCII digits.

    Raises:
        DataError: anything but one integer.
    """
    match = _INTEGER.fullmatch(data)
    if match is None:
        raise DataError(f"label {data[:20]!r} is not an integer in ASCII")
    return int(match.group(1))


def decode_array(data: bytes, name: str | None = None) -> Array:
    """One array of numbers from an npy or npz.

    Args:
        data: the file.
        name: which array of an npz; None for an npy, or for the only array of an npz.

    Returns:
        As stored, read-only, in the byte order of this machine.

    Raises:
        DataError: no such array, damaged, too large, or of anything but plain numbers (Python objects are never read).
    """
    with _array_errors(data):
        if data[:2] != b"PK":
            if name is not None:
                raise DataError(f"not an npz with array {name!r}: begins with {data[:8]!r} ({len(data)} bytes)")
            return _npy(data)
        members = _npz_members(data)
        if name is None and len(members) == 1:
            name = next(iter(members))
        if name not in members:
            raise DataError(f"npz has no array {name!r}; it has {', '.join(members) or 'none'}")
        return _npy(_unzipped(data, members[name]))


def decode_arrays(data: bytes) -> dict[str, Array]:
    """The arrays of an npz by name, or that of an npy under the empty name; otherwise as `decode_array`."""
    with _array_errors(data):
        if data[:2] != b"PK":
            return {"": _npy(data)}
        return {name: _npy(_unzipped(data, member)) for name, member in _npz_members(data).items()}


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise DataError(f"not a {' or '.join(formats)} image: begins with {data[:8]!r} ({len(data)} bytes)") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode image of {len(data)} bytes: {error}") from None
    _require_sane(*image.size)
    return image


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode image of {len(data)} bytes: {error}") from None
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"image has more than 8 bits per channel (mode {image.mode}); it is no RGB photo")
    return image.convert("RGB")


def _require_sane(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"image of {width} x {height} pixels exceeds the limit of {MAX_PIXELS} pixels")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by simplejpeg; None for what PIL has to read: broken headers, CMYK."""
    import simplejpeg  # here, since it is optional

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _require_sane(width, height)
    return None if colours in ("CMYK", "YCCK") else (width, height)


def _decode_jpeg(data: bytes, min_height: int, min_width: int) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) by simplejpeg at the smallest size that reaches the given one; None when something is wrong with it."""
    import simplejpeg

    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width)
    except ValueError:
        return None
    return pixels


@contextmanager
def _array_errors(data: bytes) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _ARRAY_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot decode array of {len(data)} bytes: {reason}") from None


def _npz_members(data: bytes) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def _unzipped(data: bytes, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_ARRAY_BYTES:
        raise DataError(f"array {member.filename} of {member.file_size} bytes exceeds the limit of {MAX_ARRAY_BYTES}")
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return archive.read(member)  # checks the CRC


def _npy(data: bytes) -> Array:
    """Parse an npy without `np.load`, which trusts the size in the header and copies."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataError(f"array holds {dtype}, not plain numbers; Python objects and records are never read")
    expected, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if expected != found or found == 0:
        raise DataError(f"array of shape {shape} and type {dtype} needs {expected} bytes, there are {found}")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)
