"""Bytes to arrays: values survive, masks never see RGB, and hostile or broken bytes give one line."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import decode
from data_pipelines.decode import (
    MAX_PIXELS,
    Photo,
    chosen_decoder,
    decode_array,
    decode_arrays,
    decode_image,
    decode_label,
    decode_mask,
)
from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import Dataset, open_dataset


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
    assert np.array_equal(decode_image(encoded(np.dstack([pixels, np.full_like(pixels[..., :1], 255)]))), pixels)
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


def jpeg(pixels: np.ndarray, mode: str | None = None, **settings: int) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(file, "JPEG", **settings)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def npz(*, is_compressed: bool = True, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if is_compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture
def fast() -> str:
    pytest.importorskip("simplejpeg")
    return "simplejpeg"


@pytest.mark.parametrize("name", ["photos_caltech", "photos_grocery", "camvid"])
def test_photo__decoders_give_the_same_pixels_of_real_photos(shared_data: Path, fast: str, name: str) -> None:
    dataset = open_dataset(shared_data / name / "train-000000.tar")
    for i in range(0, 100, 5):
        data = dataset.read(i)["jpg"]
        for factor in (1, 2, 4):
            slow, quick = Photo(data), Photo(data, fast)
            assert (slow.width, slow.height) == (quick.width, quick.height)
            slow.reduce(factor)
            quick.reduce(factor)
            assert np.array_equal(slow.pixels, quick.pixels)
            assert slow.pixels.shape[:2] == (-(-slow.height // factor), -(-slow.width // factor))
            assert np.array_equal(np.asarray(quick.image), quick.pixels)


def test_photo__decoders_agree_on_every_kind_of_jpeg(fast: str) -> None:
    smooth = np.add.outer(np.arange(37), np.arange(53))[..., None] + np.array([0, 40, 90])
    pixels = smooth.astype(np.uint8)
    files = [jpeg(pixels, quality=q, subsampling=s) for q in (30, 95) for s in (0, 1, 2)]
    files += [
        jpeg(pixels, "L"),
        jpeg(pixels, "CMYK"),
        jpeg(pixels, progressive=1),
        encoded(pixels),
        encoded(pixels[:1]),
    ]
    for data in files:
        assert np.array_equal(Photo(data).pixels, Photo(data, fast).pixels)


@pytest.mark.parametrize("keep", [3, 100, 0.3, 0.9, -20])
def test_photo__decoders_refuse_the_same_truncated_files(grocery: Dataset, fast: str, keep: float) -> None:
    data = grocery.read(0)["jpg"]
    cut = data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)]
    messages = []
    for decoder in ("pil", fast):
        with pytest.raises(DataError) as caught:
            _ = Photo(cut, decoder).pixels
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_photo__what_the_fast_decoder_complains_about_pil_decides(grocery: Dataset, fast: str) -> None:
    """Zeroed bytes inside pass in PIL (only a CRC finds them), so they pass with either decoder."""
    data = bytearray(grocery.read(0)["jpg"])
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    assert np.array_equal(Photo(bytes(data)).pixels, Photo(bytes(data), fast).pixels)


def test_photo__size_is_known_before_the_pixels(pixels: np.ndarray) -> None:
    photo = Photo(jpeg(pixels)[:-30])
    assert (photo.width, photo.height) == (11, 7)
    with pytest.raises(DataError, match="cannot decode image"):
        _ = photo.pixels


def test_photo__huge_jpeg_is_refused_by_its_header(fast: str) -> None:
    data = bytearray(jpeg(np.zeros((8, 8, 3), np.uint8)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60000, 60000)
    for decoder in ("pil", fast):
        with pytest.raises(DataError, match=r"cannot decode|60000 x 60000 pixels exceeds the limit"):
            _ = Photo(bytes(data), decoder).pixels


def test_chosen_decoder__auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "find_spec", lambda _: None)
    assert chosen_decoder("auto") == chosen_decoder("pil") == "pil"
    with pytest.raises(DataError, match=r"'simplejpeg' is not installed; pip install 'pretrain\[fast\]'"):
        chosen_decoder("simplejpeg")
    monkeypatch.setattr(decode, "find_spec", lambda name: name)
    assert chosen_decoder("auto") == chosen_decoder("simplejpeg") == "simplejpeg" and chosen_decoder("pil") == "pil"


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i8", "<f2", ">f8", "?"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 4)])
def test_decode_array__values_survive(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.asarray(np.random.default_rng(0).integers(0, 2000, shape)).astype(dtype)
    for stored in (values, np.asfortranarray(values)):
        found = decode_array(npy(stored))
        assert np.array_equal(found, values) and found.dtype == values.dtype.newbyteorder("=")
        assert found.dtype.isnative


@pytest.mark.parametrize("is_compressed", [True, False])
def test_decode_array__member_of_an_npz(is_compressed: bool) -> None:
    data = npz(a=np.arange(4), b=np.ones((2, 2), np.float16), is_compressed=is_compressed)
    assert decode_array(data, "a").tolist() == [0, 1, 2, 3] and decode_array(data, "b").dtype == np.float16
    assert {name: values.shape for name, values in decode_arrays(data).items()} == {"a": (4,), "b": (2, 2)}
    assert decode_array(npz(only=np.arange(3))).tolist() == [0, 1, 2]
    assert decode_arrays(npy(np.arange(3)))[""].tolist() == [0, 1, 2]


def damaged_zip() -> bytes:
    data = bytearray(npz(a=np.random.default_rng(0).integers(0, 9, 500), is_compressed=False))
    data[400] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", None, "cannot decode array of 0 bytes"),
        (b"\x93NUMPY\x01\x00", None, "cannot decode array of 8 bytes"),
        (b"PK\x03\x04" + b"x" * 30, None, "cannot decode array of 34 bytes"),
        (pickle.dumps({"a": 1}), None, "cannot decode array"),
        (npy(np.array([{"a": 1}], object)), None, "array holds object, not plain numbers; Python objects"),
        (npz(a=np.array([{"a": 1}], object)), None, "array holds object, not plain numbers"),
        (npy(np.array(["text"])), None, "array holds <U4, not plain numbers"),
        (npy(np.zeros(2, np.complex64)), None, "array holds complex64"),
        (npy(np.zeros((0, 3))), None, "array of shape (0, 3) is empty"),
        (npy(np.zeros(8))[:-8], None, "array of shape (8,) and type float64 needs 64 bytes, there are 56"),
        (npy(np.zeros(8)) + b"x", None, "needs 64 bytes, there are 65"),
        (npz(a=np.zeros(2), b=np.zeros(2)), None, "npz has several arrays, a, b, and nothing says which"),
        (npz(a=np.zeros(2)), "b", "npz has no array 'b'; it has a"),
        (npy(np.zeros(2)), "b", "not an npz with array 'b'"),
        (damaged_zip(), "a", "Bad CRC-32"),
    ],
)
def test_decode_array__refuses(data: bytes, name: str | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_array(data, name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_decode_array__claimed_size_is_not_allocated() -> None:
    data = npy(np.zeros(4, np.uint8)).replace(b"(4,)", b"(1<<", 1)  # no literal: must not be evaluated
    with pytest.raises(DataError, match="cannot decode array"):
        decode_array(data)
    huge = npy(np.zeros(4, np.uint8)).replace(b"(4,), }                 ", b"(99999999999999999,), } ", 1)
    with pytest.raises(DataError, match=r"needs 99999999999999999 bytes, there are 4"):
        decode_array(huge)


def test_photo__transparent_parts_are_seen_on_white() -> None:
    """Below alpha 0 lies pure magenta, which nobody has ever seen; palettes, grey and colors as alpha likewise."""
    rgba = Image.new("RGBA", (8, 8), (255, 0, 255, 0))
    rgba.paste((128, 128, 128, 255), (2, 2, 6, 6))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 255, 128, 128, 128])
    palette.paste(1, (2, 2, 6, 6))
    grey = Image.new("LA", (8, 8), (255, 0))
    grey.paste((128, 255), (2, 2, 6, 6))
    keyed = rgba.convert("RGB")
    files = [
        encoded_as(rgba, "PNG"),
        encoded_as(rgba, "WEBP", lossless=True, exact=True),
        encoded_as(palette, "PNG", transparency=bytes([0, 255])),
        encoded_as(grey, "PNG"),
        encoded_as(keyed, "PNG", transparency=(255, 0, 255)),
    ]
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[2:6, 2:6] = 128
    for data in files:
        photo = Photo(data)
        np.testing.assert_array_equal(photo.pixels, expected)
        assert photo.is_transparent
    half = decode_image(encoded_as(Image.new("RGBA", (1, 1), (0, 0, 0, 127)), "PNG"))
    assert abs(int(half[0, 0, 0]) - 128) <= 1
    opaque = Photo(encoded_as(Image.new("RGBA", (2, 2), (10, 20, 30, 255)), "PNG"))
    assert opaque.pixels[0, 0].tolist() == [10, 20, 30] and not opaque.is_transparent


def encoded_as(image: Image.Image, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()
