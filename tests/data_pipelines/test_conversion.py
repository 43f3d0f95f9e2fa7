"""From an item to its fields: bytes as found, or resized and re-encoded; masks untouched by interpolation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_pipelines.decode import decode_image, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.packing.conversion import Conversion, Encoding, Sample, convert, parse_encoding
from data_pipelines.packing.inputs import Item, Piece
from data_pipelines.pixel_sums import PixelSums

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), np.uint8)
MASK = RNG.integers(0, 5, (20, 30), np.uint8)

CLASSES = ("a", "b", "c", "d", "e")


def encoded(array: npt.NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def encoded_array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def converted(folder: Path, fields: dict[str, bytes], *, label: int | None = None, **options: Any) -> Sample:
    """Write each field to a file of its own and convert an item of them."""
    for name, data in fields.items():
        (folder / f"x.{name}").write_bytes(data)
    pieces = tuple(Piece(name, f"x.{name}", 0, len(data)) for name, data in fields.items())
    options = {"family": "images", "root": str(folder), **options}
    return convert(Item("some/x.jpg", pieces, label), Conversion(**options))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_convert__keeps_the_bytes_of_images(tmp_path: Path, form: str) -> None:
    data = encoded(PIXELS, form)
    sample = converted(tmp_path, {"jpg": data}, label=3)
    assert sample.fields == {"jpg": data, "cls": b"3", "json": b'{"source":"some/x.jpg"}'}
    assert sample.label == 3


def test_convert__counts_pixels_exactly(tmp_path: Path) -> None:
    sums = PixelSums()
    for _ in range(2):
        sums.add(converted(tmp_path, {"png": encoded(PIXELS)}).sums)
    values = PIXELS.astype(np.int64).reshape(-1, 3)
    assert sums.total == (2 * values.sum(0)).tolist()
    assert sums.squares == (2 * (values**2).sum(0)).tolist()
    assert sums.pixels == 1200


def test_convert__resizes_image_and_mask_alike(tmp_path: Path) -> None:
    sample = converted(tmp_path, {"png": encoded(PIXELS), "seg.png": encoded(MASK)}, size=10)
    image, mask = decode_image(sample.fields["png"]), decode_mask(sample.fields["seg.png"])
    expected = np.array(Image.fromarray(PIXELS).resize((15, 10), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(mask, MASK[1::2, 1::2])
    assert sample.sums.pixels == 150


def test_convert__nearest_pixel_by_centres_keeps_16_bits(tmp_path: Path) -> None:
    depth = np.arange(12 * 9, dtype=np.uint16).reshape(9, 12) * 500
    sample = converted(tmp_path, {"depth.png": encoded(depth)}, family="tars", size=3)
    np.testing.assert_array_equal(decode_mask(sample.fields["depth.png"]), depth[1::3, 1::3])


def test_convert__small_images_stay_as_they_are(tmp_path: Path) -> None:
    data = {"png": encoded(PIXELS), "seg.png": encoded(MASK)}
    sample = converted(tmp_path, data, size=20)
    assert {name: sample.fields[name] for name in data} == data


def test_convert__resized_images_keep_their_format(tmp_path: Path) -> None:
    for form, head in (("JPEG", b"\xff\xd8"), ("WEBP", b"RIFF"), ("PNG", b"\x89PNG")):
        assert converted(tmp_path, {"jpg": encoded(PIXELS, form)}, size=10).fields["jpg"].startswith(head)


def test_convert__label_arrays_of_volumes_stay_and_flat_ones_are_resized(tmp_path: Path) -> None:
    deep = encoded_array(np.arange(4 * 20 * 30, dtype=np.int16).reshape(4, 20, 30))
    fields = {"png": encoded(PIXELS), "seg.npy": deep, "labels.npy": encoded_array(MASK)}
    sample = converted(tmp_path, fields, family="tars", size=10)
    assert sample.fields["seg.npy"] == deep
    np.testing.assert_array_equal(np.load(io.BytesIO(sample.fields["labels.npy"])), MASK[1::2, 1::2])


def test_convert__re_encoding_renames_the_field_and_leaves_masks(tmp_path: Path) -> None:
    fields = {"left.jpg": encoded(PIXELS, "JPEG"), "seg.png": encoded(MASK)}
    sample = converted(tmp_path, fields, encoding=Encoding("WEBP", 50))
    assert set(sample.fields) == {"left.webp", "seg.png", "json"}
    assert sample.fields["left.webp"].startswith(b"RIFF")
    assert sample.fields["seg.png"] == fields["seg.png"]


def test_convert__palette_masks_keep_their_indices(tmp_path: Path) -> None:
    picture = Image.fromarray(MASK).convert("P")
    picture.putpalette([7 * i % 256 for i in range(768)])
    picture.putdata(MASK.ravel().tolist())
    file = io.BytesIO()
    picture.save(file, "PNG")
    sample = converted(tmp_path, {"png": encoded(PIXELS), "seg.png": file.getvalue()}, classes=CLASSES)
    assert sample.fields["seg.png"] == file.getvalue()


@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({"jpg": b"no picture"}, {}, "not a JPEG or PNG or WEBP image"),
        ({"jpg": b""}, {}, "the file is empty"),
        ({"jpg": encoded(PIXELS, "JPEG")[:-300]}, {}, "cannot decode image"),
        ({"png": encoded(PIXELS), "seg.png": encoded(MASK[:10])}, {}, "differ in size: png 20x30, seg.png 10x30"),
        ({"png": encoded(PIXELS), "seg.png": encoded(PIXELS)}, {}, "mask has 3 channels"),
        (
            {"png": encoded(PIXELS), "seg.png": encoded(MASK)},
            {"classes": CLASSES[:4]},
            "mask has the value 4; there are 4",
        ),
        ({"png": encoded(PIXELS)}, {"classes": CLASSES[:4], "label": 4}, "class 4 is outside 0..3"),
        ({"cls": b"4"}, {"family": "tars", "classes": CLASSES[:4]}, "class 4 is outside 0..3"),
        ({"cls": b"four"}, {"family": "tars"}, "not an integer"),
        ({"json": b"[1]"}, {"family": "tars"}, "json holds a list; it must be an object"),
        ({"pose.npy": b"\x93NUMPY"}, {"family": "tars"}, "array"),
    ],
)
def test_convert__says_what_is_wrong(
    tmp_path: Path, fields: dict[str, bytes], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=named):
        converted(tmp_path, fields, **options)


def test_convert__ignored_values_are_allowed_in_masks(tmp_path: Path) -> None:
    fields = {"png": encoded(PIXELS), "seg.png": encoded(np.where(MASK == 4, 11, MASK).astype(np.uint8))}
    assert converted(tmp_path, fields, classes=CLASSES[:4], ignore_index=11).fields["seg.png"] == fields["seg.png"]
    with pytest.raises(DataError, match="value 11"):
        converted(tmp_path, fields, classes=CLASSES[:4])


def test_convert__missing_and_changed_files_are_rejected(tmp_path: Path) -> None:
    conversion = Conversion("images", str(tmp_path))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        convert(Item("gone.jpg", (Piece("jpg", "gone.jpg", 0, 9),)), conversion)
    (tmp_path / "a.jpg").write_bytes(b"12345")
    with pytest.raises(DataError, match="5 bytes, 9 when it was listed"):
        convert(Item("a.jpg", (Piece("jpg", "a.jpg", 0, 9),)), conversion)


def test_convert__json_of_a_tar_keeps_its_facts(tmp_path: Path) -> None:
    sample = converted(tmp_path, {"json": b'{"z": 1, "licence": "\\u00a9"}'}, family="tars")
    assert json.loads(sample.fields["json"]) == {"source": "some/x.jpg", "z": 1, "licence": "©"}
    kept = converted(tmp_path, {"json": b'{"source": "the first"}'}, family="tars")
    assert json.loads(kept.fields["json"]) == {"source": "the first"}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (90, Encoding("JPEG", 90)),
        ("85", Encoding("JPEG", 85)),
        ("jpeg", Encoding("JPEG", 95)),
        ("JPG:70", Encoding("JPEG", 70)),
        ("webp:80", Encoding("WEBP", 80)),
        ("png", Encoding("PNG")),
    ],
)
def test_parse_encoding__reads_format_and_quality(text: str | int, encoding: Encoding) -> None:
    assert parse_encoding(text) == encoding
    assert parse_encoding(str(encoding)) == encoding


@pytest.mark.parametrize("text", ["bmp", "jpeg:0", "jpeg:101", "webp:high", "png:9", "", 0])
def test_parse_encoding__refuses_the_rest(text: str | int) -> None:
    with pytest.raises(DataError, match="write jpeg:QUALITY or webp:QUALITY"):
        parse_encoding(text)


def rotated(pixels: npt.NDArray[Any], form: str = "JPEG") -> bytes:
    """A photo that is stored so that EXIF turns it clockwise to be shown as `pixels`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(np.rot90(pixels, 1), form, exif=exif, quality=100)


