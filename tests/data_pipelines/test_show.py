"""`describe` and `contact_sheet`: what they say and what they paint."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.inspection.show import contact_sheet, describe
from data_pipelines.inspection.thumbnails import thumbnail
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.shards.index import scan_shard, sidecar

Members = Sequence[tuple[str, bytes]]
WriteTar = Callable[[Path, Members], Path]

rng = np.random.default_rng(0)
SIZE = 32


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(kind: str, data: bytes, ignore_index: int | None = None) -> np.ndarray:
    """(H, W, 3) of the thumbnail."""
    image = thumbnail(kind, data, SIZE, ignore_index)
    assert image is not None and image.mode == "RGB"
    return np.array(image)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_thumbnail__a_radiance_grid_is_seen_from_a_corner_and_cut(dtype: type) -> None:
    """A cube, red below and blue above, in the right half of the grid."""
    grid = np.zeros((4, 16, 16, 16), np.float32)
    grid[3, 9:15, 5:11, 4:12] = 1
    grid[0, :, :, :8], grid[2, :, :, 8:] = 1, 1
    values = (grid * 255 if dtype is np.uint8 else grid).astype(dtype)
    drawn = thumbnail("volume", npy(values), SIZE, is_grid=True)
    assert drawn is not None and drawn.size == (3 * SIZE, SIZE)
    seen, level, upright = np.split(np.array(drawn), 3, axis=1)
    is_red, is_blue = (seen == (255, 0, 0)).all(axis=2), (seen == (0, 0, 255)).all(axis=2)
    rows = np.arange(SIZE)[:, None]
    assert is_red.sum() > 20 and is_blue.sum() > 20
    assert (rows * is_blue).sum() / is_blue.sum() < (rows * is_red).sum() / is_red.sum()  # blue is above
    assert (seen[0] == 255).all()
    assert (level[16, 24] == (0, 0, 255)).all() and (level[16, 8] == 255).all()
    assert (upright[10, 24] == (0, 0, 255)).all() and (upright[20, 24] == (255, 0, 0)).all()
    assert thumbnail("volume", npy(values[:3]), SIZE, is_grid=True) is not None  # no grid, drawn as a volume


@pytest.fixture
def dataset(tmp_path: Path, write_tar: WriteTar) -> Dataset:
    """Three red, green and blue photos with masks, labels and some text; the second has a damaged photo."""
    colours = np.eye(3, dtype=np.uint8) * 255
    members = [
        member
        for number, colour in enumerate(colours)
        for member in (
            (f"s{number}.cls", b"%d" % number),
            (f"s{number}.json", b'{"from": "h\xc3\xa9re"}'),
            (f"s{number}.png", b"no" if number == 1 else png(np.broadcast_to(colour, (8, 12, 3)).copy())),
            (f"s{number}.seg.png", png(np.full((8, 12), number, np.uint8))),
        )
    ]
    (tmp_path / "dataset.json").write_text('{"classes": ["ant", "bee"], "ignore_index": 2}')
    return open_dataset(write_tar(tmp_path / "a.tar", members))


def test_describe__says_what_a_sample_holds(dataset: Dataset) -> None:
    first, *fields = describe(dataset, 0)
    assert first == f"0: shard {dataset.shards[0].location}, sample 's0'"
    assert [line.split()[0] for line in fields] == ["cls", "json", "png", "seg.png"]
    said = [line.split("bytes  ")[1] for line in fields]
    assert said == ["ant (0)", '{"from": "hére"}', "image 12 x 8", "mask uint8 (8, 12)"]
    assert describe(dataset, 2)[1].endswith("  2")  # a label without a class name
    assert "not a JPEG or PNG or WEBP image" in describe(dataset, 1)[3]
    assert len(describe(dataset, 0, "cls")) == 2


def test_describe__wrong_requests(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"no field seg\.pn in every sample.*did you mean 'seg\.png'"):
        describe(dataset, 0, "seg.pn")
    with pytest.raises(DataError, match=r"sample id 3 is outside 0\.\.2"):
        describe(dataset, 3)


def test_describe__long_texts_and_unknown_fields(tmp_path: Path, write_tar: WriteTar) -> None:
    arrays = io.BytesIO()
    np.savez(arrays, image=np.zeros((2, 3), np.uint8), window=np.zeros(2, np.float32))
    members = [("a.txt", b"four \n" * 500), ("a.pkl", b"..."), ("a.npz", arrays.getvalue())]
    lines = describe(open_dataset(write_tar(tmp_path / "a.tar", members)), 0)
    assert lines[1].endswith("array image uint8 (2, 3), window float32 (2,)")
    assert lines[2].endswith("not read")
    assert lines[3].endswith("...") and len(lines[3]) < 450


def test_contact_sheet__shows_samples_side_by_side(dataset: Dataset) -> None:
    sheet = contact_sheet(dataset, [0, 2], SIZE)
    pixels = np.array(sheet)
    left, right = pixels[:, : sheet.width // 2], pixels[:, sheet.width // 2 :]
    assert (left == (255, 0, 0)).all(axis=2).sum() == SIZE * 21  # 12 x 8 enlarged to 32 x 21
    assert (right == (0, 0, 255)).all(axis=2).sum() == SIZE * 21
    assert (pixels == (0, 0, 0)).all(axis=2).sum() == SIZE * 21  # the mask of the last one is all `ignore_index`
    assert (pixels[-20:] > 150).any()  # the captions
    only = np.array(contact_sheet(dataset, [0, 2], SIZE, "seg.png"))
    assert only.shape[1] < pixels.shape[1] and not (only == (255, 0, 0)).all(axis=2).any()


def test_contact_sheet__damaged_samples_have_a_place(dataset: Dataset) -> None:
    """One that does not decode, one whose bytes are not those of the index."""
    shard = Path(dataset.shards[0].location)
    scan_shard(shard).save(Path(sidecar(str(shard))))
    content, written = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[512] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(written, written))  # as a disk that rots does
    damaged = open_dataset(shard)
    pixels = np.array(contact_sheet(damaged, [0, 1, 2], SIZE))
    assert pixels.shape == np.array(contact_sheet(dataset, [2, 2, 2], SIZE)).shape
    assert (pixels == (0, 0, 255)).all(axis=2).sum() == SIZE * 21
    assert not (pixels == (255, 0, 0)).all(axis=2).any()


def test_contact_sheet__breaks_into_rows(tiny_dataset: Callable[[Sequence[int]], Dataset]) -> None:
    sheet = contact_sheet(tiny_dataset([30]), range(30), 128)
    assert sheet.width <= 1612 and sheet.height > 3 * 128


def test_contact_sheet__nothing_to_draw(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="field cls of these samples can"):
        contact_sheet(dataset, [0], SIZE, "cls")
    with pytest.raises(DataError, match=r"no field jgp in every sample"):
        contact_sheet(dataset, [0], SIZE, "jgp")


def test_thumbnail__the_same_class_has_the_same_colour_everywhere() -> None:
    one, other = (
        picture("mask", png(values)) for values in (np.full((9, 9), 7, np.uint8), np.full((5, 8), 7, np.uint8))
    )
    assert one[0, 0].tolist() == other[0, 0].tolist()
    classes = {tuple(picture("mask", png(np.full((8, 8), n, np.uint8)))[0, 0]) for n in range(64)}
    assert len(classes) == 64
    assert picture("mask", png(np.full((8, 8), 255, np.uint8)), 255).max() == 0
    wide = picture("mask", png(np.full((8, 8), 1000, np.uint16)), 11)
    assert wide.max() > 0


def test_thumbnail__depth_is_stretched_and_its_holes_are_black() -> None:
    depth = np.tile(np.linspace(1000, 3000, 32).astype(np.uint16), (32, 1))
    depth[:, :8] = 0
    seen = picture("depth", png(depth))[:, :, 0]
    assert seen[:, :8].max() == 0 and seen[:, 9:].min() < 20 and seen[:, -1].min() == 255


def test_thumbnail__bands_are_stretched_one_by_one() -> None:
    """(C, H, W): the first three channels, whatever their ranges; with fewer, grey."""
    ramp = np.tile(np.arange(32.0), (32, 1))
    seen = picture("array", npy(np.stack([ramp * 1e6, ramp[:, ::-1] - 5, ramp.T * 1e-6, ramp]).astype(np.float32)))
    assert seen[0, -1].tolist() == [255, 0, 0] and seen[-1, 0].tolist() == [0, 255, 255]
    grey = picture("array", npy(np.stack([ramp, ramp.T])))
    assert (grey == grey[..., :1]).all() and grey[0, -1, 0] == 255


@pytest.mark.parametrize("kind", ["volume", "array"])
def test_thumbnail__volumes_are_three_slices(kind: str) -> None:
    volume = np.zeros((16, 16, 16), np.float32)
    volume[8] = 1  # the middle across the first axis is all ones, the others have one bright line
    volume[0, 0, 0] = -1
    seen = picture(kind, npy(volume))
    assert seen.shape == (SIZE, 3 * SIZE, 3)
    assert (seen[16:18, SIZE:] == 255).all() and not (seen[2:14, SIZE:] == 255).any()


def test_thumbnail__volumes_of_labels_and_of_colours() -> None:
    labels = np.zeros((16, 12, 8), np.int16)
    labels[8] = 3
    seen = picture("mask", npy(labels))
    assert seen.shape == (SIZE, 21 + 16 + 24, 3) or seen.shape[0] == SIZE
    assert seen[0, 0].tolist() == picture("mask", png(np.full((8, 8), 3, np.uint8)))[0, 0].tolist()
    grid = rng.random((4, 16, 16, 16)).astype(np.float16)
    assert picture("array", npy(grid)).shape == (SIZE, 3 * SIZE, 3)


@pytest.mark.parametrize("name", ["label", "labels", "seg"])
def test_thumbnail__labels_beside_a_volume_have_the_colours_of_masks(name: str) -> None:
    """Three slices of the volume, in grey, then three of its labels; of labels alone these."""
    image, labels = rng.integers(0, 255, (16, 16, 16), np.uint8), np.zeros((16, 16, 16), np.uint8)
    labels[:, :8], labels[:, 8:] = 1, 2
    both, alone = io.BytesIO(), io.BytesIO()
    np.savez(both, image=image, **{name: labels})
    np.savez(alone, **{name: labels})
    seen, drawn = (picture("array", file.getvalue()) for file in (both, alone))
    assert seen.shape == (SIZE, 6 * SIZE, 3)
    assert (seen[:, : 3 * SIZE] == seen[:, : 3 * SIZE, :1]).all()
    assert np.array_equal(seen[:, 3 * SIZE :], drawn)
    assert np.array_equal(drawn, picture("mask", npy(labels)))
    assert len({tuple(pixel) for pixel in drawn.reshape(-1, 3)}) == 2


def test_contact_sheet__labels_of_packed_volumes_are_coloured(tmp_path: Path, write_tar: WriteTar) -> None:
    labels = np.zeros((16, 16, 16), np.int16)
    labels[4:12] = 3
    members = [("a.seg.npy", npy(labels)), ("a.volume.npy", npy(rng.random((16, 16, 16), np.float32)))]
    shards = open_dataset(write_tar(tmp_path / "a.tar", members))
    assert "mask int16 (16, 16, 16)" in describe(shards, 0)[1]
    sheet = np.array(contact_sheet(shards, [0], SIZE, "seg.npy"))
    third = picture("mask", png(np.full((8, 8), 3, np.uint8)))[0, 0]
    assert (sheet == third).all(axis=2).sum() >= SIZE * SIZE


def test_thumbnail__near_points_are_brighter() -> None:
    cloud = np.concatenate([rng.uniform(-1, 1, (4000, 2)), np.full((4000, 1), -1.0)], axis=1)
    cloud[2000:, 2] = 1
    cloud[2000:, :2] *= 0.3
    seen = picture("points", npy(np.concatenate([cloud, cloud], axis=1)))  # further columns are passed over
    assert seen.shape == (SIZE, SIZE, 3)
    assert len(np.unique(seen[..., 0])) > 10 and seen[12:20, 12:20].mean() > seen[:4].mean()
    assert picture("points", npy(np.full((3, 3), np.nan))).max() < 20


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("array", np.zeros((4, 4))),  # a pose
        ("array", np.zeros(100)),
        ("array", np.zeros((2, 2, 16, 16, 16))),
        ("points", np.zeros((10, 2))),
        ("points", np.zeros(3)),
    ],
)
def test_thumbnail__numbers_are_no_pictures(kind: str, array: np.ndarray) -> None:
    assert thumbnail(kind, npy(array), SIZE) is None


def test_thumbnail__points_beyond_all_bounds_are_left_out() -> None:
    far = np.array([[1e308, -1e308, 0], [-1e308, 1e308, 0], [0, 0, 0]])
    assert thumbnail("points", npy(far), SIZE) is not None


@pytest.mark.parametrize("name", ["camvid", "cifar10", "points_psb", "volumes_hippocampus"])
def test_contact_sheet__real_data(name: str, shared_data: Path) -> None:
    (shard, *_) = sorted((shared_data / name).glob("test-*.tar"))
    dataset = open_dataset(shard)
    pixels = np.array(contact_sheet(dataset, range(4), 64))
    assert pixels[: pixels.shape[0] // 2].std() > 20
    assert len(describe(dataset, 3)) >= 2
