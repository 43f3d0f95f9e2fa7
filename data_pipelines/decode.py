"""Bytes of a field to arrays, trusting neither the name of the field nor the size the file claims.

The codec is chosen by content from an allow-list and the number of pixels is bounded before anything is decoded.
Masks never pass through RGB: class ids and 16-bit values come out as stored. Pictures and masks are turned as their
EXIF orientation says, so they come out as they are shown. Nothing here unpickles.

PIL decodes everything and decides what is damaged. `simplejpeg` (optional, 1.3 to 1.9 times as fast) decodes JPEGs
where it is installed; what it refuses is handed to PIL, so both accept the same files. Both use libjpeg-turbo and gave
the same pixels in every photo compared. Neither can decode a part of a JPEG, so whole pictures are decoded.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data_pipelines.errors import DataError
from data_pipelines.picture_files import (
    grey_bits,
    is_progressive,
    orientation,
    picture_format,
    turned,
    without_texts,
)
from data_pipelines.specs import require_choice

__all__ = [
    "DECODERS",
    "IMAGE_FIELDS",
    "MAX_PIXELS",
    "Photo",
    "array_names",
    "chosen_decoder",
    "decode_array",
    "decode_arrays",
    "decode_image",
    "decode_label",
    "decode_mask",
    "decode_rgba",
    "open_image",
]

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
DECODERS = ("auto", "pil", "simplejpeg")
MAX_PIXELS = 1 << 26  # 8192 x 8192; a photo of 67 million pixels takes 268 MB in PIL
MAX_PIXELS_VARIABLE = "PRETRAIN_MAX_PIXELS"  # of the environment, instead: all that read pictures obey it
MAX_ARRAY_BYTES = 4 << 30  # what one array may unpack to
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_MASK_FORMATS = ("PNG",)  # lossless only
# Not by `Image.open`, whose own limit of pixels holds for the whole process, also for what is not ours.
_READERS: dict[str, type[ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile}
_STEPS = {2: 85, 4: 17}  # by which Pillow multiplies grey values of so many bits, to spread them over 0..255
_REDUCTIONS = (1, 2, 4, 8)  # of JPEGs while they are decoded
_INTEGER = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")

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

    Grey and palette images are spread to three channels. Transparent parts are seen on white, as documents and web
    pages show them: the colors that a file keeps below them are arbitrary, and nobody has ever seen them.

    Args:
        data: a JPEG, PNG or WebP.
        decoder: of JPEGs, `pil` or `simplejpeg`.
        exif_rotation: turn it as its EXIF orientation says; False: as stored.

    Attributes:
        width, height: of the picture as it comes out, not reduced.
        is_transparent: whether a pixel is not opaque; known when the pixels are.

    Raises:
        DataError: another format, broken, too large, or of more than 8 bits (which RGB would clip); at once or when
            the pixels are asked for.
    """

    def __init__(self, data: bytes, decoder: str = "pil", *, exif_rotation: bool = True) -> None:
        self._data, self._factor, self.is_transparent = data, 1, False
        self._file: Image.Image | None = None  # what PIL will decode
        self._orientation = orientation(data) if exif_rotation else 1
        is_jpeg = picture_format(data) == "JPEG"
        size = _jpeg_size(data) if decoder == "simplejpeg" and is_jpeg else None
        if size is None:
            self._file = _open(data, _IMAGE_FORMATS)
            size = self._file.size
        self._stored_width, self._stored_height = size
        self._reductions = _REDUCTIONS if is_jpeg else (1,)
        if not self._fits(self._reductions[-1]) or (not self._fits(1) and is_jpeg and is_progressive(data)):
            raise _too_large(*size)
        self.width, self.height = size if self._orientation < 5 else size[::-1]

    def reduce(self, factor: int) -> None:
        """Decode to about 1 / factor of the size (2, 4 or 8), where the format can: JPEGs, by a smaller inverse DCT.

        Worth it for factors of two only: others cost more than they save.
        """
        if factor in self._reductions:
            self._factor = factor

    def reduce_to_limit(self, least_side: int) -> None:
        """Where the picture is too large to be decoded whole, reduce it until it is not.

        Args:
            least_side: of the reduced picture; rather than below, it stays too large.
        """
        shorter = min(self.width, self.height)
        factors = [factor for factor in self._reductions if self._fits(factor) and shorter // factor >= least_side]
        self.reduce(min(factors, default=1))

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
        stored = self._decoded_as_stored()
        return stored if self._orientation == 1 else turned(np.asarray(stored), self._orientation)

    def _decoded_as_stored(self) -> Image.Image | npt.NDArray[np.uint8]:
        width, height, factor = self._stored_width, self._stored_height, self._factor
        if not self._fits(factor):
            raise _too_large(width, height)
        if self._file is None:
            pixels = _decode_jpeg(self._data, -(-height // factor), -(-width // factor))
            if pixels is not None:
                return pixels
        image = _open(self._data, _IMAGE_FORMATS) if self._file is None else self._file
        if factor > 1:  # the largest power of two by which both sides shrink to no less than what is asked for
            image.draft(None, (max(1, width // factor), max(1, height // factor)))
        image = _loaded(image, self._data)
        if image.has_transparency_data and not image.mode.startswith(("I", "F")):
            layer = image.convert("RGBA")
            self.is_transparent = bool((np.asarray(layer.getchannel("A")) < 255).any())
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return _rgb(image)

    def _fits(self, factor: int) -> bool:
        """Whether it may be decoded at 1 / factor of its size."""
        return _fits(self._stored_width, self._stored_height, factor)


def open_image(data: bytes) -> Image.Image:
    """Decode a photo to a PIL image in RGB, see `Photo`."""
    return Photo(data).image


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a photo to (H, W, 3) uint8 in RGB, see `Photo`."""
    return Photo(data).pixels


def decode_rgba(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a photo to (H, W, 4) uint8 with straight alpha, as stored; pictures without alpha are opaque.

    Raises:
        DataError: see `Photo`.
    """
    opened = _open(data, _IMAGE_FORMATS)
    if not _fits(*opened.size):
        raise _too_large(*opened.size)
    image = _loaded(opened, data)
    _require_eight_bits(image)
    return np.array(image.convert("RGBA"))


def decode_mask(data: bytes, *, exif_rotation: bool = True) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Decode a label or depth map without touching its values (palette images give their indices).

    Args:
        data: a PNG of one channel.
        exif_rotation: turn it as its EXIF orientation says; False: as stored.

    Returns:
        (H, W) uint8 or uint16.

    Raises:
        DataError: not a PNG, broken, too large, or with several channels.
    """
    opened = _open(data, _MASK_FORMATS)
    if not _fits(*opened.size):
        raise _too_large(*opened.size)
    image = _loaded(opened, data)
    values = np.array(image)
    if values.ndim != 2:
        raise DataError(
            f"mask has {values.shape[-1]} channels (mode {image.mode}); it must be a single-channel 8 or 16 bit PNG"
        )
    values = values // _STEPS.get(grey_bits(data) or 0, 1)
    values = values.astype(np.uint16 if image.mode.startswith("I") else np.uint8, copy=False)
    return turned(values, orientation(data) if exif_rotation else 1)


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
        if name is None and members:
            raise DataError(f"npz has several arrays, {', '.join(members)}, and nothing says which to read")
        if name not in members:
            raise DataError(f"npz has no array {name!r}; it has {', '.join(members) or 'none'}")
        return _npy(_unzipped(data, members[name]))


def array_names(data: bytes) -> list[str]:
    """Names of the arrays of an npz, none of which is decoded; of an npy the empty name.

    Raises:
        DataError: an npz whose directory is damaged.
    """
    with _array_errors(data):
        return list(_npz_members(data)) if data[:2] == b"PK" else [""]


def decode_arrays(data: bytes) -> dict[str, Array]:
    """The arrays of an npz by name, or that of an npy under the empty name; otherwise as `decode_array`."""
    with _array_errors(data):
        if data[:2] != b"PK":
            return {"": _npy(data)}
        return {name: _npy(_unzipped(data, member)) for name, member in _npz_members(data).items()}


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    found = picture_format(data)
    if found is None or found not in formats:
        raise DataError(f"not a {' or '.join(formats)} image: begins with {data[:8]!r} ({len(data)} bytes)")
    with _picture_errors(data):
        return _READERS[found](BytesIO(without_texts(data) if found == "PNG" else data))


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    with _picture_errors(data):
        image.load()
    return image


@contextmanager
def _picture_errors(data: bytes) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any type: that depends on where the reader of a damaged file stumbles
        raise DataError(f"cannot decode image of {len(data)} bytes: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    _require_eight_bits(image)
    return image.convert("RGB")


def _require_eight_bits(image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"image has more than 8 bits per channel (mode {image.mode}); it is no RGB photo")


def _fits(width: int, height: int, factor: int = 1) -> bool:
    return width * height <= _max_pixels() * factor**2


def _too_large(width: int, height: int) -> DataError:
    return DataError(
        f"image of {width} x {height} pixels exceeds the limit of {_max_pixels()} pixels; set {MAX_PIXELS_VARIABLE}="
        f"{width * height} to read it all the same, or make it smaller (`pretrain data pack --size` can, of JPEGs)"
    )


def _max_pixels() -> int:
    said = os.environ.get(MAX_PIXELS_VARIABLE)
    if said is None:
        return MAX_PIXELS
    if not re.fullmatch("[0-9]{1,18}", said):
        raise DataError(f"{MAX_PIXELS_VARIABLE}={said!r} is not allowed; it is a whole number of pixels: {MAX_PIXELS}")
    return int(said)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by simplejpeg; None for what PIL has to read: broken headers, CMYK."""
    import simplejpeg  # here, since it is optional

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
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
    except Exception as error:  # of any type: damaged zip directories, compressed data, headers parsed as Python
        raise DataError(f"cannot decode array of {len(data)} bytes: {_reason(error)}") from None


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
    if expected == 0:
        raise DataError(f"array of shape {shape} is empty")
    if expected != found:
        raise DataError(f"array of shape {shape} and type {dtype} needs {expected} bytes, there are {found}")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)