def test_convert__resized_photos_stand_as_they_are_shown(tmp_path: Path) -> None:
    shown = np.zeros((60, 40, 3), np.uint8)
    shown[:30] = 200
    kept = converted(tmp_path, {"jpg": rotated(shown), "seg.png": encoded(shown[..., 0])})
    assert kept.fields["jpg"] == rotated(shown)
    small = converted(tmp_path, {"jpg": rotated(shown), "seg.png": encoded(shown[..., 0])}, size=20)
    image, mask = decode_image(small.fields["jpg"]), decode_mask(small.fields["seg.png"])
    assert image.shape == (30, 20, 3) and mask.shape == (30, 20)
    assert np.abs(image[..., 0].astype(int) - mask)[[5, 25]].max() < 10
    again = converted(tmp_path, {"jpg": rotated(shown)}, encoding=Encoding("PNG"))
    assert decode_image(again.fields["png"]).shape == (60, 40, 3)
    assert np.asarray(Image.open(io.BytesIO(again.fields["png"]))).shape == (60, 40, 3)  # for readers that know no EXIF
    with pytest.raises(DataError, match=r"jpg 60x40, seg.png 40x60; photos count as their EXIF orientation shows them"):
        converted(tmp_path, {"jpg": rotated(shown), "seg.png": encoded(np.rot90(shown[..., 0], 1))})


