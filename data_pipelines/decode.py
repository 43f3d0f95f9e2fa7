"""Bytes of a field to arrays, trusting neither the name of the field nor the size the file claims.

The codec is chosen by content from an allow-list and the number of pixels is bounded before anything is decoded.
Masks never pass through RGB: class ids and 16-bit values come out as stored. EXIF orientation is not applied (as in
torchvision's ImageFolder). Nothing here unpickles.
"""

from __future__ import annotations

import re
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from data_pipelines.errors import DataError

__all__ = ["IMAGE_FIELDS", "MAX_PIXELS", "decode_image", "decode_label", "decode_mask", "open_image"]

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 1 << 26  # 8192 x 8192; a photo of 67 million pixels takes 268 MB in PIL
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_MASK_FORMATS = ("PNG",)  # lossless only
_INTEGER = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")


def open_image(data: bytes) -> Image.Image:
    """Decode a photo to a PIL image in RGB; alpha is dropped, grey and palette images are spread to three channels.

    Raises:
        DataError: not a JPEG, PNG or WebP, broken, too large, or of more than 8 bits (which RGB would clip).
    """
    image = _load(data, _IMAGE_FORMATS)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"image has more than 8 bits per channel (mode {image.mode}); it is no RGB photo")
    return image.convert("RGB")


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a photo to RGB.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: as `open_image`.
    """
    return np.array(open_image(data))


def decode_mask(data: bytes) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Decode a label or depth map without touching its values (palette images give their indices).

    Returns:
        (H, W) uint8 or uint16.

    Raises:
        DataError: not a PNG, broken, too large, or with several channels.
    """
    image = _load(data, _MASK_FORMATS)
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


def _load(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"image of {image.width} x {image.height} pixels exceeds the limit of {MAX_PIXELS} pixels")
        image.load()
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"not a {' or '.join(formats)} image: begins with {data[:8]!r} ({len(data)} bytes)") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode image of {len(data)} bytes: {error}") from None
    return image
