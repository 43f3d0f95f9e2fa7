"""Point clouds of every format, and what broken ones say."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.packing.point_files import read_points

POINTS = np.array([[0.5, -1, 2], [3, 4, 5], [-6, 7e-3, 8]], np.float32)
COLOURS = np.array([[255, 0, 1], [2, 3, 4], [5, 6, 7]], np.uint8)
COLOURED = np.concatenate([POINTS, COLOURS], axis=1)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


PLY_HEAD = b"""ply
format %s 1.0
comment made for a test
element marker 2
property uchar kind
property double weight
element vertex 3
property uchar red
property float x
property float y
property float z
property uchar green
property uchar blue
element face 1
property list uchar int vertex_indices
end_header
"""


def ply(kind: str) -> bytes:
    head = PLY_HEAD % kind.encode()
    if kind == "ascii":
        rows = "".join(f"{c[0]} {p[0]} {p[1]} {p[2]} {c[1]} {c[2]}\n" for p, c in zip(POINTS, COLOURS, strict=True))
        return head + b"1 0.5\n2 0.25\n" + rows.encode() + b"3 0 1 2\n"
    order = "<" if "little" in kind else ">"
    rows = b"".join(
        struct.pack(f"{order}B3f2B", c[0], *p, *c[1:]) for p, c in zip(POINTS.tolist(), COLOURS.tolist(), strict=True)
    )
    markers = struct.pack(f"{order}BdBd", 1, 0.5, 2, 0.25)
    return head + markers + rows + struct.pack(f"{order}B3i", 3, 0, 1, 2)


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_read_points__ply_gives_coordinates_first_whatever_lies_around_them(kind: str) -> None:
    points, origin = read_points(ply(kind), ".ply")
    assert origin is None
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, COLOURED)


@pytest.mark.parametrize(
    "text",
    [
        "OFF\n3 1 0\n0.5 -1 2\n3 4 5\n-6 7e-3 8\n3 0 1 2\n",
        "OFF3 1 0\n0.5 -1 2\n3 4 5\n-6 7e-3 8\n3 0 1 2\n",
        "# a mesh\nCOFF # with colours\n\n3 1 0 # counts\n0.5 -1 2 1 0 0 1\n3 4 5 1 0 0 1\n-6 7e-3 8 1 0 0 1\n",
        "OFF\r\n3 1 0\r\n0.5 -1 2\r\n3 4 5\r\n-6 7e-3 8\r\n",
    ],
)
def test_read_points__off_gives_the_vertices(text: str) -> None:
    np.testing.assert_array_equal(read_points(text.encode(), ".off").points, POINTS)


@pytest.mark.parametrize("suffix", [".txt", ".xyz"])
@pytest.mark.parametrize("text", ["0.5 -1 2\n3 4 5\n-6 7e-3 8\n", "# x,y,z\n0.5,-1,2\n\n3;4;5 // last\n-6,7e-3,8"])
def test_read_points__text_is_a_table(text: str, suffix: str) -> None:
    np.testing.assert_array_equal(read_points(text.encode(), suffix).points, POINTS)


def test_read_points__arrays_become_float32() -> None:
    half = POINTS.astype(np.float16)
    np.testing.assert_array_equal(read_points(npy(half), ".npy").points, half.astype(np.float32))
    np.testing.assert_array_equal(read_points(npy(COLOURED.astype(np.float64)), ".npy").points, COLOURED)
    np.testing.assert_array_equal(read_points(npy(np.asfortranarray(POINTS)), ".npy").points, POINTS)
    np.testing.assert_array_equal(read_points(npz(other=COLOURS, points=POINTS), ".npz").points, POINTS)
    np.testing.assert_array_equal(read_points(npz(cloud=POINTS), ".npz").points, POINTS)


def test_read_points__clouds_of_a_map_keep_their_shape() -> None:
    cloud = np.random.default_rng(0).normal(size=(100, 3)) + np.array([4.5e6, 6e5, 100.0])
    binary = b"ply\nformat binary_little_endian 1.0\nelement vertex 100\nproperty double x\nproperty double y\n"
    binary += b"property double z\nend_header\n" + cloud.astype("<f8").tobytes()
    text = "\n".join(" ".join(map(repr, row)) for row in cloud.tolist()).encode()
    for data, suffix in ((npy(cloud), ".npy"), (binary, ".ply"), (text, ".xyz")):
        points, origin = read_points(data, suffix)
        assert points.dtype == np.float32 and np.abs(points).max() < 4
        assert origin is not None
        np.testing.assert_allclose(points + np.array(origin), cloud, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "suffix", "named"),
    [
        (npy(np.ones((5, 3))), ".npy", "all 5 points are at one place"),
        (npy(np.arange(300.0).reshape(3, 100)), ".npy", r"shape \(3, 100\) has a row for each value"),
        (npy(np.zeros((0, 3))), ".npy", r"array of shape \(0, 3\) is empty"),
        (b"", ".off", "not an OFF text file"),
        (b"OFF BINARY\n\0\0", ".off", "not an OFF text file"),
        (b"nOFF\n4\n1 0 0\n", ".off", "not an OFF text file"),
        (b"OFF\nmany\n", ".off", "OFF counts 'many'"),
        (b"OFF\n3 1 0\n0 0 0\n1 1 1\n", ".off", "cut: 3 vertices announced, 2 lines there"),
        (b"OFF\n1 0 0\n0 zero 0\n", ".off", "not a table of numbers"),
        (b"OFF\n99999999999999 0 0\n0 0 0\n", ".off", "cut"),
        (b"OFF\n99999999999999999999999999 0 0\n0 0 0\n", ".off", "cut"),
        (b"1 2\n3 4\n", ".txt", r"shape \(2, 2\).* is no cloud"),
        (b"1 2 3\n4 5\n", ".txt", "not a table of numbers"),
        (b"\n# nothing\n", ".txt", "holds no points"),
        (b"1 2 nan\n4 5 6\n", ".txt", "1 of 2 points are not finite"),
        (b"1 2 1e300\n", ".txt", "1 of 1 points are not finite"),
        (b"solid", ".ply", "not a PLY file"),
        (b"ply\nformat ascii 1.0\nelement face 1\nend_header\n", ".ply", "no vertices, only face"),
        (b"ply\nelement vertex 1\nproperty float x\nend_header\n", ".ply", "names no format"),
        (b"ply\nformat utf8 1.0\nend_header\n", ".ply", "cannot read PLY header line 'format utf8 1.0'"),
        (PLY_HEAD.replace(b"property float y\n", b"") % b"ascii", ".ply", "x, y and z are needed"),
        (ply("binary_little_endian")[:-20], ".ply", "cut: 3 vertices need 45 bytes"),
        (ply("ascii").replace(b"element vertex 3", b"element vertex 300"), ".ply", "cut: 300 vertices announced"),
        (ply("ascii").replace(b"property uchar red", b"property list uchar int red"), ".ply", "'vertex' at or before"),
        (npy(np.zeros((0, 3))), ".npy", r"shape \(0, 3\)"),
        (npy(np.zeros((3, 3), complex)), ".npy", "cloud|plain numbers|complex"),
        (npz(a=POINTS, b=POINTS), ".npz", "npz holds a, b; name the cloud 'points'"),
    ],
)
def test_read_points__says_what_is_wrong(data: bytes, suffix: str, named: str) -> None:
    with pytest.raises(DataError, match=named) as failure:
        read_points(data, suffix)
    assert "\n" not in str(failure.value)


def test_read_points__never_unpickles() -> None:
    with pytest.raises(DataError):
        read_points(npy(np.array([[object()] * 3])), ".npy")
