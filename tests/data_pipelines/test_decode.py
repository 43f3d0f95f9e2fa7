"""Bytes to arrays: values survive, masks never see RGB, and hostile or broken bytes give one line."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import MAX_PIXELS, decode_image, decode_label, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.shards import Dataset, open_dataset


def encoded(pixels: np.ndarray, fmt: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, fmt)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)


def test_decode_image__lossless_pixels_survive(pixels: np.ndarray) -> None:
    image = decode_image(encoded(pixels))
    assert image.dtype == np.uint8 and image.flags.writeable
    assert np.array_equal(image, pixels)


def test_decode_image__grey_palette_and_alpha_become_rgb(pixels: np.ndarray) -> None:
    grey = decode_image(encoded(pixels[..., 0]))
    assert np.array_equal(grey, np.repeat(pixels[..., :1], 3, axis=2))
    assert np.array_equal(decode_image(encoded(np.dstack([pixels, pixels[..., :1]]))), pixels)
    assert decode_image(encoded(pixels, mode="P")).shape == (7, 11, 3)
    assert decode_image(encoded(pixels, "JPEG")).shape == decode_image(encoded(pixels, "WEBP")).shape == (7, 11, 3)


def test_decode_image__real_photos(grocery: Dataset) -> None:
    image = decode_image(grocery.read(5)["jpg"])
    assert min(image.shape[:2]) == 96 and image.shape[2] == 3 and image.std() > 10


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_decode_mask__values_survive(dtype: type[np.unsignedinteger]) -> None:
    values = np.array([[0, 1, 2, 11], [255, 254, 7, 0], [np.iinfo(dtype).max, 3, 4, 300 % np.iinfo(dtype).max]], dtype)
    mask = decode_mask(encoded(values))
    assert mask.dtype == dtype and np.array_equal(mask, values)


def test_decode_mask__palette_indices_not_colours() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert decode_mask(buffer.getvalue()).tolist() == [[0, 1], [2, 1]]
    assert decode_mask(encoded(np.array([[True, False]]))).tolist() == [[1, 0]]


def test_decode_mask__refuses_colour_and_lossy(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"mask has 3 channels \(mode RGB\)"):
        decode_mask(encoded(pixels))
    with pytest.raises(DataError, match="not a PNG image"):
        decode_mask(encoded(pixels[..., 0], "JPEG"))


def test_decode_mask__camvid_masks_and_depth_of_shared_data(shared_data: Path) -> None:
    camvid = open_dataset(shared_data / "camvid" / "val-000000.tar")
    mask = decode_mask(camvid.read(0)["seg.png"])
    assert mask.shape == (360, 480) and mask.dtype == np.uint8 and mask.max() <= 11 and len(np.unique(mask)) > 5
    depth = decode_mask(open_dataset(shared_data / "rgbd_7scenes" / "test-000000.tar").read(0)["depth.png"])
    assert depth.dtype == np.uint16 and 800 < np.median(depth[depth > 0]) < 3500  # millimetres


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a JPEG or PNG or WEBP image: begins with b'' (0 bytes)"),
        (b"<html>no</html>", "not a JPEG or PNG or WEBP image"),
        (b"GIF89a" + b"\0" * 50, "not a JPEG or PNG or WEBP image"),
        (pickle.dumps({"a": 1}), "not a JPEG or PNG or WEBP image"),
        (png_header(8193, 8193), f"image of 8193 x 8193 pixels exceeds the limit of {MAX_PIXELS} pixels"),
        (png_header(64, 64), "cannot decode image"),
    ],
    ids=["empty", "html", "gif", "pickle", "too large", "no data"],
)
def test_decode_image__refuses(data: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(data)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_decode_image__bomb_is_refused_without_decoding() -> None:
    with pytest.raises(DataError, match=r"cannot decode|exceeds the limit"):
        decode_image(png_header(60000, 60000))


def test_decode_image__truncated_jpeg(grocery: Dataset) -> None:
    data = grocery.read(0)["jpg"]
    with pytest.raises(DataError, match=rf"cannot decode image of {len(data) // 2} bytes"):
        decode_image(data[: len(data) // 2])


def test_decode_image__sixteen_bits_are_not_clipped_in_silence() -> None:
    with pytest.raises(DataError, match="more than 8 bits"):
        decode_image(encoded(np.array([[1000, 40000]], np.uint16)))


@pytest.mark.parametrize(("data", "label"), [(b"0", 0), (b"19", 19), (b" 7\n", 7), (b"-1", -1)])
def test_decode_label__integers(data: bytes, label: int) -> None:
    assert decode_label(data) == label


@pytest.mark.parametrize("data", [b"", b"cat", b"1.5", b"1 2", b"0x1", b"1_0", "١".encode(), b"9" * 30])
def test_decode_label__refuses(data: bytes) -> None:
    with pytest.raises(DataError, match="is not an integer in ASCII"):
        decode_label(data)