def test_convert__photos_above_the_limit_of_pixels_are_decoded_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = encoded(np.full((400, 600, 3), 90, np.uint8), "JPEG")
    monkeypatch.setenv("PRETRAIN_MAX_PIXELS", "20000")
    sample = converted(tmp_path, {"jpg": large}, size=64)
    assert decode_image(sample.fields["jpg"]).shape == (64, 96, 3)
    with pytest.raises(DataError, match=r"exceeds the limit of 20000 pixels; set PRETRAIN_MAX_PIXELS=240000"):
        converted(tmp_path, {"jpg": large})


def test_convert__what_a_format_cannot_hold_is_one_rejected_item(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"20000 x 2 pixels cannot be written as WEBP: .*; give a --size"):
        converted(tmp_path, {"jpg": encoded(np.zeros((2, 20000, 3), np.uint8))}, encoding=Encoding("WEBP", 80))


def test_convert__labels_of_volumes_are_classes_of_the_data_set(tmp_path: Path) -> None:
    def volume(largest: int) -> dict[str, bytes]:
        file = io.BytesIO()
        np.savez(file, image=np.zeros((2, 3, 4), np.uint8), label=np.full((2, 3, 4), largest, np.int16))
        return {"volume.npz": file.getvalue()}

    for allowed in (4, 255):
        fields = converted(tmp_path, volume(allowed), family="volumes", classes=CLASSES).fields
        assert set(fields) == {"volume.npz", "seg.npy", "json"}
    for wrong in (5, -1):
        with pytest.raises(DataError, match=f"mask has the value {wrong}; there are 5 classes and ignore_index 255"):
            converted(tmp_path, volume(wrong), family="volumes", classes=CLASSES)
