"""Volumes as other programs store them, to one array: `.npy .npz .nii .nii.gz` -> (D, H, W) with spacing and labels.

A fourth axis is that of the channels, and comes first: (C, D, H, W). Values and number format stay as stored where
training can use them; 64-bit ones become smaller. NIfTI files are read with nibabel (an optional package); their axes
x, y, z come out as z, y, x, slices first.

Not here: resampling, intensity windows, what training does with a volume (`volumes`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import LABEL_ARRAYS

__all__ = ["CHANNELS", "VolumeFile", "read_labels", "read_volume"]

CHANNELS = ("first", "last")  # of arrays of four axes

_MAX_BYTES = 2 << 30  # unpacked
_LARGEST_LABEL = (1 << 15) - 1
_PLACE_TOLERANCE_MM = 0.1  # between the corners of a volume and of its labels, as their files place them
_KEPT = ("uint8", "int8", "uint16", "int16", "float16", "float32")


@dataclass(frozen=True)
class VolumeFile:
    """A volume and what its file says about it."""

    values: npt.NDArray[Any]  # (D, H, W), or (C, D, H, W)
    labels: npt.NDArray[Any] | None = None  # whole numbers (D, H, W), when the file has them
    spacing: tuple[float, ...] | None = None  # millimetres along D, H, W
    corners: npt.NDArray[np.float64] | None = None  # (4, 3) where the first voxel and the ends of the axes lie, mm


def read_volume(data: bytes, suffix: str, channels: str | None = None) -> VolumeFile:
    """Read a volume.

    Args:
        suffix: of the file, lower case with the dot; decides the format.
        channels: where an npy or npz of four axes has them, one of `CHANNELS`; None: first, and what looks as if they
            were last is refused. NIfTI says it itself.

    Raises:
        DataError: damaged, too large, not of three or four dimensions, not finite; or nibabel is needed and missing.
    """
    if suffix in (".nii", ".nii.gz"):
        return _from_nifti(data)
    arrays = decode_arrays(data)
    values = next((arrays[name] for name in ("volume", "image", "") if name in arrays), None)
    if values is None and len(arrays) == 1:
        values = next(iter(arrays.values()))
    if values is None:
        raise DataError(f"npz holds {', '.join(sorted(arrays)) or 'nothing'}; name the volume 'volume' or 'image'")
    labels = next((arrays[name] for name in LABEL_ARRAYS if name in arrays), None)
    spacing = arrays.get("spacing")
    volume = _compact(_channels_first(values, channels))
    return VolumeFile(
        volume,
        None if labels is None else _whole_labels(labels, volume.shape),
        None if spacing is None else tuple(float(step) for step in spacing.ravel()),
    )


def read_labels(data: bytes, suffix: str, volume: VolumeFile) -> npt.NDArray[Any]:
    """Read the classes of the voxels of a volume from a file of their own.

    Args:
        suffix: see `read_volume`.
        volume: that they belong to.

    Returns:
        (D, H, W) whole numbers.

    Raises:
        DataError: see `read_volume`; or they have another shape or place than the volume, or are no whole numbers.
    """
    found = read_volume(data, suffix)
    labels = _whole_labels(found.values, volume.values.shape)
    if volume.corners is not None and found.corners is not None:
        away = float(np.abs(volume.corners - found.corners).max())
        if away > _PLACE_TOLERANCE_MM:
            raise DataError(
                f"labels lie {away:.3g} mm away from the volume, or are turned or mirrored, by the affines of the two "
                "files; bring them onto the voxels of the volume"
            )
    return labels


def _channels_first(values: npt.NDArray[Any], channels: str | None) -> npt.NDArray[Any]:
    """(C, D, H, W) of an array of four axes; others as they are.

    Raises:
        DataError: nothing says where the channels are, and the last axis looks more like it than the first.
    """
    if values.ndim != 4 or channels == "first":
        return values
    if channels == "last":
        return np.moveaxis(values, -1, 0)
    first, *_, last = values.shape
    if last < first and 2 * last <= min(values.shape[:3]):
        raise DataError(
            f"array of shape {values.shape} looks like (D, H, W, C) with {last} channels, and shards hold (C, D, H, W)"
            f": add --channels last, or --channels first if it has {first} channels"
        )
    return values


def _whole_labels(labels: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Labels as integers of at most 16 bits.

    Raises:
        DataError: another shape than the volume's, fractions, or numbers that are no classes.
    """
    if labels.shape != shape[-3:]:
        raise DataError(f"labels of shape {labels.shape} do not fit the volume of shape {shape}")
    if labels.dtype.kind not in "fiub" or not (labels == np.round(labels)).all():
        raise DataError(f"labels are {labels.dtype} with fractions; they must be whole numbers, one for each class")
    least, largest = float(labels.min()), float(labels.max())
    if max(-least - 1, largest) > _LARGEST_LABEL:
        raise DataError(f"labels go from {least:g} to {largest:g}; they must be class indices within 16 bits")
    kept = labels.dtype.kind in "iu" and labels.dtype.itemsize <= 2
    return _compact(labels if kept else labels.astype(np.uint8 if least >= 0 and largest < 256 else np.int16))


def _from_nifti(data: bytes) -> VolumeFile:
    try:
        import nibabel
    except ImportError:
        raise DataError("NIfTI volumes need the package nibabel: pip install nibabel") from None
    try:
        image = nibabel.Nifti1Image.from_bytes(_gunzip(data))
        size = int(np.prod(image.shape, dtype=np.int64)) * 8
        if size > _MAX_BYTES:
            raise DataError(f"volume of shape {image.shape} exceeds {_MAX_BYTES} bytes as float64")
        values = np.asanyarray(image.dataobj)  # scaled to floats only where the header asks for it
        steps = image.header.get_zooms()
        ends = np.vstack([np.zeros(3), np.diag(np.array((*image.shape, 1, 1)[:3]) - 1)])  # (4, 3) voxels
        corners = nibabel.affines.apply_affine(image.affine, ends)
    except DataError:
        raise
    except Exception as error:  # nibabel documents no base class for what damaged headers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read NIfTI of {len(data)} bytes: {reason}") from None
    spatial = tuple(float(step) for step in steps[:3])
    return VolumeFile(_compact(values.T), None, spatial[::-1], corners)  # (x, y, z) -> (z, y, x)


def _gunzip(data: bytes) -> bytes:
    """Unpack gzip bytes, not beyond the limit; other bytes come back as they are."""
    if data[:2] != b"\x1f\x8b":
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(data, _MAX_BYTES)
    except zlib.error as error:
        raise DataError(f"cannot unpack gzip of {len(data)} bytes: {error}") from None
    if not unpacker.eof:
        raise DataError(f"gzip of {len(data)} bytes is cut, or unpacks to more than {_MAX_BYTES} bytes")
    return content


def _compact(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Little endian and at most 32 bits wide; integers stay integers when they fit into 16 bits."""
    if values.ndim not in (3, 4) or values.size == 0 or values.dtype.kind not in "fiub":
        raise DataError(f"array of shape {values.shape} and type {values.dtype} is no volume; it must be (D, H, W)")
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    elif values.dtype.newbyteorder("=").name not in _KEPT:
        fits = values.dtype.kind in "iu" and values.min() >= -(1 << 15) and values.max() < 1 << 15
        with np.errstate(over="ignore"):  # what overflows float32 is reported as not finite
            values = values.astype(np.int16 if fits else np.float32)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"{int((~np.isfinite(values)).sum())} of {values.size} voxels are not finite")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
