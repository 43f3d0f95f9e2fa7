"""Volumes of every format keep their values, labels and spacing."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.packing.volume_files import read_labels, read_volume

VALUES = np.arange(24, dtype=np.int16).reshape(2, 3, 4) - 5


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        ("int16", "int16"),
        (">i2", "int16"),
        ("uint8", "uint8"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("float64", "float32"),
        ("int64", "int16"),
        ("bool", "uint8"),
    ],
)
def test_read_volume__keeps_types_of_up_to_32_bits(stored: str, kept: str) -> None:
    values = np.abs(VALUES).astype(stored)
    found = read_volume(npy(values), ".npy")
    assert found.values.dtype == np.dtype(kept)
    np.testing.assert_array_equal(found.values, values)
    assert found.labels is None and found.spacing is None


@pytest.mark.parametrize("wrap", [npy, lambda array: npz(image=array)], ids=["npy", "npz"])
def test_read_volume__channels_that_look_last_are_asked_for(wrap: Callable[[np.ndarray], bytes]) -> None:
    """Taken as they are, 36 slices would be channels, without a word."""
    last = np.arange(36 * 50 * 35 * 2, dtype=np.float32).reshape(36, 50, 35, 2)
    suffix = ".npy" if wrap is npy else ".npz"
    with pytest.raises(DataError) as refused:
        read_volume(wrap(last), suffix)
    assert str(refused.value) == (
        "array of shape (36, 50, 35, 2) looks like (D, H, W, C) with 2 channels, and shards hold (C, D, H, W): "
        "add --channels last, or --channels first if it has 36 channels"
    )
    np.testing.assert_array_equal(read_volume(wrap(last), suffix, "last").values, np.moveaxis(last, 3, 0))
    np.testing.assert_array_equal(read_volume(wrap(last), suffix, "first").values, last)
    first = np.moveaxis(last, 3, 0)
    np.testing.assert_array_equal(read_volume(wrap(first), suffix).values, first)
    cube = np.zeros((4, 4, 4, 4), np.uint8)  # of which nothing can be told
    assert read_volume(wrap(cube), suffix).values.shape == cube.shape


def test_read_volume__labels_lie_on_volumes_with_channels_last() -> None:
    image, labels = np.zeros((8, 9, 10, 2), np.float32), np.ones((8, 9, 10), np.uint8)
    found = read_volume(npz(image=image, label=labels), ".npz", "last")
    assert found.values.shape == (2, 8, 9, 10) and found.labels is not None and found.labels.shape == (8, 9, 10)


def test_read_volume__large_integers_become_floats() -> None:
    found = read_volume(npy(VALUES.astype(np.int64) + 40_000), ".npy")
    assert found.values.dtype == np.float32 and found.values.max() == 40_018


def test_read_volume__npz_has_labels_and_spacing() -> None:
    labels = (VALUES > 3).astype(np.uint8)
    found = read_volume(npz(image=VALUES, label=labels, window=np.ones(2), spacing=np.array([2, 1, 0.5])), ".npz")
    np.testing.assert_array_equal(found.values, VALUES)
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, labels)
    assert found.spacing == (2, 1, 0.5)
    np.testing.assert_array_equal(read_volume(npz(scan=VALUES), ".npz").values, VALUES)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_read_volume__nifti_comes_out_slices_first(tmp_path: Path, suffix: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(VALUES, np.diag([0.5, 1.0, 2.0, 1.0]))
    nibabel.save(image, tmp_path / f"scan{suffix}")
    data = (tmp_path / f"scan{suffix}").read_bytes()
    found = read_volume(data, suffix)
    assert found.values.dtype == np.int16
    np.testing.assert_array_equal(found.values, VALUES.transpose(2, 1, 0))
    assert found.spacing == (2.0, 1.0, 0.5)
    with pytest.raises(DataError, match=r"NIfTI|gzip"):
        read_volume(data[: len(data) // 2], suffix)


@pytest.mark.parametrize("stored", [np.float64, np.int64, np.uint16, np.bool_])
def test_read_labels__are_whole_numbers(stored: type) -> None:
    labels = (VALUES > 3).astype(stored)
    for found in (
        read_labels(npy(labels), ".npy", read_volume(npy(VALUES), ".npy")),
        read_volume(npz(image=VALUES, label=labels), ".npz").labels,
    ):
        assert found is not None and found.dtype.kind in "iu" and found.dtype.itemsize <= 2
        np.testing.assert_array_equal(found, VALUES > 3)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (VALUES + 0.5, "labels are float.* with fractions"),
        (VALUES.astype(np.int64) + 70_000, "labels go from 69995 to 70018"),
        (VALUES[:1], r"labels of shape \(1, 3, 4\) do not fit"),
        (VALUES[None], r"labels of shape \(1, 2, 3, 4\) do not fit"),
    ],
)
def test_read_labels__says_what_is_wrong(labels: np.ndarray, named: str) -> None:
    with pytest.raises(DataError, match=named):
        read_labels(npy(labels), ".npy", read_volume(npy(VALUES), ".npy"))
    with pytest.raises(DataError, match=named):
        read_volume(npz(image=VALUES, label=labels), ".npz")


def test_read_labels__of_another_place_are_refused(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")

    def scan(*diagonal: float) -> bytes:
        nibabel.save(nibabel.Nifti1Image(np.abs(VALUES), np.diag(diagonal)), tmp_path / "scan.nii")
        return (tmp_path / "scan.nii").read_bytes()

    volume = read_volume(scan(1.0, 1.0, 2.0, 1.0), ".nii")
    assert read_labels(scan(1.0, 1.0, 2.01, 1.0), ".nii", volume).shape == volume.values.shape
    assert read_labels(npy(np.abs(VALUES).T), ".npy", volume).shape == volume.values.shape
    with pytest.raises(DataError, match="labels lie 2 mm away from the volume, or are turned or mirrored"):
        read_labels(scan(-1.0, 1.0, 2.0, 1.0), ".nii", volume)


@pytest.mark.parametrize(
    ("data", "suffix", "named"),
    [
        (npy(np.zeros((3, 4))), ".npy", r"shape \(3, 4\) .* is no volume"),
        (npy(np.full((2, 2, 2), np.nan)), ".npy", "8 of 8 voxels are not finite"),
        (npy(VALUES)[:-8], ".npy", "array|bytes"),
        (npz(a=VALUES, b=VALUES), ".npz", "npz holds a, b; name the volume"),
        (npz(image=VALUES, label=VALUES[:1]), ".npz", r"labels of shape \(1, 3, 4\) do not fit"),
        (gzip.compress(b"no volume" * 100, mtime=0), ".nii.gz", "cannot read NIfTI"),
        (b"\x1f\x8bbroken", ".nii.gz", "cannot unpack gzip"),
        (b"", ".nii", "cannot read NIfTI"),
    ],
)
def test_read_volume__says_what_is_wrong(data: bytes, suffix: str, named: str) -> None:
    if ".nii" in suffix:
        pytest.importorskip("nibabel")
    with pytest.raises(DataError, match=named) as failure:
        read_volume(data, suffix)
    assert "\n" not in str(failure.value)
