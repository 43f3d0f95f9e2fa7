"""Pictures as they are shown, masks as they were drawn, and whatever else a sound file may hold beside its pixels."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from data_pipelines.decode import MAX_PIXELS_VARIABLE, Photo, decode_array, decode_image, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.picture_files import orientation
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.specs import views_from

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def saved(pixels: np.ndarray, form: str, orientation: int | None = None, **options: Any) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, form, exif=exif, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(values: list[int], bits: int, color_type: int, *extra: bytes) -> bytes:
    """A square PNG, each row of which holds `values` in so many bits."""
    size, per_byte = len(values), 8 // bits
    packed = [sum(values[i + k] << (8 - bits * (k + 1)) for k in range(per_byte)) for i in range(0, size, per_byte)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, bits, color_type, 0, 0, 0))
    palette = [chunk(b"PLTE", bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]))] if color_type == 3 else []
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(packed)) * size))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *palette, pixels, *extra, chunk(b"IEND", b"")])


@pytest.mark.parametrize("color_type", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_decode_mask__class_ids_are_those_of_the_file_at_any_depth(bits: int, color_type: int) -> None:
    classes = [0, 1] * 4 if bits == 1 else [0, 1, 2, 3, 3, 2, 1, 0]
    assert decode_mask(png(classes, bits, color_type)).tolist() == [classes] * 8


def test_decode_mask__every_value_of_four_bits() -> None:
    assert decode_mask(png(list(range(16)), 4, 0))[0].tolist() == list(range(16))


@pytest.mark.parametrize("decoder", ["pil", "simplejpeg"])
@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_photo__is_turned_as_it_is_shown(form: str, value: int, decoder: str) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(PIXELS, form, value, **options)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    photo, stored = Photo(data, decoder), Photo(data, decoder, exif_rotation=False)
    assert (photo.width, photo.height) == shown.size and (stored.width, stored.height) == (24, 16)
    assert np.array_equal(photo.pixels, np.asarray(shown)) and photo.pixels.flags.writeable
    assert np.array_equal(np.asarray(photo.image), photo.pixels)
    assert stored.pixels.shape == (16, 24, 3)
    reduced = Photo(data, decoder)
    reduced.reduce(2)
    factor = 2 if form == "JPEG" else 1
    assert reduced.pixels.shape[:2] == (photo.height // factor, photo.width // factor)


def exif(order: str, value: int, kind: int = 3) -> bytes:
    magic, number = {"<": b"II*\0", ">": b"MM\0*"}[order], "H" if kind == 3 else "I"
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + struct.pack(order + number, value).ljust(4, b"\0")
    other = struct.pack(f"{order}HHII", 0x0100, 3, 1, 0)
    return magic + struct.pack(f"{order}IH", 8, 2) + other + entry


def test_orientation__both_byte_orders_and_behind_the_pixels() -> None:
    for tiff in (exif("<", 6), exif(">", 6), exif(">", 6, kind=4), b"Exif\0\0" + exif("<", 6)):
        assert orientation(png([0] * 8, 8, 0, chunk(b"eXIf", tiff))) == 6
    jpeg = saved(PIXELS, "JPEG")
    segment = b"Exif\0\0" + exif("<", 8)
    xmp = b"\xff\xe1" + struct.pack(">H", 30) + b"http://ns.adobe.com/xap/1.0/"
    told = jpeg[:2] + xmp + b"\xff\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    assert orientation(told) == 8


@pytest.mark.parametrize(
    "tiff", [b"", b"II*\0", exif("<", 6)[:-6], exif("<", 0), exif("<", 9), b"JJ" + exif("<", 6), b"\xff" * 40]
)
def test_orientation__what_makes_no_sense_is_shown_as_stored(tiff: bytes) -> None:
    assert orientation(png([0] * 8, 8, 0, chunk(b"eXIf", tiff))) == 1
    assert orientation(tiff) == 1


def test_views__photo_mask_and_box_agree_and_the_old_way_is_a_setting() -> None:
    """Red is the column as shown; the mask is drawn on the photo as shown, once plain and once turned itself."""
    shown = np.zeros((48, 32, 3), np.uint8)
    shown[..., 0] = np.arange(32) * 8
    stored = np.rot90(shown, 1)  # orientation 6: turned clockwise to be shown
    mask = shown[..., 0] // 8
    sample = {
        "png": saved(stored, "PNG", 6),
        "seg.png": saved(mask, "PNG"),
        "turned.seg.png": saved(np.rot90(mask, 1).copy(), "PNG", 6),
    }
    views = [
        {"name": "image", "size": 16, "scale": [0.3, 0.9], "return_box": True},
        {"name": "mask", "size": 16, "field": "seg.png", "resize": "nearest", "same_crop_as": "image"},
        {"name": "turned", "size": 16, "field": "turned.seg.png", "resize": "nearest", "same_crop_as": "image"},
    ]
    made = ViewMaker(views_from(views), frozenset(sample))(sample, 7)
    assert made["mask"].equal(made["turned"]) and len(made["mask"].unique()) > 8
    assert (made["image"][0].float() / 8 - made["mask"][0]).abs().max() <= 1
    left, _, width, _, flipped = made["image.box"].tolist()
    seen = made["mask"][0, 0].tolist()[:: -1 if flipped else 1]
    assert seen[0] == pytest.approx(left * 32, abs=1) and seen[-1] == pytest.approx((left + width) * 32 - 1, abs=1)
    as_stored = ViewMaker(views_from(views[:1]), frozenset(sample), exif_rotation=False)(sample, 7)
    assert as_stored["image"][0].float().std(dim=1).max() < 8 < as_stored["image"][0].float().std(dim=0).min()


def test_decode_image__large_texts_and_profiles_are_not_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "a" * 2_000_000, zip=True)
    info.add_text("parameters", "b" * 2_000_000, zip=True)
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=info, icc_profile=bytes(2_000_000))
    data = file.getvalue()
    assert np.array_equal(decode_image(data), PIXELS)
    behind = data.removesuffix(chunk(b"IEND", b"")) + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000)))
    assert np.array_equal(decode_image(behind + chunk(b"IEND", b"")), PIXELS)


@pytest.mark.filterwarnings("error")
def test_photo__limit_is_a_setting_named_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "100")
    with pytest.raises(
        DataError, match=r"24 x 16 pixels exceeds the limit of 100 pixels; set PRETRAIN_MAX_PIXELS=384 "
    ):
        decode_image(saved(PIXELS, "PNG"))
    with pytest.raises(DataError, match="set PRETRAIN_MAX_PIXELS=384"):
        decode_mask(saved(PIXELS[..., 0], "PNG"))
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "384")
    assert decode_image(saved(PIXELS, "PNG")).shape == (16, 24, 3)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "4e2")
    with pytest.raises(DataError, match="PRETRAIN_MAX_PIXELS='4e2' is not allowed; it is a whole number of pixels"):
        decode_image(saved(PIXELS, "PNG"))


@pytest.mark.parametrize("decoder", ["pil", "simplejpeg"])
def test_photo__too_large_a_jpeg_is_reduced_to_the_limit(monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    large = np.full((400, 600, 3), 90, np.uint8)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "20000")
    photo = Photo(saved(large, "JPEG"), decoder)
    photo.reduce_to_limit(80)
    assert photo.pixels.shape == (100, 150, 3) and (photo.width, photo.height) == (600, 400)
    for data, least in ((saved(large, "JPEG"), 101), (saved(large, "JPEG", progressive=True), 80)):
        with pytest.raises(DataError, match="600 x 400 pixels exceeds the limit of 20000"):
            photo = Photo(data, decoder)
            photo.reduce_to_limit(least)
            _ = photo.pixels


def test_decode__damaged_bytes_are_a_data_error_whatever_the_reader_stumbles_over() -> None:
    """Any other exception would end a run in which damaged samples are to be replaced."""
    array = io.BytesIO()
    np.savez_compressed(array, a=np.arange(40), b=np.ones((3, 3)))
    sound = [
        *(saved(PIXELS, form, 6) for form in ("JPEG", "PNG", "WEBP")),
        saved(PIXELS, "JPEG", progressive=True),
        png([0, 1, 2, 3] * 2, 2, 3, chunk(b"eXIf", exif("<", 6))),
    ]
    rng, refused = random.Random(0), 0
    for data in [*sound, array.getvalue()] * 60:
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        cut = bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        for read in (decode_image, decode_mask, decode_array):
            try:
                read(cut)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 700
